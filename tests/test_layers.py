"""The layers against Keras's or TensorFlow's own, finite differences and NumPy; the LSTM through Keras and TFF."""

import collections
import warnings

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff
from conftest import NO_SEED
from tensorflow.python.keras.layers.recurrent import PeepholeLSTMCell

import tff_fedavg
from tff_fedavg import models
from tff_fedavg.client_files import write_client_dataset
from tff_fedavg.global_policy import global_policy
from tff_fedavg.layers import LocalResponseNormalization, MaxPooling, PeepholeLSTM
from tff_fedavg.masked import MaskedAccuracy

PADDING = 256


@pytest.fixture(autouse=True)
def _seed():
    tf.keras.utils.set_random_seed(0)


def keras_lstm(units, dtype=None):
    """The reference: the cell that was `tf.keras.experimental.PeepholeLSTMCell`, which TensorFlow keeps in private."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cell = PeepholeLSTMCell(units, recurrent_activation="sigmoid", dtype=dtype)
    return tf.keras.layers.RNN(cell, return_sequences=True, dtype=dtype)


def small_model(lstm_layer):
    return tf.keras.Sequential(
        [
            tf.keras.layers.InputLayer([None], dtype=tf.int32),
            tf.keras.layers.Embedding(258, 3),
            lstm_layer(7),
            lstm_layer(7),
            tf.keras.layers.Dense(258),
        ]
    )


def masked_loss():
    return tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=PADDING)


def randomize(weights):
    """Weights large enough for the gates to leave their linear range, biases and peepholes included.

    The matrices give sums of a variance near 1. With larger peepholes some cells of a long sequence grow without bound
    or not by the last bit of what they add up, and what comes out depends on the rounding of the processor at hand.
    """
    for w in weights:
        w.assign(tf.random.normal(w.shape, stddev=0.2 if w.shape.rank == 1 else w.shape[0] ** -0.5))


def outputs_and_gradients(layer, x, output_gradient):
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x)
    return [y, *tape.gradient(y, [x, *layer.trainable_weights], output_gradient)]


def assert_close(actual, expected, tolerance=1e-5):
    """Largest difference relative to the largest value, array by array."""
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected):
        a, e = np.asarray(a), np.asarray(e)
        assert a.shape == e.shape
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * np.abs(e).max(initial=0))


@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize(
    "batch, time, features, units", [(5, 13, 7, 32), (1, 1, 3, 2), (3, 2, 1, 1), (10, 80, 8, 256), (0, 4, 3, 2)]
)
def test_outputs_and_gradients_equal_those_of_the_keras_cell_in_float64(batch, time, features, units, in_graph):
    layer, reference = PeepholeLSTM(units), keras_lstm(units, "float64")
    x = tf.random.normal([batch, time, features])
    layer(x), reference(tf.cast(x, tf.float64))
    randomize(layer.weights)
    reference.set_weights(layer.get_weights())
    output_gradient = tf.random.normal([batch, time, units])
    exact = [tf.cast(value, tf.float64) for value in (x, output_gradient)]
    expected = tf.function(outputs_and_gradients)(reference, *exact)
    run = tf.function(outputs_and_gradients) if in_graph else outputs_and_gradients
    assert_close(run(layer, x, output_gradient), expected)


def test_weights_have_the_names_shapes_and_initial_values_of_the_keras_cell():
    layer, reference = PeepholeLSTM(64), keras_lstm(64)
    for each in (layer, reference):
        each(tf.zeros([1, 1, 100]))
    names = [[w.name.split("/")[-1] for w in each.weights] for each in (layer, reference)]
    assert names[0] == names[1]
    for actual, expected in zip(layer.get_weights(), reference.get_weights()):
        assert actual.shape == expected.shape
        np.testing.assert_allclose(actual.std(), expected.std(), rtol=0.3)
        np.testing.assert_allclose(actual.mean(), expected.mean(), atol=0.03)
    np.testing.assert_array_equal(layer.bias, reference.cell.bias)
    recurrent = layer.get_weights()[1]
    np.testing.assert_allclose(recurrent @ recurrent.T, np.eye(64), atol=1e-5)


def test_outputs_follow_the_equations_in_numpy():
    layer = PeepholeLSTM(4)
    x = np.random.normal(size=[2, 6, 3]).astype(np.float32)
    layer(x)
    randomize(layer.weights)
    w, u, b, p_i, p_f, p_o = layer.get_weights()

    def sigmoid(z):
        return 1 / (1 + np.exp(-z))

    c = h = np.zeros([2, 4])
    for t in range(6):
        z_i, z_f, z_g, z_o = np.split(x[:, t] @ w + h @ u + b, 4, axis=1)
        c = sigmoid(z_f + p_f * c) * c + sigmoid(z_i + p_i * c) * np.tanh(z_g)
        h = sigmoid(z_o + p_o * c) * np.tanh(c)
        np.testing.assert_allclose(layer(x)[:, t], h, atol=1e-6)


def test_gradients_equal_finite_differences():
    layer = PeepholeLSTM(3)
    x = tf.random.normal([2, 5, 2])
    layer(x)
    randomize(layer.weights)
    output_gradient = tf.random.normal([2, 5, 3])
    gradients = outputs_and_gradients(layer, x, output_gradient)[2:]
    step = 1e-2
    for weight, gradient in zip(layer.weights, gradients):
        direction = tf.random.normal(weight.shape)
        values = []
        for sign in (1, -1):
            weight.assign_add(sign * step * direction)
            values.append(tf.reduce_sum(layer(x) * output_gradient))
            weight.assign_sub(sign * step * direction)
        expected = (values[0] - values[1]) / (2 * step)
        np.testing.assert_allclose(tf.reduce_sum(gradient * direction), expected, rtol=2e-3, atol=2e-3)


def test_one_graph_serves_every_batch_size_and_length():
    layer, reference = PeepholeLSTM(6), keras_lstm(6)
    layer(tf.zeros([1, 1, 4])), reference(tf.zeros([1, 1, 4]))
    reference.set_weights(layer.get_weights())
    spec = tf.TensorSpec([None, None, 4])

    @tf.function(input_signature=[spec, tf.TensorSpec([None, None, 6])])
    def run(x, output_gradient):
        return outputs_and_gradients(layer, x, output_gradient)

    for batch, time in ((3, 5), (1, 1), (2, 9)):
        x, output_gradient = tf.random.normal([batch, time, 4]), tf.random.normal([batch, time, 6])
        assert_close(run(x, output_gradient), outputs_and_gradients(reference, x, output_gradient))


def test_padding_at_the_end_changes_neither_outputs_nor_gradients():
    model = small_model(PeepholeLSTM)
    line = tf.random.uniform([2, 6], 0, 256, tf.int32)

    def run(padding):
        padded = tf.pad(line, [[0, 0], [0, padding]], constant_values=PADDING)
        with tf.GradientTape() as tape:
            logits = model(padded)
            loss = masked_loss()(padded, logits)
        gradients = [tf.convert_to_tensor(g) for g in tape.gradient(loss, model.trainable_weights)]
        return [logits[:, :6], loss, *gradients]

    assert_close(run(padding=5), run(padding=0))


def test_while_loop_of_sgd_steps_on_plain_tensors_equals_the_keras_cell():
    """As in `client_update`: no variables, a tape inside a loop."""
    x, target = tf.random.normal([4, 7, 3]), tf.random.normal([4, 7, 5])

    def train(layer):
        def sgd_step(step, weights):
            with tf.GradientTape() as tape:
                tape.watch(weights)
                loss = tf.reduce_mean((call_with(layer, weights, x) - target) ** 2)
            return step + 1, [w - g for w, g in zip(weights, tape.gradient(loss, weights))]

        def loop(*weights):
            return tf.while_loop(lambda step, _: step < 5, sgd_step, (0, list(weights)))[1]

        return tf.function(loop)(*start)

    layer, reference = PeepholeLSTM(5), keras_lstm(5)
    layer(x), reference(x)
    start = layer.get_weights()
    assert_close(train(layer), train(reference))


def call_with(layer, weights, x):
    """Calls a copy of the layer whose weights are tensors."""
    remaining = list(weights)
    with tf.variable_creator_scope(lambda _, **kwargs: remaining.pop(0)):
        copy = keras_lstm(5) if isinstance(layer, tf.keras.layers.RNN) else type(layer).from_config(layer.get_config())
        return copy(x)


def test_char_lstm_has_866578_parameters_and_a_logit_per_symbol():
    model = models.char_lstm()
    assert model.count_params() == 866_578
    assert model.count_params() == sum(w.shape.num_elements() for w in model.trainable_weights)
    assert model.input.dtype == tf.int32 and model.output_shape == (None, None, 258)
    assert model(np.arange(258).reshape(3, 86)).shape == (3, 86, 258)


def test_char_lstm_equals_the_model_of_keras_cells():
    model = models.char_lstm()
    reference = tf.keras.Sequential(
        [tf.keras.layers.Embedding(258, 8), keras_lstm(256), keras_lstm(256), tf.keras.layers.Dense(258)]
    )
    x = tf.random.uniform([2, 12], 0, 258, tf.int32)
    reference(x)
    reference.set_weights(model.get_weights())
    assert_close([model.predict(x, verbose=0)], [reference(x)])


def test_fit_learns_and_predict_agrees_with_a_call():
    model = small_model(PeepholeLSTM)
    lines = np.random.randint(0, 4, [32, 1]) * np.ones([1, 9], np.int32)
    model.compile(tf.keras.optimizers.SGD(1.0), masked_loss(), metrics=[MaskedAccuracy([PADDING])])
    losses = model.fit(lines, lines, batch_size=10, epochs=5, verbose=0).history["loss"]
    assert losses[-1] < losses[0] / 2
    assert_close([model.predict(lines, verbose=0)], [model(lines)])


@pytest.mark.parametrize("file", ["model", "model.keras", "model.h5"])
def test_saved_model_gives_the_same_outputs_and_gradients(tmp_path, file):
    model = small_model(PeepholeLSTM)
    model.save(tmp_path / file)
    loaded = tf.keras.models.load_model(tmp_path / file)
    assert isinstance(loaded.layers[1], PeepholeLSTM)
    x = tf.random.uniform([2, 5], 0, 256, tf.int32)

    def run(model):
        with tf.GradientTape() as tape:
            loss = masked_loss()(x, model(x))
        return [model(x), *map(tf.convert_to_tensor, tape.gradient(loss, model.trainable_weights))]

    assert_close(run(loaded), run(model))


def test_config_rebuilds_the_layer():
    layer = PeepholeLSTM(5, name="lstm")
    copy = PeepholeLSTM.from_config(layer.get_config())
    assert (copy.name, copy.units) == ("lstm", 5)
    assert isinstance(tf.keras.models.clone_model(small_model(PeepholeLSTM)).layers[1], PeepholeLSTM)


def test_fed_avg_round_equals_plain_sgd_with_the_keras_cell(worker, tmp_path):
    """Two clients, E = 3, B = inf, lines cut to the longest of the batch; then the evaluation of the new weights."""
    clients = []
    for lengths in ([4, 9, 2], [12]):
        lines = np.full([len(lengths), 20], PADDING, np.int32)
        for line, length in zip(lines, lengths):
            line[:length] = np.random.randint(0, 256, length)
        clients.append(lines)

    def batch(example, seed):
        line = example["line"]
        # Outside tf.function, as in a TFF computation, `!=` would compare the objects.
        longest = tf.reduce_max(tf.reduce_sum(tf.cast(tf.not_equal(line, PADDING), tf.int32), axis=1))
        return tf.pad(line[:, : longest - 1], [[0, 0], [1, 0]], constant_values=PADDING), line[:, :longest]

    # The plain loop comes first: a Keras model is of no use any more once TFF has made another one in a graph.
    batches = [batch({"line": tf.constant(lines)}, NO_SEED) for lines in clients]
    model, reference = small_model(PeepholeLSTM), small_model(keras_lstm)
    randomize(model.weights)
    start = model.get_weights()
    expected = [0] * len(start)
    for x, y in batches:
        reference.set_weights(start)
        for _ in range(3):
            with tf.GradientTape() as tape:
                loss = masked_loss()(y, reference(x))
            for w, g in zip(reference.trainable_weights, tape.gradient(loss, reference.trainable_weights)):
                w.assign_sub(0.5 * tf.convert_to_tensor(g))
        expected = [e + len(x) / 4 * w for e, w in zip(expected, reference.get_weights())]
    reference.set_weights(expected)
    right = nats = 0
    for x, y in batches:
        real = y != PADDING
        log_probabilities = tf.nn.log_softmax(reference(x))[real]
        right += np.sum(np.argmax(log_probabilities, axis=-1) == y[real])
        nats -= tf.reduce_sum(tf.gather(log_probabilities, y[real], batch_dims=1))

    write_client_dataset(tmp_path, [{"line": lines} for lines in clients])
    dataset = tff_fedavg.ClientDataset(tmp_path, batch)
    metrics = collections.OrderedDict(
        loss=lambda: tf.keras.metrics.SparseCategoricalCrossentropy(from_logits=True, ignore_class=PADDING),
        accuracy=lambda: MaskedAccuracy([PADDING]),
    )
    model = tff.learning.models.functional_model_from_keras(model, masked_loss(), dataset.batch_spec, metrics)
    process = tff_fedavg.build_fed_avg(model, dataset, epochs=3, batch_size=None, learning_rate=0.5)
    state, _ = process.next(process.initialize(), [0, 1])
    weights = process.get_model_weights(state)
    evaluation = tff_fedavg.build_fed_eval(model, dataset)(weights, [0, 1])

    changes = [[w - w_0 for w, w_0 in zip(trained, start)] for trained in (weights.trainable, expected)]
    assert_close(*changes, tolerance=1e-4)
    np.testing.assert_allclose(evaluation["accuracy"], right / (4 + 9 + 2 + 12), rtol=1e-6)
    np.testing.assert_allclose(evaluation["loss"], nats / (4 + 9 + 2 + 12), rtol=1e-5)


@pytest.mark.parametrize("shape", [[2, 3, 3, 64], [1, 2, 2, 5]])
def test_local_response_normalization_is_that_of_tensorflow(shape):
    x = tf.random.normal(shape, stddev=50)  # Large enough for it to matter.
    output_gradient = tf.random.normal(shape)
    outputs = []
    for normalize in (LocalResponseNormalization(), lambda x: tf.nn.lrn(x, 4, 1.0, 0.001 / 9, 0.75)):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = normalize(x)
        outputs.append((y, tape.gradient(y, x, output_gradient)))
    for actual, expected in zip(*outputs):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(outputs[0][0] - x).max() > 1


@pytest.mark.parametrize("pool_size", [2, 3])
@pytest.mark.parametrize("shape", [[3, 4, 10, 5], [1, 2, 2, 1], [0, 4, 4, 2]])
def test_max_pooling_is_that_of_keras_also_where_values_are_equal(pool_size, shape):
    x = tf.random.uniform(shape, 0, 4, tf.int32)  # So few values that most windows have their largest more than once.
    for pooled in (tf.cast(x, tf.float32), -tf.cast(x, tf.float32), tf.random.normal(shape)):
        output_gradient = tf.cast(
            tf.random.uniform([shape[0], shape[1] // 2, shape[2] // 2, shape[3]], 1, 9, tf.int32), tf.float32
        )
        ours, keras = MaxPooling(pool_size), tf.keras.layers.MaxPooling2D(pool_size, strides=2, padding="same")
        for actual, expected in zip(
            *(outputs_and_gradients(layer, pooled, output_gradient) for layer in (ours, keras))
        ):
            np.testing.assert_array_equal(actual, expected)


def test_max_pooling_of_other_sizes_is_refused():
    with pytest.raises(ValueError, match="pool_size is 4"):
        MaxPooling(4)
    with pytest.raises(ValueError, match="is 4 x 5"):
        MaxPooling(2)(tf.zeros([1, 4, 5, 1]))


@pytest.mark.parametrize(
    ("make_layer", "shape"),
    [
        (lambda: PeepholeLSTM(4), [2, 3, 4]),
        (lambda: MaxPooling(3), [2, 4, 4, 8]),
        (LocalResponseNormalization, [2, 2, 2, 12]),
    ],
)
def test_layers_compute_in_float32_under_a_mixed_policy(make_layer, shape):
    x = tf.cast(tf.random.normal(shape), tf.bfloat16)
    exact = make_layer()
    exact.build(shape)
    with global_policy("mixed_bfloat16"):
        mixed = make_layer()
        mixed.build(shape)
        restored = type(mixed).from_config(mixed.get_config())
    mixed.set_weights(exact.get_weights())
    assert mixed(x).dtype == tf.float32
    assert restored.compute_dtype == "float32"
    np.testing.assert_array_equal(mixed(x), exact(tf.cast(x, tf.float32)))
