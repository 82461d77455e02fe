"""The flags that say which saved model is meant: of which run, and of which round."""

import os
import pathlib
import sys
from typing import TYPE_CHECKING

from absl import flags

from binaries.command_line import data_flags, run_dirs
from binaries.command_line.number import integer
from binaries.experiment import Experiment
from tasks import own
from tff_fedavg import run_directory, saved_state

if TYPE_CHECKING:
    from tensorflow_federated.learning.models import FunctionalModel, ModelWeights

    from tasks.task import Task

_RUN_DIR = flags.DEFINE_string("run_dir", None, "The directory of the run, as binaries.train leaves it.")
_ROUND = flags.DEFINE(integer(0, 2**31 - 1), "round", None, "The round; by default the newest whose state is saved.")

flags.adopt_module_key_flags(data_flags)


def chosen() -> tuple[pathlib.Path, Experiment, int]:
    """Returns the directory, the experiment and the round that are meant, without TensorFlow.

    Raises:
      ValueError: If there is no such run, no saved state of the round, or the data of the run are missing.
    """
    if _RUN_DIR.value is None:
        raise ValueError("--run_dir is missing: give the directory of a run")
    run_dir = pathlib.Path(os.path.expanduser(_RUN_DIR.value))
    experiment = run_dirs.read_experiment(run_dir)
    round_number = saved_state.choose_round(run_dir, _ROUND.value)
    experiment.find_data(data_flags.directories()["data_dir"])
    return run_dir, experiment, round_number


def load_weights(run_dir: pathlib.Path, round_number: int) -> "ModelWeights":
    """Returns the model weights of a saved round.

    Raises:
      ValueError: If its state is damaged, or of another run.
    """
    return saved_state.load_weights(run_dir, round_number, run=run_directory.read_config(run_dir)["run"])


def check_weights(weights: "ModelWeights", model: "FunctionalModel") -> None:
    """Raises a `ValueError` if weights are of another model, as after a change of a task of one's own."""
    from tff_fedavg.export import check_shapes

    for part, initial in zip(("trainable", "non_trainable"), model.initial_weights):
        check_shapes(f"the {part} weights of the run", getattr(weights, part), initial)


def build_task(run_dir: pathlib.Path, experiment: Experiment) -> "Task":
    """Builds the task of a run; says so if its file has changed since.

    Raises:
      ValueError: If its data are bad, or not those of the run.
    """
    task = experiment.build_task(**data_flags.directories())
    run_directory.check_data(run_dir, task.checksums)
    if run_directory.task_has_changed(run_dir, own.checksum(experiment.task)):
        print(
            f"{experiment.task} has changed since the run in {run_dir}: its task is what is in it now", file=sys.stderr
        )
    return task
