"""How a metric is distributed over the clients: in numbers, and as a picture."""

import dataclasses
import os
from collections.abc import Mapping, Sequence

import numpy as np

from tff_fedavg import picture
from tff_fedavg.learning_curve import Target

_BINS = 30
_WORST = 0.1


@dataclasses.dataclass(frozen=True)
class Summary:
    """A metric of the clients in numbers.

    Attributes:
      mean: Every client counts the same.
      weighted_mean: A client counts by its examples, as in FedAvg's average.
      median: Of the clients.
      worst: The mean of the worst tenth of the clients, rounded up.
    """

    mean: float
    weighted_mean: float
    median: float
    worst: float

    def __str__(self) -> str:
        return (
            f"mean {self.mean:.4f}, weighted by examples {self.weighted_mean:.4f}, median {self.median:.4f}, "
            f"worst {_WORST:.0%} {self.worst:.4f}"
        )


def summarize(values: Sequence[float], num_examples: Sequence[int], *, lower_is_better: bool) -> Summary:
    """Returns the numbers of a metric.

    Args:
      values: The metric of each client.
      num_examples: The number of examples that it was measured on.
      lower_is_better: Whether the largest values are the worst, as of a loss.
    """
    best_last = sorted(values, reverse=lower_is_better)
    return Summary(
        mean=float(np.mean(values)),
        weighted_mean=float(np.average(values, weights=num_examples)),
        median=float(np.median(values)),
        worst=float(np.mean(best_last[: int(np.ceil(_WORST * len(values)))])),
    )


def plot(
    path: str | os.PathLike[str],
    values: Mapping[str, Sequence[float]],
    *,
    target: Target,
    title: str,
) -> None:
    """Draws histograms over the clients, each with its mean as a line.

    Args:
      path: The PNG file; replaced in one step.
      values: The metric of each client, by what is said of it in the legend: once or twice.
      target: Names the metric.
      title: Title of the picture.
    """
    figure = picture.new_figure()
    axes = figure.add_subplot()
    edges = np.histogram_bin_edges(np.concatenate(list(values.values())), _BINS)
    for (label, each), color in zip(values.items(), picture.COLORS):
        axes.hist(each, edges, color=color, alpha=0.5, label=label)
        axes.axvline(np.mean(each), color=color, label=f"mean {np.mean(each):.4f}")
    axes.set(xlabel=f"{target.metric} of a client", ylabel="clients", title=title)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2 * len(values))
    picture.save(figure, path)
