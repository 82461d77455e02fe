"""Whatever happens to the files that programs read: what comes of it is right, rebuilt and told, or refused in a line.

`--damage_cases=5000` runs more cases than the few that are run by default, `-s` shows what came of them.
"""

import contextlib
import io
import os
import shutil
import signal
import sys

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff
from damage import Cases

from binaries.experiment import Experiment
from binaries.reproduction import figure_1, outcome, plan
from tff_fedavg import run_directory, training
from tff_fedavg.client_data import prepare_client_dataset
from tff_fedavg.learning_curve import Target
from tff_fedavg.run_directory import RunDirectory

ModelWeights = tff.learning.models.ModelWeights
State = tff.learning.templates.LearningAlgorithmState
ROUNDS = 8


@pytest.fixture
def num_cases(request):
    return request.config.getoption("damage_cases")


@contextlib.contextmanager
def errors_to(told):
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        yield
    told += errors.getvalue().splitlines()


def test_client_files(tmp_path, num_cases):
    rng = np.random.default_rng(0)
    clients = [{"x": rng.normal(size=[n, 3]), "y": rng.integers(9, size=n).astype(np.uint8)} for n in (5, 0, 9, 1)]
    key = {"name": "toy", "checksums": {"toy.csv": "1"}}

    def prepare(cache_dir):
        return prepare_client_dataset(
            cache_dir, key, lambda: iter(clients), lambda example: (example["x"], example["y"])
        )

    directory = prepare(tmp_path / "original").directory.name

    def read(cache_dir, told):
        with errors_to(told):
            dataset = prepare(cache_dir)
        loaded = [dataset.load(k) for k in range(dataset.num_clients)]
        x, y = dataset.batch(dataset.read(tf.constant(2)), tf.range(9), tf.zeros([2], tf.int32))
        return (
            len(loaded) == len(clients)
            and all(a[name].tolist() == b[name].tolist() for a, b in zip(loaded, clients) for name in ("x", "y"))
            and np.array_equal(x, clients[2]["x"])
            and np.array_equal(y, clients[2]["y"])
        )

    files = [f"{directory}/{name}" for name in ("examples.bin", "offsets.bin", "manifest.json")]
    Cases(tmp_path, tmp_path / "original", num_cases, seed=0).run(files, read, names=lambda file: directory)


class Process:
    """A training whose weights after each round are known, and no work."""

    def initialize(self):
        return State(ModelWeights((np.zeros([20, 5], np.float32), np.float32([1, 2])), ()), (), np.int32(0), (), ())

    def next(self, state, client_ids):
        round_number = int(state.client_work) + 1
        weights = tuple(w + np.float32(1 / (round_number + sum(client_ids))) for w in state.global_model_weights[0])
        new_state = state._replace(global_model_weights=ModelWeights(weights, ()), client_work=np.int32(round_number))
        metrics = {
            "client_work": {"train": {"loss": 1 / round_number, "num_examples": 3}},
            "finalizer": {"update_non_finite": 0},
        }
        return tff.learning.templates.LearningProcessOutput(new_state, metrics)


SETTINGS = Experiment(task="mnist_2nn", rounds=ROUNDS).to_json()


def train(run_dir, told, rounds=ROUNDS):
    """Trains to the last round, as `binaries.train` does, with a save after each round; returns what came of it."""
    directory = RunDirectory(run_dir)
    experiment = Experiment.read(run_dir)
    if experiment is not None:
        experiment.go_on(run_dir, {**SETTINGS, "rounds": rounds})
    state = training.train(
        Process(),
        directory,
        training_selection_fn=lambda t: [t % 3],
        evaluate=lambda weights: {"accuracy": float(weights.trainable[0][0, 0] / 10)},
        target=Target(0.9),
        total_rounds=rounds,
        rounds_per_evaluation=2,
        on_start=lambda t: directory.start({**SETTINGS, "rounds": rounds}, {}, Target(0.9), after_round=t),
        on_mended=told.append,
    )
    rows = run_directory.read_metrics(run_dir)
    for row in rows:
        row.pop("training_time_in_seconds", None)
    return [w.tobytes() for w in state.global_model_weights.trainable], rows


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """What comes of a run that nothing disturbs."""
    return train(tmp_path_factory.mktemp("straight"), [])


@pytest.fixture
def saves_each_round(monkeypatch):
    monkeypatch.setattr(training, "_SECONDS_BETWEEN_SAVES", -1.0)


def test_run_directory(tmp_path, num_cases, straight, saves_each_round):
    train(tmp_path / "original", [], rounds=6)
    states = [f"states/round_{t}.npz" for t in (4, 5, 6)]
    assert all((tmp_path / "original" / state).exists() for state in states)
    files = ["config.json", "metrics.csv", "metrics.csv", *states[1:]]
    cases = Cases(tmp_path, tmp_path / "original", num_cases, seed=1)
    cases.run(files, lambda run_dir, told: train(run_dir, told) == straight)


