"""The weights in the saved states of a run.

A state is a SavedModel, as `tff.program.FileProgramStateManager` writes it. Its weights are read without the process
that made it, so neither the clients' data nor TFF's worker is needed, and it does not matter how they were aggregated.
"""

import os
import pathlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tensorflow_federated as tff

_PREFIX = "program_state_"


def saved_rounds(run_dir: str | os.PathLike[str]) -> list[int]:
    """Returns the rounds whose states are saved, ascending."""
    names = (path.name.removeprefix(_PREFIX) for path in _states(run_dir).glob(f"{_PREFIX}*"))
    return sorted(int(name) for name in names if name.isdecimal())


def choose_round(run_dir: str | os.PathLike[str], round_number: int | None = None) -> int:
    """Returns the newest saved round, or the given one if it is saved.

    Raises:
      ValueError: If it is not, or none is.
    """
    rounds = saved_rounds(run_dir)
    if not rounds:
        raise ValueError(f"run_dir={run_dir} has no saved state")
    if round_number not in (None, *rounds):
        raise ValueError(f"run_dir={run_dir} has no state of round {round_number}: take one of {rounds}")
    return rounds[-1] if round_number is None else round_number


def load_weights(run_dir: str | os.PathLike[str], round_number: int) -> "tff.learning.models.ModelWeights":
    """Returns the model weights w_t of a saved round t, as arrays.

    Raises:
      ValueError: If the state is damaged.
    """
    import tensorflow as tf
    import tensorflow_federated as tff

    path = _states(run_dir) / f"{_PREFIX}{round_number}"
    try:
        weights = tf.saved_model.load(str(path))().global_model_weights
        weights = tf.nest.map_structure(lambda w: w.numpy(), weights)
    except Exception as e:  # TF raises many kinds of errors for the many ways in which a SavedModel can be damaged.
        raise ValueError(f"{path} is damaged: take another of the rounds {saved_rounds(run_dir)}") from e
    return tff.learning.models.ModelWeights(weights.trainable, weights.non_trainable)


def _states(run_dir):
    return pathlib.Path(run_dir) / "states"
