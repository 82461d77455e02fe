"""Computations in subrounds and in shares: the same results, in less memory, whatever the number of clients."""

import contextlib

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff
from conftest import own_worker
from numpy_model import max_difference
from test_fed_avg import diverging_for

from tff_fedavg import ClientDataset, build_client_eval, build_fed_avg, build_fed_eval, local_worker, runtime, subrounds
from tff_fedavg.client_ids import _deal_out

CLIENTS = [0, 1, 3, 4, 5]
AGGREGATORS = {
    "mean": lambda: None,
    "mean of each update": tff.aggregators.MeanFactory,
    "unweighted": tff.aggregators.UnweightedMeanFactory,
    "robust": tff.learning.robust_aggregator,
    "compressed": tff.learning.compression_aggregator,
}


def build(model, client_dataset, aggregator="mean", **more):
    settings = dict(epochs=2, batch_size=3, learning_rate=0.1, aggregator=AGGREGATORS[aggregator]())
    return build_fed_avg(model, client_dataset, **settings, **more)


def run_rounds(process, rounds=2, clients=CLIENTS):
    state = process.initialize()
    for _ in range(rounds):
        state, metrics = process.next(state, clients)
    return state, metrics


@contextlib.contextmanager
def subrounds_of(clients):
    with local_worker(clients_per_subround=clients):
        yield


@pytest.mark.parametrize("aggregator", list(AGGREGATORS))
def test_a_round_is_the_same_in_subrounds(worker, model, client_dataset, monkeypatch, aggregator):
    process = build(model, client_dataset, aggregator)
    expected, expected_metrics = run_rounds(process)
    invoke, numbers = subrounds.invoke, []
    monkeypatch.setattr(subrounds, "invoke", lambda *args: numbers.append(args[2]) or invoke(*args))
    with subrounds_of(1 if aggregator == "mean" else 2):  # TFF's clients are shares of ours with the mean.
        found, metrics = run_rounds(process)
    assert len(numbers) == 2 and min(numbers) > 1
    assert max_difference(tf.nest.flatten(found), tf.nest.flatten(expected)) < 1e-6
    flat, expected_flat = (tf.nest.flatten(m) for m in (metrics, expected_metrics))
    np.testing.assert_allclose(np.array(flat, float), np.array(expected_flat, float), rtol=1e-5)


def test_subrounds_give_the_same_bits_again(worker, model, client_dataset):
    process = build(model, client_dataset, "robust")
    with subrounds_of(1):
        runs = [tf.nest.flatten(run_rounds(process)[0]) for _ in range(2)]
    assert max_difference(*runs) == 0


def test_evaluations_are_the_same_in_subrounds(worker, model, client_dataset):
    weights = tff.learning.models.ModelWeights(*model.initial_weights)
    fed_eval, client_eval = build_fed_eval(model, client_dataset), build_client_eval(model, client_dataset)
    expected, expected_of_each = fed_eval(weights, CLIENTS), client_eval(weights, CLIENTS)
    with subrounds_of(2):
        assert fed_eval(weights, CLIENTS) == pytest.approx(expected, rel=1e-6)
        assert client_eval(weights, CLIENTS) == expected_of_each


def test_arguments_of_any_order_and_none_are_divided_by_clients(worker):
    """TFF's own context for several workers gives 6 for the first of these."""
    add = tff.tensorflow.computation(lambda x, y: x + y, [np.int32, np.int32])
    at_clients, at_server = tff.FederatedType(np.int32, tff.CLIENTS), tff.FederatedType(np.int32, tff.SERVER)

    @tff.federated_computation(at_clients, at_server)
    def clients_first(xs, s):
        return tff.federated_sum(tff.federated_map(add, (xs, tff.federated_broadcast(s))))

    @tff.federated_computation(at_clients)
    def clients_only(xs):
        return tff.federated_sum(xs)

    @tff.federated_computation(at_server)
    def server_only(s):
        return tff.federated_map(tff.tensorflow.computation(lambda x: x + 1, np.int32), s)

    with subrounds_of(2):
        assert clients_first([1, 2, 3, 4], 0) == 10
        assert clients_only([1, 2, 3, 4, 5]) == 15
        assert server_only(1) == 2


