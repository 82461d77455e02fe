"""Functions as people write them: what they capture, draw and return is the same in TFF's worker as outside of it."""

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff

from tff_fedavg import ClientDataset
from tff_fedavg.traced import ChangedVariableError, TracedFunction

X = np.random.default_rng(0).normal(size=[6, 3]).astype(np.float32)
LABELS = np.array([3, 1, 2, 3, 9, 1])
SCALAR = tf.TensorSpec([], tf.float32)
KEY = tf.TensorSpec([2], tf.int64)


def in_worker(dataset, seed=(0, 0), steps=1):
    """The batch of client 0 as a client of a round reads it, in the last of some steps of a loop."""
    spec = dataset.batch_spec

    @tff.tensorflow.computation(np.int32)
    def read(client_id):
        records = dataset.read(client_id)
        rows = tf.range(tf.shape(records)[0])

        def step(i, batch):
            del batch
            return i + 1, dataset.batch(records, rows, tf.constant(seed, tf.int64))

        empty = tf.nest.map_structure(lambda s: tf.zeros([0, *s.shape[1:]], s.dtype), spec)
        shapes = tf.nest.map_structure(lambda s: s.shape, spec)
        return tf.while_loop(lambda i, _: i < steps, step, (0, empty), (tf.TensorShape([]), shapes))[1]

    return read(0)


def dataset_with(preprocess_fn):
    return ClientDataset.from_arrays([{"x": X, "y": LABELS}], preprocess_fn)


def test_a_large_constant_and_a_variable(worker):
    table, shift = tf.constant(np.linspace(0, 1, 1000), tf.float32), tf.Variable(2.0)
    dataset = dataset_with(lambda example: (example["x"] + shift, tf.gather(table, example["y"])))
    shift.assign(100.0)  # What it was when the data set was built is what counts.
    x, y = in_worker(dataset, steps=2)
    np.testing.assert_allclose(x, X + 2)
    np.testing.assert_allclose(y, np.linspace(0, 1, 1000)[LABELS], rtol=1e-6)


@pytest.mark.parametrize("dtype", [tf.int64, tf.string])
def test_a_lookup_table(worker, dtype):
    values = tf.constant([10, 20, 30], tf.int64)
    keys = tf.constant([1, 2, 3], tf.int64)
    if dtype == tf.string:
        keys = tf.strings.as_string(keys)
    table = tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer(keys, values), default_value=-1)
    dataset = dataset_with(
        lambda example: (
            example["x"],
            table.lookup(tf.strings.as_string(example["y"]) if dtype == tf.string else example["y"]),
        )
    )
    assert in_worker(dataset, steps=2)[1].tolist() == [30, 10, 20, 30, -1, 10]


def test_an_adapted_layer_of_keras(worker):
    layer = tf.keras.layers.Normalization()
    layer.adapt(X)
    x, _ = in_worker(dataset_with(lambda example: (layer(example["x"]), example["y"])))
    np.testing.assert_allclose(x, (X - X.mean(0)) / X.std(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "preprocess",
    [
        lambda example: (example["x"], example["y"], example["x"][:, 0]),
        lambda example, seed: [example["x"], example["y"], example["x"][:, 0]],
        lambda example: {"sample_weight": example["x"][:, 0], "y": example["y"], "x": example["x"]},
    ],
    ids=["tuple", "list", "mapping"],
)
def test_a_batch_is_a_tuple_in_whatever_form_it_is_returned(worker, preprocess):
    dataset = dataset_with(preprocess)
    assert [spec.shape.as_list() for spec in dataset.batch_spec] == [[None, 3], [None], [None]]
    x, y, sample_weight = in_worker(dataset)
    np.testing.assert_array_equal(x, X)
    np.testing.assert_array_equal(y, LABELS)
    np.testing.assert_array_equal(sample_weight, X[:, 0])


def test_python_conditions_on_tensors(worker):
    def preprocess(example):
        if tf.reduce_sum(example["x"]) > 1e6:
            return example["x"] * 0.0, example["y"]
        return example["x"] * 2.0, example["y"]

    np.testing.assert_allclose(in_worker(dataset_with(preprocess))[0], 2 * X)


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: x + tf.random.normal(tf.shape(x)),
        lambda x: x + tf.random.uniform(tf.shape(x)),
        lambda x: x + tf.random.truncated_normal(tf.shape(x)),
        lambda x: x + tf.cast(tf.random.uniform(tf.shape(x), 0, 1000, tf.int32), tf.float32),
        lambda x: x + tf.cast(tf.random.categorical(tf.zeros([tf.shape(x)[0], 100]), 3), tf.float32),
    ],
    ids=["normal", "uniform", "truncated", "integers", "categorical"],
)
def test_random_numbers_are_a_function_of_the_seed(worker, draw):
    dataset = dataset_with(lambda example: (draw(example["x"]), example["y"]))
    first, again, other = (in_worker(dataset, seed)[0] for seed in ((1, 2), (1, 2), (1, 3)))
    np.testing.assert_array_equal(first, again)
    assert np.mean(first != other) > 0.8
    assert np.mean(first != X) > 0.8


