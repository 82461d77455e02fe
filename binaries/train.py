"""Trains one model of the paper with one algorithm; leaves metrics, states and a learning curve in --run_dir.

    python -m binaries.train --task=mnist_2nn --partition=iid --client_fraction=0.1 --local_epochs=1 --batch_size=10

Started again with the same --run_dir, it goes on where it was.
"""

import math
import os

from absl import flags

from binaries.command_line import data_flags, experiment_flags, program, worker_flags
from binaries.experiment import Experiment
from binaries.experiment.record import SETTINGS
from tff_fedavg.run_directory import RunDirectory

_RUN_DIR = flags.DEFINE_string(
    "run_dir", None, "Where the run is kept, by default runs/TASK. The flags of a run that it holds need not be given."
)

_CONFIG = flags.DEFINE_string(
    "config", None, "config.json of a run, for another run with its flags, but for those that are given."
)

_BEYOND_THE_PAPER = ("client_optimizer", "proximal_strength", "server_optimizer", "aggregator", "matmul_precision")

experiment_flags.define()
flags.adopt_module_key_flags(data_flags)
flags.adopt_module_key_flags(experiment_flags)
flags.adopt_module_key_flags(worker_flags)


def main() -> None:
    experiment, run_dir = _experiment()
    workers = worker_flags.chosen()
    experiment.find_data(data_flags.directories()["data_dir"])
    print(_description(experiment, run_dir), flush=True)
    directory = RunDirectory(run_dir)
    try:
        # Last, since they import TensorFlow.
        from binaries.command_line.progress import ProgressPrinter
        from binaries.experiment import runner

        with ProgressPrinter(run_dir, experiment.rounds) as printer:
            print(runner.run(experiment, directory, **data_flags.directories(), workers=workers, observer=printer))
    except KeyboardInterrupt as e:
        raise KeyboardInterrupt(f"interrupted; the same command goes on where {run_dir} stopped") from e


def _experiment() -> tuple[Experiment, str]:
    """Returns the experiment, and where its run is kept."""
    given = experiment_flags.given()
    if _CONFIG.value is not None:
        given = Experiment.read_json(os.path.expanduser(_CONFIG.value)).change(given).to_json()
    if _RUN_DIR.value is None:
        experiment = Experiment(**given)
        return experiment, f"runs/{experiment.task_name}"
    run_dir = os.path.expanduser(_RUN_DIR.value)
    held = Experiment.read(run_dir)
    return held.go_on(run_dir, given) if held else Experiment(**given), run_dir


def _description(experiment: Experiment, run_dir: str) -> str:
    symbols = {"C": experiment.client_fraction, "E": experiment.local_epochs, "B": experiment.batch_size or math.inf}
    values = ", ".join(f"{symbol} = {value:g}" for symbol, value in symbols.items() if value is not None)
    decay = ""
    if experiment.learning_rate_decay:
        decay = f" x {experiment.learning_rate_decay:g} every {experiment.decay_every} rounds"
    of = ", ".join(part for part in (experiment.task, experiment.data, experiment.partition) if part)
    beyond_the_paper = "".join(
        f", {name} = {value}"
        for name in _BEYOND_THE_PAPER
        if (value := getattr(experiment, name)) != SETTINGS[name].default
    )
    return (
        f"{experiment.algorithm} on {of}, with {values}, eta = {experiment.learning_rate:g}{decay}{beyond_the_paper}, "
        f"in {run_dir} (TensorFlow takes some seconds to start)"
    )


if __name__ == "__main__":
    program.run("train", main)
