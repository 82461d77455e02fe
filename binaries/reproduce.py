"""Reproduces the tables and figures of the paper: runs what is missing, and sets it beside the published numbers.

    python -m binaries.reproduce --table=4 --rows='mnist_2nn-iid-*' --budget_hours=8
    python -m binaries.reproduce --list
    python -m binaries.reproduce --report

Started again, it goes on where it was; without --table and --figure it is about all of them, what takes least first. It
runs as many models at once as it may use cores.
"""

import fnmatch
import functools
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence

from absl import flags

import tasks
from binaries.command_line import data_flags, program, worker_flags
from binaries.command_line.number import Number, integer, real
from binaries.experiment.record import SETTINGS
from binaries.reproduction import execution, figure_1, plan, pool
from tff_fedavg import run_directory

_TABLE = flags.DEFINE_multi(
    integer(1, 4), None, "table", [], "A table of the paper, 1 to 4; may be given several times."
)
_FIGURE = flags.DEFINE_multi(
    integer(1, 10), None, "figure", [], "A figure of the paper, 1 to 10; may be given several times."
)
_ROWS = flags.DEFINE_list(
    "rows", ["*"], "Which cells of them: names as --list shows them, with wildcards, such as 'mnist_2nn-iid-*-B10'."
)
_ROUNDS = flags.DEFINE(
    Number(SETTINGS["rounds"]),
    "rounds",
    None,
    "Rounds of a run at most; by default twice the paper's. More can follow later.",
)
_BUDGET_HOURS = flags.DEFINE(
    real(0, 1e6), "budget_hours", None, "Stops after so many hours, to go on with the next call."
)
_JOBS = flags.DEFINE(
    integer(1, 2**16),
    "jobs",
    None,
    "Models at once at most, each on a core, from the first on; by default one on each that the program may use.",
)
_LIST = flags.DEFINE_boolean("list", False, "Shows the cells, what was measured, and the time that the rest takes.")
_REPORT = flags.DEFINE_boolean("report", False, "Writes RESULTS.md and its pictures into --results_dir.")
_QUICK = flags.DEFINE_boolean(
    "quick",
    False,
    "A small form, on data that come with the packages: shows in minutes that it runs. The results go into "
    "--results_dir, by default results-quick.",
)
_RESULTS_DIR = flags.DEFINE_string("results_dir", None, "Where the results are; by default results.")

flags.adopt_module_key_flags(data_flags)
flags.adopt_module_key_flags(worker_flags)

# What only shows what there is, and the flags that make a difference to it.
_COMMANDS = (
    (_LIST, ("table", "figure", "rows", "rounds", "quick", "results_dir")),
    (_REPORT, ("quick", "results_dir")),
)
_SECONDS_BETWEEN_LINES = 10.0


def main() -> None:
    if _LIST.value and _REPORT.value:
        raise ValueError("--list and --report are two commands: give one of them")
    for command, takes in _COMMANDS:
        for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0]) if command.value else ():
            if flag.present and flag.name not in (command.name, *takes):
                raise ValueError(f"--{flag.name} is of no use with --{command.name}: leave it out")
    results_dir = pathlib.Path(os.path.expanduser(_RESULTS_DIR.value or "results" + "-quick" * _QUICK.value))
    if _REPORT.value:
        if not results_dir.is_dir():
            raise ValueError(f"--results_dir={results_dir}: there is no such directory")
        from binaries.reproduction import report

        print(report.write(results_dir, shrunk=_QUICK.value))
        return
    worker_flags.chosen()  # Refuses what is wrong, before anything is done.
    panels, grids = _selection()
    if _LIST.value:
        print("\n".join(_listing(panels, grids, results_dir)))
        return
    _run(panels, plan.cheapest_first(grids, results_dir), results_dir)


def _selection() -> tuple[list[str], list[plan.Grid]]:
    """Returns the panels of Figure 1 and the grids that the flags ask for, in the paper's order."""
    everything = not _TABLE.value and not _FIGURE.value
    figures = [f for n, f in plan.figures(_QUICK.value).items() if everything or n in _FIGURE.value]
    grids = [g for n in (1, 2, 3, 4) if everything or n in _TABLE.value for g in plan.table(n, _QUICK.value)]
    grids = [*dict.fromkeys([*grids, *(curve.grid for figure in figures for curve in figure.curves)])]
    panels = [panel for panel in figure_1.PANELS if everything or 1 in _FIGURE.value]
    names = [*map(figure_1.name, panels), *(name for grid in grids for name in (grid.cell.name, _title(grid)))]
    for pattern in _ROWS.value:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"--rows={pattern} is no cell of what was asked for: see --list")
    panels = [panel for panel in panels if _is_asked_for(figure_1.name(panel))]
    grids = [grid for grid in grids if _is_asked_for(grid.cell.name, _title(grid))]
    if _ROUNDS.value:
        grids = [plan.limit(grid, _ROUNDS.value) for grid in grids]
    if _QUICK.value:
        left_out = {g.cell.task for g in grids if tasks.TASKS[g.cell.task].embedded is None}
        grids = [grid for grid in grids if grid.cell.task not in left_out]
        for task in sorted(left_out):
            print(f"{task} is left out: no package comes with data for it", flush=True)
    return panels, grids


def _is_asked_for(*names: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in _ROWS.value)


