import numpy as np
import numpy_model
import pytest
import tensorflow as tf
from numpy_model import max_difference

from tff_fedavg import CentralizedSGD, build_fed_sgd, learning_curve, metrics_table, training
from tff_fedavg.client_data import ClientDataset
from tff_fedavg.client_files import write_client_dataset
from tff_fedavg.run_directory import RunDirectory


class RecordingDataset(ClientDataset):
    """A client dataset that keeps the indices of the examples that were read."""

    def __init__(self, directory, preprocess_fn):
        self.read_indices = []
        super().__init__(directory, preprocess_fn)
        self.read_indices.clear()  # Of those that preprocess_fn was tried with.

    def gather(self, indices):
        self.read_indices.append(indices)
        return super().gather(indices)


@pytest.fixture
def dataset(client_dataset):
    return RecordingDataset(client_dataset.directory, client_dataset.preprocess_fn)


def build(model, dataset, **changes):
    return CentralizedSGD(model, dataset, **{"batch_size": 7, "learning_rate": 0.3, **changes})


def weights_of(output):
    return output.state.global_model_weights.trainable


def test_updates_are_those_of_sgd_by_hand(model, dataset, client_arrays):
    x, y = (np.concatenate([arrays[name] for arrays in client_arrays]) for name in ("x", "y"))
    process = build(model, dataset)
    output = process.next(process.initialize(), 10)
    weights, losses = list(model.initial_weights[0]), []
    for batch in dataset.read_indices:
        loss, gradient = numpy_model.loss_and_gradient(weights, x[batch], y[batch])
        losses += [loss] * len(batch)
        weights = [w - 0.3 * g for w, g in zip(weights, gradient)]
    assert max_difference(weights_of(output), weights) < 1e-6
    assert output.metrics["client_work"]["train"]["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert output.metrics["client_work"]["train"]["num_examples"] == len(losses)
    assert output.metrics["finalizer"]["update_non_finite"] == 0
    assert output.state.client_work == 10


def test_each_epoch_sees_every_example_once_in_an_order_of_its_own(model, dataset):
    process = build(model, dataset)
    process.next(process.initialize(), 16)
    assert [len(indices) for indices in dataset.read_indices] == 2 * [7, 7, 7, 7, 7, 7, 7, 1]
    first, second = (np.concatenate(dataset.read_indices[8 * epoch : 8 * epoch + 8]) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(50))
    assert list(first) != list(second) != list(range(50)) != list(first)
    other = RecordingDataset(dataset.directory, dataset.preprocess_fn)
    process = build(model, other, seed=1)
    process.next(process.initialize(), 8)
    assert list(np.concatenate(other.read_indices)) != list(first)


def test_the_order_of_many_examples_is_random(tmp_path, model, client_dataset):
    """60,000 examples in sorted order give minibatches from all of them, with the spread of uniform draws."""
    n = 60_000
    write_client_dataset(tmp_path, [{"x": np.zeros([n, 4], np.float32), "y": np.zeros(n, np.uint8)}])
    dataset = RecordingDataset(tmp_path, client_dataset.preprocess_fn)
    process = build(model, dataset, batch_size=100)
    process.next(process.initialize(), 100)
    tenths = np.stack([np.bincount(indices * 10 // n, minlength=10) for indices in dataset.read_indices])
    # Of the examples of a minibatch 10 come from each tenth on average, with a standard deviation of 3.
    assert abs(tenths.mean(0) - 10).max() < 5 * 3 / np.sqrt(100)
    assert abs(tenths.std() - 3) < 0.5


def test_an_update_on_all_examples_is_a_round_of_fed_sgd_with_all_clients(worker, model, dataset):
    process = build(model, dataset, batch_size=50)
    fed_sgd = build_fed_sgd(model, dataset, learning_rate=0.3)
    output, state = process.next(process.initialize(), 1), fed_sgd.initialize()
    expected = fed_sgd.next(state, list(range(dataset.num_clients)))
    assert max_difference(weights_of(output), weights_of(expected)) < 1e-6
    for name in ("loss", "num_examples"):
        values = [o.metrics["client_work"]["train"][name] for o in (output, expected)]
        assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_learning_rate_follows_a_schedule_over_the_updates(model, dataset):
    schedule = tf.keras.optimizers.schedules.ExponentialDecay(0.3, decay_steps=2, decay_rate=0.5, staircase=True)
    process = build(model, dataset, learning_rate=schedule)
    scheduled = process.next(process.initialize(), 3)
    state = process.initialize()
    for learning_rate in (0.3, 0.3, 0.15):
        output = build(model, dataset, learning_rate=learning_rate).next(state, 1)
        state = output.state
    assert max_difference(weights_of(scheduled), weights_of(output)) < 1e-6


def test_resumed_run_gives_bit_equal_weights_and_evaluates_the_rounds_asked_for(tmp_path, model, dataset):
    process = build(model, dataset)

    def run(path, total_rounds):
        directory = RunDirectory(path)
        directory.start({}, {}, learning_curve.Target(None))
        state = training.train(
            process,
            directory,
            training_selection_fn=lambda t: min(4 - (t - 1) % 4, total_rounds + 1 - t),
            evaluate=lambda weights: {"accuracy": float(np.abs(weights.trainable[0]).mean())},
            target=learning_curve.Target(None),
            total_rounds=total_rounds,
            rounds_per_evaluation=4,
        )
        return state, learning_curve.evaluations(metrics_table.read_metrics(directory.metrics_csv))

    straight, curve = run(tmp_path / "straight", 12)
    for total_rounds in (6, 12):
        resumed, resumed_curve = run(tmp_path / "stopped", total_rounds)
    assert max_difference(straight.global_model_weights.trainable, resumed.global_model_weights.trainable) == 0
    assert list(curve[0]) == [0, 4, 8, 12]
    assert [p for p in zip(*resumed_curve) if p[0] != 6] == list(zip(*curve))


def test_a_loss_that_is_no_longer_finite_is_reported(model, dataset):
    process = build(model, dataset, learning_rate=1e30)
    metrics = process.next(process.initialize(), 5).metrics
    assert metrics["finalizer"]["update_non_finite"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size (B) is 0"),
        ({"learning_rate": 0.0}, "learning_rate (eta) is 0"),
        ({"learning_rate": float("nan")}, "learning_rate (eta) is nan"),
    ],
)
def test_arguments_out_of_range_are_refused(model, dataset, changes, message):
    with pytest.raises(ValueError) as error:
        build(model, dataset, **changes)
    assert message in str(error.value)


def test_no_updates_are_refused(model, dataset):
    process = build(model, dataset)
    with pytest.raises(ValueError, match="num_updates is 0; it must be from 1"):
        process.next(process.initialize(), 0)


def test_a_dataset_without_examples_is_refused(tmp_path, model, client_dataset):
    write_client_dataset(tmp_path, [{"x": np.zeros([0, 4], np.float32), "y": np.zeros(0, np.uint8)}])
    with pytest.raises(ValueError, match="has no examples"):
        build(model, ClientDataset(tmp_path, client_dataset.preprocess_fn))