@pytest.mark.parametrize("file", ["config.json", "outcome.json", "metrics.csv", "losses.csv"])
def test_results(tmp_path, num_cases, file):
    grid = plan.table(4)[0]
    results = tmp_path / "original"
    run = grid.run(grid.rates[0])
    directory = run.directory(results)
    train(directory, [])
    shutil.rmtree(directory / "states")
    outcome.write_outcome(directory, {"rounds": 8, "best_accuracy": 0.25, "date": "2017-04-20"}, "metrics.csv")
    figure_1_directory = results / "runs" / figure_1.name("shared")
    figure_1_directory.mkdir()
    (figure_1_directory / "losses.csv").write_text("theta,loss\n-0.2,0.9\n0.0,0.5\n")
    outcome.write_outcome(figure_1_directory, {"date": "2017-04-20"}, "losses.csv")

    def read_all(results_dir):
        found = run.outcome(results_dir)
        return (
            found,
            found and outcome.read_metrics(run.directory(results_dir)),
            found and Experiment.read(run.directory(results_dir)),
            figure_1.read(results_dir, "shared"),
        )

    expected = read_all(results)
    assert all(expected)

    def read(results_dir, told):
        outcome._told.clear()
        with errors_to(told):
            found = read_all(results_dir)
        for directory, i in ((run.directory(results_dir), 0), (results_dir / "runs" / "figure_1-shared", 3)):
            if not (directory / "outcome.json").exists():
                return not found[i]  # As of a run that has not ended.
        # What was told is left out, and the rest is what it was.
        return all(a == b or (not a and told) for a, b in zip(found, expected))

    of = figure_1_directory if file == "losses.csv" else directory
    files = [str((of / name).relative_to(results)) for name in (file, "outcome.json")]
    cases = Cases(tmp_path, results, num_cases // 4, seed=2)
    cases.run(files[: 1 if file != "losses.csv" else 2], read, names=lambda file: file.rpartition("/")[0])


def file_operations(run_dir, act):
    """Calls `act` before each operation on a file below a directory, with its number; returns their count."""
    count = 0
    audited = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate")

    def hook(event, arguments):
        nonlocal count
        if event in audited and str(arguments[0]).startswith(str(run_dir)):
            count += 1
            act(count)

    sys.addaudithook(hook)
    return lambda: count


def in_a_child(function):
    """Runs a function in a copy of this process; returns its exit status."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = function()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def count_operations(run_dir):
    counted = run_dir.with_suffix(".count")

    def run():
        count = file_operations(run_dir, lambda number: None)
        train(run_dir, [])
        counted.write_text(str(count()))
        return 0

    assert in_a_child(run) == 0
    return int(counted.read_text())


def test_client_files_whose_preparation_was_killed_before_any_operation_on_a_file_are_prepared_by_the_next(tmp_path):
    clients = [{"x": np.arange(3.0), "y": np.arange(3)}, {"x": np.arange(2.0), "y": np.arange(2)}]
    key = {"name": "toy", "checksums": {"toy.csv": "1"}}

    def prepare(cache_dir):
        return prepare_client_dataset(
            cache_dir, key, lambda: iter(clients), lambda example: (example["x"], example["y"])
        )

    count = file_operations(tmp_path / "count", lambda number: None)
    prepare(tmp_path / "count")
    operations = count()
    assert operations > 10
    for number in range(1, operations + 1):
        cache_dir = tmp_path / f"killed_{number}"

        def killed(cache_dir=cache_dir, number=number):
            file_operations(cache_dir, lambda n: n == number and os.kill(os.getpid(), signal.SIGKILL))
            prepare(cache_dir)

        assert in_a_child(killed) == -signal.SIGKILL, number
        dataset = prepare(cache_dir)
        assert [dataset.load(k)["x"].tolist() for k in range(2)] == [[0, 1, 2], [0, 1]], number
        assert list(cache_dir.iterdir()) == [dataset.directory], number
    print(f"killed before each of {operations} operations on files: prepared by the next")


def test_killed_before_any_operation_on_a_file_and_resumed_a_run_ends_bit_equal(tmp_path, straight, saves_each_round):
    operations = count_operations(tmp_path / "count")
    assert 60 < operations < 250
    for number in range(1, operations + 1):
        run_dir = tmp_path / f"killed_{number}"

        def killed(run_dir=run_dir, number=number):
            file_operations(run_dir, lambda n: n == number and os.kill(os.getpid(), signal.SIGKILL))
            train(run_dir, [])

        assert in_a_child(killed) == -signal.SIGKILL, number
        told = []
        assert train(run_dir, told) == straight, number
        assert told == [], number
        left = [path.name for path in run_dir.rglob("*.tmp")]
        assert left == [], number
        shutil.rmtree(run_dir)
    print(f"killed before each of {operations} operations on files: all bit-equal")


def test_a_disk_that_is_full_from_any_operation_on_ends_in_a_line_and_the_run_goes_on_bit_equal(
    tmp_path, straight, saves_each_round
):
    statuses = []
    for number in range(1, count_operations(tmp_path / "count") + 1):
        run_dir = tmp_path / f"full_{number}"

        def full(run_dir=run_dir, number=number):
            def act(n):
                if n >= number:
                    raise OSError(28, "No space left on device")

            file_operations(run_dir, act)
            try:
                train(run_dir, [])
            except (training.NotSavedError, ValueError) as e:
                return 2 if "\n" not in str(e) and "No space left on device" in str(e) else 3
            return 0

        # Where it is an operation on a file that is only read, or one that is no longer needed, the run may end well.
        statuses.append(in_a_child(full))
        assert statuses[-1] in (0, 2), number
        assert train(run_dir, []) == straight, number
        shutil.rmtree(run_dir)
    assert statuses.count(2) > 0.9 * len(statuses) > 50
