"""The program `binaries/evaluate.py`, against plain Keras."""

import csv

import numpy as np
import pytest
import tensorflow as tf
from conftest import NO_SEED
from programs import run_at_once, run_program

import tasks
import tff_fedavg
from binaries.command_line import saved_run
from tff_fedavg import distribution, metrics_table, models, saved_state
from tff_fedavg.learning_curve import Target
from tff_fedavg.run_directory import read_config


def evaluate_run(run_dir, *flags):
    result = run_program("binaries.evaluate", f"--run_dir={run_dir}", f"--cache_dir={run_dir.parent / 'cache'}", *flags)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.splitlines()


def rows_of(path):
    with open(path, newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def test_test_metrics_are_those_of_the_run(short_run):
    row = metrics_table.read_metrics(short_run / "metrics.csv")[-1]
    lines = evaluate_run(short_run, "--round=3")
    expected = f"loss {row['evaluation/loss']:.4f}, accuracy {row['evaluation/accuracy']:.4f}"
    assert lines == [
        f"round 3 of {short_run} (TensorFlow takes some seconds to start)",
        f"on the 1000 examples of the test set: {expected}",
    ]
    assert not (short_run / "evaluation").exists()


def test_each_client_has_the_accuracy_that_plain_keras_finds(short_run, tmp_path):
    lines = evaluate_run(short_run, f"--output_dir={tmp_path}", "--split=train")
    rows = rows_of(tmp_path / "round_3_train.csv")
    task = tasks.build_task("mnist_2nn", data="embedded", cache_dir=short_run.parent / "cache")
    model = tff_fedavg.keras_model(
        models.mnist_2nn, saved_state.load_weights(short_run, 3, run=read_config(short_run)["run"])
    )
    accuracies = []
    for k in range(100):
        records = task.train.read(tf.constant(k))
        x, y = task.train.batch(records, tf.range(len(records)), NO_SEED)
        accuracies.append(np.mean(model(x).numpy().argmax(-1) == y))
    assert [(row["client"], row["num_examples"]) for row in rows] == [(k, 40) for k in range(100)]
    assert [row["accuracy"] for row in rows] == pytest.approx(accuracies, abs=1e-6)
    mean, median, worst = np.mean(accuracies), np.median(accuracies), np.sort(accuracies)[:10].mean()
    assert lines[1:] == [
        f"accuracy of 100 clients on their training examples: mean {mean:.4f}, weighted by examples {mean:.4f}, "
        f"median {median:.4f}, worst 10% {worst:.4f}",
        f"see {tmp_path}/round_3_train.csv and {tmp_path}/round_3_train.png",
    ]
    assert (tmp_path / "round_3_train.png").read_bytes().startswith(b"\x89PNG")


def test_personalization_has_a_row_per_client_and_its_numbers_are_those_of_the_rows(short_run, tmp_path):
    flags = ["--personalize_epochs=2", "--batch_size=0", "--learning_rate=0.05"]
    lines = evaluate_run(short_run, f"--output_dir={tmp_path}", *flags)
    rows = rows_of(tmp_path / "round_3_personalized_E2.csv")
    assert [(row["client"], row["num_examples"], row["num_held_out"]) for row in rows] == [
        (k, 32, 8) for k in range(100)
    ]
    before, after = (np.array([row[f"accuracy_{when}"] for row in rows]) for when in ("before", "after"))
    assert f"mean {before.mean():.4f}, " in lines[2] and lines[2].startswith("before: ")
    assert f"mean {after.mean():.4f}, " in lines[3] and lines[3].startswith("after:  ")
    assert lines[4] == f"better for {np.sum(after > before)} clients, worse for {np.sum(after < before)}"
    assert (tmp_path / "round_3_personalized_E2.png").read_bytes().startswith(b"\x89PNG")


def test_clients_that_diverge_are_told_and_no_file_is_left(short_run, tmp_path):
    flags = [f"--run_dir={short_run}", f"--cache_dir={short_run.parent / 'cache'}", f"--output_dir={tmp_path}"]
    result = run_program("binaries.evaluate", *flags, "--personalize_epochs=2", "--learning_rate=1e30")
    told = "evaluate: 100 of 100 clients diverged: give a smaller --learning_rate\n"
    assert (result.returncode, result.stderr) == (2, told)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--personalize_epochs=0"], "--personalize_epochs=0: take an integer from 1 to 1,000,000"),
        (["--batch_size=5"], "--batch_size=5 needs --personalize_epochs: give that"),
        (["--personalize_epochs=1", "--batch_size=-1"], "--batch_size=-1: take an integer from 0 to"),
        (["--personalize_epochs=1", "--learning_rate=0"], "--learning_rate=0: take a number above 0"),
        (["--personalize_epochs=1", "--split=train"], "--split is of no use with --personalize_epochs"),
        (["--split=all"], "--split=all"),
        (["--output_dir=here"], "--output_dir is of no use without --split=train or --personalize_epochs"),
        (["--split=train", "--output_dir=/dev/null"], "/dev/null"),
        (["--round=1"], "has no state of round 1: take one of [0, 3]"),
    ],
)
def test_bad_flags_get_one_line_at_once(short_run, flags, message):
    result = run_at_once("binaries.evaluate", f"--run_dir={short_run}", *flags)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("evaluate: ") and result.stderr.count("\n") == 1
    assert message in result.stderr


def test_weights_of_another_model_are_told_with_their_shapes(short_run):
    weights = saved_state.load_weights(short_run, 3, run=read_config(short_run)["run"])
    task = tasks.build_task("mnist_cnn", data="embedded", cache_dir=short_run.parent / "cache")
    with pytest.raises(
        ValueError, match=r"the trainable weights of the run have the shapes \[\(784, 200\), .*, but those"
    ):
        saved_run.check_weights(weights, task.build_model(0))


def test_summary_of_accuracies_and_of_losses():
    values = [0.5, 0.1, 0.9, 0.3, 0.7, 0.2, 0.4, 0.6, 0.8, 1.0, 0.0]
    sizes = [1] * 10 + [11]
    accuracy = distribution.summarize(values, sizes, lower_is_better=False)
    assert (accuracy.mean, accuracy.median) == (pytest.approx(0.5), 0.5)
    assert accuracy.weighted_mean == pytest.approx(5.5 / 21)
    assert accuracy.worst == pytest.approx((0.0 + 0.1) / 2)  # Of 11 clients 2 are the worst tenth.
    assert distribution.summarize(values, sizes, lower_is_better=True).worst == pytest.approx((1.0 + 0.9) / 2)
    assert distribution.summarize([0.25], [3], lower_is_better=False).worst == 0.25


def test_histogram_has_every_client_in_one_bar(tmp_path, monkeypatch):
    import matplotlib.figure

    figures = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda f, *a, **k: (figures.append(f), save(f, *a, **k)))
    values = {"before": [0.1, 0.1, 0.5, 1.0], "after": [0.2, 1.0, 1.0, 1.0]}
    distribution.plot(tmp_path / "clients.png", values, target=Target(None), title="clients")
    assert (tmp_path / "clients.png").read_bytes().startswith(b"\x89PNG")
    bars = figures[0].axes[0].containers
    assert [sum(bar.get_height() for bar in each) for each in bars] == [4, 4]
    assert [line.get_xdata()[0] for line in figures[0].axes[0].lines] == pytest.approx([0.425, 0.8])