@pytest.mark.parametrize(
    ("draw", "mean", "deviation"),
    [
        (lambda n: tf.random.normal([n], 3.0, 2.0), 3.0, 2.0),
        (lambda n: tf.random.uniform([n], -1.0, 1.0), 0.0, np.sqrt(1 / 3)),
        (lambda n: tf.cast(tf.random.uniform([n], 0, 10, tf.int64), tf.float32), 4.5, np.sqrt(99 / 12)),
        (lambda n: tf.cast(tf.random.categorical(tf.math.log([[0.2, 0.8]]), n), tf.float32), 0.8, 0.4),
        (lambda n: tf.concat([tf.random.normal([n // 2]), tf.random.normal([n // 2])], 0), 0.0, 1.0),
    ],
)
def test_random_numbers_have_the_distribution_that_was_asked_for(draw, mean, deviation):
    n = 20_000
    sample = TracedFunction("draw", lambda: draw(n), [])(seed=tf.constant([5, 6])).numpy().ravel()
    assert abs(sample.mean() - mean) < 5 * deviation / np.sqrt(n)
    assert sample.std() == pytest.approx(deviation, rel=0.05)
    assert abs(np.corrcoef(sample[: n // 2], sample[n // 2 :])[0, 1]) < 5 / np.sqrt(n / 2)


def test_variables_whose_values_are_arguments():
    """Also those that are read in a loop, and those that are looked up."""
    table, scale = tf.Variable(np.eye(4), dtype=tf.float32), tf.Variable(1.0)

    def fn(rows):
        total = tf.zeros([4])
        for row in rows:
            total = total * scale + tf.gather(table, row)
        return total

    traced = TracedFunction("fn", fn, [tf.TensorSpec([None], tf.int32)], [table, scale])
    found = traced(tf.constant([0, 2, 2]), variables=[2 * tf.eye(4), tf.constant(10.0)])
    assert found.numpy().tolist() == [200, 0, 22, 0]
    assert scale.numpy() == 1 and table.numpy().tolist() == np.eye(4).tolist()


COUNTER = tf.Variable(0)
GENERATOR = tf.random.Generator.from_seed(1)


def counting(x):
    COUNTER.assign_add(1)
    return x


@pytest.mark.parametrize(
    ("fn", "error", "message"),
    [
        (counting, ChangedVariableError, "fn changes the variable Variable:0"),
        (lambda x: tf.py_function(lambda v: v, [x], tf.float32), ValueError, "fn calls Python"),
        (lambda x: tf.random.gamma([2], x), ValueError, "fn draws random numbers with RandomGamma"),
        (lambda x: tf.random.shuffle([x, x]), ValueError, "fn draws random numbers with RandomShuffle"),
        (
            lambda x: tf.nn.fractional_max_pool(x * tf.ones([1, 7, 7, 1]), 1.4)[0],
            ValueError,
            "fn draws random numbers with FractionalMaxPool",
        ),
        (
            lambda x: tf.random.log_uniform_candidate_sampler([[1]], 1, 2, True, 9)[0],
            ValueError,
            "fn draws random numbers with LogUniformCandidateSampler",
        ),
        (lambda x: tf.raw_ops.NonDeterministicInts(shape=[2]), ValueError, "fn draws random numbers with NonDeterm"),
        (tf.function(lambda x: x + tf.random.normal([])), ValueError, "cannot be seeded: draw them outside of it"),
        (lambda x: tf.map_fn(lambda v: v + tf.random.normal([]), x[tf.newaxis]), ValueError, "within a loop"),
        (lambda x: x + "a", ValueError, "fn fails: .*Error: "),
    ],
)
def test_what_cannot_be_copied_is_refused_in_one_line(fn, error, message):
    with pytest.raises(error, match=message) as found:
        TracedFunction("fn", fn, [SCALAR])
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("switch_on", "switch_off", "message"),
    [
        (
            lambda: tf.config.run_functions_eagerly(True),
            lambda: tf.config.run_functions_eagerly(False),
            r"tf.config.run_functions_eagerly\(True\) is on",
        ),
        (
            tf.debugging.enable_check_numerics,
            tf.debugging.disable_check_numerics,
            r"tf.debugging.enable_check_numerics\(\) or the like is on",
        ),
    ],
)
def test_what_debugs_tensorflow_is_refused_in_one_line(switch_on, switch_off, message):
    switch_on()
    try:
        with pytest.raises((RuntimeError, ValueError), match=message) as error:
            TracedFunction("it", lambda x: 2 * x, [tf.TensorSpec([], tf.float32)])
    finally:
        switch_off()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("preprocess", "message"),
    [
        (lambda example: example["x"], r"preprocess_fn fails: ValueError: it must return \(x, y\)"),
        (lambda example: (example["x"],), r"it must return \(x, y\)"),
        (lambda example: {"x": example["x"], "label": example["y"]}, r"it must return \(x, y\)"),
        (lambda example: (tf.reduce_sum(example["x"]), example["y"]), r"it must return tensors \[batch, ...\]"),
        (
            lambda example: (tf.RaggedTensor.from_tensor(example["x"]), example["y"]),
            r"it returns a RaggedTensor: make a tensor of it, as with its to_tensor\(\)",
        ),
        (lambda example: (example["image"], example["y"]), "preprocess_fn fails: KeyError: 'image'"),
    ],
)
def test_a_preprocess_fn_that_does_not_fit_is_told_when_the_data_set_is_built(preprocess, message):
    with pytest.raises(ValueError, match=message) as error:
        dataset_with(preprocess)
    assert "\n" not in str(error.value)
