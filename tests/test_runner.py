"""Experiments from beginning to end, in this program: what an experiment says is what is run, kept and resumed."""

import errno
import re

import numpy as np
import pytest
import tensorflow as tf

from binaries.command_line import data_flags, saved_run
from binaries.command_line.progress import ProgressPrinter
from binaries.experiment import Experiment, runner
from binaries.experiment.observer import Observer
from tff_fedavg import picture, saved_state
from tff_fedavg.learning_curve import Target
from tff_fedavg.metrics_table import MetricsTable, read_metrics
from tff_fedavg.run_directory import RunDirectory
from tff_fedavg.training import NotSavedError

OWN_TASK = "docs/examples/auto_mpg.py"
TASK_WITH_DROPOUT = """
import re

import numpy as np
import tensorflow as tf
import tasks
from tff_fedavg import ClientDataset


def build(seed):
    rng = np.random.default_rng(seed)
    clients = [{"x": rng.normal(size=[20, 4]).astype("f"), "y": rng.integers(3, size=20)} for _ in range(6)]
    normalization = tf.keras.layers.Normalization()
    normalization.adapt(np.concatenate([client["x"] for client in clients]))

    def model():
        copy = tf.keras.layers.Normalization.from_config(normalization.get_config())
        copy.build([None, 4])
        copy.set_weights(normalization.get_weights())
        copy.finalize_state()
        return tf.keras.Sequential(
            [
                tf.keras.layers.InputLayer([4]),
                copy,
                tf.keras.layers.Dense(8, "relu", kernel_regularizer="l2"),
                tf.keras.layers.Dropout(0.5),
                tf.keras.layers.Dense(3),
            ]
        )

    data = ClientDataset.from_arrays(clients)
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    metrics = {"accuracy": "accuracy"}
    return tasks.Task(name="noisy", train=data, test=data, keras_model_fn=model, loss=loss, metrics=metrics)
"""


TASK_AT_ITS_TARGET = """
import numpy as np
import tensorflow as tf
import tasks
from tff_fedavg import ClientDataset


def build():
    data = ClientDataset.from_arrays([{"x": np.ones([4, 2], "f"), "y": np.ones(4, "f")}])
    model = lambda: tf.keras.Sequential([tf.keras.layers.InputLayer([2]), tf.keras.layers.Dense(1)])
    return tasks.Task("near", data, data, model, "mse", {"mae": "mae"}, target=tasks.Target(9.0, "mae", True))
"""


class StopAfter(Observer):
    def __init__(self, round_number):
        self._round_number = round_number

    def update(self, progress):
        if progress.round_number == self._round_number:
            raise KeyboardInterrupt


def saved(run_dir, round_number):
    """The saved values of a round, of the state's weights and optimizer alike."""
    with np.load(run_dir / "states" / f"round_{round_number}.npz") as state:
        return {name: state[name] for name in state if name not in ("run", "metrics")}


def test_a_run_with_dropout_regularisers_and_optimizers_resumes_bit_for_bit(tmp_path):
    (tmp_path / "noisy.py").write_text(TASK_WITH_DROPOUT)
    experiment = Experiment(
        task=str(tmp_path / "noisy.py"),
        client_optimizer="adam",
        learning_rate=0.01,
        server_optimizer="yogi",
        server_learning_rate=0.05,
        proximal_strength=0.1,
        aggregator="robust",
        client_fraction=0.5,
        batch_size=6,
        rounds=5,
    )
    runner.run(experiment, tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt) as kept:  # As a notebook does, with all that its traceback holds.
        runner.run(experiment, tmp_path / "stopped", observer=StopAfter(3))
    runner.run(experiment, tmp_path / "stopped")
    assert kept.type is KeyboardInterrupt
    straight, resumed = saved(tmp_path / "straight", 5), saved(tmp_path / "stopped", 5)
    assert straight.keys() == resumed.keys() and len(straight) > 10
    assert all(np.array_equal(straight[name], resumed[name]) for name in straight)
    rows = [read_metrics(tmp_path / name / "metrics.csv") for name in ("straight", "stopped")]
    for row in (*rows[0], *rows[1]):
        row.pop("training_time_in_seconds", None)
    assert rows[0] == rows[1]


