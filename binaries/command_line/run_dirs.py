"""What a program is given as the directory of a run."""

import pathlib

from binaries.experiment import Experiment


def read_experiment(run_dir: pathlib.Path) -> Experiment:
    """Returns the experiment of a run.

    Raises:
      ValueError: If the directory holds none.
    """
    experiment = Experiment.read(run_dir)
    if experiment is None:
        raise ValueError(f"run_dir={run_dir} holds no run: it has no config.json")
    return experiment
