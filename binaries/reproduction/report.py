"""RESULTS.md and its pictures: what was measured, beside what the paper has published.

All of it is computed from the files of the runs and from `published`. What was not run is said to be so.
"""

import pathlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter

from binaries.experiment import Experiment
from binaries.reproduction import claims, figure_1, plan, published
from binaries.reproduction.measured import Measured, tables
from binaries.reproduction.outcome import read_metrics
from binaries.reproduction.plan import Curve, Figure, Grid, Run
from binaries.reproduction.published import Row
from tff_fedavg import learning_curve, picture
from tff_fedavg.metrics_table import ROUND_FIELD
from tff_fedavg.replacement import replacement

_TOLERANCE = 0.25  # Rounds that differ by more are marked. The paper's own repeats of a cell differ by as much.
_NOT_RUN = "not run"
_SHOWN_ACCURACIES = {"mnist_2nn": (0.933, 0.987), "mnist_cnn": (0.97, 1.0), "shakespeare_lstm": (0.2, 0.65)}
_ON_THE_WAY = {"mnist_2nn": (0.9, 0.95), "mnist_cnn": (0.97, 0.98), "shakespeare_lstm": (0.3, 0.4, 0.45, 0.5)}
_PANEL_INCHES = 3.0  # The height.
_MARKERS = 20  # Of a curve.
_HOLLOW = {"markersize": 4, "markerfacecolor": "none"}
_OF_THE_PAPER = {"linestyle": ":", "linewidth": 1, "marker": "o", **_HOLLOW}

_INTRODUCTION = """# Results

Written by `python -m binaries.reproduce --report` from the files in `runs/`; not by hand.

"Here" is the number of communication rounds to the target test accuracy, by the paper's measure (the best accuracy so
far, interpolated between evaluations, which are in the rounds of its figures), at the best rate of a grid of resolution
10^(1/3), for CIFAR-10 of the rates of Figures 4 and 9 (SGD: the only one); one seed. A speed-up is over the first row
of its column. Ratios that are off by more than 25 % are **bold**, and explained or said to be open; the paper's own
repeats of the same cell differ by up to that, and once by a factor of 2 (Tables 1 and 2).

Some of what the paper leaves open was chosen so that its numbers come out: the range of the digits, the initial values
and the decay for CIFAR-10, the scale of a text's loss ([docs/reproduce.md](../docs/reproduce.md)). That rounds on IID
digits agree is no independent evidence of these choices."""

_SHRUNK = "**These are trials of a few seconds on small data, not results.**"

_CLAIMS = """## What the paper concludes, and what these runs say

Each claim is checked as comparisons of two numbers, which are speed-ups over the first row of a column where the claim
is about saving rounds. The paper's own numbers come out as claimed in all of them. The table says in how many of those
that can be made of the runs so far it is the same, and in which it is not. A run without the target counts as far as it
went. Not checked are the accuracies at the end, as runs stop at the target, large E, CIFAR-10 and the word LSTM."""
_CLAIM_HEADER = ("claim", "", "holds in", "not in")

_OVERVIEW = "Tables 1 to 4"
_TITLES = {
    1: "Table 1: the effect of the client fraction C (2NN: E = 1; CNN: E = 5)",
    2: "Table 2: more computation per client, C = 0.1",
    3: "Table 3: CIFAR-10",
    4: "Table 4: more computation per client, 2NN, C = 0.1",
}
_RUN_HEADER = (
    "cell",
    "target",
    "paper",
    "here",
    "ratio",
    "speed-up, paper",
    "here",
    "η",
    "rates run",
    "seed",
    "date",
    "",
)
_SUMMARY_HEADER = ("task", "partition", "run", "median ratio", "within 25 %", "their largest speed-up, paper", "here")
_CURVE_HEADER = ("panel", "curve", "η", "at", "here", "paper")
_WAY_HEADER = "rounds on the way"
_ENDS = "Runs stop at the target, where a curve ends; those of the paper go on, and of most only the end is known."


