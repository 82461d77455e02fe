"""Optimizers of clients and server, FedProx and weighting: equal to TFF's own algorithms with the same parts."""

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff
from numpy_model import loss_and_gradient, max_difference
from tff_reference import run_rounds_of_tff, split

from tff_fedavg import build_fed_avg, build_fed_sgd

CLIENTS = [0, 1, 3, 4]
NUM_EXAMPLES = [7, 1, 20, 10]
UNIFORM = tff.learning.ClientWeighting.UNIFORM
optimizers = tff.learning.optimizers


def weights_of(state):
    return state.global_model_weights.trainable


def run_rounds(process, rounds):
    state = process.initialize()
    for _ in range(rounds):
        state, _ = process.next(state, CLIENTS)
    return state


def random_optimizer(name, rng):
    rate = float(10 ** rng.uniform(-2, -0.5))
    match name:
        case "sgd":
            return optimizers.build_sgdm(rate)
        case "momentum":
            return optimizers.build_sgdm(rate, rng.uniform(0.1, 0.9))
        case "adam":
            return optimizers.build_adam(rate, rng.uniform(0.5, 0.95), rng.uniform(0.9, 0.999), 1e-3)
        case "adagrad":
            return optimizers.build_adagrad(rate, rng.uniform(0.01, 0.2), 1e-3)
        case "yogi":
            return optimizers.build_yogi(rate, rng.uniform(0.5, 0.95), rng.uniform(0.9, 0.999), 1e-2, 1e-3)


@pytest.mark.parametrize(
    ("seed", "client", "server"),
    [
        (0, "momentum", "sgd"),
        (1, "adam", "momentum"),
        (2, "adagrad", "adam"),
        (3, "yogi", "yogi"),
        (4, "sgd", "adagrad"),
    ],
)
def test_rounds_equal_those_of_tffs_own_fed_avg_with_these_optimizers(
    worker, model, client_arrays, client_dataset, seed, client, server
):
    rng = np.random.default_rng(seed)
    client_optimizer, server_optimizer = random_optimizer(client, rng), random_optimizer(server, rng)
    weighting = list(tff.learning.ClientWeighting)[seed % 2]
    settings = dict(epochs=int(rng.integers(1, 4)), batch_size=int(rng.integers(2, 9)))
    reference = tff.learning.algorithms.build_weighted_fed_avg(
        model, client_optimizer, server_optimizer, client_weighting=weighting
    )
    expected, _ = run_rounds_of_tff(reference, client_arrays, CLIENTS, **settings, rounds=3)
    process = build_fed_avg(
        model,
        client_dataset,
        **settings,
        client_optimizer=client_optimizer,
        server_optimizer=server_optimizer,
        client_weighting=weighting,
    )
    state = run_rounds(process, 3)
    assert max_difference(weights_of(state), weights_of(expected)) < 1e-6
    assert max_difference(weights_of(state), model.initial_weights[0]) > 1e-4


def proximal_update(weights, x, y, order, *, epochs, batch_size, learning_rate, strength):
    """A client of FedProx by hand: the gradient of l + mu / 2 |w - w_t|^2."""
    w_t = weights
    for _ in range(epochs):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            _, gradient = loss_and_gradient(weights, x[batch], y[batch])
            weights = [w - learning_rate * (g + strength * (w - v)) for w, g, v in zip(weights, gradient, w_t)]
    return weights


def fed_prox_by_hand(model, client_arrays, strength, **settings):
    w_0 = model.initial_weights[0]
    expected = [np.zeros_like(w, float) for w in w_0]
    for k, n_k in zip(CLIENTS, NUM_EXAMPLES):
        x, y = client_arrays[k]["x"], client_arrays[k]["y"]
        w_k = proximal_update(w_0, x, y, split(0, 0, k, n_k), strength=strength, **settings)
        expected = [e + n_k / sum(NUM_EXAMPLES) * w for e, w in zip(expected, w_k)]
    return expected


@pytest.mark.parametrize("strength", [0.1, 3.0])
def test_fed_prox_is_the_proximal_step_by_hand(worker, model, client_arrays, client_dataset, strength):
    settings = dict(epochs=3, batch_size=4, learning_rate=0.1)
    state = run_rounds(build_fed_avg(model, client_dataset, **settings, proximal_strength=strength), 1)
    assert max_difference(weights_of(state), fed_prox_by_hand(model, client_arrays, strength, **settings)) < 1e-6


