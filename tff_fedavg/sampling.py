"""Sampling of the clients that take part in a round (Algorithm 1: m <- max(C K, 1); S_t <- random set of m clients)."""

import numbers
import operator
from collections.abc import Callable

import numpy as np
import tensorflow_federated as tff

from tff_fedavg.integer import as_integer


def num_sampled_clients(num_clients: int, client_fraction: float) -> int:
    """Returns m = max(C K, 1), rounded down. C = 0 means one client per round.

    Raises:
      TypeError: If C is no number.
      ValueError: If C is not in [0, 1].
    """
    if not isinstance(client_fraction, numbers.Real):
        raise TypeError(f"client_fraction (C) is {client_fraction!r}; it must be a number")
    if not 0 <= client_fraction <= 1:
        raise ValueError(f"client_fraction (C) is {client_fraction}; it must be in [0, 1]")
    if isinstance(client_fraction, np.floating):
        client_fraction = float(str(client_fraction))  # As it is written: in float32 0.29 is a little less.
    # Without the small term 0.29 * 100 would round down to 28.
    return max(int(client_fraction * num_clients + 1e-9), 1)


def build_sampling_fn(num_clients: int, client_fraction: float, seed: int) -> Callable[[int], list[int]]:
    """Returns a function from the round t to S_t, the ids of m distinct clients in [0, K).

    S_t depends on the seed and on t alone, so a run that resumes at round t goes on with the same clients.

    Raises:
      TypeError: If the seed is no integer, or C no number.
      ValueError: If C is not in [0, 1], or the seed not in [0, 2^32).
    """
    # TFF takes no notice of a seed that is not of Python's own type.
    seed = as_integer("seed", seed, 0, 2**32 - 1)
    sample = tff.simulation.build_uniform_sampling_fn(range(num_clients), replace=False, random_seed=seed)
    num_sampled = num_sampled_clients(num_clients, client_fraction)
    return lambda round_number: sample(operator.index(round_number), num_sampled)