def test_what_cannot_be_divided_is_told(worker):
    multiply = tff.tensorflow.computation(lambda x, y: x * y, [np.int32, np.int32])

    @tff.federated_computation(tff.FederatedType(np.int32, tff.CLIENTS))
    def sum_of_a_sum(xs):
        total = tff.federated_broadcast(tff.federated_sum(xs))
        return tff.federated_sum(tff.federated_map(multiply, (xs, total)))

    assert sum_of_a_sum([1, 2, 3]) == 36
    with subrounds_of(2):
        with pytest.raises(ValueError, match="needs all clients of a round in one worker"):
            sum_of_a_sum([1, 2, 3])


def test_shares_are_of_about_the_same_size_and_hold_each_client_once():
    sizes = np.random.default_rng(0).integers(1, 100, 50).tolist()
    shares = _deal_out(range(50), sizes, 4)
    assert sorted(k for share in shares for k in share) == list(range(50))
    loads = [sum(sizes[k] for k in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes)


@pytest.mark.parametrize("number", [1, 2, 3, 7])
def test_a_round_is_the_same_in_any_number_of_shares(worker, model, client_dataset, monkeypatch, number):
    """More shares than clients too, and with a client whose update is left out."""
    dataset = diverging_for(client_dataset, [3])
    process = build_fed_avg(model, dataset, epochs=2, batch_size=None, learning_rate=0.1)
    expected, expected_metrics = run_rounds(process)
    monkeypatch.setattr(runtime, "num_shares", lambda num_clients: number)
    found, metrics = run_rounds(process)
    assert max_difference(tf.nest.flatten(found), tf.nest.flatten(expected)) < 1e-6
    assert metrics["client_work"]["train"] == pytest.approx(expected_metrics["client_work"]["train"], rel=1e-6)
    assert metrics["clients_left_out"] == expected_metrics["clients_left_out"] == 1


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A model of 4 MB and 40 clients of one example."""
    keras_model = tf.keras.Sequential([tf.keras.layers.InputLayer([1000]), tf.keras.layers.Dense(1000)])
    rows = np.zeros([1, 1000], np.float32)
    dataset = ClientDataset.from_arrays([{"x": rows, "y": rows}] * 40, directory=tmp_path_factory.mktemp("large"))
    loss = tf.keras.losses.MeanSquaredError()
    return tff.learning.models.functional_model_from_keras(keras_model, loss, dataset.batch_spec), dataset


def test_the_updates_of_a_subround_take_a_gigabyte(large):
    """Of 4 MB each, in four copies; on the server there are as many again, which no client sends."""
    next_round = build(*large, "robust", server_optimizer=tff.learning.optimizers.build_adam(0.1)).next
    for clients, cores, expected in ((10, 2, 1), (62, 2, 1), (63, 2, 2), (1000, 2, 17), (1000, 500, 2)):
        arg = tff.structure.Struct.unnamed(None, list(range(clients)))
        assert subrounds.num_for_memory(next_round, arg, None, cores) == expected


@pytest.mark.parametrize("aggregator", ["mean", "robust"])  # The mean's TFF clients are at most as many as cores.
def test_the_worker_does_not_grow_with_the_rounds_when_their_numbers_of_clients_differ(large, aggregator):
    """TFF's own runtime takes 10 to 15 times the model's size more for each number of clients."""
    with local_worker():
        process = own_worker()
        fed_avg = build(*large, aggregator)
        state = fed_avg.initialize()
        megabytes = []
        for _ in range(2):
            for clients in range(1, 21):
                fed_avg.next(state, range(clients))
            megabytes.append(process.memory_info().rss / 1e6)
    assert megabytes[1] < megabytes[0] + 200  # Not 800 or more.
