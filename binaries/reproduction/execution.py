"""One run of the plan, in a process of the pool: trains, gives a rate up that cannot win, and leaves outcome.json."""

import pathlib
import sys
from collections.abc import Callable

from binaries.experiment.observer import Observer
from binaries.experiment.workers import Workers
from binaries.reproduction.outcome import read_outcome, write_outcome
from binaries.reproduction.plan import Run
from tff_fedavg import learning_curve, run_directory
from tff_fedavg.metrics_table import ROUND_FIELD


class _GivenUpError(Exception):
    """Another rate of the grid is better."""


def execute(
    run: Run,
    results_dir: pathlib.Path,
    say: Callable[[str], None],
    *,
    data_dir: str,
    cache_dir: str,
    workers: Workers | None = None,
) -> str:
    """Runs what is missing of a run.

    Args:
      run: The run.
      results_dir: Where the results are.
      say: Takes a line of progress.
      data_dir: As the flag of `binaries.command_line.data_flags`.
      cache_dir: As that flag.
      workers: As for `binaries.experiment.runner.run`.

    Returns:
      What came of it, in a line.

    Raises:
      ValueError: If the data are bad, or the run directory holds another run.
      OSError: If a file cannot be written.
    """
    from binaries.experiment import runner  # Imports TensorFlow.
    from tff_fedavg import training

    directory = run.directory(results_dir)
    observer = _Observer(run, directory, say)
    ended = None
    try:
        directories = {"data_dir": data_dir, "cache_dir": cache_dir}
        runner.run(run.experiment, directory, **directories, workers=workers, observer=observer)
    except training.DivergedError:
        ended = "diverged"
    except _GivenUpError:
        ended = "slower"
    outcome = _outcome(run, directory, ended)
    write_outcome(directory, outcome, run_directory.METRICS_CSV)
    reached = outcome["rounds_to_target"]
    return (
        f"{outcome['rounds']} rounds, best accuracy {outcome['best_accuracy']:.4f}"
        + (f", {run.grid.target:g} reached in {reached:.1f}" if reached is not None else "")
        + f", {outcome['training_seconds']:.0f} s of training, ended: {outcome['ended']}"
    )


class _Observer(Observer):
    """Says how the run goes, and ends it when another rate of the grid has won."""

    def __init__(self, run: Run, directory: pathlib.Path, say: Callable[[str], None]):
        self._run = run
        self._directory = directory
        self._say = say

    def start(self, round_number: int) -> None:
        self._say(f"going on after round {round_number}" if round_number else "evaluating the initial model")

    def update(self, progress) -> None:
        best = progress.best
        self._say(f"round {progress.round_number}/{self._run.grid.rounds}, best accuracy {best:.4f}")
        if self._run.grid.extends and progress.target.field in progress.metrics:
            is_reached = learning_curve.Target(self._run.grid.target).is_reached(best)
            if not is_reached and progress.round_number >= self._fewest_rounds():
                raise _GivenUpError

    def warn(self, message: str) -> None:
        print(message, file=sys.stderr)

    def _fewest_rounds(self) -> float:
        """Returns the rounds to the target of the best other rate so far; infinity if there is none."""
        others = (read_outcome(path) for path in self._directory.parent.glob("eta*") if path != self._directory)
        return min((o["rounds_to_target"] for o in others if o and o["rounds_to_target"]), default=float("inf"))


def _outcome(run: Run, directory: pathlib.Path, ended: str | None) -> dict:
    metrics = run_directory.read_metrics(directory)
    rounds, accuracies = learning_curve.evaluations(metrics)
    reached = None
    if run.grid.target is not None:
        reached = learning_curve.Target(run.grid.target).rounds(rounds, accuracies)
    return {
        "ended": ended or ("cap" if reached is None else "target"),
        "rounds": int(metrics[-1][ROUND_FIELD]),
        "rounds_to_target": reached,
        "best_accuracy": max(accuracies),
        "training_seconds": round(sum(row.get("training_time_in_seconds", 0.0) for row in metrics), 1),
    }
