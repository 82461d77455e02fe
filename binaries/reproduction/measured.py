"""What the runs of a row of the paper's tables measured."""

import pathlib

from binaries.reproduction import plan, published
from binaries.reproduction.outcome import read_metrics
from binaries.reproduction.plan import Grid, Run
from binaries.reproduction.published import Row
from tff_fedavg import learning_curve


class Measured:
    """What was measured of a row, at its best rate.

    A run that has not been to its last round counts if it has reached the row's target: Table 3 has three for a run.

    Attributes:
      runs: The runs that count.
      run: The best one; None if there is none.
      rounds: Its rounds to the target; None if it did not reach it.
      last_round: Its last round.
      complete: Whether all runs of the grid count.
    """

    def __init__(self, row: Row, grid: Grid, results_dir: pathlib.Path):
        self.runs = []
        self.run = self.rounds = self.last_round = None
        self._best = ()
        done, wanted = grid.progress(results_dir)
        for run in [*done, *wanted]:
            rounds, accuracies = evaluations(run, results_dir) if run.outcome(results_dir) else ([], [])
            reached = learning_curve.Target(row.target).rounds(rounds, accuracies)
            if reached is None and run in wanted:
                continue
            self.runs.append(run)
            rank = (1, -max(accuracies)) if reached is None else (0, reached)
            if self.run is None or rank < self._best:
                self.run, self.rounds, self._best = run, reached, rank
                self.last_round, self._accuracy = rounds[-1], max(accuracies)
        self.complete = len(self.runs) == len(done) + len(wanted)

    def __str__(self) -> str:
        if self.run is None:
            return "not run"
        if self.rounds is None:
            return f"not in {self.last_round} rounds ({self._accuracy:.4f})"
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
