import errno
import os
import re
import shutil

import numpy as np
import pytest
import tensorflow_federated as tff
from numpy_model import max_difference

from tff_fedavg import build_fed_avg, build_sampling_fn, learning_curve, saved_state, training
from tff_fedavg.learning_curve import Target
from tff_fedavg.metrics_table import MetricsTable, read_metrics
from tff_fedavg.run_directory import RunDirectory


@pytest.fixture(scope="module")
def process(worker, model, client_dataset):
    return build_fed_avg(model, client_dataset, epochs=1, batch_size=3, learning_rate=0.1)


class Run:
    """One run directory; `to` trains on to a round, as a new program would."""

    def __init__(self, path, process):
        self.path = path
        self.process = process
        self.mended = []
        self.rounds = []

    def to(self, total_rounds, **changes):
        directory = RunDirectory(self.path)
        directory.start({}, {}, Target(None))
        arguments = {
            "training_selection_fn": build_sampling_fn(6, 0.5, seed=0),
            "target": Target(None),
            "evaluate": lambda weights: {"accuracy": float(np.abs(weights.trainable[0]).mean())},
            "on_round": lambda progress: self.rounds.append(progress.round_number),
            "on_mended": self.mended.append,
        }
        return training.train(self.process, directory, total_rounds=total_rounds, **{**arguments, **changes})

    def metrics(self):
        rows = read_metrics(self.path / "metrics.csv")
        return [{k: v for k, v in row.items() if k != "training_time_in_seconds"} for row in rows]


def weights_of(state):
    return state.global_model_weights.trainable


def test_resumed_run_gives_bit_equal_weights_and_metrics(tmp_path, process):
    straight, stopped = Run(tmp_path / "straight", process), Run(tmp_path / "stopped", process)
    expected = straight.to(7)
    for total_rounds in (2, 5, 7):
        state = stopped.to(total_rounds)
    assert max_difference(weights_of(state), weights_of(expected)) == 0
    assert stopped.metrics() == straight.metrics()
    assert stopped.rounds == list(range(8))


def test_run_that_is_finished_computes_nothing_more(tmp_path, process):
    run = Run(tmp_path, process)
    run.to(3)
    run.rounds.clear()
    run.to(3)
    assert run.rounds == []


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_interrupted_run_saves_the_last_round_and_goes_on_from_there(tmp_path, process, interrupt):
    straight, stopped = Run(tmp_path / "straight", process), Run(tmp_path / "stopped", process)
    expected = straight.to(5)

    def stop_in_round_4(round_number):
        if round_number == 4:
            raise interrupt
        return build_sampling_fn(6, 0.5, seed=0)(round_number)

    with pytest.raises(interrupt):
        stopped.to(5, training_selection_fn=stop_in_round_4)
    stopped.rounds.clear()
    state = stopped.to(5)
    assert stopped.rounds == [4, 5]
    assert max_difference(weights_of(state), weights_of(expected)) == 0


def test_rounds_after_the_saved_state_are_computed_again_after_a_crash(tmp_path, process):
    """A crash loses the rounds since the last save; their rows in metrics.csv are replaced by equal ones."""
    straight, crashed = Run(tmp_path / "straight", process), Run(tmp_path / "crashed", process)
    straight.to(6)
    crashed.to(6)
    (tmp_path / "crashed" / "states" / "round_6.npz").unlink()
    crashed.rounds.clear()
    crashed.to(6)
    assert crashed.rounds == list(range(1, 7))
    assert crashed.metrics() == straight.metrics()
    assert crashed.mended == []


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace_by_fifo(path):
    path.unlink()
    os.mkfifo(path)


def test_a_state_that_cannot_be_read_is_not_taken_for_a_damaged_one(tmp_path, process, monkeypatch):
    """As without the permission, or with too many files open: the run is as good as before."""
    run = Run(tmp_path, process)
    run.to(4)

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    before = sorted(path.name for path in (tmp_path / "states").iterdir())
    monkeypatch.setattr(saved_state, "open_regular", refuse)
    with pytest.raises(ValueError, match="/states/round_4.npz cannot be read: Permission denied"):
        run.to(5)
    assert sorted(path.name for path in (tmp_path / "states").iterdir()) == before


