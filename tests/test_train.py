"""The program `binaries/train.py`, run as a user runs it."""

import csv
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import tensorflow as tf
from conftest import ROOT
from programs import run_alone, run_at_once, run_program

from binaries.experiment import Experiment


def command(run_dir, *flags):
    return ["binaries.train", "--data=embedded", f"--cache_dir={run_dir.parent}/cache", f"--run_dir={run_dir}", *flags]


def train(run_dir, *flags, **kwargs):
    return run_program(*command(run_dir, *flags), **kwargs)


def train_alone(run_dir, *flags, **kwargs):
    return run_alone(*command(run_dir, *flags), **kwargs)


def metrics(run_dir):
    """Rows of metrics.csv, without the one column that is not the same in every run."""
    path = run_dir / "metrics.csv"
    if not path.exists():
        return []
    with open(path) as file:
        return [{k: v for k, v in row.items() if k != "training_time_in_seconds"} for row in csv.DictReader(file)]


def saved_weights(run_dir, round_number):
    with np.load(run_dir / "states" / f"round_{round_number}.npz") as state:
        return {name: state[name].tobytes() for name in state if name.startswith("global_model_weights/")}


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--task=mnist_3nn", "--task=mnist_3nn: take one of mnist_2nn, mnist_2nn_0_to_1, "),
        ("--task=cifar_cnn", "--data=embedded, but no package comes with data for cifar_cnn: leave it out"),
        ("--data=mnist6k", "--data=mnist6k: mnist_2nn takes mnist, mnist5k"),
        ("--partition=by_hand", "--partition=by_hand: mnist_2nn takes iid, pathological"),
        ("--client_fraction=1.5", "--client_fraction=1.5: take a number from 0 to 1"),
        ("--local_epochs=0", "--local_epochs=0: take an integer from 1 to 1,000,000"),
        ("--batch_size=-1", "--batch_size=-1: take an integer from 0 to "),
        ("--learning_rate=-0.1", "--learning_rate=-0.1: take a number above 0"),
        ("--learning_rate=nan", "--learning_rate=nan: take a number above 0"),
        ("--learning_rate_decay=0", "--learning_rate_decay=0: take a number above 0, at most 1"),
        ("--learning_rate_decay=1.01", "--learning_rate_decay=1.01: take a number above 0, at most 1"),
        ("--clients=0", "--clients=0: take an integer from 1 to "),
        ("--seed=-1", "--seed=-1: take an integer from 0 to "),
        ("--rounds=many", "--rounds=many"),
        ("--epochs=5", "unknown flag --epochs: did you mean --local_epochs?"),
        ("rounds=5", "unknown argument 'rounds=5'"),
        ("--flagfile=missing", "missing"),
        ("--config=missing.json", "--config=missing.json: there is no such file"),
    ],
)
def test_bad_flags_get_one_line_at_once_and_nothing_is_written(tmp_path, flag, message):
    result = run_at_once(*command(tmp_path / "run", flag))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("train: ") and result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not (tmp_path / "run").exists()


def test_flags_are_read_from_a_flag_file(tmp_path):
    (tmp_path / "flags").write_text("# A comment.\n--rounds=3\n--client_fraction=-0.5\n")
    result = train(tmp_path / "run", f"--flagfile={tmp_path / 'flags'}")
    assert result.returncode == 2
    assert "--client_fraction=-0.5" in result.stderr


def test_help_names_the_papers_symbols_and_is_quick():
    result = run_at_once("binaries.train", "--help")
    for text in ("C, the fraction", "E, epochs", "B, the local minibatch size", "eta, the learning rate", "K, the"):
        assert text in result.stdout


# Rounds of about 0.1 s, which leave time to interrupt the program in the middle.
FLAGS = ("--local_epochs=20", "--rounds=24", "--target_accuracy=1", "--eval_every=2")


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """The directory of a run of 24 rounds that nothing interrupted, and its result."""
    run_dir = tmp_path_factory.mktemp("train") / "run"
    return run_dir, train_alone(run_dir, *FLAGS)


def test_run_reports_its_progress_and_outcome_without_noise(finished_run):
    run_dir, result = finished_run
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0].startswith("fedavg on mnist_2nn, mnist5k, iid, with C = 0.1, E = 20, B = 10, eta = 0.1, in ")
    assert lines[1].startswith("round 0/24  accuracy 0.")
    # 199,210 weights of 4 bytes, 10 clients, 24 rounds.
    assert re.fullmatch(
        r"24 rounds, best accuracy 0\.9\d+, \d+\.\d s of training, 191\.2 MB up, 191\.2 MB down; see .*",
        lines[-1],
    )


