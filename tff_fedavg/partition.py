"""Partitions: which examples each client holds (Section 3 of the paper, "IID" and "Non-IID").

Every function returns a list of K int64 arrays, the example indices of each client. Together they are an exact cover
of the data set: each example belongs to exactly one client. The same seed gives the same partition.
"""

from collections.abc import Sequence

import numpy as np

Partition = list[np.ndarray]

# The paper ran "unbalanced versions of these datasets" without saying how they were made. Here the sizes are
# log-normal, the spread of examples per client that user-generated data tends to show.
_UNBALANCED_SIGMA = 1.0


def build_partition(name: str, labels: np.ndarray, num_clients: int, seed: int) -> Partition:
    """Makes a partition by its name: "iid", "pathological", "unbalanced_iid" or "unbalanced_pathological".

    Args:
      name: Name of a function below.
      labels: `[n]`, the label of each example.
      num_clients: K.
      seed: Seeds the partition.

    Raises:
      ValueError: If there is no such partition, or it has fewer examples than it needs.
    """
    match name:
        case "iid":
            return iid(len(labels), num_clients, seed)
        case "pathological":
            return pathological(labels, num_clients, seed)
        case "unbalanced_iid":
            return unbalanced_iid(len(labels), num_clients, seed)
        case "unbalanced_pathological":
            return unbalanced_pathological(labels, num_clients, seed)
    raise ValueError(f"there is no partition {name!r}")


def iid(num_examples: int, num_clients: int, seed: int) -> Partition:
    """Shuffles the examples and gives each client an equal share (for MNIST, 600 to each of 100)."""
    _check_counts(num_examples, num_clients, num_clients)
    return np.array_split(np.random.default_rng(seed).permutation(num_examples), num_clients)


def pathological(labels: np.ndarray, num_clients: int, seed: int, *, shards_per_client: int = 2) -> Partition:
    """Sorts the examples by label, cuts them into equal shards, and gives each client some shards at random.

    With the paper's 2 shards per client (for MNIST 200 shards of 300) most clients have examples of two labels only.
    Where the examples cannot be divided equally, some shards have one more than others.

    Args:
      labels: `[n]`, the label of each example.
      num_clients: K.
      seed: Decides which client gets which shards.
      shards_per_client: Number of shards that each client gets.

    Raises:
      ValueError: If there are more shards than examples.
    """
    num_shards = num_clients * shards_per_client
    _check_counts(len(labels), num_clients, num_shards)
    shards = np.array_split(np.argsort(labels, kind="stable"), num_shards)
    return _deal(shards, num_clients, seed)


def unbalanced_iid(num_examples: int, num_clients: int, seed: int) -> Partition:
    """Shuffles the examples and gives each client a share of log-normal size (at least 1 example)."""
    _check_counts(num_examples, num_clients, num_clients)
    rng = np.random.default_rng(seed)
    return _cut_log_normal(rng.permutation(num_examples), num_clients, rng)


def unbalanced_pathological(
    labels: np.ndarray, num_clients: int, seed: int, *, shards_per_client: int = 2
) -> Partition:
    """As `pathological`, with shards of log-normal size (at least 1 example)."""
    num_shards = num_clients * shards_per_client
    _check_counts(len(labels), num_clients, num_shards)
    rng = np.random.default_rng(seed)
    shards = _cut_log_normal(np.argsort(labels, kind="stable"), num_shards, rng)
    return _deal(shards, num_clients, seed)


def natural(owners: np.ndarray) -> Partition:
    """Makes one client of each distinct value of `owners` (`[n]`: the writer, role or author of each example)."""
    order = np.argsort(owners, kind="stable")
    _, starts = np.unique(owners[order], return_index=True)
    return np.split(order, starts[1:])


def _deal(shards: Sequence[np.ndarray], num_clients: int, seed: int) -> Partition:
    hands = np.random.default_rng(seed).permutation(len(shards)).reshape(num_clients, -1)
    return [np.concatenate([shards[s] for s in hand]) for hand in hands]


def _cut_log_normal(order: np.ndarray, num_pieces: int, rng: np.random.Generator) -> Partition:
    weights = rng.lognormal(sigma=_UNBALANCED_SIGMA, size=num_pieces)
    # Each piece has one example for certain; the weights divide the others.
    others = np.round(np.cumsum(weights) / np.sum(weights) * (len(order) - num_pieces)).astype(np.int64)
    return np.split(order, (others + np.arange(1, num_pieces + 1))[:-1])


def _check_counts(num_examples: int, num_clients: int, num_pieces: int) -> None:
    if num_clients < 1:
        raise ValueError(f"the number of clients is {num_clients}; it must be at least 1")
    if num_pieces > num_examples:
        raise ValueError(
            f"{num_clients} clients need {num_pieces} pieces of data, but there are {num_examples} examples"
        )
