"""What the runs of a row of the paper's tables measured."""

import dataclasses
import pathlib

from binaries.reproduction import plan, published
from binaries.reproduction.outcome import read_metrics
from binaries.reproduction.plan import Grid, Run
from binaries.reproduction.published import Row
from tff_fedavg import learning_curve


class Measured:
    """What was measured of a row, at its best rate.

    Attributes:
      runs: The finished runs.
      run: The best one; None if there is none.
      rounds: Its rounds to the target; None if it did not reach it.
      last_round: Its last round; without a finished run, that of the longest which was stopped without the target; None
        if nothing was run.
      complete: Whether the grid has been run to its end.
    """

    def __init__(self, row: Row, grid: Grid, results_dir: pathlib.Path):
        # Of the row's target: Table 3 has three for a run, which goes on to the highest.
        self.runs, wanted = dataclasses.replace(grid, target=row.target).progress(results_dir)
        self.complete = not wanted
        self.run = self.rounds = self.last_round = None
        self._best = ()
        target = learning_curve.Target(row.target)
        for run in self.runs:
            rounds, accuracies = evaluations(run, results_dir)
            if not rounds:
                continue  # Damaged since it ended, which is told.
            reached = target.rounds(rounds, accuracies)
            rank = grid.rank({**run.outcome(results_dir), "rounds_to_target": reached}, run.learning_rate)
            if self.run is None or rank < self._best:
                self.run, self.rounds, self._best = run, reached, rank
                self.last_round, self._accuracy = rounds[-1], max(accuracies)
        if self.run is None:
            for run in wanted:
                rounds, accuracies = evaluations(run, results_dir)
                # One that is still under way, or was killed, may have reached this target of several.
                if rounds and rounds[-1] > (self.last_round or 0) and not target.is_reached(max(accuracies)):
                    self.last_round, self._accuracy = rounds[-1], max(accuracies)

    def __str__(self) -> str:
        if self.last_round is None:
            return "not run"
        if self.rounds is None:
            stopped = "stopped: " if self.run is None else ""
            return f"{stopped}not in {self.last_round} rounds ({self._accuracy:.4f})"
        return f"{self.rounds:.1f}"


def tables(results_dir: pathlib.Path, shrunk: bool = False) -> dict[Row, Measured]:
    """Returns what was measured of all rows of Tables 1 to 4.

    Args:
      results_dir: The directory of the results, with the runs in runs/.
      shrunk: Whether the runs are the shrunk ones.
    """
    grids = {grid.cell: grid for number in (1, 2, 3, 4) for grid in plan.table(number, shrunk)}
    return {row: Measured(row, grids[row.cell], results_dir) for row in published.rows() if row.cell in grids}


def evaluations(run: Run, results_dir: pathlib.Path, metric: str = "accuracy") -> tuple[list[int], list[float]]:
    """Returns the rounds in which a run was evaluated so far, and a metric of the test set in them."""
    return learning_curve.evaluations(read_metrics(run.directory(results_dir)), metric)