@pytest.mark.parametrize("damage", [cut, flip, lambda path: path.write_bytes(b""), replace_by_fifo])
def test_damaged_state_falls_back_to_the_one_before_and_says_so(tmp_path, process, damage):
    run = Run(tmp_path, process)
    run.to(2)
    expected = run.to(4)
    damage(tmp_path / "states" / "round_4.npz")
    run.rounds.clear()
    state = run.to(4)
    (message,) = run.mended
    assert message.startswith(f"{tmp_path}/states/round_4.npz is damaged (") and "\n" not in message
    assert "going on from the state before it; it is kept as damaged_" in message
    assert run.rounds == [3, 4]
    assert max_difference(weights_of(state), weights_of(expected)) == 0


def test_a_state_of_another_round_or_run_is_not_taken_for_that_of_this_one(tmp_path, process):
    run, other = Run(tmp_path / "run", process), Run(tmp_path / "other", process)
    straight = run.to(4)
    states = tmp_path / "run" / "states"
    (states / "round_4.npz").rename(states / "round_9.npz")
    other.to(8)
    shutil.copy(tmp_path / "other" / "states" / "round_8.npz", states)
    run.rounds.clear()
    state = run.to(4)
    assert [message.split(":")[0] for message in run.mended[:2]] == [
        f"{states}/round_9.npz is the state of round 4",
        f"{states}/round_8.npz is the state of another run",
    ]
    assert run.rounds == [1, 2, 3, 4]
    assert max_difference(weights_of(state), weights_of(straight)) == 0


def test_a_run_whose_model_or_algorithm_was_changed_is_refused_and_stays_as_it_is(
    tmp_path, process, model, client_dataset
):
    straight = Run(tmp_path, process).to(4)
    adam = tff.learning.optimizers.build_adam(0.1)
    other = build_fed_avg(model, client_dataset, epochs=1, batch_size=3, learning_rate=0.1, server_optimizer=adam)
    run = Run(tmp_path, other)
    with pytest.raises(ValueError, match="round_4.npz is the state of another model or algorithm, which differs in "):
        run.to(8)
    assert (run.mended, run.rounds) == ([], [])
    assert max_difference(weights_of(Run(tmp_path, process).to(4)), weights_of(straight)) == 0


def cut_in_row_2(path):
    path.write_bytes(path.read_bytes()[: -len(path.read_bytes().splitlines(True)[-1]) - 5])


def type_an_accuracy_of_2(path):
    rows = path.read_text().splitlines(True)
    rows[2] = re.sub("[0-9.]+\r?\n?$", "2.0\n", rows[2])
    path.write_text("".join(rows))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_in_row_2, "is not what was written up to round 4: written anew from the saved state; damaged_"),
        (type_an_accuracy_of_2, "is not what was written up to round 4"),
        (lambda path: path.write_text(""), "is not what was written up to round 4"),
        (lambda path: path.write_text(path.read_text().splitlines(True)[0]), "is not what was written up to round 4"),
        (lambda path: path.write_bytes(b"\xff\0" * 99), "is not what was written up to round 4"),
        (lambda path: path.unlink(), "is missing: written anew up to round 4, from the saved state"),
    ],
    ids=["cut", "edited", "empty", "header only", "binary", "missing"],
)
def test_metrics_that_are_not_what_was_written_are_mended_from_the_state_and_told(tmp_path, process, damage, message):
    straight, run = Run(tmp_path / "straight", process), Run(tmp_path / "run", process)
    straight.to(6)
    run.to(4)
    damage(tmp_path / "run" / "metrics.csv")
    run.to(6, target=Target(1.5))
    (told,) = run.mended
    assert told.startswith(f"{tmp_path}/run/metrics.csv {message}")
    assert run.metrics() == straight.metrics()
    assert run.rounds == list(range(7))