def _listing(panels: Sequence[str], grids: Sequence[plan.Grid], results_dir: pathlib.Path) -> list[str]:
    """Returns a line for each panel of Figure 1 and for each grid."""
    layout = "{:<52} {:<50} {:>9} {:>9} {:>9}"
    lines = [layout.format("cell", "state", "rounds", "seconds", "left")]
    for panel in panels:
        state = "done" if figure_1.read(results_dir, panel) else "not run"
        lines.append(layout.format(figure_1.name(panel), state, "", "", ""))
    outcomes = plan.outcomes(results_dir)
    for grid in grids:
        done, wanted = grid.progress(results_dir)
        found = {run: run.outcome(results_dir) for run in done}
        states, rounds = [], ""
        if found:
            best = min(found, key=lambda run: grid.rank(found[run], run.learning_rate))
            states.append(f"rates run: {len(found)}, best {best.learning_rate:g}" + ("" if wanted else ": done"))
            rounds = found[best]["rounds_to_target"]
            rounds = "-" if rounds is None else f"{rounds:.1f}"
        last_rounds = [run.last_round(results_dir) for run in wanted]
        if any(last_rounds):
            states.append(f"one stopped in round {max(last_rounds)}")
        state = ", ".join(states) or "not run"
        seconds = f"{sum(outcome['training_seconds'] for outcome in found.values()):.0f}" if found else ""
        left = plan.seconds_left(grid, last_rounds, outcomes)
        lines.append(layout.format(_title(grid), state, rounds, seconds, "?" if left is None else f"{left:.0f}"))
    return lines


def _title(grid: plan.Grid) -> str:
    """Returns the name of the cell; of a single run, its own."""
    return grid.cell.name if len(grid.rates) > 1 else grid.run(grid.rates[0]).name


def _run(panels: Sequence[str], grids: Sequence[plan.Grid], results_dir: pathlib.Path) -> None:
    deadline = time.monotonic() + 3600 * _BUDGET_HOURS.value if _BUDGET_HOURS.value is not None else float("inf")
    failed = _without_data(panels, grids, results_dir) if time.monotonic() < deadline else set()
    printed, printed_at = {}, time.monotonic()
    try:
        with pool.Pool(_JOBS.value) as processes:
            while time.monotonic() < deadline:
                for name, job in _jobs(panels, grids, results_dir):
                    if not processes.has_room:
                        break
                    if name not in processes.running and not {name, _task(name)} & failed:
                        processes.submit(name, job)
                if not processes.running:
                    break
                now = time.monotonic()
                for ended in processes.wait(min(printed_at + _SECONDS_BETWEEN_LINES, deadline) - now):
                    if ended.failed:
                        of_the_task = ended.refused and not _is_of_its_own(ended, results_dir)
                        failed.add(_task(ended.name) if of_the_task else ended.name)
                        _tell(f"{ended.name}: {ended.outcome}")
                    else:
                        print(f"{ended.name}: {ended.outcome}", flush=True)
                if time.monotonic() - printed_at >= _SECONDS_BETWEEN_LINES:
                    for name, message in processes.running.items():
                        if message != printed.get(name):
                            print(f"    {name}: {message}", flush=True)
                    printed, printed_at = processes.running, time.monotonic()
    except KeyboardInterrupt as e:
        raise KeyboardInterrupt("interrupted; the same command goes on from the saved states") from e
    left = len(list(_jobs(panels, grids, results_dir)))
    if left:
        print(f"left to run: {left} or more; the same command goes on with them")
    else:
        print(f"nothing is left to run: all is in {results_dir}; another --results_dir runs it anew")
    if failed:
        raise RuntimeError(f"{', '.join(sorted(failed))}: left out after an error, which is above")


def _without_data(panels: Sequence[str], grids: Sequence[plan.Grid], results_dir: pathlib.Path) -> set[str]:
    """Returns the tasks, or Figure 1, whose data are missing: none of their runs can be made."""
    to_run = {_task(name) for name, _ in _jobs(panels, grids, results_dir)}
    experiments = {grid.cell.task: grid.run(grid.rates[0]).experiment for grid in grids}
    experiments |= {_task(figure_1.name(panel)): figure_1.experiment(_data()) for panel in panels}
    missing = set()
    for task, experiment in experiments.items():
        try:
            if task in to_run:
                experiment.find_data(data_flags.directories()["data_dir"])
        except ValueError as e:
            missing.add(task)
            _tell(f"{task}: {program.first_line(e)}")
    return missing


def _is_of_its_own(ended: pool.Ended, results_dir: pathlib.Path) -> bool:
    """Whether a run was refused for what is in its directory, or uses it: that is nothing to the others of its task."""
    run_dir = results_dir / "runs" / ended.name
    try:
        run_directory.read_config(run_dir)
    except ValueError:
        return True
    return ended.outcome.startswith(f"--run_dir={run_dir} ")


def _tell(message: str) -> None:
    print(f"reproduce: {message}", file=sys.stderr, flush=True)


def _data() -> str | None:
    return "embedded" if _QUICK.value else None


def _jobs(
    panels: Sequence[str], grids: Sequence[plan.Grid], results_dir: pathlib.Path
) -> Iterator[tuple[str, pool.Job]]:
    """Yields what is not done yet, by name; it may be running."""
    common = {**data_flags.directories(), "workers": worker_flags.chosen()}
    for panel in panels:
        if not figure_1.read(results_dir, panel):
            yield figure_1.name(panel), functools.partial(figure_1.execute, panel, _data(), results_dir, **common)
    for grid in grids:
        for run in grid.progress(results_dir)[1]:
            yield run.name, functools.partial(execution.execute, run, results_dir, **common)


def _task(name: str) -> str:
    """Returns the task of a run, "figure_1" of its panels."""
    return name.split("-")[0]


if __name__ == "__main__":
    program.run("reproduce", main)