def write(results_dir: pathlib.Path, shrunk: bool = False) -> pathlib.Path:
    """Writes RESULTS.md into the directory of the results, and the pictures into figures/; returns the former's path.

    Args:
      results_dir: The directory, with the runs in runs/.
      shrunk: Whether the runs are the shrunk ones.

    Raises:
      OSError: If a file cannot be written.
    """
    (results_dir / "figures").mkdir(parents=True, exist_ok=True)
    measured = tables(results_dir, shrunk)
    sections = [_INTRODUCTION, *[_SHRUNK] * shrunk, _counts(measured), _overview(measured, results_dir)]
    if not shrunk:
        sections.append(_claims_section(measured, results_dir))
    for number in _TITLES:
        table = {row: m for row, m in measured.items() if row.table == number}
        sections.append(_table_section(number, table, results_dir))
    sections.append(_figure_1_section(results_dir))
    sections += [_figure_section(number, figure, results_dir) for number, figure in plan.figures(shrunk).items()]
    path = results_dir / "RESULTS.md"
    with replacement(path) as temporary:
        temporary.write_text("\n\n".join(sections) + "\n", "utf-8")
    return path


def _counts(measured: Mapping[Row, Measured]) -> str:
    """Returns how many numbers of the tables are measured, and how near they are, in two sentences."""
    numbers = [row for row in measured if row.rounds]
    run = [row for row in numbers if measured[row].run is not None]
    text = f"Of the {len(numbers)} numbers of Tables 1 to 4, {len(run)} are measured"
    ratios = _ratios(measured, run)
    if not ratios:
        return f"{text}."
    by_partition = {}
    for row in run:
        by_partition.setdefault(row.cell.partition, []).append(row)
    parts = ((partition, _ratios(measured, rows)) for partition, rows in by_partition.items())
    each = "; ".join(f"{partition} {_nearness(ratios)}" for partition, ratios in parts if ratios)
    return (
        f"{text}. The target was reached in {len(ratios)} of them. The median ratio, here over the paper, is "
        f"{_nearness(ratios)}: {each}."
    )


def _nearness(ratios: Sequence[float]) -> str:
    return f"{np.median(ratios):.2f}, with {_num_near(ratios)} of {len(ratios)} within {100 * _TOLERANCE:g} %"


def _ratios(measured: Mapping[Row, Measured], rows: Iterable[Row]) -> list[float]:
    return [measured[row].rounds / row.rounds for row in rows if measured[row].rounds and row.rounds]


def _num_near(ratios: Iterable[float]) -> int:
    return sum(abs(ratio - 1) <= _TOLERANCE for ratio in ratios)


def _overview(measured: Mapping[Row, Measured], results_dir: pathlib.Path) -> str:
    """Draws the rounds of all rows over the paper's; returns the line that shows the picture."""
    # Of a grid that is not finished, rates that missed the target say nothing yet.
    compared = {row: m for row, m in measured.items() if row.rounds and (m.rounds or (m.run and m.complete))}
    if not compared:
        return f"{_OVERVIEW}: {_NOT_RUN}"
    colors = dict(zip(dict.fromkeys((row.cell.task, row.cell.partition) for row in compared), picture.COLORS))
    groups = {}
    for row, m in compared.items():
        group = (row.cell.task, row.cell.partition), m.rounds is not None
        groups.setdefault(group, []).append((row.rounds, m.rounds or m.last_round))
    drawn = picture.new_figure(5.5)
    axes = drawn.add_subplot()
    for (of, is_reached), points in groups.items():
        label = " ".join(of) + ("" if is_reached else ", not reached until here")
        axes.plot(*zip(*points), "o" if is_reached else "^", color=colors[of], markersize=5, label=label)
    numbers = np.concatenate(list(groups.values()))
    ends = np.array([numbers.min() / 2, 2 * numbers.max()])
    axes.plot(ends, ends, color="gray", linewidth=0.8)
    band = {"color": "lightgray", "zorder": 0, "label": f"{100 * _TOLERANCE:g} % less to more"}
    axes.fill_between(ends, (1 - _TOLERANCE) * ends, (1 + _TOLERANCE) * ends, **band)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    axes.set(title=f"{_OVERVIEW}: rounds to the target accuracy", xlabel="in the paper", ylabel="here")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    return f"![{_OVERVIEW}]({_save(drawn, results_dir, 'tables')})"