def test_metrics_of_which_no_state_is_left_are_kept_aside_and_the_run_starts_anew(tmp_path, process):
    run = Run(tmp_path, process)
    run.to(4)
    written = (tmp_path / "metrics.csv").read_bytes()
    shutil.rmtree(tmp_path / "states")
    run.rounds.clear()
    run.to(4)
    assert run.rounds == list(range(5))
    (told,) = run.mended
    assert "has rounds of which no state is saved: they are run again; damaged_" in told
    (aside,) = tmp_path.glob("damaged_*_metrics.csv")
    assert aside.read_bytes() == written


def test_something_else_in_the_place_of_the_metrics_is_refused(tmp_path, process):
    run = Run(tmp_path, process)
    run.to(1)
    replace_by_fifo(tmp_path / "metrics.csv")
    with pytest.raises(ValueError, match="metrics.csv cannot be read: .* is a FIFO"):
        run.to(2)


def test_what_a_killed_save_left_is_gone_with_the_next_start(tmp_path, process):
    run = Run(tmp_path, process)
    run.to(1)
    (tmp_path / "states" / "round_7.npz.tmp").write_bytes(b"PK")
    run.to(2)
    assert {path.name for path in (tmp_path / "states").iterdir()} == {f"round_{n}.npz" for n in (0, 1, 2)}


def test_training_stops_at_the_target(tmp_path, process):
    run = Run(tmp_path, process)
    accuracies = iter([0.1, 0.5, 0.4, 0.8, 0.9])
    run.to(10, evaluate=lambda _: {"accuracy": next(accuracies)}, target=Target(0.8))
    assert run.rounds == [0, 1, 2, 3]


def test_evaluations_come_in_round_0_their_multiples_and_the_last(tmp_path, process):
    run = Run(tmp_path, process)
    run.to(7, rounds_per_evaluation=3)
    assert learning_curve.evaluations(run.metrics())[0] == [0, 3, 6, 7]


@pytest.mark.parametrize("aggregator", [None, tff.aggregators.UnweightedMeanFactory()])
def test_three_rounds_without_a_finite_update_stop_the_run_and_the_weights_stay(
    tmp_path, worker, model, client_dataset, aggregator
):
    """Also where the aggregator has an average of zeros, as that of differential privacy."""
    process = build_fed_avg(model, client_dataset, epochs=2, batch_size=3, learning_rate=1e30, aggregator=aggregator)
    run = Run(tmp_path, process)
    with pytest.raises(training.DivergedError, match="rounds 1 to 3 diverged: no client had a finite update"):
        # Client 2 has no examples, and so no update that is not finite.
        run.to(9, training_selection_fn=lambda round_number: [0, 2, 3, 4])
    assert sorted(path.name for path in (tmp_path / "states").iterdir()) == ["round_0.npz", "round_2.npz"]
    rows = run.metrics()
    assert [row["round_num"] for row in rows] == [0, 1, 2]
    assert [row["clients_left_out"] for row in rows[1:]] == [3, 3]
    assert rows[0]["evaluation/accuracy"] == rows[2]["evaluation/accuracy"]
    good_process = build_fed_avg(model, client_dataset, epochs=1, batch_size=3, learning_rate=0.1)
    assert max_difference(weights_of(Run(tmp_path, good_process).to(2)), model.initial_weights[0]) == 0


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_in_the_last_save_does_not_prevent_it(tmp_path, process, monkeypatch, interrupt):
    save = saved_state.save_state
    calls = []

    def interrupted(run_dir, round_number, *args, **kwargs):
        calls.append(round_number)
        if calls == [0, 3]:
            raise interrupt
        save(run_dir, round_number, *args, **kwargs)

    monkeypatch.setattr(saved_state, "save_state", interrupted)
    with pytest.raises(interrupt):
        Run(tmp_path, process).to(3)
    assert calls == [0, 3, 3]
    assert saved_state.saved_rounds(tmp_path) == [0, 3]


@pytest.mark.parametrize(
    ("owner", "function", "what"),
    [(MetricsTable, "append", "metrics of round 0"), (saved_state, "save_state", "state of round 0")],
)
def test_what_cannot_be_written_is_named(tmp_path, process, monkeypatch, owner, function, what):
    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(owner, function, full_disk)
    with pytest.raises(training.NotSavedError, match=f"{what} could not be written: .*No space left on device"):
        Run(tmp_path, process).to(1)