def test_tffs_own_fed_prox_has_the_opposite_sign(worker, model, client_arrays):
    """Of TFF 0.87 the proximal term drives a client away from w_t, so its rounds are no reference for FedProx."""
    settings = dict(epochs=3, batch_size=4)
    reference = tff.learning.algorithms.build_weighted_fed_prox(model, 0.5, optimizers.build_sgdm(0.1))
    found, _ = run_rounds_of_tff(reference, client_arrays, CLIENTS, **settings, rounds=1)
    expected = fed_prox_by_hand(model, client_arrays, -0.5, **settings, learning_rate=0.1)
    assert max_difference(weights_of(found), expected) < 1e-6


def test_a_learning_rate_takes_the_place_of_the_optimizers(worker, model, client_dataset):
    settings = dict(epochs=2, batch_size=4)
    replaced = build_fed_avg(
        model, client_dataset, **settings, client_optimizer=optimizers.build_adam(7.0), learning_rate=lambda t: 0.01
    )
    own = build_fed_avg(model, client_dataset, **settings, client_optimizer=optimizers.build_adam(0.01))
    assert max_difference(weights_of(run_rounds(replaced, 2)), weights_of(run_rounds(own, 2))) < 1e-7


def test_uniform_weighting_gives_each_client_of_a_round_the_same_weight(worker, model, client_arrays, client_dataset):
    process = build_fed_sgd(model, client_dataset, learning_rate=0.5, client_weighting=UNIFORM)
    w_0 = model.initial_weights[0]
    gradients = [loss_and_gradient(w_0, client_arrays[k]["x"], client_arrays[k]["y"])[1] for k in CLIENTS]
    expected = [w - 0.5 * np.mean(g, axis=0) for w, g in zip(w_0, zip(*gradients))]
    assert max_difference(weights_of(run_rounds(process, 1)), expected) < 1e-6


@pytest.mark.parametrize("argument", ["client_optimizer", "server_optimizer"])
def test_an_optimizer_that_fails_in_the_graph_is_named(model, client_dataset, argument):
    settings = {"epochs": 1, "batch_size": 5, "learning_rate": 0.1}
    settings[argument] = optimizers.build_adafactor(learning_rate=0.1)
    with pytest.raises(ValueError, match=f"^{argument} is a _AdafactorOptimizer, which fails: ") as error:
        build_fed_avg(model, client_dataset, **settings)
    assert "\n" not in str(error.value)


class OnEvenSteps(optimizers.Optimizer):
    """SGD that takes every other step. In the graphs that TFF builds `==` would be False."""

    def __init__(self, rate=1.0):
        self.rate = rate

    def initialize(self, specs):
        return tf.constant(0)

    def next(self, step, weights, gradients):
        rate = tf.where(step % 2 == 0, self.rate, 0.0)
        return step + 1, tuple(w - rate * g for w, g in zip(weights, gradients))


class Noisy(OnEvenSteps):
    def next(self, state, weights, gradients):
        return state, tuple(w - g + tf.random.normal(w.shape) for w, g in zip(weights, gradients))


def test_an_optimizer_of_ones_own_may_compare(worker, model, client_dataset):
    process = build_fed_sgd(model, client_dataset, learning_rate=0.5, server_optimizer=OnEvenSteps())
    sgd = build_fed_sgd(model, client_dataset, learning_rate=0.5)
    expected = weights_of(run_rounds(sgd, 1))
    assert max_difference(weights_of(run_rounds(process, 1)), expected) == 0
    assert max_difference(weights_of(run_rounds(process, 2)), expected) == 0
    own = build_fed_avg(model, client_dataset, epochs=2, batch_size=None, client_optimizer=OnEvenSteps(0.1))
    one = build_fed_avg(model, client_dataset, epochs=1, batch_size=None, learning_rate=0.1)
    assert max_difference(weights_of(run_rounds(own, 1)), weights_of(run_rounds(one, 1))) < 1e-7


def test_an_optimizer_that_draws_the_same_in_each_step_is_refused(model, client_dataset):
    with pytest.raises(ValueError, match="^server_optimizer is a Noisy, which draws random numbers, the same in each"):
        build_fed_sgd(model, client_dataset, learning_rate=0.5, server_optimizer=Noisy())


def test_fed_sgd_takes_a_server_optimizer(worker, model, client_dataset):
    """Two steps of momentum 0.5 on the same gradient: 1 + 1.5 of it, where the weights stay about the same."""
    rate = 1e-3
    process = build_fed_sgd(
        model, client_dataset, learning_rate=rate, server_optimizer=optimizers.build_sgdm(1.0, momentum=0.5)
    )
    plain = run_rounds(build_fed_sgd(model, client_dataset, learning_rate=rate), 1)
    w_0 = model.initial_weights[0]
    steps = [(w - v) for w, v in zip(w_0, weights_of(plain))]
    expected = [w - 2.5 * step for w, step in zip(w_0, steps)]
    assert max_difference(weights_of(run_rounds(process, 2)), expected) < 1e-5