def _claims_section(measured: Mapping[Row, Measured], results_dir: pathlib.Path) -> str:
    here = claims.check(
        {row: m.rounds for row, m in measured.items() if m.rounds},
        {row: m.last_round for row, m in measured.items() if m.last_round and not m.rounds},
        {panel: figure_1.read(results_dir, panel) for panel in figure_1.PANELS},
    )
    rows = []
    for claim, comparisons in here.items():
        against = [name for name, holds in comparisons.items() if not holds]
        holds = f"{len(comparisons) - len(against)} of {len(comparisons)}" if comparisons else _NOT_RUN
        rows.append((*claim.value, holds, ", ".join(against)))
    return f"{_CLAIMS}\n\n{_markdown(_CLAIM_HEADER, rows)}"


def _table_section(number: int, measured: Mapping[Row, Measured], results_dir: pathlib.Path) -> str:
    paper = published.speedups({row: row.rounds for row in measured if row.rounds})
    here = published.speedups({row: m.rounds for row, m in measured.items() if m.rounds})
    speedups = {row: (paper.get(row), here.get(row)) for row in measured}
    printed = {
        row: f"{_dash(row.rounds)}{_in_brackets(speedups[row][0])} → {_rounds(m)}{_in_brackets(speedups[row][1])}"
        for row, m in measured.items()
    }
    lines = _markdown(_RUN_HEADER, (_details(row, measured[row], speedups[row], results_dir) for row in measured))
    parts = (
        f"## {_TITLES[number]}",
        "Rounds, as paper → here.",
        _as_printed(printed),
        _summary(measured, speedups),
        lines,
    )
    return "\n\n".join(parts)


def _summary(measured: dict[Row, Measured], speedups: dict[Row, tuple[float | None, float | None]]) -> str:
    """Returns, for each task and partition of a table, the median ratio and the largest speed-ups."""
    groups = {}
    for row in measured:
        groups.setdefault((row.cell.task, row.cell.partition), []).append(row)
    lines = []
    for group, rows in groups.items():
        run = [row for row in rows if measured[row].run is not None]
        ratios = _ratios(measured, run)
        # Of the same rows; that of the first row over itself is none.
        both = [speedups[row] for row in run if None not in speedups[row] and speedups[row] != (1, 1)]
        largest = [max(each) for each in zip(*both)] or [None, None]
        lines.append(
            (
                *group,
                f"{len(run)} of {len(rows)}",
                f"{np.median(ratios):.2f}" if ratios else "",
                f"{_num_near(ratios)} of {len(ratios)}" if ratios else "",
                *map(_times, largest),
            )
        )
    return _markdown(_SUMMARY_HEADER, lines)


def _as_printed(printed: dict[Row, str]) -> str:
    """Returns the table in the form in which the paper prints it."""

    def place(row: Row) -> tuple[tuple, str]:
        cell = row.cell
        if row.table == 1:
            return (cell.task, f"C = {cell.C:g}"), f"{cell.partition}, B = {cell.B or '∞'}"
        if row.table == 3:
            return (cell.algorithm, f"B = {cell.B or '∞'}"), f"{100 * row.target:g} %"
        return (cell.task, f"{cell.algorithm}, E = {cell.E}, B = {cell.B or '∞'}"), _iid_or_not(cell.partition)

    columns = list(dict.fromkeys(place(row)[1] for row in printed))
    table = {}
    for row, text in printed.items():
        key, column = place(row)
        table.setdefault(key, dict.fromkeys(columns, ""))[column] = text
    return _markdown(("", "", *columns), ((*key, *values.values()) for key, values in table.items()))


