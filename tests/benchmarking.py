"""The benchmarks run, and write down what they measured. `make test-benchmarks` runs it."""

import csv
import sys

import pytest
from programs import run_alone, run_program


def test_quick_run_measures_every_system(tmp_path):
    output = tmp_path / "round_time.csv"
    flags = ["--quick", "--tasks=mnist_2nn", f"--cache_dir={tmp_path}", f"--output={output}", f"--peers_dir={tmp_path}"]
    result = run_alone("benchmarks.round_time", *flags, timeout=300)
    assert result.returncode == 0, result.stderr
    assert [line for line in result.stdout.splitlines() if "left out" in line] == [
        f"{peer} is left out: `make benchmark` installs it" for peer in ("PyTorch", "FedJAX", "Flower, PyTorch")
    ]
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
        assert float(row["deviation"]) < 1e-3
    assert output.with_suffix(".png").stat().st_size > 0
    measured = {row["measured"] for row in rows}
    assert {"round of 1 clients of 4 examples", "start and first round of binaries.train"} <= measured


_IDLE_PEER = f"""#!{sys.executable}
import sys
print("ready", flush=True)
for _ in sys.stdin:
    print("done\\n[1, 1, 1, 1, 1, 1]", flush=True)
"""


def test_peer_that_does_other_work_is_one_line(tmp_path):
    peer = tmp_path / "pytorch" / "bin" / "python"
    peer.parent.mkdir(parents=True)
    peer.write_text(_IDLE_PEER)
    peer.chmod(0o700)
    flags = ["--quick", "--tasks=mnist_2nn", f"--cache_dir={tmp_path}", f"--peers_dir={tmp_path}"]
    result = run_alone("benchmarks.round_time", *flags, timeout=300)
    assert result.returncode == 2
    assert result.stderr.startswith("round_time: mnist_2nn: PyTorch does other work than tff_fedavg: ")
    assert result.stderr.count("\n") == 1


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
    result = run_program(f"benchmarks.{name}", *flags)
    assert result.returncode == 0, result.stderr
    with open(output, newline="") as file:
        rows = list(csv.reader(file))[1:]
    assert [tuple(row[:3]) for row in rows] == measured
    assert all(float(row[3]) > 0 for row in rows)


def test_unknown_task_is_one_line():
    result = run_program("benchmarks.round_time", "--tasks=mnist")
    assert result.returncode == 2
    assert result.stderr.startswith("round_time: --tasks has 'mnist'; it takes ") and result.stderr.count("\n") == 1
