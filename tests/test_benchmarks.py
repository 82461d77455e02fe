"""The benchmarks run, and write down what they measured."""

import csv
import subprocess
import sys

import pytest


def test_quick_run_measures_every_system(tmp_path):
    output = tmp_path / "round_time.csv"
    command = [
        *(sys.executable, "-m", "benchmarks.round_time", "--quick", "--tasks=mnist_2nn"),
        *(f"--cache_dir={tmp_path}", f"--output={output}"),
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    with open(output, newline="") as file:
        rows = list(csv.DictReader(file))
    of_round = {row["system"]: row for row in rows if row["measured"] == "round of 2 clients"}
    assert of_round.keys() == {
        "tff_fedavg",
        "build_weighted_fed_avg, default",
        "build_weighted_fed_avg, iterator",
        "no TFF, all cores for a client",
        "no TFF, a core for a client",
    }
    for row in of_round.values():
        assert float(row["seconds"]) > 0 and float(row["cpu_seconds"]) > 0
    measured = {row["measured"] for row in rows}
    assert {"round of 1 clients of 4 examples", "start and first round of binaries.train"} <= measured


@pytest.mark.parametrize(
    ("name", "more", "measured"),
    [
        ("cohort", "cache_dir", [("mnist_2nn", a, n) for a in ("mean", "robust") for n in ("10", "100")]),
        ("workers", None, [("sleep", model, n) for model in ("2NN", "CNN") for n in ("1", "2")]),
    ],
)
def test_quick_runs_measure_all_numbers_of_clients_and_of_workers(tmp_path, name, more, measured):
    output = tmp_path / "measured.csv"
    flags = ["--quick", f"--output={output}", *([f"--{more}={tmp_path}"] if more else [])]
    subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *flags], check=True, stdout=subprocess.DEVNULL)
    with open(output, newline="") as file:
        rows = list(csv.reader(file))[1:]
    assert [tuple(row[:3]) for row in rows] == measured
    assert all(float(row[3]) > 0 for row in rows)


def test_unknown_task_is_one_line():
    command = [sys.executable, "-m", "benchmarks.round_time", "--tasks=mnist"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("round_time: --tasks has 'mnist'; it takes ") and result.stderr.count("\n") == 1