def _details(
    row: Row, measured: Measured, speedups: tuple[float | None, float | None], results_dir: pathlib.Path
) -> tuple[str, ...]:
    paper = (row.cell.name, f"{100 * row.target:g} %", _dash(row.rounds), str(measured))
    if measured.run is None:
        note = published.explanations().get(row.cell.name, "") if measured.last_round else ""
        return (*paper, "", _times(speedups[0]), "", "", "", "", "", note)
    ratio = measured.rounds / row.rounds if measured.rounds and row.rounds else None
    differs = abs(ratio - 1) > _TOLERANCE if ratio else (measured.rounds is None) != (row.rounds is None)
    notes = [published.explanations().get(row.cell.name, "open")] if differs else []
    if not measured.complete:
        notes.append("the grid is not finished")
    held = Experiment.read(measured.run.directory(results_dir))
    if held.eval_every != measured.run.grid.eval_every:
        notes.append(f"evaluated every {held.eval_every} rounds, not as in the paper")
    shown = f"{ratio:.2f}" if ratio else "-"
    return (
        *paper,
        f"**{shown}**" if differs else shown,
        *map(_times, speedups),
        f"{measured.run.learning_rate:g}",
        ", ".join(f"{run.learning_rate:g}" for run in measured.runs),
        str(held.seed),
        measured.run.outcome(results_dir)["date"],
        "; ".join(notes),
    )


def _figure_1_section(results_dir: pathlib.Path) -> str:
    title = "## Figure 1: the loss of mixtures of two models"
    measured = {panel: points for panel in figure_1.PANELS if (points := figure_1.read(results_dir, panel))}
    if not measured:
        return f"{title}\n\n{_NOT_RUN}"
    rows = []
    for panel in figure_1.PANELS:
        paper = published.curves(1)[panel]["mixture"]
        for name, points in (("paper", paper), ("here", measured.get(panel))):
            rows.append((panel, name, *(_mixture(points) if points else (_NOT_RUN, "", "", ""))))
    drawn, axes = _panels(title.removeprefix("## "), list(figure_1.PANELS))
    style, papers, *_ = picture.STYLES
    for panel in figure_1.PANELS:
        _draw(axes[panel], published.curves(1)[panel]["mixture"], papers, paper=True, label="paper")
        if panel in measured:
            points = np.array(measured[panel])
            _draw(axes[panel], points, style, label="here")
            axes[panel].axhline(min(_parents(points)), color=style[0], linewidth=0.8, label="better parent, here")
        for theta in (0, 1):
            axes[panel].axvline(theta, color="lightgray", zorder=0)
        axes[panel].set_title(f"{panel} initialisation", fontsize="medium")
        axes[panel].set(xlabel="mixing weight θ", ylabel="loss on the training set")
    labels = {label: line for each in axes.values() for line, label in zip(*each.get_legend_handles_labels())}
    drawn.legend(labels.values(), labels, loc="outside lower center", ncols=len(labels))
    path = _save(drawn, results_dir, "figure_1")
    header = ("initialisation", "", "better parent", "at θ = 0.5", "lowest", "highest between the parents")
    return f"{title}\n\n![Figure 1]({path})\n\n{_markdown(header, rows)}"


def _mixture(points: Sequence[tuple[float, float]]) -> tuple[str, ...]:
    """Returns what Figure 1 is about, as text: a parent's loss, and those of mixtures."""
    theta, loss = np.array(points).T
    best = np.argmin(loss)
    between = loss[(theta >= 0) & (theta <= 1)].max()
    half = np.interp(0.5, theta, loss)
    return f"{min(_parents(points)):.4f}", f"{half:.4f}", f"{loss[best]:.4f} at {theta[best]:.2f}", f"{between:.4f}"


