"""The program `binaries/compare.py`, on runs that are written by hand."""

import csv
import dataclasses
import json
import math
import subprocess
import sys

import matplotlib.figure
import numpy as np
import pytest
from conftest import ROOT

from binaries import compare
from binaries.experiment import Experiment
from tff_fedavg.learning_curve import Target

FIELDS = ["round_num", "evaluation/accuracy", "evaluation/loss", "training_time_in_seconds", "bytes_up"]


def record(run_dir, rows, fields=FIELDS, target=None, **settings):
    """Leaves a run with these rows of metrics, of the first version without a target; None is an empty cell."""
    run_dir.mkdir(parents=True)
    with open(run_dir / "metrics.csv", "w", newline="") as file:
        csv.writer(file).writerows([fields, *rows])
    config = {"settings": Experiment(**settings).to_json()}
    if target:
        config["target"] = dataclasses.asdict(target)
    (run_dir / "config.json").write_text(json.dumps(config))
    return run_dir


@pytest.fixture
def runs(tmp_path):
    """Two runs that differ in E, of which the second has not counted bytes and is evaluated in every other round."""
    one = [(0, 0.1, 2.3, None, None), (1, 0.5, 1.0, 2.0, 3e6), (2, 0.4, 1.1, 2.0, 3e6), (3, 0.9, 0.5, 2.0, 3e6)]
    five = [(0, 0.1, 2.3, None), (1, None, None, 7.0), (2, 0.8, 0.6, 7.0)]
    return [
        record(tmp_path / "runs" / "a", one, local_epochs=1, rounds=3),
        record(tmp_path / "runs" / "b", five, FIELDS[:4], local_epochs=5, rounds=2),
    ]


def run_program(*arguments):
    program = [sys.executable, "-X", "importtime", "-m", "binaries.compare", *map(str, arguments)]
    result = subprocess.run(program, capture_output=True, text=True, cwd=ROOT, timeout=60)
    imports = [line.split("|")[-1].strip() for line in result.stderr.splitlines() if line.startswith("import time:")]
    errors = [line for line in result.stderr.splitlines() if not line.startswith("import time:")]
    return result, imports, errors


def table(lines):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def test_table_has_what_differs_and_what_came_of_it(runs, tmp_path):
    output = tmp_path / "comparison"
    result, imports, errors = run_program(*runs, f"--output_dir={output}")
    assert (result.returncode, errors) == (0, [])
    lines = result.stdout.splitlines()
    header, _, first, second = table(lines)
    assert header == [
        *("run", "local_epochs", "last round", "rounds to accuracy 0.8", "MB up", "s of training", "best accuracy")
    ]
    # The first is at 0.5 in round 1, as the best in round 2 too, and at 0.9 in round 3: at 0.8 in round 2.75.
    assert first == ["a", "1", "3", "2.8", "9.0", "6.0", "0.9000"]
    assert second == ["b", "5", "2", "2.0", "not counted", "14.0", "0.8000"]
    assert lines[-1] == f"see {output}/comparison.png and {output}/comparison.md"
    assert (output / "comparison.md").read_text().splitlines()[2:] == lines[:-1]
    assert (output / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert not [name for name in imports if name.split(".")[0] in ("tensorflow", "tensorflow_federated")]


def drawn(monkeypatch, *arguments):
    """Runs the program in this process; returns the axes of its picture."""
    figures = []

    def savefig(figure, path, **_):
        figures.append(figure)
        path.touch()

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    compare.main(compare.flags.FLAGS(["compare", *map(str, arguments)])[1:])
    return figures[0].axes[0]


@pytest.mark.parametrize(
    ("x", "first", "second"), [("rounds", [0, 1, 2, 3], [0, 2]), ("seconds", [0, 2, 4, 6], [0, 14])]
)
def test_curves_are_drawn_as_measured_and_as_best_so_far(runs, tmp_path, monkeypatch, x, first, second):
    axes = drawn(monkeypatch, *runs, f"--x={x}", f"--output_dir={tmp_path}/comparison")
    measured, best, _, other_best, target = axes.lines
    np.testing.assert_allclose(measured.get_xydata().T, [first, [0.1, 0.5, 0.4, 0.9]])
    np.testing.assert_allclose(best.get_xydata().T, [first, [0.1, 0.5, 0.5, 0.9]])
    np.testing.assert_allclose(other_best.get_xydata().T, [second, [0.1, 0.8]])
    assert list(target.get_ydata()) == [0.8, 0.8]
    assert [line.get_label() for line in (best, other_best)] == ["a", "b"]
    assert measured.get_color() == best.get_color() != other_best.get_color()


def test_megabytes_are_summed_up_and_asked_for_only_where_they_were_counted(runs, tmp_path, monkeypatch):
    axes = drawn(monkeypatch, runs[0], "--x=megabytes", f"--output_dir={tmp_path}/comparison")
    np.testing.assert_allclose(axes.lines[0].get_xdata(), [0, 3, 6, 9])
    with pytest.raises(ValueError, match="--x=megabytes: b has not counted them; take --x=rounds"):
        drawn(monkeypatch, *runs, "--x=megabytes", f"--output_dir={tmp_path}/comparison")


def test_target_is_the_runs_own_if_they_have_the_same(tmp_path, monkeypatch, capsys):
    rows = [(0, 0.1, 2.3, None, None), (1, 0.5, 1.0, 2.0, 3e6)]
    runs = [record(tmp_path / name / "run", rows, target_accuracy=0.7, seed=i) for i, name in enumerate("ab")]
    drawn(monkeypatch, *runs, "--x=rounds", f"--output_dir={tmp_path}/comparison")
    header, _, *cells = table(capsys.readouterr().out.splitlines())
    assert header[1:4] == ["seed", "last round", "rounds to accuracy 0.7"]
    assert [row[:4] for row in cells] == [[f"{name}/run", f"{i}", "1", "not reached"] for i, name in enumerate("ab")]


def test_a_target_of_1_is_for_none_in_the_setting_and_a_target_in_the_task(tmp_path, monkeypatch, capsys):
    rows = [[(0, 0.1, 2.3, None, None), (1, accuracy, 1.0, 2.0, 3e6)] for accuracy in (0.5, 1.0)]
    for setting, shown in ((1, "0.5"), (None, "1")):
        runs = [
            record(tmp_path / f"{setting}" / f"{i}", rows[i], target=Target(1.0), target_accuracy=setting, seed=i)
            for i in (0, 1)
        ]
        drawn(monkeypatch, *runs, "--x=rounds", f"--output_dir={tmp_path}/comparison")
        assert f"rounds to accuracy {shown} " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["loss", "mean_absolute_error"])