def test_a_task_without_an_accuracy_runs_to_its_own_target(tmp_path):
    experiment = Experiment(task=OWN_TASK, learning_rate=0.003, client_fraction=0.3, rounds=60)
    outcome = runner.run(experiment, tmp_path / "run")
    assert ", best mean_absolute_error 2." in outcome and "rounds to 2.5: not reached" not in outcome
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert rows[-1]["evaluation/mean_absolute_error"] <= 2.5 < rows[-2]["evaluation/mean_absolute_error"]
    assert (tmp_path / "run" / "learning_curve.png").exists()


def test_a_model_that_is_refused_leaves_no_run(tmp_path):
    """So that the same directory takes the run of the model that is mended, with other settings too."""
    refused = TASK_WITH_DROPOUT.replace("tf.keras.layers.Dropout(0.5)", "tf.keras.layers.BatchNormalization()")
    path = tmp_path / "task.py"
    path.write_text(refused)
    with pytest.raises(ValueError, match="BatchNormalization"):
        runner.run(Experiment(task=str(path), learning_rate=0.1, rounds=1), tmp_path / "run")
    path.write_text(TASK_WITH_DROPOUT)
    runner.run(Experiment(task=str(path), learning_rate=0.2, rounds=1), tmp_path / "run")


def test_a_run_whose_task_was_edited_goes_on_and_says_so(tmp_path, capsys, monkeypatch):
    """As do the programs that use its model."""
    path = tmp_path / "task.py"
    path.write_text(TASK_WITH_DROPOUT)
    warnings = []

    class Listener(Observer):
        def warn(self, message):
            warnings.append(message)

    monkeypatch.setattr(data_flags, "directories", dict)

    def run(rounds):
        experiment = Experiment(task=str(path), learning_rate=0.1, rounds=rounds, target_accuracy=1.0)
        runner.run(experiment, tmp_path / "run", observer=Listener())
        return warnings[:]

    def told_of_the_task():
        saved_run.build_task(tmp_path / "run", Experiment.read(tmp_path / "run"))
        return capsys.readouterr().err

    assert run(1) == []
    assert told_of_the_task() == ""
    path.write_text(TASK_WITH_DROPOUT.replace("Dropout(0.5)", "Dropout(0.25)"))
    told = told_of_the_task()
    assert told == f"{path} has changed since the run in {tmp_path}/run: its task is what is in it now\n"
    (told,) = run(2)
    assert told.startswith(f"{path} has changed since round 1 of the run in {tmp_path}/run, which goes on with what is")
    assert run(3) == [told]  # Once.
    assert told_of_the_task() == ""


def test_a_run_at_its_target_says_so_and_goes_on_without_one(tmp_path):
    """Also where the target is no accuracy."""
    (tmp_path / "task.py").write_text(TASK_AT_ITS_TARGET)
    settings = dict(task=str(tmp_path / "task.py"), learning_rate=1e-3)
    first = runner.run(Experiment(**settings, rounds=2), tmp_path / "run")
    assert "0 rounds, best mae " in first and "rounds to 9: 0.0" in first
    again = runner.run(Experiment(**settings, rounds=2), tmp_path / "run")
    assert "rounds to 9: 0.0 (reached before; --target_accuracy=1 goes on without a target)" in again
    more = runner.run(Experiment(**settings, rounds=2, target_accuracy=1), tmp_path / "run")
    assert more.startswith("2 rounds, best mae ") and "rounds to" not in more


def test_the_outcome_says_how_far_a_run_was_evaluated(tmp_path):
    """Of one that was stopped between two evaluations, and is asked for no more rounds."""
    directory, table = RunDirectory(tmp_path), MetricsTable(tmp_path / "metrics.csv")
    table.append(0, {"evaluation/accuracy": 0.1})
    table.append(3, {"training_time_in_seconds": 2.0})
    outcome = runner._outcome(Experiment(algorithm="sgd"), directory, None, Target(None), 3)
    expected = "3 rounds, best accuracy 0.1000 up to round 0, the last that was evaluated, 2.0 s of training"
    assert outcome == f"{expected}; see {tmp_path}"