def _parents(points: Sequence[tuple[float, float]]) -> np.ndarray:
    theta, loss = np.array(points).T
    return np.interp([0, 1], theta, loss)


def _figure_section(number: int, figure: Figure, results_dir: pathlib.Path) -> str:
    title = f"## Figure {number}: {figure.title}"
    measured = {curve: points for curve in figure.curves if len(points := _points(figure, curve, results_dir))}
    if not measured:
        note = published.explanations().get(f"figure {number}")
        return f"{title}\n\n{': '.join(filter(None, (_NOT_RUN, note)))}"
    with_runs = {curve.panel for curve in measured}
    panels = [panel for panel in dict.fromkeys(curve.panel for curve in figure.curves) if panel in with_runs]
    drawn, axes = _panels(title.removeprefix("## "), panels)
    # A setting has the same colour in all panels.
    styles = dict(zip(dict.fromkeys(curve.label for curve in figure.curves), picture.STYLES))
    shown = set()
    targets = {curve.panel: curve.grid.target for curve in measured}
    rows = []
    for panel in panels:
        for curve in (curve for curve in figure.curves if curve.panel == panel):
            paper = published.curves(number).get(panel, {}).get(curve.label)
            if paper:
                _draw(axes[panel], paper, styles[curve.label], paper=True)
            if paper or curve in measured:
                shown.add(curve.label)
            if curve not in measured:
                rows.append((panel, curve.label, "", "", _NOT_RUN, "", *[""] * figure.monotone))
                continue
            points = measured[curve]
            _draw(axes[panel], points, styles[curve.label])
            x, y = points[-1]
            rates = ", ".join(f"{run.learning_rate:g}" for run in _runs(figure, curve, results_dir))
            way = [_on_the_way(points, curve.grid)] * figure.monotone
            rows.append((panel, curve.label, rates, f"{x:g}", f"{y:.4f}", _paper_value(paper, x), *way))
        if figure.monotone and targets[panel]:
            axes[panel].axhline(targets[panel], color="gray", linewidth=0.8)
            # The runs stop at the target, of the paper's only the ends are known: a linear axis would show neither.
            axes[panel].set_xscale("log", nonpositive="mask")
            axes[panel].set_ylim(_SHOWN_ACCURACIES[panel.split("-")[0]])
        axes[panel].set_title(panel.replace("-", ", "), fontsize="medium")
        axes[panel].set(xlabel=figure.x_label, ylabel="training loss" if "loss" in figure.metric else "test accuracy")
        if "loss" in figure.metric:
            axes[panel].set_yscale("log")
            axes[panel].yaxis.set_major_formatter("{x:g}")
            axes[panel].yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
    sources = {"here": {}, "paper": _OF_THE_PAPER} if published.curves(number) else {}
    lines = [
        Line2D([], [], color=color, linestyle=line, marker=marker if sources else "", **_HOLLOW, label=label)
        for label, (color, line, marker) in styles.items()
        if label in shown
    ]
    lines += [Line2D([], [], color="gray", label=source, **style) for source, style in sources.items()]
    drawn.legend(handles=lines, loc="outside lower center", ncols=3, fontsize="small")
    path = _save(drawn, results_dir, f"figure_{number}")
    header = (*_CURVE_HEADER, *[_WAY_HEADER] * figure.monotone)
    notes = filter(None, (figure.note, _ENDS * figure.monotone))
    return "\n\n".join((title, *notes, f"![Figure {number}]({path})", _markdown(header, rows)))


def _runs(figure: Figure, curve: Curve, results_dir: pathlib.Path) -> list[Run]:
    """Returns the runs that a curve shows: all rates where the figure is monotone, else the best finished one."""
    done, wanted = curve.grid.progress(results_dir)
    runs = [run for run in [*done, *wanted] if read_metrics(run.directory(results_dir))]
    if figure.monotone or len(runs) <= 1:
        return runs
    return (
        [min(done, key=lambda run: curve.grid.rank(run.outcome(results_dir), run.learning_rate))] if done else runs[:1]
    )


