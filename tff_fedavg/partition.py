"""Partitions: which examples each client holds (Section 3 of the paper, "IID" and "Non-IID"; `dirichlet` is later).

Every function returns a list of K int64 arrays, the example indices of each client. Together they are an exact cover
of the data set: each example belongs to exactly one client. The same seed gives the same partition.
"""

import numbers
from collections.abc import Sequence

import numpy as np

Partition = list[np.ndarray]

# The paper ran "unbalanced versions of these datasets" without saying how they were made. Here the sizes are
# log-normal, the spread of examples per client that user-generated data tends to show.
_UNBALANCED_SIGMA = 1.0


def build_partition(
    name: str, labels: np.ndarray, num_clients: int, seed: int, *, dirichlet_alpha: float | None = None
) -> Partition:
    """Makes a partition by its name.

    Args:
      name: Name of a function below: "iid", "pathological", "unbalanced_iid", "unbalanced_pathological", "dirichlet".
      labels: `[n]`, the label of each example.
      num_clients: K.
      seed: Seeds the partition.
      dirichlet_alpha: The alpha of `dirichlet`, which needs it.

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
        case "dirichlet":
            return dirichlet(labels, num_clients, seed, alpha=dirichlet_alpha)
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
    labels = _one_per_example(labels)
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
    labels = _one_per_example(labels)
    _check_counts(len(labels), num_clients, num_shards)
    rng = np.random.default_rng(seed)
    shards = _cut_log_normal(np.argsort(labels, kind="stable"), num_shards, rng)
    return _deal(shards, num_clients, seed)


def dirichlet(labels: np.ndarray, num_clients: int, seed: int, *, alpha: float) -> Partition:
    """Gives each client an equal share of the examples, with labels mixed at random (Hsu, Qi and Brown 2019).

    A client draws its mix of labels q ~ Dir(alpha p), and then its examples one after the other by q, without
    replacement; when a label has run out, by q over the other labels. The share q of a label has the mean p and the
    variance p (1 - p) / (alpha + 1): a large alpha makes the clients alike, and with a small one they have a label or
    two.

    p is the distribution of the labels that are left: for the first client that of all examples. With the same p for
    all, the last clients would be left with whatever labels chance has spared, however large alpha is.

    Args:
      labels: `[n]`, the label of each example.
      num_clients: K.
      seed: Seeds the mixes and the examples.
      alpha: Concentration of the mixes, above 0.

    Raises:
      ValueError: If there are more clients than examples, or alpha is out of range.
    """
    labels = _one_per_example(labels)
    _check_counts(len(labels), num_clients, num_clients)
    if not isinstance(alpha, numbers.Real) or not 0 < alpha < np.inf:
        raise ValueError(f"alpha is {alpha}; it must be a number above 0")
    rng = np.random.default_rng(seed)
    _, label_ids, left = np.unique(labels, return_inverse=True, return_counts=True)
    order = rng.permutation(len(labels))
    pools = np.split(order[np.argsort(label_ids[order], kind="stable")], np.cumsum(left)[:-1])
    clients = []
    for size in map(len, np.array_split(labels, num_clients)):
        log_q = _log_dirichlet(alpha * left / left.sum(), rng)
        taken = np.zeros_like(left)
        # In a draw all at once, what exceeds a label is what would have been drawn anew one by one.
        while missing := size - taken.sum():
            log_available = np.where(taken < left, log_q, -np.inf)
            mix = np.exp(log_available - log_available.max())
            taken = np.minimum(taken + rng.multinomial(missing, mix / mix.sum()), left)
        clients.append(np.concatenate([pool[n - t : n] for pool, n, t in zip(pools, left, taken)]))
        left = left - taken
    return clients


def _log_dirichlet(alphas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns the logarithms of a sample of Dir(alphas), up to a constant.

    Not with NumPy's `dirichlet`, in which small alphas make all shares but the largest 0. It uses that a Gamma(a)
    variable is distributed as Gamma(a + 1) U^(1 / a), with U uniform.
    """
    # A label that has run out has 0.
    alphas = np.maximum(alphas, 1e-300)
    return np.log(rng.gamma(alphas + 1)) - rng.exponential(size=len(alphas)) / alphas


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


def _one_per_example(labels: np.ndarray) -> np.ndarray:
    """Returns labels as `[n]`; they may be `[n, 1]`, as Keras has them."""
    labels = np.asarray(labels)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise ValueError(
            f"labels has the shape {list(labels.shape)}; it must have one for each example: of one-hot labels take "
            "labels.argmax(1)"
        )
    return labels


def _check_counts(num_examples: int, num_clients: int, num_pieces: int) -> None:
    if num_clients < 1:
        raise ValueError(f"the number of clients is {num_clients}; it must be at least 1")
    if num_pieces > num_examples:
        raise ValueError(
            f"{num_clients} clients need {num_pieces} pieces of data, but there are {num_examples} examples"
        )
