"""The benchmark runs, and writes down what it measured."""

import csv
import subprocess
import sys


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


def test_unknown_task_is_one_line():
    command = [sys.executable, "-m", "benchmarks.round_time", "--tasks=mnist"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("round_time: --tasks has 'mnist'; it takes ") and result.stderr.count("\n") == 1