def _points(figure: Figure, curve: Curve, results_dir: pathlib.Path) -> np.ndarray:
    """Returns the points of a curve, `[n, 2]`.

    Where the figure is monotone they are the best of all rates up to each x, and end where that reaches the target:
    runs stop there, and what slower rates have later is not the best.
    """
    points = []
    for run in _runs(figure, curve, results_dir):
        rows = read_metrics(run.directory(results_dir))
        points += [(curve.x_per_round * row[ROUND_FIELD], row[figure.metric]) for row in rows if figure.metric in row]
    points = np.array(sorted(points)).reshape(-1, 2)
    if figure.monotone:
        points[:, 1] = np.maximum.accumulate(points[:, 1])
        points = points[np.diff(points[:, 0], append=np.inf) > 0]
        target = learning_curve.Target(curve.grid.target)
        reached = next((i for i, value in enumerate(points[:, 1]) if target.is_reached(value)), len(points))
        points = points[: reached + 1]
    return points


def _on_the_way(points: np.ndarray, grid: Grid) -> str:
    """Returns the rounds to accuracies before the target, and to the target: they tell curves apart that end early."""
    accuracies = (*_ON_THE_WAY.get(grid.cell.task, ()), *[grid.target] * (grid.target is not None))
    rounds = {accuracy: learning_curve.Target(accuracy).rounds(*points.T) for accuracy in accuracies}
    return ", ".join(f"{100 * accuracy:g} %: {n:.1f}" for accuracy, n in rounds.items() if n is not None)


def _paper_value(paper: Sequence[tuple[float, float]] | None, x: float) -> str:
    if not paper:
        return ""
    (first, start), (last, end) = paper[0], paper[-1]
    if x < first:
        return f"{start:.4f} at {first:g}"
    if x <= last and len(paper) > 1:
        return f"{np.interp(x, *np.array(paper).T):.4f}"
    return f"{end:.4f} at {last:g}"


def _panels(title: str, names: Sequence[str]) -> tuple[Picture, dict[str, Axes]]:
    columns = min(len(names), 2)
    rows = -(-len(names) // columns)
    figure = picture.new_figure(1.5 + _PANEL_INCHES * rows)
    figure.suptitle(title)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for unused in axes[len(names) :]:
        unused.remove()
    return figure, dict(zip(names, axes))


def _draw(
    axes: Axes,
    points: Sequence[tuple[float, float]],
    style: tuple[str, str, str],
    *,
    paper: bool = False,
    label: str | None = None,
) -> None:
    """Draws a curve, in one of `picture.STYLES`: a measured one as a line, the paper's as `_OF_THE_PAPER`."""
    color, line, marker = style
    x, y = np.array(points).T
    how = {**_OF_THE_PAPER, "marker": marker, "markevery": -(-len(x) // _MARKERS)} if paper else {"linestyle": line}
    axes.plot(x, y, color=color, label=label, **how)


def _save(figure: Picture, results_dir: pathlib.Path, name: str) -> str:
    """Writes a picture; returns its path, relative to RESULTS.md."""
    path = results_dir / "figures" / f"{name}.png"
    picture.save(figure, path)
    return f"figures/{path.name}"


def _times(speedup: float | None) -> str:
    return "" if speedup is None else f"{speedup:.1f}x"


def _in_brackets(speedup: float | None) -> str:
    return "" if speedup in (None, 1) else f" ({_times(speedup)})"


def _dash(rounds: float | None) -> str:
    return "-" if rounds is None else f"{rounds:.0f}"


def _rounds(measured: Measured) -> str:
    if measured.last_round is None:
        return _NOT_RUN
    return f"{measured.rounds:.0f}" if measured.rounds else f"> {measured.last_round}"


def _iid_or_not(partition: str) -> str:
    return "IID" if partition == "iid" else "non-IID"


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ("---",) * len(header), *rows))
