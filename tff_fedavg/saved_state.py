"""The saved states of a run: `states/round_40.npz` has the state after round 40, in NumPy's format.

Its arrays are named by their place in the state, such as "global_model_weights/trainable/0"; three others say which run
it is of, and which round, and what metrics.csv was then. It is read as values, and without the process that made it: so
neither the clients' data nor TFF's worker is needed for the weights.

Not written by TFF's `FileProgramStateManager`: reading its SavedModels runs what is in them, they do not say what they
are of, and each that was saved stays in the memory of the program.
"""

import io
import os
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from tff_fedavg.regular_file import open_regular
from tff_fedavg.replacement import replacement

if TYPE_CHECKING:
    import tensorflow_federated as tff

_RUN, _ROUND, _METRICS = "run", "round", "metrics"
_WEIGHTS = "global_model_weights"
_NEWEST = 3  # States that are kept.


class DamagedStateError(ValueError):
    """A state is not what was written in this round of this run: there is nothing to be had from it."""


def saved_rounds(run_dir: str | os.PathLike[str]) -> list[int]:
    """Returns the rounds whose states are saved, ascending."""
    names = (path.stem.removeprefix("round_") for path in _states(run_dir).glob("round_*.npz"))
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


def path_of(run_dir: str | os.PathLike[str], round_number: int) -> pathlib.Path:
    """Returns the file of a state."""
    return _states(run_dir) / f"round_{round_number}.npz"


def save_state(
    run_dir: str | os.PathLike[str], round_number: int, state: Any, *, run: str, metrics: bytes | bytearray
) -> None:
    """Saves the state after a round, and removes all but the newest three.

    Args:
      run_dir: The directory of the run.
      round_number: The round.
      state: A structure of arrays and numbers.
      run: What tells the run from others.
      metrics: The content of metrics.csv.

    Raises:
      OSError: If the file cannot be written.
    """
    arrays = {
        **_by_place(state),
        _RUN: np.array(run),
        _ROUND: np.array(round_number),
        _METRICS: np.frombuffer(bytes(metrics), np.uint8),
    }
    path = path_of(run_dir, round_number)
    path.parent.mkdir(exist_ok=True)
    content = io.BytesIO()  # NumPy leaves a file half open where the disk is full.
    np.savez(content, **arrays)
    with replacement(path) as temporary:
        temporary.write_bytes(content.getbuffer())
    for old in saved_rounds(run_dir)[:-_NEWEST]:
        path_of(run_dir, old).unlink()


def remove_unfinished(run_dir: str | os.PathLike[str]) -> None:
    """Removes what is left of states whose saving did not come to its end."""
    for path in _states(run_dir).glob("round_*.npz.tmp"):
        path.unlink()


def load_state(run_dir: str | os.PathLike[str], round_number: int, structure: Any, *, run: str) -> tuple[Any, bytes]:
    """Returns the state after a round, and the content of metrics.csv then.

    Args:
      run_dir: The directory of the run.
      round_number: The round.
      structure: A state of the same structure, shapes and dtypes.
      run: As for `save_state`.

    Raises:
      DamagedStateError: If the state is damaged, or is not that of this round and run.
      ValueError: If it has another structure, or cannot be read.
    """
    import tree

    path = path_of(run_dir, round_number)
    arrays = _read(path, round_number, run)
    metrics = arrays.pop(_METRICS).tobytes()
    expected = _by_place(structure)
    for name in expected.keys() | arrays.keys():
        specs = [(a[name].shape, a[name].dtype) if name in a else None for a in (arrays, expected)]
        if specs[0] != specs[1]:
            raise ValueError(
                f"{path} is the state of another model or algorithm, which differs in {name}: give another run_dir for "
                "this one"
            )
    return tree.map_structure_with_path(lambda place, _: arrays[_name(place)][()], structure), metrics


def load_weights(run_dir: str | os.PathLike[str], round_number: int, *, run: str) -> "tff.learning.models.ModelWeights":
    """Returns the model weights w_t of a saved round t, as arrays.

    Raises:
      ValueError: As `load_state`.
    """
    import tensorflow_federated as tff

    try:
        arrays = _read(path_of(run_dir, round_number), round_number, run)
    except ValueError as e:
        others = [other for other in saved_rounds(run_dir) if other != round_number]
        raise ValueError(f"{e}; the other saved rounds are {others}" if others else str(e)) from e

    def weights(part: str) -> tuple[np.ndarray, ...]:
        names = (name for name in arrays if name.startswith(f"{_WEIGHTS}/{part}/"))
        return tuple(arrays[name] for name in sorted(names, key=lambda name: int(name.rpartition("/")[2])))

    return tff.learning.models.ModelWeights(weights("trainable"), weights("non_trainable"))


def load_metrics(run_dir: str | os.PathLike[str], round_number: int, *, run: str) -> bytes:
    """Returns the content of metrics.csv when the state after a round was saved.

    Raises:
      ValueError: As `load_state`.
    """
    return _read(path_of(run_dir, round_number), round_number, run)[_METRICS].tobytes()


def _states(run_dir: str | os.PathLike[str]) -> pathlib.Path:
    return pathlib.Path(run_dir) / "states"


def _read(path: pathlib.Path, round_number: int, run: str) -> dict[str, np.ndarray]:
    """Returns the arrays of a state, by name."""
    try:
        with open_regular(path) as file:
            content = io.BytesIO(file.read())
        with np.load(content, allow_pickle=False) as archive:
            arrays = {name: _with_dtype(archive[name]) for name in archive.files}
        found = str(arrays.pop(_RUN)), int(arrays.pop(_ROUND))
        arrays[_METRICS].tobytes()
    except MemoryError:
        raise
    except Exception as e:  # NumPy and zipfile raise many kinds of errors for the many ways in which it can be damaged.
        if isinstance(e, OSError) and e.errno:  # Which says nothing of what is in it.
            raise ValueError(f"{path} cannot be read: {e.strerror}") from e
        raise DamagedStateError(f"{path} is damaged ({e})".replace("\n", " ")) from e
    if found != (run, round_number):
        raise DamagedStateError(f"{path} is the state of {'another run' if found[0] != run else f'round {found[1]}'}")
    return arrays


def _with_dtype(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind != "V":
        return array
    import tensorflow as tf

    return array.view(tf.bfloat16.as_numpy_dtype)  # Of which NumPy's format keeps only the size.


def _by_place(state: Any) -> Mapping[str, np.ndarray]:
    import tree

    return {_name(place): np.asarray(leaf) for place, leaf in tree.flatten_with_path(state)}


def _name(place: tuple[Any, ...]) -> str:
    return "/".join(map(str, place))
