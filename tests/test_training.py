import shutil

import numpy as np
import pytest
import tensorflow_federated as tff
from numpy_model import max_difference

from tff_fedavg import build_fed_avg, build_sampling_fn, learning_curve, training
from tff_fedavg.learning_curve import Target
from tff_fedavg.run_directory import RunDirectory


@pytest.fixture(scope="module")
def process(worker, model, client_dataset):
    return build_fed_avg(model, client_dataset, epochs=1, batch_size=3, learning_rate=0.1)


class Run:
    """One run directory; `to` trains on to a round, as a new program would."""

    def __init__(self, path, process):
        self.path = path
        self.process = process
        self.damaged = []
        self.rounds = []

    def to(self, total_rounds, **changes):
        directory = RunDirectory(self.path)
        arguments = {
            "training_selection_fn": build_sampling_fn(6, 0.5, seed=0),
            "target": Target(None),
            "evaluate": lambda weights: {"accuracy": float(np.abs(weights.trainable[0]).mean())},
            "on_round": lambda progress: self.rounds.append(progress.round_number),
            "on_damaged": lambda path, _: self.damaged.append(path.name),
        }
        return training.train(self.process, directory, total_rounds=total_rounds, **{**arguments, **changes})

    def metrics(self):
        rows = learning_curve.read_metrics(self.path / "metrics.csv")
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
    shutil.rmtree(tmp_path / "crashed" / "states" / "program_state_6")
    crashed.rounds.clear()
    crashed.to(6)
    assert crashed.rounds == list(range(7))
    assert crashed.metrics() == straight.metrics()


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "saved_model.pb").unlink(),
        lambda path: (path / "saved_model.pb").write_bytes((path / "saved_model.pb").read_bytes()[:100]),
        lambda path: next((path / "variables").glob("*.data*")).write_bytes(b"damaged"),
        lambda path: [f.unlink() for f in path.rglob("*") if f.is_file()],
    ],
    ids=["no graph", "cut graph", "damaged values", "empty"],
)
def test_damaged_state_falls_back_to_the_one_before_and_says_so(tmp_path, process, damage):
    run = Run(tmp_path, process)
    run.to(2)
    expected = run.to(4)
    damage(tmp_path / "states" / "program_state_4")
    run.rounds.clear()
    state = run.to(4)
    assert run.damaged == ["program_state_4"]
    assert run.rounds == [3, 4]
    assert max_difference(weights_of(state), weights_of(expected)) == 0


def test_training_stops_at_the_target(tmp_path, process):
    run = Run(tmp_path, process)
    accuracies = iter([0.1, 0.5, 0.4, 0.8, 0.9])
    run.to(10, evaluate=lambda _: {"accuracy": next(accuracies)}, target=Target(0.8))
    assert run.rounds == [0, 1, 2, 3]


def test_evaluations_come_in_round_0_their_multiples_and_the_last(tmp_path, process):
    run = Run(tmp_path, process)
    run.to(7, rounds_per_evaluation=3)
    assert learning_curve.evaluations(run.metrics())[0] == [0, 3, 6, 7]


def test_three_rounds_without_a_finite_update_stop_the_run_and_the_weights_stay(
    tmp_path, worker, model, client_dataset
):
    process = build_fed_avg(model, client_dataset, epochs=2, batch_size=3, learning_rate=1e30)
    run = Run(tmp_path, process)
    with pytest.raises(training.DivergedError, match="rounds 1 to 3 diverged: no client had a finite update"):
        # Client 2 has no examples, and so no update that is not finite.
        run.to(9, training_selection_fn=lambda round_number: [0, 2, 3, 4])
    assert [path.name for path in (tmp_path / "states").iterdir()] == ["program_state_2"]
    rows = run.metrics()
    assert [row["round_num"] for row in rows] == [0, 1, 2]
    assert [row["clients_left_out"] for row in rows[1:]] == [3, 3]
    assert rows[0]["evaluation/accuracy"] == rows[2]["evaluation/accuracy"]
    good_process = build_fed_avg(model, client_dataset, epochs=1, batch_size=3, learning_rate=0.1)
    assert max_difference(weights_of(Run(tmp_path, good_process).to(2)), model.initial_weights[0]) == 0


@pytest.mark.parametrize(
    ("manager", "method", "what"),
    [
        (tff.program.CSVFileReleaseManager, "release", "metrics of round 0"),
        (tff.program.FileProgramStateManager, "save", "state of round 1"),
    ],
)
def test_what_cannot_be_written_is_named(tmp_path, process, monkeypatch, manager, method, what):
    async def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manager, method, full_disk)
    with pytest.raises(training.NotSavedError, match=f"{what} could not be written: .*No space left on device"):
        Run(tmp_path, process).to(1)
