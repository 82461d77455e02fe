"""Learning curves, and the paper's measure: communication rounds to a target test accuracy (Section 3).

The paper makes each curve monotone ("the best value of test-set accuracy achieved over all prior rounds") and takes
the point where it crosses the target, by linear interpolation between the evaluations.
"""

import csv
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from tff_fedavg.replacement import replacement

ROUND_FIELD = "round_num"
ACCURACY_FIELD = "evaluation/accuracy"

# Height of a picture, in multiples of the error rate at the target.
_SHOWN_ERRORS = 4


def monotone(accuracies: Sequence[float]) -> np.ndarray:
    """Returns, for each evaluation, the best accuracy up to it."""
    return np.maximum.accumulate(np.asarray(accuracies, float))


def rounds_to_target(rounds: Sequence[int], accuracies: Sequence[float], target: float) -> float | None:
    """Returns the round, with a fraction, in which the monotone curve reaches the target; None if it does not.

    Args:
      rounds: Rounds of the evaluations, ascending.
      accuracies: Test accuracies in those rounds.
      target: The target accuracy.
    """
    best = monotone(accuracies)
    reached = np.flatnonzero(best >= target)
    if not reached.size:
        return None
    i = reached[0]
    if i == 0:
        return float(rounds[0])
    return float(np.interp(target, best[i - 1 : i + 1], rounds[i - 1 : i + 1]))


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """Reads the rows of a run's metrics.csv, without the cells that are empty. Without a file there are none."""
    path = pathlib.Path(path)
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def evaluations(metrics: Sequence[dict[str, float]]) -> tuple[list[int], list[float]]:
    """Returns the rounds that were evaluated, and the accuracies in them."""
    rows = [row for row in metrics if ACCURACY_FIELD in row]
    return [int(row[ROUND_FIELD]) for row in rows], [row[ACCURACY_FIELD] for row in rows]


def plot(
    path: str | os.PathLike[str], rounds: Sequence[int], accuracies: Sequence[float], *, target: float, title: str
):
    """Draws test accuracy over rounds, as measured and monotone, with the target as a gray line (as in Figure 2).

    Args:
      path: The PNG file; replaced in one step.
      rounds: As for `rounds_to_target`.
      accuracies: As for `rounds_to_target`.
      target: As for `rounds_to_target`.
      title: Title of the picture.
    """
    import matplotlib.figure  # Takes a second to import, and only the end of a run needs it.

    figure = matplotlib.figure.Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(rounds, accuracies, ".", color="tab:blue", alpha=0.4, label="measured")
    axes.plot(rounds, monotone(accuracies), color="tab:blue", label="best so far")
    axes.axhline(target, color="gray", linewidth=1, label=f"target {target:g}")
    crossing = rounds_to_target(rounds, accuracies, target)
    if crossing is not None:
        axes.plot([crossing], [target], "o", color="tab:red", label=f"reached in round {crossing:.1f}")
    # The first rounds would take up the whole height, when it is the last per cents that count.
    bottom = 1 - _SHOWN_ERRORS * (1 - target)
    if max(accuracies, default=0) > bottom > min(accuracies, default=0):
        top = max(*accuracies, target)
        axes.set_ylim(bottom, top + 0.05 * (top - bottom))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="communication rounds", ylabel="test accuracy", title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    with replacement(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