def test_run_leaves_all_that_the_readme_names(finished_run):
    run_dir, _ = finished_run
    config = json.loads((run_dir / "config.json").read_text())
    assert config["settings"]["learning_rate"] == 0.1
    assert config["settings"]["data"] == "mnist5k"
    assert len(config["data_checksums"]["mnist_5k.csv.gz"]) == 64
    assert config["versions"]["tensorflow-federated"] == "0.87.0"
    assert (run_dir / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert (run_dir / "states" / "round_24.npz").is_file()
    steps = {
        event.step
        for path in (run_dir / "tensorboard").iterdir()
        for event in tf.compat.v1.train.summary_iterator(str(path))
        if event.summary.value
    }
    assert steps == set(range(25))
    rows = metrics(run_dir)
    assert [int(row["round_num"]) for row in rows] == list(range(25))
    assert [row["evaluation/accuracy"] != "" for row in rows] == [True, False] * 12 + [True]
    assert float(rows[24]["evaluation/accuracy"]) > 0.9
    assert all(int(row["client_work/train/num_examples"]) == 400 for row in rows[1:])


def test_a_run_is_made_again_from_its_configuration_and_flags_come_first(finished_run):
    run_dir, _ = finished_run
    again = run_dir.parent / "again"
    result = train(again, f"--config={run_dir / 'config.json'}", "--rounds=3")
    assert (result.returncode, result.stderr) == (0, "")
    assert metrics(again)[:3] == metrics(run_dir)[:3]
    expected = Experiment.read(run_dir).to_json()
    assert Experiment.read(again).to_json() == {**expected, "rounds": 3}


def test_another_flag_for_the_same_run_directory_is_refused_by_name(finished_run):
    run_dir, _ = finished_run
    rows = metrics(run_dir)
    result = train(run_dir, *FLAGS, "--learning_rate=0.2")
    assert result.returncode == 2
    expected = "holds a run with --learning_rate=0.1, not 0.2: give another run_dir to start a new run"
    assert result.stderr == f"train: --run_dir={run_dir} {expected}\n"
    assert metrics(run_dir) == rows


def test_run_directory_alone_goes_on_with_its_run_and_what_is_given_has_to_agree(finished_run):
    run_dir, first = finished_run
    rows = metrics(run_dir)
    again = train(run_dir)
    lines = again.stdout.splitlines()
    assert (again.returncode, again.stderr, metrics(run_dir)) == (0, "", rows)
    assert lines[1].startswith("going on after round 24 of the run in")
    assert [lines[0], lines[-1]] == [first.stdout.splitlines()[0], first.stdout.splitlines()[-1]]
    other = train(run_dir, "--algorithm=fedsgd")
    assert (other.returncode, other.stdout) == (2, "")
    assert "holds a run with --algorithm=fedavg, not fedsgd: give another run_dir" in other.stderr


def test_run_that_is_interrupted_killed_and_resumed_ends_bit_equal(finished_run):
    straight, _ = finished_run
    run_dir = straight.parent / "interrupted"
    scratch = straight.parent / "tmp"
    scratch.mkdir()
    environment = {**os.environ, "TMPDIR": str(scratch)}
    # SIGKILL leaves no time to save: those rounds are computed again.
    for signal_number, last_round, status in (
        (signal.SIGINT, 5, 128 + signal.SIGINT),
        (signal.SIGKILL, 12, -signal.SIGKILL),
    ):
        program = subprocess.Popen(
            [sys.executable, "-m", *command(run_dir, *FLAGS)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        deadline = time.monotonic() + 100
        while len(metrics(run_dir)) <= last_round and time.monotonic() < deadline:
            time.sleep(0.05)
        workers = psutil.Process(program.pid).children(recursive=True)
        program.send_signal(signal_number)
        _, errors = program.communicate(timeout=5)
        assert program.returncode == status, errors
        assert errors.count("\n") <= 1
        assert psutil.wait_procs(workers, timeout=5)[1] == []
        assert bool(list(scratch.iterdir())) == (signal_number == signal.SIGKILL)
    result = train_alone(run_dir, *FLAGS, env=environment)
    assert result.stdout.splitlines()[1].startswith("going on after round ")
    assert metrics(run_dir) == metrics(straight)
    assert saved_weights(run_dir, 24) == saved_weights(straight, 24) != {}
    assert list(scratch.iterdir()) == []


def limit_files_to_300_kilobytes():
    """Less than a state has: 800 kB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))


def test_full_disk_ends_the_run_with_one_line(finished_run):
    run_dir = finished_run[0].parent / "full"
    result = train(run_dir, *FLAGS, "--rounds=2", before=limit_files_to_300_kilobytes)
    assert result.returncode == 2
    assert result.stderr.startswith("train: the state of round 0 could not be written: ")
    assert result.stderr.count("\n") == 1
    assert len(metrics(run_dir)) == 1
    # Another seed needs other client files.
    result = train(run_dir.parent / "full too", *FLAGS, "--seed=1", before=limit_files_to_300_kilobytes)
    assert result.returncode == 2
    assert result.stderr.startswith("train: the client files could not be written to ")
    assert result.stderr.count("\n") == 1


def test_updates_that_are_not_finite_end_the_run_with_the_rounds_and_the_rate(finished_run):
    run_dir = finished_run[0].parent / "diverged"
    result = train(run_dir, *FLAGS, "--learning_rate=1e20")
    assert result.returncode == 2
    message = (
        r"rounds 1 to 3 diverged: no client had a finite update at --learning_rate=1e\+20; .* keeps the state before it"
    )
    assert re.fullmatch(f"train: {message}\n", result.stderr)
    assert (run_dir / "states" / "round_2.npz").is_file()


def test_centralised_sgd_counts_its_updates_as_rounds_and_leaves_the_same_files(tmp_path):
    flags = ("--algorithm=sgd", "--learning_rate_decay=0.5", "--decay_every=50", "--rounds=120", "--eval_every=50")
    result = train(tmp_path / "run", *flags)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert " with B = 100, eta = 0.1 x 0.5 every 50 rounds, in " in lines[0]
    assert re.fullmatch(
        r"120 rounds, best accuracy 0\.\d+, rounds to 0.93: .*, \d+\.\d s of training; see .*", lines[-1]
    )
    evaluated = [row["round_num"] for row in metrics(tmp_path / "run") if row["evaluation/accuracy"]]
    assert evaluated == ["0", "50", "100", "120"]
    assert (tmp_path / "run" / "states" / "round_120.npz").is_file()
    assert (tmp_path / "run" / "learning_curve.png").exists()
