"""Learning curves, and the paper's measure: communication rounds to a target test accuracy (Section 3).

The paper makes each curve monotone ("the best value of test-set accuracy achieved over all prior rounds") and takes
the point where it crosses the target, by linear interpolation between the evaluations.
"""

import dataclasses
import math
import numbers
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from tff_fedavg import picture
from tff_fedavg.metrics_table import ROUND_FIELD

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Height of the panel for the last per cents, in multiples of the error rate at the target.
_SHOWN_ERRORS = 4


def next_evaluation(after_round: int, rounds_per_evaluation: int) -> int:
    """Returns the next round that is evaluated.

    How often one looks decides when a noisy curve is seen to reach a target, by up to a factor of two: the best of many
    evaluations is higher than that of few.

    Args:
      after_round: The next one after this one is meant.
      rounds_per_evaluation: Rounds between evaluations; 0 for those in which the curves of the paper's Figures 2, 6 and
        7 bend: 1 to 10, every tenth up to 100, then every hundredth.
    """
    step = rounds_per_evaluation or min(10 ** (len(str(after_round)) - 1), 100)
    return after_round - after_round % step + step


@dataclasses.dataclass(frozen=True)
class Target:
    """What is aimed at: a value of a metric on the test set, whose rounds are counted.

    Attributes:
      value: The value at which a run stops; None for none.
      metric: Name of the metric.
      lower_is_better: Whether the metric is to fall, as an error, or to rise.
    """

    value: float | None
    metric: str = "accuracy"
    lower_is_better: bool = False

    def __post_init__(self):
        is_number = isinstance(self.value, numbers.Real) and not isinstance(self.value, bool)
        if self.value is not None and not (is_number and math.isfinite(self.value)):
            raise ValueError(f"the target is {self.value!r}; it must be a number")

    @property
    def field(self) -> str:
        """Name of the metric in metrics.csv."""
        return f"evaluation/{self.metric}"

    def monotone(self, values: Sequence[float]) -> np.ndarray:
        """Returns, for each evaluation, the best value up to it; NaN is none."""
        best = np.fmin if self.lower_is_better else np.fmax
        return best.accumulate(np.asarray(values, float))

    def best(self, values: Iterable[float]) -> float:
        """Returns the best of some values, NaN excepted; NaN if there are none."""
        return (min if self.lower_is_better else max)((v for v in values if not math.isnan(v)), default=math.nan)

    def is_reached(self, value: float | None) -> bool:
        """Whether a value is as good as the target; None is not."""
        if None in (value, self.value):
            return False
        # Metrics are float32, in which 951 of 1,000 is less than 0.951.
        value, target = np.float32(value), np.float32(self.value)
        return bool(value <= target if self.lower_is_better else value >= target)

    def rounds(self, rounds: Sequence[int], values: Sequence[float]) -> float | None:
        """Returns the round, with a fraction, in which the monotone curve reaches the value; None if it does not.

        Args:
          rounds: Rounds of the evaluations, ascending.
          values: The metric in those rounds.
        """
        best = self.monotone(values)
        i = next((i for i, value in enumerate(best) if self.is_reached(value)), None)
        if i is None:
            return None
        if not i or math.isnan(best[i - 1]):
            return float(rounds[i])
        # `np.interp` wants ascending values.
        sign = -1 if self.lower_is_better else 1
        return float(np.interp(sign * self.value, sign * best[i - 1 : i + 1], rounds[i - 1 : i + 1]))


def evaluations(metrics: Sequence[dict[str, float]], metric: str = "accuracy") -> tuple[list[int], list[float]]:
    """Returns the rounds that were evaluated, and a metric of the test set in them."""
    field = Target(None, metric).field
    rows = [row for row in metrics if field in row]
    return [int(row[ROUND_FIELD]) for row in rows], [row[field] for row in rows]


def panels(figure: "Figure", values: Sequence[float], target: Target) -> list["Axes"]:
    """Returns the panels in which curves are to be drawn, all of them in each.

    Args:
      figure: An empty figure.
      values: All values of all curves.
      target: The target, which names the metric.
    """
    known = [value for value in values if not math.isnan(value)]
    near_target = None
    if known and target.metric == "accuracy" and target.value is not None:
        # The first rounds may take up most of the height, when it is the last per cents that count.
        bottom, top = 1 - _SHOWN_ERRORS * (1 - target.value), max(*known, target.value)
        if max(known) > bottom and bottom - min(known) > top - bottom:
            near_target = bottom, top + 0.05 * (top - bottom)
    axes = figure.subplots(1, 2 if near_target else 1, squeeze=False)[0]
    if near_target:
        axes[0].set_title("all rounds", fontsize="medium")
        axes[1].set_title("near the target", fontsize="medium")
        axes[1].set_ylim(near_target)
    for each in axes:
        each.xaxis.get_major_locator().set_params(integer=True)
        each.grid(alpha=0.3)
    axes[0].set(ylabel=f"test {target.metric}")
    return list(axes)


def plot(
    path: str | os.PathLike[str], rounds: Sequence[int], values: Sequence[float], *, target: Target, title: str
) -> None:
    """Draws a metric of the test set over rounds, as measured and monotone; the target is a gray line (as in Figure 2).

    Args:
      path: The PNG file; replaced in one step.
      rounds: As for `Target.rounds`.
      values: As for `Target.rounds`.
      target: The target, which names the metric.
      title: What was run.
    """
    best_color, reached_color, *_ = picture.COLORS
    figure = picture.new_figure()
    for axes in panels(figure, values, target):
        axes.plot(rounds, values, ".", color=best_color, alpha=0.4, label="measured")
        axes.plot(rounds, target.monotone(values), color=best_color, label="best so far")
        if target.value is not None:
            axes.axhline(target.value, color="gray", linewidth=1, label=f"target {target.value:g}")
            crossing = target.rounds(rounds, values)
            if crossing is not None:
                axes.plot(
                    [crossing], [target.value], "o", color=reached_color, label=f"reached in round {crossing:.1f}"
                )
        axes.set(xlabel="communication rounds")
    figure.suptitle(f"Test {target.metric} by round: {title}")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    picture.save(figure, path)