def test_an_error_that_all_aim_at_is_to_fall(tmp_path, monkeypatch, capsys, name):
    fields = ["round_num", f"evaluation/{name}", "training_time_in_seconds"]
    target = Target(None, name, lower_is_better=True)
    runs = [
        record(tmp_path / f"{end}", [(0, 3.0, None), (1, end, 1.0)], fields, target, learning_rate=end)
        for end in (1.0, 2.0)
    ]
    axes = drawn(monkeypatch, *runs, "--x=rounds", f"--output_dir={tmp_path}/comparison")
    header, _, *cells = table(capsys.readouterr().out.splitlines())
    assert (header[3], header[-1]) == (f"rounds to {name} 2", f"best {name}")
    assert [(row[3], row[-1]) for row in cells] == [("0.5", "1.0000"), ("1.0", "2.0000")]
    assert axes.get_ylabel() == f"test {name}"


def test_runs_with_several_aims_are_compared_by_their_loss(tmp_path, monkeypatch, capsys):
    fields = ["round_num", "evaluation/loss", "evaluation/accuracy", "evaluation/mae"]
    targets = Target(0.9), Target(0.5, "mae", lower_is_better=True)
    runs = [
        record(tmp_path / f"{i}", [(0, 3.0, 0.1, 2.0), (1, 1.0 + i, 0.5, 1.0)], fields, target, seed=i)
        for i, target in enumerate(targets)
    ]
    drawn(monkeypatch, *runs, "--x=rounds", f"--output_dir={tmp_path}/comparison")
    header, *_ = table(capsys.readouterr().out.splitlines())
    assert (header[3], header[-1]) == ("rounds to loss 2", "best loss")


def test_the_file_of_a_runs_task_may_be_gone(tmp_path, monkeypatch, capsys):
    run = record(
        tmp_path / "run", [(0, 0.1, 2.3, None, None), (1, 0.5, 1.0, 2.0, 3e6)], task="gone.py", learning_rate=1
    )
    drawn(monkeypatch, run, f"--output_dir={tmp_path}/comparison")
    assert table(capsys.readouterr().out.splitlines())[2][1] == "1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "RUN_DIR is missing"),
        (["{}/missing"], "missing holds no run: it has no config.json"),
        (["{}"], "holds no run"),
        (["{}/runs/a", "{}/runs/empty"], "runs/empty has no metrics yet"),
        (["{}/runs/a", "--x=bytes"], "--x=bytes"),
        (["{}/runs/a", "{}/runs/nan"], "nan has no accuracy that is a number: leave it out"),
        (["{}/runs/a"] * 29, "29 runs are given: take 28 at most"),
    ],
)
def test_bad_input_gets_one_line_at_once(runs, tmp_path, arguments, message):
    record(tmp_path / "runs" / "empty", [])
    (tmp_path / "runs" / "empty" / "metrics.csv").unlink()
    record(tmp_path / "runs" / "nan", [(0, 3.0, math.nan)], ["round_num", "evaluation/loss", "evaluation/accuracy"])
    result, imports, errors = run_program(*(argument.format(tmp_path) for argument in arguments))
    assert "tensorflow" not in imports
    assert (result.returncode, result.stdout, len(errors)) == (2, "", 1)
    assert errors[0].startswith("compare: ") and message in errors[0]
