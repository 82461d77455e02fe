import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff
from numpy_model import client_update as numpy_client_update
from numpy_model import loss_and_gradient, max_difference

from tff_fedavg.client_update import client_gradient, client_update, minibatch_seed

SEED = [3, 4]


def split(num_examples):
    """The order in which ClientUpdate goes through the examples."""
    return tf.random.experimental.stateless_shuffle(tf.range(num_examples), SEED).numpy()


def run(fn, *args):
    """Runs a TensorFlow function in the worker; TFF's functional Keras models work in TFF computations only."""
    return tff.tensorflow.computation(fn)(*args)


def batch_fn(arrays):
    return lambda indices: (tf.gather(arrays["x"], indices), tf.gather(tf.cast(arrays["y"], tf.int32), indices))


def update(model, arrays, epochs=1, batch_size=10, learning_rate=0.1):
    return run(
        lambda: client_update(
            model,
            [tf.constant(w) for w in model.initial_weights[0]],
            tf.constant(len(arrays["y"])),
            batch_fn(arrays),
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=tf.constant(SEED),
        )
    )


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 6, 10, 20, 50])
def test_client_update_is_minibatch_sgd_by_hand(worker, model, client_arrays, epochs, batch_size):
    # With B = 6 the last batch has 2 of the 20 examples, and with B = 50 the only batch has all 20.
    arrays = client_arrays[3]
    expected = numpy_client_update(
        model.initial_weights[0],
        arrays["x"],
        arrays["y"],
        split(20),
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=0.1,
    )
    weights, _ = update(model, arrays, epochs, batch_size)
    assert max_difference(weights, expected) < 1e-5


def test_infinite_batch_size_is_one_batch_of_all_examples(worker, model, client_arrays):
    arrays = client_arrays[3]
    _, gradient = loss_and_gradient(model.initial_weights[0], arrays["x"], arrays["y"])
    weights, _ = update(model, arrays, batch_size=None)
    expected = [w - 0.1 * g for w, g in zip(model.initial_weights[0], gradient)]
    assert max_difference(weights, expected) < 1e-6


def test_loss_sum_is_the_mean_loss_times_the_examples_seen(worker, model, client_arrays):
    arrays = client_arrays[3]
    loss, _ = loss_and_gradient(model.initial_weights[0], arrays["x"], arrays["y"])
    # With a rate of (almost) zero all batches see the same weights.
    _, loss_sum = update(model, arrays, epochs=2, batch_size=6, learning_rate=1e-12)
    assert loss_sum == pytest.approx(2 * 20 * loss, rel=1e-5)


def test_client_without_examples_returns_the_weights_it_got(worker, model, client_arrays):
    for batch_size in (10, None):
        weights, loss_sum = update(model, client_arrays[2], epochs=2, batch_size=batch_size)
        assert max_difference(weights, model.initial_weights[0]) == 0
        assert loss_sum == 0


@pytest.mark.parametrize("client", [0, 1, 2, 3])
def test_client_gradient_is_the_gradient_over_all_examples_by_hand(worker, model, client_arrays, client):
    arrays = client_arrays[client]
    n = len(arrays["y"])
    gradient, loss_sum = run(
        lambda: client_gradient(
            model, [tf.constant(w) for w in model.initial_weights[0]], tf.constant(n), batch_fn(arrays)
        )
    )
    if n == 0:
        assert loss_sum == 0
        assert all(np.all(g == 0) for g in gradient)
    else:
        loss, expected = loss_and_gradient(model.initial_weights[0], arrays["x"], arrays["y"])
        assert loss_sum == pytest.approx(n * loss, rel=1e-5)
        assert max_difference(gradient, expected) < 1e-6


def test_minibatch_seeds_differ_between_runs_rounds_and_clients():
    keys = [(s, t, k) for s in range(3) for t in range(3) for k in range(3)]
    seeds = {tuple(minibatch_seed(s, tf.constant(t), tf.constant(k)).numpy()) for s, t, k in keys}
    assert len(seeds) == len(keys)
