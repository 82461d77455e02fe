import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff
from numpy_model import client_update as numpy_client_update
from numpy_model import loss_and_gradient, max_difference

from tff_fedavg.client_update import client_gradient, client_update, minibatch_seed, sgd_step

SEED = [3, 4]


def split(num_examples):
    """The order in which ClientUpdate goes through the examples."""
    return tf.random.experimental.stateless_shuffle(tf.range(num_examples), SEED).numpy()


def run(fn, *args):
    """Runs a TensorFlow function in the worker; TFF's functional Keras models work in TFF computations only."""
    return tff.tensorflow.computation(fn)(*args)


def weights_of(model):
    """The initial weights, in a graph."""
    return tff.learning.models.ModelWeights(*tf.nest.map_structure(tf.constant, model.initial_weights))


def batch_fn(arrays):
    return lambda indices, seed: (tf.gather(arrays["x"], indices), tf.gather(tf.cast(arrays["y"], tf.int32), indices))


def update(model, arrays, epochs=1, batch_size=10, learning_rate=0.1):
    return run(
        lambda: client_update(
            model,
            weights_of(model),
            tf.constant(len(arrays["y"])),
            batch_fn(arrays),
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=tf.constant(SEED),
        )
    )


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 6, 10, 20, 50, 2**31 - 1])
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
            model,
            weights_of(model),
            tf.constant(n),
            batch_fn(arrays),
            seed=tf.constant(SEED),
        )
    )
    if n == 0:
        assert loss_sum == 0
        assert all(np.all(g == 0) for g in gradient)
    else:
        loss, expected = loss_and_gradient(model.initial_weights[0], arrays["x"], arrays["y"])
        assert loss_sum == pytest.approx(n * loss, rel=1e-5)
        assert max_difference(gradient, expected) < 1e-6


def test_every_batch_is_augmented_with_its_own_seed_in_every_epoch(worker, model, client_arrays):
    arrays = client_arrays[0]  # 7 examples: with B = 4 the batches of two epochs have 4, 3, 4 and 3.

    def noisy_batch_fn(indices, seed):
        x, y = batch_fn(arrays)(indices, seed)
        return x + tf.random.stateless_normal(tf.shape(x), seed), y

    weights, _ = run(
        lambda: client_update(
            model,
            weights_of(model),
            tf.constant(7),
            noisy_batch_fn,
            epochs=2,
            batch_size=4,
            learning_rate=0.1,
            seed=tf.constant(SEED),
        )
    )
    expected = model.initial_weights[0]
    order = split(7)
    for step, batch in enumerate([order[:4], order[4:]] * 2):
        seed = tf.random.experimental.stateless_fold_in(tf.constant(SEED), step)
        noise = tf.random.stateless_normal([len(batch), 4], seed).numpy()
        _, gradient = loss_and_gradient(expected, arrays["x"][batch] + noise, arrays["y"][batch])
        expected = [w - 0.1 * g for w, g in zip(expected, gradient)]
    assert max_difference(weights, expected) < 1e-5


@pytest.fixture(scope="module")
def embedding_model():
    """Three symbols of ten, embedded in two dimensions, are classified."""
    return tff.learning.models.functional_model_from_keras(
        tf.keras.Sequential(
            [
                tf.keras.layers.InputLayer([3], dtype=tf.int32),
                tf.keras.layers.Embedding(10, 2),
                tf.keras.layers.Flatten(),
                tf.keras.layers.Dense(4),
            ]
        ),
        tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        (tf.TensorSpec([None, 3], tf.int32), tf.TensorSpec([None], tf.int32)),
    )


def test_a_step_descends_along_the_gradient_of_repeated_embeddings(worker, embedding_model):
    x, y = np.array([[1, 7, 1], [7, 7, 3]]), np.array([0, 2])
    weights = embedding_model.initial_weights[0]

    def step():
        batch = tf.constant(x, tf.int32), tf.constant(y, tf.int32)
        return sgd_step(embedding_model, weights_of(embedding_model), batch, 0.5, tf.constant(SEED))

    result, loss = run(step)

    embeddings, kernel, bias = weights
    logits = embeddings[x].reshape(2, 6) @ kernel + bias
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    d_logits = (probabilities - np.eye(4)[y]) / 2
    d_embeddings = np.zeros_like(embeddings)
    np.add.at(d_embeddings, x, (d_logits @ kernel.T).reshape(2, 3, 2))
    hidden = embeddings[x].reshape(2, 6)
    gradient = [d_embeddings, hidden.T @ d_logits, d_logits.sum(0)]
    assert max_difference(result, [w - 0.5 * g for w, g in zip(weights, gradient)]) < 1e-6
    assert loss == pytest.approx(-np.log(probabilities[[0, 1], y]).mean(), rel=1e-5)


def test_a_step_computes_nothing_of_the_size_of_the_embeddings(embedding_model):
    """Of all the operations only the one that subtracts the rows gives a tensor of that shape."""
    shapes = []

    @tff.tensorflow.computation
    def step():
        weights = weights_of(embedding_model)
        operations = set(tf.compat.v1.get_default_graph().get_operations())
        batch = tf.constant([[1, 7, 1]]), tf.constant([0])
        result, _ = sgd_step(embedding_model, weights, batch, 0.5, tf.constant(SEED))
        new = set(tf.compat.v1.get_default_graph().get_operations()) - operations
        shapes.extend(o.type for o in new for t in o.outputs if t.shape == [10, 2])
        return tuple(result)

    assert [type for type in shapes if type != "Identity"] == ["TensorScatterSub"]


def test_client_gradient_has_the_shapes_of_the_weights_that_are_embeddings_too(embedding_model):
    """Else a round of FedSGD with a model of texts is refused by TFF."""
    weights = embedding_model.initial_weights[0]

    @tff.tensorflow.computation(np.int32)
    def gradient(num_examples):
        x, y = tf.constant([[1, 7, 1], [7, 7, 3]]), tf.constant([0, 2])
        batch_fn = lambda indices, seed: (tf.gather(x, indices), tf.gather(y, indices))  # noqa: E731
        arguments = weights_of(embedding_model), num_examples, batch_fn
        return tuple(client_gradient(embedding_model, *arguments, seed=tf.constant(SEED))[0])

    assert [list(t.shape) for t in gradient.type_signature.result] == [list(w.shape) for w in weights]


def test_minibatch_seeds_differ_between_runs_rounds_and_clients():
    keys = [(s, t, k) for s in range(3) for t in range(3) for k in range(3)]
    seeds = {tuple(minibatch_seed(s, tf.constant(t), tf.constant(k)).numpy()) for s, t, k in keys}
    assert len(seeds) == len(keys)