def test_a_target_accuracy_is_refused_where_there_is_no_accuracy(tmp_path):
    experiment = Experiment(task=OWN_TASK, learning_rate=0.003, target_accuracy=0.5)
    with pytest.raises(ValueError, match="auto_mpg has no accuracy: its metrics are loss, mean_absolute_error"):
        runner.run(experiment, tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (dict(aggregator="dp", noise_multiplier=1.0), r"epsilon \d.* at delta 1e-05"),
        (dict(aggregator="compressed"), r" 4\.7 MB up, 15\.9 MB down"),
        (dict(algorithm="fedsgd", server_optimizer="momentum", partition="dirichlet"), r"15\.9 MB up"),
    ],
)
def test_the_outcome_says_what_was_sent_and_how_private_it_is(tmp_path, settings, expected):
    experiment = Experiment(data="embedded", rounds=2, **settings)
    outcome = runner.run(experiment, tmp_path / "run", cache_dir=tmp_path / "cache")
    assert re.search(expected, outcome), outcome
    assert Experiment.read(tmp_path / "run") == experiment


def test_a_metric_that_is_no_number_is_shown_as_such_and_the_run_goes_to_its_end(tmp_path, capsys):
    (tmp_path / "unknown.py").write_text(
        """
import numpy as np
import tensorflow as tf
import tasks
from tff_fedavg import ClientDataset

def build():
    train = ClientDataset.from_arrays([{"x": np.ones([4, 2], "f"), "y": np.ones(4, "f")}])
    test = ClientDataset.from_arrays([{"x": np.full([4, 2], np.nan, "f"), "y": np.ones(4, "f")}])
    model = lambda: tf.keras.Sequential([tf.keras.layers.InputLayer([2]), tf.keras.layers.Dense(1)])
    return tasks.Task(name="unknown", train=train, test=test, keras_model_fn=model, loss="mse", metrics={})
"""
    )
    experiment = Experiment(task=str(tmp_path / "unknown.py"), learning_rate=0.1, client_fraction=1.0, rounds=2)
    with ProgressPrinter(str(tmp_path / "run"), 2) as printer:
        outcome = runner.run(experiment, tmp_path / "run", observer=printer)
    assert outcome.startswith("2 rounds, best loss nan, ")
    assert "round 2/2  loss nan (best nan)" in capsys.readouterr().out


def test_the_loss_on_the_training_data_is_the_mean_over_all_examples(tmp_path):
    experiment = Experiment(task=OWN_TASK, learning_rate=1e-6, rounds=1, eval_train=True)
    runner.run(experiment, tmp_path / "run")
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    task = experiment.build_task()
    tf.keras.utils.set_random_seed(experiment.seed)
    model = task.keras_model_fn()
    model.compile(loss="mse")
    clients = [task.train.load(k) for k in range(task.train.num_clients)]
    x, y = (np.concatenate([client[name] for client in clients]) for name in ("x", "y"))
    assert rows[0]["evaluation/train_loss"] == pytest.approx(model.evaluate(x, y, verbose=0), rel=1e-5)


def test_of_a_run_whose_files_are_lost_what_has_ended_it_is_told(tmp_path, worker):
    class Losing(Observer):
        def update(self, progress):
            (tmp_path / "run" / "metrics.csv").unlink()

    with pytest.raises(NotSavedError, match="metrics.csv"):
        runner.run(Experiment(data="embedded"), tmp_path / "run", cache_dir=tmp_path / "cache", observer=Losing())


def test_on_a_full_disk_what_is_told_is_the_state_that_could_not_be_written(tmp_path, monkeypatch, worker):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saved_state, "save_state", full)
    monkeypatch.setattr(picture, "save", full)
    with pytest.raises(NotSavedError, match="^the state of round 0 could not be written: "):
        runner.run(Experiment(data="embedded"), tmp_path / "run", cache_dir=tmp_path / "cache")
