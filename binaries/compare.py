"""Compares runs: their learning curves in one picture, and in one table what they differ in and what came of it.

    python -m binaries.compare runs/a runs/b --x=megabytes

Prints the table, and leaves it in --output_dir as comparison.md beside comparison.png. It does not need TensorFlow.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from absl import flags

from binaries.command_line import program, run_dirs
from binaries.command_line.output_dir import make_output_dir
from binaries.experiment import Experiment
from binaries.experiment.record import SETTINGS
from tff_fedavg import learning_curve, picture, run_directory
from tff_fedavg.learning_curve import Target
from tff_fedavg.metrics_table import ROUND_FIELD
from tff_fedavg.replacement import replacement

_ROUNDS, _SECONDS, _MEGABYTES = "rounds", "seconds", "megabytes"
_AXES = {
    _ROUNDS: "communication rounds",
    _SECONDS: "seconds of training",
    _MEGABYTES: "megabytes that clients sent up",
}
_X = flags.DEFINE_enum("x", _ROUNDS, list(_AXES), "What the curves are drawn over.")
_OUTPUT_DIR = flags.DEFINE_string("output_dir", "comparison", "Where the picture and the table go.")

_MOST_RUNS = len(picture.STYLES)


@dataclasses.dataclass(frozen=True)
class _Run:
    """A run, as its files tell it.

    Attributes:
      name: What tells its directory from the others.
      experiment: The experiment.
      target: What it aimed at.
      metrics: The rows of metrics.csv.
    """

    name: str
    experiment: Experiment
    target: Target
    metrics: list[dict[str, float]]

    def x(self, unit: str) -> np.ndarray | None:
        """Returns, for each row, the rounds, seconds or megabytes up to it; None if the run has not counted them."""
        if unit == _ROUNDS:
            return np.array([row[ROUND_FIELD] for row in self.metrics])
        field, scale = {_SECONDS: ("training_time_in_seconds", 1), _MEGABYTES: ("bytes_up", 1e-6)}[unit]
        if not any(field in row for row in self.metrics):
            return None
        return scale * np.cumsum([row.get(field, 0.0) for row in self.metrics])

    def curve(self, unit: str, target: Target) -> tuple[np.ndarray, np.ndarray]:
        """Returns x and the target's metric, for each evaluation."""
        is_evaluated = [target.field in row for row in self.metrics]
        values = np.array([row[target.field] for row in self.metrics if target.field in row])
        return self.x(unit)[is_evaluated], values


def main(arguments: Sequence[str]) -> None:
    runs = _read([pathlib.Path(os.path.expanduser(argument)).absolute() for argument in arguments])
    for run in runs:
        if run.x(_X.value) is None:
            raise ValueError(f"--x={_X.value}: {run.name} has not counted them; take --x=rounds")
    target = _target(runs)
    output_dir = make_output_dir(_OUTPUT_DIR.value)
    table = _table(runs, target)
    print(table)
    _plot(output_dir / "comparison.png", runs, target, _X.value)
    with replacement(output_dir / "comparison.md") as temporary:
        temporary.write_text(f"![{target.metric} over {_AXES[_X.value]}](comparison.png)\n\n{table}\n", "utf-8")
    print(f"see {output_dir}/comparison.png and {output_dir}/comparison.md")


def _read(paths: Sequence[pathlib.Path]) -> list[_Run]:
    if len(paths) > _MOST_RUNS:
        raise ValueError(f"{len(paths)} runs are given: take {_MOST_RUNS} at most, whose lines can be told apart")
    common = os.path.commonpath([path.parent for path in paths])
    runs = []
    for path in paths:
        experiment = run_dirs.read_experiment(path)
        metrics = run_directory.read_metrics(path)
        if not metrics:
            raise ValueError(f"run_dir={path} has no metrics yet")
        # Runs of the first version have not kept their target: it was an accuracy.
        target = run_directory.read_config(path)["target"] or {"value": experiment.target_accuracy}
        if experiment.target_accuracy == 1:  # Which is for none; earlier versions kept it as a value.
            target = {**target, "value": None}
        runs.append(_Run(str(path.relative_to(common)), experiment, Target(**target), metrics))
    return runs


def _target(runs: Sequence[_Run]) -> Target:
    """Returns what the runs are compared by: what all aimed at, or else the loss.

    Where their values differ, or are none, the value is the best that all of them have reached.
    """
    metrics = {dataclasses.replace(run.target, value=None) for run in runs}
    target = metrics.pop() if len(metrics) == 1 else Target(None, "loss", lower_is_better=True)
    values = {run.target.value for run in runs}
    if not metrics and len(values) == 1 and values != {None}:
        return dataclasses.replace(target, value=values.pop())
    best = [target.best(run.curve(_ROUNDS, target)[1]) for run in runs]
    for run, value in zip(runs, best):
        if math.isnan(value):
            raise ValueError(f"{run.name} has no {target.metric} that is a number: leave it out")
    return dataclasses.replace(target, value=(max if target.lower_is_better else min)(best))


def _differences(runs: Sequence[_Run]) -> dict[str, list[str]]:
    """Returns the values of the settings that are not the same in all runs, by name; without those for when to stop."""
    settings = [run.experiment.to_json() for run in runs]
    return {
        name: ["" if each[name] is None else str(each[name]) for each in settings]
        for name in settings[0]
        if not SETTINGS[name].may_differ and any(each[name] != settings[0][name] for each in settings)
    }


def _table(runs: Sequence[_Run], target: Target) -> str:
    differences = _differences(runs)
    header = [
        "run",
        *differences,
        "last round",
        f"rounds to {target.metric} {target.value:.4g}",
        "MB up",
        "s of training",
    ]
    rows = []
    for i, run in enumerate(runs):
        rounds, values = run.curve(_ROUNDS, target)
        reached = target.rounds(rounds, values)
        sums = [run.x(unit) for unit in (_MEGABYTES, _SECONDS)]
        rows.append(
            [
                run.name,
                *(values[i] for values in differences.values()),
                f"{run.x(_ROUNDS)[-1]:g}",
                "not reached" if reached is None else f"{reached:.1f}",
                *("not counted" if x is None else f"{x[-1]:.1f}" for x in sums),
                f"{target.best(values):.4f}",
            ]
        )
    lines = [[*header, f"best {target.metric}"], *rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def _plot(path: pathlib.Path, runs: Sequence[_Run], target: Target, unit: str) -> None:
    """Draws the curves as `learning_curve.plot` draws one: what was measured as points, the best so far as a line."""
    figure = picture.new_figure()
    curves = [run.curve(unit, target) for run in runs]
    for axes in learning_curve.panels(figure, np.concatenate([values for _, values in curves]), target):
        for run, (x, values), (color, line, _) in zip(runs, curves, picture.STYLES):
            axes.plot(x, values, ".", color=color, alpha=0.3)
            axes.plot(x, target.monotone(values), line, color=color, label=run.name)
        axes.axhline(target.value, color="gray", linewidth=1, label=f"{target.metric} {target.value:.4g}")
        axes.set(xlabel=_AXES[unit])
    figure.suptitle(f"Test {target.metric} by {_AXES[unit]}: measured (dots), best so far (lines)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    picture.save(figure, path)


if __name__ == "__main__":
    program.run("compare", main, takes="RUN_DIR")
