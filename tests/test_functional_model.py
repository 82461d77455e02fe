"""Any Keras model: one step here is one `train_on_batch` of Keras, or one line says why not."""

import functools

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff
from numpy_model import max_difference

from tff_fedavg import ClientDataset, build_fed_avg, build_fed_eval, build_fed_sgd, functional_model_from_keras
from tff_fedavg.global_policy import global_policy
from tff_fedavg.masked import MaskedCrossentropy

RATE = 0.1
SPARSE = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
layers = tf.keras.layers


@pytest.fixture(scope="module")
def arrays():
    """A client of twelve examples, whose columns serve all the models."""
    rng = np.random.default_rng(0)
    return {
        "x": rng.normal(size=[12, 4]).astype(np.float32),
        "ids": rng.integers(10, size=[12, 3]).astype(np.int32),
        "label": rng.integers(3, size=12).astype(np.int32),
        "value": rng.normal(size=12).astype(np.float32),
        "weight": rng.uniform(0.5, 2, size=12).astype(np.float32),
    }


@pytest.fixture(scope="module")
def dataset_of(arrays):
    """Returns the client dataset whose batches are the columns of these names."""

    @functools.cache
    def build(x, y, sample_weight=None):
        def preprocess(example):
            features = example[x] if isinstance(x, str) else {name: example[name] for name in x}
            return (features, example[y]) if sample_weight is None else (features, example[y], example[sample_weight])

        return ClientDataset.from_arrays([arrays], preprocess)

    return build


def columns(arrays, names):
    return arrays[names] if isinstance(names, str) else {name: arrays[name] for name in names}


def sequential(*inner, units=3):
    return tf.keras.Sequential([layers.InputLayer([4]), *inner, layers.Dense(units)])


def normalized():
    layer = layers.Normalization()
    layer.adapt(np.random.default_rng(1).normal(3.0, 2.0, [50, 4]).astype(np.float32))
    return sequential(layer)


def two_inputs():
    x, ids = layers.Input([4], name="x"), layers.Input([3], dtype=tf.int32, name="ids")
    embedded = layers.Flatten()(layers.Embedding(10, 2)(ids))
    return tf.keras.Model({"x": x, "ids": ids}, layers.Dense(3)(layers.Concatenate()([x, embedded])))


def embedding(**settings):
    return tf.keras.Sequential(
        [
            layers.InputLayer([3], dtype=tf.int32),
            layers.Embedding(10, 2, **settings),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )


def shared_layer():
    x = layers.Input([4])
    dense = layers.Dense(4)
    return tf.keras.Model(x, layers.Dense(3)(dense(dense(x))))


class Subclassed(tf.keras.Model):
    """Has weights in a dict, a loss of its own, and no `get_config`."""

    def __init__(self):
        super().__init__()
        self.parts = {"a": layers.Dense(5, activation="tanh"), "b": layers.Dense(3)}

    def call(self, x, training=False):
        hidden = self.parts["a"](x)
        self.add_loss(0.3 * tf.reduce_mean(hidden**2))
        return self.parts["b"](hidden)


class Misfit(Subclassed):
    def call(self, x, training=False):
        return self.parts["b"](tf.reshape(x, [7, 7]))


class Choosy(tf.keras.Model):
    def call(self, x):
        raise ValueError(f"I take 5 features, not {x.shape[-1]}")


class OwnStep(tf.keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3)

    def call(self, x):
        return self.dense(x)

    def train_step(self, data):
        return {"loss": 0.0}


class OwnLoss(OwnStep):
    train_step = tf.keras.Model.train_step

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        return 100.0 * tf.reduce_mean(y_pred)


class OwnTest(OwnStep):
    train_step = tf.keras.Model.train_step

    def test_step(self, data):
        return {"loss": 0.0}


def with_a_step_of_its_own():
    model = sequential()
    model.train_step = lambda data: {"loss": 0.0}
    return model


class TwoOutputsInTraining(tf.keras.Model):
    def __init__(self):
        super().__init__()
        self.parts = [layers.Dense(3), layers.Dense(3)]

    def call(self, x, training=False):
        outputs = [part(x) for part in self.parts]
        return outputs if training else outputs[0]


class HeadInTraining(tf.keras.Model):
    def __init__(self):
        super().__init__()
        self.dense, self.head = layers.Dense(3), layers.Dense(2)

    def call(self, x, training=False):
        if training:
            self.add_loss(tf.reduce_mean(self.head(x) ** 2))
        return self.dense(x)


class OwnWeights(tf.keras.Model):
    def build(self, shape):
        self.kernel = self.add_weight("kernel", [4, 3])

    def call(self, x):
        return tf.matmul(x, tf.cast(self.kernel, x.dtype))


def in_float16():
    with global_policy("mixed_float16"):
        return OwnWeights()


def two_outputs():
    x = layers.Input([4])
    return tf.keras.Model(x, [layers.Dense(3)(x), layers.Dense(3)(x)])


class Halving(layers.Layer):
    """Its `call` is a `tf.function` with a loop and a condition, which read a weight."""

    def build(self, shape):
        self.scale = self.add_weight("scale", [shape[-1]], initializer="ones")

    @tf.function
    def call(self, x):
        steps = tf.constant(0)
        while tf.reduce_sum(tf.abs(x)) > 1.0 and steps < 3:
            x = x * self.scale / 2.0
            steps += 1
        return tf.cond(tf.reduce_sum(x) > 0.0, lambda: x + self.scale, lambda: x - self.scale)


def frozen():
    model = sequential(layers.Dense(5, activation="relu"))
    model.layers[0].trainable = False
    return model


def mixed_bfloat16():
    return sequential(layers.Dense(5, activation="relu", dtype="mixed_bfloat16"), layers.Activation("linear"))


CLASSIFIERS = {
    "dense": lambda: sequential(),
    "regularised": lambda: sequential(layers.Dense(5, kernel_regularizer="l2", activity_regularizer="l1")),
    "strongly regularised": lambda: sequential(layers.Dense(5, kernel_regularizer=tf.keras.regularizers.L2(10))),
    "frozen layer": frozen,
    "adapted normalization": normalized,
    "group normalization": lambda: sequential(layers.GroupNormalization(2)),
    "layer normalization": lambda: sequential(layers.LayerNormalization()),
    "frozen batch normalization": lambda: sequential(layers.BatchNormalization(trainable=False)),
    "shared layer": shared_layer,
    "subclass with add_loss": Subclassed,
    "tf.function with control flow": lambda: sequential(Halving()),
    "mixed_bfloat16": mixed_bfloat16,
    "Keras LSTM": lambda: sequential(layers.Reshape([4, 1]), layers.LSTM(3), layers.Dense(3)),
    "Keras GRU": lambda: sequential(layers.Reshape([2, 2]), layers.GRU(3, dropout=0.0), layers.Dense(3)),
    "attention": lambda: sequential(layers.Reshape([2, 2]), SelfAttention(), layers.Flatten()),
    "bias only": lambda: sequential(layers.Lambda(lambda x: 0.0 * x)),
}


class SelfAttention(layers.Layer):
    def __init__(self):
        super().__init__()
        self.inner = layers.MultiHeadAttention(2, 2)

    def call(self, x):
        return self.inner(x, x)


def one_step(worker, model, loss, dataset):
    """The weights after one step of SGD on all examples of the client, in TFF's worker."""
    functional = functional_model_from_keras(model, loss, dataset.batch_spec)
    process = build_fed_avg(functional, dataset, epochs=1, batch_size=None, learning_rate=RATE)
    state, metrics = process.next(process.initialize(), [0])
    return state.global_model_weights, metrics["client_work"]["train"]["loss"]


def keras_step(model, loss, x, y, sample_weight=None):
    model.compile(tf.keras.optimizers.legacy.SGD(RATE), loss)
    value = model.train_on_batch(x, y, sample_weight)
    return [v.numpy() for v in model.trainable_variables], [v.numpy() for v in model.non_trainable_variables], value


def assert_step_is_kerass(worker, build, loss, dataset, x, y, sample_weight=None, tolerance=1e-6):
    tf.keras.utils.set_random_seed(1)
    model = build()
    weights, value = one_step(worker, model, loss, dataset)
    trainable, non_trainable, expected = keras_step(model, loss, x, y, sample_weight)
    assert max_difference(weights.trainable, trainable) < tolerance
    assert max_difference([0, *weights.non_trainable], [0, *non_trainable]) == 0
    assert value == pytest.approx(expected, rel=max(1e-5, tolerance))


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_step_is_that_of_keras(worker, arrays, dataset_of, name):
    """... which the model that was handed over takes afterwards."""
    tolerance = 5e-4 if name == "mixed_bfloat16" else 2e-6
    x, y = arrays["x"], arrays["label"]
    assert_step_is_kerass(worker, CLASSIFIERS[name], SPARSE, dataset_of("x", "label"), x, y, tolerance=tolerance)


@pytest.mark.parametrize(
    ("build", "x"),
    [(two_inputs, ("x", "ids")), (embedding, "ids"), (functools.partial(embedding, trainable=False), "ids")],
    ids=["two inputs", "embedding", "frozen embedding"],
)
def test_a_step_on_nested_and_integer_inputs_is_that_of_keras(worker, arrays, dataset_of, build, x):
    assert_step_is_kerass(worker, build, SPARSE, dataset_of(x, "label"), columns(arrays, x), arrays["label"])


@pytest.mark.parametrize(
    "loss",
    [
        "mse",
        "MeanAbsoluteError",
        tf.keras.losses.Huber(),
        tf.keras.losses.mean_squared_error,
        tf.keras.losses.MeanSquaredError(reduction="sum"),
        lambda y_true, y_pred: tf.abs(y_true - y_pred),
    ],
)
def test_losses_as_keras_takes_them(worker, arrays, dataset_of, loss):
    """The model has an output of [batch, 1], the labels are [batch]: Keras does not broadcast them to a square."""
    build = functools.partial(sequential, units=1)
    assert_step_is_kerass(worker, build, loss, dataset_of("x", "value"), arrays["x"], arrays["value"])


def negative_log_likelihood(y_true, y_pred):
    mean, log_variance = y_pred[:, :1], y_pred[:, 1:]
    return 0.5 * (log_variance + tf.square(y_true - mean) / tf.exp(log_variance))


@pytest.mark.parametrize(
    ("loss", "units"),
    [
        (negative_log_likelihood, 2),
        ("mse", 3),
        ("mse", 12),  # As many as examples.
        (lambda y_true, y_pred: tf.reduce_mean(tf.square(y_true[:, 0] - y_pred[:, 0])), 2),
    ],
)
@pytest.mark.parametrize(("dtype", "sample_weight"), [(np.float32, None), (np.float64, "weight")])
def test_labels_have_the_rank_and_dtype_that_keras_gives_them(
    worker, arrays, dataset_of, loss, units, dtype, sample_weight
):
    columns = {**arrays, "value": arrays["value"].astype(dtype)}
    weight = [] if sample_weight is None else [sample_weight]
    dataset = ClientDataset.from_arrays([columns], lambda e: tuple(e[name] for name in ("x", "value", *weight)))
    build = functools.partial(sequential, units=units)
    weights = [columns[name] for name in weight]
    assert_step_is_kerass(worker, build, loss, dataset, columns["x"], columns["value"], *weights)


def test_losses_of_single_examples_are_averaged(worker, dataset_of):
    dataset = dataset_of("x", "label")
    losses = [tf.keras.losses.SparseCategoricalCrossentropy(True, reduction=r) for r in ("none", "sum_over_batch_size")]
    tf.keras.utils.set_random_seed(1)
    model = sequential()
    results = [one_step(worker, model, loss, dataset)[0].trainable for loss in losses]
    assert max_difference(*results) < 1e-7


def test_sample_weights_count_as_in_keras(worker, arrays, dataset_of):
    dataset = dataset_of("x", "label", "weight")
    assert_step_is_kerass(worker, sequential, SPARSE, dataset, arrays["x"], arrays["label"], arrays["weight"])


def test_the_model_that_was_handed_over_is_as_before(worker, arrays, dataset_of, tmp_path):
    model = sequential(layers.Dense(5, activation="relu"))
    before, weights = model.predict(arrays["x"], verbose=0), model.get_weights()
    one_step(worker, model, SPARSE, dataset_of("x", "label"))
    assert max_difference(weights, model.get_weights()) == 0
    np.testing.assert_array_equal(model.predict(arrays["x"], verbose=0), before)
    model.save(tmp_path / "model.keras")
    np.testing.assert_array_equal(tf.keras.models.load_model(tmp_path / "model.keras").predict(arrays["x"]), before)
    model.compile("sgd", SPARSE)
    model.fit(arrays["x"], arrays["label"], verbose=0)


class Sampling(layers.Layer):
    """Adds noise by a plain TensorFlow operation, as the code of a variational autoencoder does."""

    def call(self, x, training=False):
        return x + tf.random.normal(tf.shape(x)) if training else x


@pytest.mark.parametrize(
    "layer",
    [
        lambda: layers.Dropout(0.5),
        lambda: layers.GaussianNoise(1.0),
        lambda: tf.keras.Sequential([layers.Reshape([4, 1, 1]), layers.RandomFlip(), layers.Flatten()]),
        lambda: tf.keras.Sequential([layers.Reshape([2, 2]), layers.LSTM(4, dropout=0.5)]),
        Sampling,
    ],
    ids=["dropout", "noise", "flip", "LSTM with dropout", "tf.random.normal"],
)
def test_random_layers_are_a_function_of_the_seed_the_round_and_the_client(worker, arrays, dataset_of, layer):
    tf.keras.utils.set_random_seed(1)
    functional = functional_model_from_keras(sequential(layer()), SPARSE, dataset_of("x", "label").batch_spec)
    two_alike = ClientDataset.from_arrays([arrays, arrays], dataset_of("x", "label").preprocess_fn)

    def run(seed, client, first_round=0):
        # Its examples have one order: only the layer has the seed.
        process = build_fed_sgd(functional, two_alike, learning_rate=RATE, seed=seed)
        state = process.initialize()._replace(client_work=np.int32(first_round))
        return process.next(state, [client]).state.global_model_weights.trainable

    same, again = run(0, 0), run(0, 0)
    assert max_difference(same, again) == 0
    for other in (run(1, 0), run(0, 1), run(0, 0, first_round=1)):
        assert max_difference(same, other) > 1e-3


def test_a_random_layer_draws_anew_in_each_step(worker):
    """Each of the two steps adds its mask to the weights."""
    x = layers.Input([100])
    model = tf.keras.Model(x, layers.Dense(1, use_bias=False)(layers.Dropout(0.5)(x)))
    ones = {"x": np.ones([2, 100], np.float32), "y": np.zeros([2, 1], np.float32)}
    dataset = ClientDataset.from_arrays([ones])
    functional = functional_model_from_keras(model, lambda y, output: output - y, dataset.batch_spec)
    process = build_fed_avg(functional, dataset, epochs=1, batch_size=1, learning_rate=0.5)
    (trained,) = process.next(process.initialize(), [0]).state.global_model_weights.trainable
    steps = np.round(functional.initial_weights[0][0] - trained).ravel()
    assert set(steps) == {0, 1, 2}  # In neither, one, both: each kept input counts twice, for half of the rate.


def test_dropout_leaves_out_the_share_it_is_told_to(worker):
    """The model's only weight is the factor on its input: the loss says how much of that is left, or twice as much."""
    n = 4000
    x = layers.Input([1])
    dropped = layers.Dropout(0.3)(x)
    model = tf.keras.Model(x, layers.Dense(1, use_bias=False, kernel_initializer="ones")(dropped))
    ones = {"x": np.ones([n, 1], np.float32), "y": np.zeros([n, 1], np.float32)}
    dataset = ClientDataset.from_arrays([ones])
    functional = functional_model_from_keras(model, lambda y, output: output - y, dataset.batch_spec)
    process = build_fed_sgd(functional, dataset, learning_rate=1.0)
    _, metrics = process.next(process.initialize(), [0])
    # The mean of 1 / 0.7 with probability 0.7, else 0, has the standard deviation sqrt(0.3 / 0.7 / n).
    assert abs(metrics["client_work"]["train"]["loss"] - 1) < 4 * np.sqrt(0.3 / 0.7 / n)


def discretized():
    layer = layers.Discretization(num_bins=2)
    layer.adapt(np.float32([[-1, -1, 0, 0]]))
    return sequential(layer, layers.Rescaling(1.0))


def absolute_in_python(x):
    return tf.ensure_shape(tf.numpy_function(np.abs, [x], tf.float32), x.shape)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: sequential(layers.BatchNormalization()),
            r"layer 'batch_normalization.*' \(BatchNormalization\) changes .*moving_mean.* in training.*: take "
            "GroupNormalization or LayerNormalization",
        ),
        (
            lambda: sequential(tf.keras.Sequential([layers.Dense(4), layers.BatchNormalization()])),
            r"\(BatchNormalization\) changes",
        ),
        (
            lambda: sequential(
                layers.Reshape([2, 2]), layers.TimeDistributed(layers.BatchNormalization()), layers.Flatten()
            ),
            r"\(BatchNormalization\) changes",
        ),
        (
            lambda: sequential(layers.Dense(4, dtype="mixed_float16"), layers.Activation("linear")),
            "has the policy mixed_float16",
        ),
        (
            lambda: sequential(
                layers.Reshape([2, 2]), layers.TimeDistributed(layers.Dense(2, dtype="mixed_float16")), layers.Flatten()
            ),
            "has the policy mixed_float16",
        ),
        (lambda: sequential(layers.Dense(4), layers.Lambda(absolute_in_python)), "calls Python"),
        (
            lambda: sequential(layers.Reshape([2, 2]), layers.LSTM(3, recurrent_dropout=0.5)),
            "draws random numbers within a loop",
        ),
        (lambda: sequential(layers.Lambda(tf.random.shuffle)), "RandomShuffle"),
        (lambda: tf.keras.Sequential([layers.InputLayer([4])]), "no trainable weights"),
        (
            lambda: tf.keras.Sequential([layers.InputLayer([5]), layers.Dense(3)]),
            "the model fails: ValueError: .*shape",
        ),
        (Misfit, "the model fails: "),
        (discretized, r"layer 'discretization.*is adapted, which Keras loses .*; make it with bin_boundaries=\[-1.0\]"),
        (
            lambda: sequential(layers.Dense(4, kernel_constraint="non_neg")),
            "dense.*/kernel:0 has the constraint NonNeg, which the average of weights that meet it need not meet",
        ),
        (
            lambda: sequential(layers.Dense(4, dtype="float64")),
            "dense.*/kernel:0 is float64; take float32, or the policy mixed_bfloat16",
        ),
        (OwnStep, "OwnStep has a train_step of its own, which would not be called"),
        (
            OwnLoss,
            "OwnLoss has a compute_loss of its own, which would not be called: give what it computes as the loss, or "
            "by add_loss",
        ),
        (OwnTest, "OwnTest has a test_step of its own, which would not be called: give what it computes as metrics"),
        (with_a_step_of_its_own, "Sequential has a train_step of its own, which would not be called"),
        (TwoOutputsInTraining, "the model has 2 outputs, and Keras's losses are for one"),
        (HeadInTraining, "the model makes .*/kernel:0, .*/bias:0 only when it is called: .* with training=True too"),
        (in_float16, "has the policy mixed_float16"),
        (two_outputs, "the model has 2 outputs, and Keras's losses are for one: give a function of"),
        (
            lambda: tf.keras.Sequential([sequential(), layers.Lambda(tf.stop_gradient)]),
            "the model fails: ValueError: the loss has no gradient by any of the weights",
        ),
        (Choosy, "the model fails: ValueError: I take 5 features, not 4"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused_in_one_line(dataset_of, build, message):
    with pytest.raises(ValueError, match=message) as error:
        functional_model_from_keras(build(), SPARSE, dataset_of("x", "label").batch_spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dense", SPARSE), "keras_model is 'dense'; it must be a tf.keras.Model"),
        ((lambda: None, SPARSE), "keras_model is None"),
        ((layers.Dense(3), SPARSE), "keras_model is <.*Dense.*>; it must be a tf.keras.Model"),
        ((sequential, 3), "loss is 3; it must be"),
        ((sequential, tf.keras.losses.Huber), "loss is <class"),
    ],
)
def test_arguments_of_another_type_are_told(dataset_of, arguments, message):
    with pytest.raises(TypeError, match=message):
        functional_model_from_keras(*arguments, dataset_of("x", "label").batch_spec)


class ShareAbove(tf.keras.metrics.Metric):
    """Does not say in its configuration what it was made with."""

    def __init__(self, threshold=0.5, name="share", **kwargs):
        super().__init__(name=name, **kwargs)
        self.threshold = threshold
        self.mean = self.add_weight("mean", initializer="zeros")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.mean.assign(tf.reduce_mean(tf.cast(y_pred > self.threshold, tf.float32)))

    def result(self):
        return self.mean


class TopOf(tf.keras.metrics.SparseTopKCategoricalAccuracy):
    def __init__(self, name="top", **kwargs):
        self.k = kwargs.pop("k", 5)
        super().__init__(self.k, name, **kwargs)

    def get_config(self):
        return {"name": self.name}


class Inherits(tf.keras.metrics.Mean):
    """Its get_config has a dtype, which __init__ does not take."""

    def __init__(self, name):
        super().__init__(name)


class Vector(tf.keras.metrics.Mean):
    def update_state(self, y_true, y_pred, sample_weight=None):
        return super().update_state(y_pred)

    def result(self):
        return tf.stack([self.total, self.count])


class Largest(ShareAbove):
    """Of two parts of a test set TFF would add up the largest values."""

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.mean.assign(tf.maximum(self.mean, tf.reduce_max(y_pred)))


class Smoothed(Vector):
    """Its count would be one too many for each part of a test set."""

    def __init__(self):
        super().__init__()
        self.prior = self.add_weight("prior", initializer="ones")

    def result(self):
        return self.total / (self.count + self.prior)


@pytest.mark.parametrize(
    ("metrics", "error", "message"),
    [
        (["acuracy"], ValueError, "there is no metric 'acuracy' in Keras"),
        ("accuracy", TypeError, "metrics is 'accuracy'; it must be a list"),
        ([3], TypeError, "a metric is 3; it must be a Keras metric"),
        (["mse", tf.keras.metrics.MeanSquaredError("mse")], ValueError, "several metrics have the same name"),
        ([ShareAbove(-100.0)], ValueError, "'share' cannot be made anew: get_config of ShareAbove lacks threshold"),
        ([TopOf(k=3)], ValueError, "'top' cannot be made anew: get_config of TopOf lacks k; give a function"),
        ([Inherits("mine")], ValueError, "'mine' cannot be made anew .*: give a function that makes it"),
        (["mse", tf.keras.metrics.F1Score()], ValueError, "TFF can make no function of the metric 'f1_score' "),
        ({"a": Vector}, ValueError, "TFF can make no function of the metric 'a' .* not a number"),
        ([Largest], ValueError, "of the metric 'share' .*its variables are not sums over the examples.*, from zero"),
        ([Smoothed], ValueError, "of the metric 'mean' .*its variables are not sums over the examples"),
        ({"mean error": "mse"}, ValueError, "a metric has the name 'mean error': give it one of letters"),
        ([lambda y_true, y_pred: y_pred], ValueError, "a metric has the name '<lambda>'"),
        ([tf.keras.metrics.AUC(multi_label=True, num_labels=3)], ValueError, "TFF can make no function .* 'auc"),
    ],
)
def test_metrics_that_are_none_are_told(dataset_of, metrics, error, message):
    with pytest.raises(error, match=message):
        functional_model_from_keras(sequential, SPARSE, dataset_of("x", "label").batch_spec, metrics)


def test_a_data_set_in_the_place_of_its_spec_is_told(dataset_of):
    with pytest.raises(TypeError, match="input_spec is .*; it must be the batch_spec of a client dataset"):
        functional_model_from_keras(sequential, SPARSE, dataset_of("x", "label"))


def evaluate(worker, model, loss, dataset, metrics):
    functional = functional_model_from_keras(model, loss, dataset.batch_spec, metrics)
    process = build_fed_avg(functional, dataset, epochs=1, batch_size=5, learning_rate=RATE)
    return build_fed_eval(functional, dataset, batch_size=5)(process.initialize().global_model_weights, [0])


def test_metrics_of_outputs_with_a_mask_are_those_of_keras(worker):
    """Keras gives the mask of padded texts to losses and metrics."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 10, [12, 6]).astype(np.int32)
    ids[np.arange(6) >= rng.integers(1, 6, [12, 1])] = 0
    labels = rng.integers(3, size=[12, 6]).astype(np.int32)
    tf.keras.utils.set_random_seed(1)
    model = tf.keras.Sequential([layers.InputLayer([6]), layers.Embedding(10, 4, mask_zero=True), layers.Dense(3)])
    dataset = ClientDataset.from_arrays([{"x": ids, "y": labels}])
    functional = functional_model_from_keras(
        model, SPARSE, dataset.batch_spec, ["accuracy", tf.keras.metrics.SparseTopKCategoricalAccuracy(2, name="top")]
    )
    process = build_fed_avg(functional, dataset, epochs=1, batch_size=None, learning_rate=RATE)
    weights = process.initialize().global_model_weights
    found = build_fed_eval(functional, dataset)(weights, [0])
    model.compile(loss=SPARSE, metrics=["accuracy", tf.keras.metrics.SparseTopKCategoricalAccuracy(2, name="top")])
    expected = model.evaluate(ids, labels, batch_size=12, verbose=0, return_dict=True)
    assert dict(found) == pytest.approx(expected, rel=1e-5)
    unmasked = tf.keras.metrics.SparseCategoricalAccuracy()
    assert expected["accuracy"] != pytest.approx(float(unmasked(labels, model.predict(ids, verbose=0))), rel=0.01)


@pytest.mark.parametrize(
    ("activation", "loss", "labels"),
    [
        ("softmax", "sparse_categorical_crossentropy", [0, 1, 0, 1]),
        ("softmax", "categorical_crossentropy", [[1, 0], [0, 1], [1, 0], [0, 1]]),
        ("sigmoid", "binary_crossentropy", [[1, 0], [0, 1], [1, 0], [0, 1]]),
    ],
)
def test_the_loss_of_probabilities_is_that_of_their_logits_as_in_keras(worker, activation, loss, labels):
    """Of two confident mistakes of 40 nats; of probabilities, which are clipped at 1e-7, they would be 16."""
    x = np.array([[40, 0], [0, 40], [0, 40], [40, 0]], np.float32)
    model = tf.keras.Sequential([layers.InputLayer([2]), layers.Dense(2, activation, kernel_initializer="identity")])
    dataset = ClientDataset.from_arrays([{"x": x, "y": np.array(labels)}])
    found = evaluate(worker, model, loss, dataset, {"metric": loss})
    model.compile(loss=loss, metrics=[loss])
    assert list(found.values()) == pytest.approx(model.evaluate(x, np.array(labels), verbose=0), rel=1e-5)
    assert found["loss"] > 10


def deviation(y_true, y_pred, power=1.5):
    return tf.abs(y_true - y_pred) ** power


class Deviation:
    def __call__(self, y_true, y_pred):
        return deviation(y_true, y_pred)


@pytest.mark.parametrize(
    "function",
    [
        lambda y_true, y_pred: deviation(y_true, y_pred),
        deviation,
        functools.partial(deviation, power=1.5),
        Deviation(),
        tf.keras.metrics.MeanMetricWrapper(deviation),
        tf.keras.__internal__.losses.LossFunctionWrapper(deviation),
        lambda y_true, y_pred: tf.reduce_mean(deviation(y_true, y_pred)),  # Of batches of several sizes.
    ],
)
def test_a_function_is_a_metric_as_in_keras(worker, arrays, dataset_of, function):
    dataset = dataset_of("x", "value")
    metrics = {"deviation": function}
    functional = functional_model_from_keras(sequential(units=1), "mse", dataset.batch_spec, metrics)
    process = build_fed_avg(functional, dataset, epochs=1, batch_size=None, learning_rate=RATE)
    weights = process.initialize().global_model_weights
    kernel, bias = weights.trainable
    outputs = (arrays["x"] @ kernel + bias)[:, 0]
    found = build_fed_eval(functional, dataset, batch_size=5)(weights, [0])["deviation"]
    assert found == pytest.approx(np.mean(np.abs(arrays["value"] - outputs) ** 1.5), rel=1e-5)


def right(y_true, y_pred):
    return tf.argmax(y_pred, -1) == tf.cast(tf.reshape(y_true, [-1]), tf.int64)


class ShareOfOthers(tf.keras.metrics.Mean):
    def update_state(self, y_true, y_pred, sample_weight=None):
        return super().update_state(tf.cast(tf.reshape(y_true, [-1]) != 1, tf.float32))


def test_metrics_of_ones_own_may_compare_and_use_what_is_outside_of_them(worker, arrays, dataset_of):
    """In the graphs that TFF builds `==` would be False for all of two tensors."""
    weights = tf.constant(np.linspace(1, 2, 3), tf.float32)

    def weighted(y_true, y_pred):
        return tf.gather(weights, tf.cast(tf.reshape(y_true, [-1]), tf.int32)) * tf.cast(
            right(y_true, y_pred), tf.float32
        )

    model = sequential()
    metrics = [right, ShareOfOthers("others"), weighted]
    found = evaluate(worker, model, SPARSE, dataset_of("x", "label"), metrics)
    labels = arrays["label"]
    is_right = model.predict(arrays["x"], verbose=0).argmax(-1) == labels
    assert found["right"] == pytest.approx(is_right.mean())
    assert 0 < is_right.mean() < 1
    assert found["others"] == pytest.approx((labels != 1).mean())
    assert found["weighted"] == pytest.approx(np.mean(np.linspace(1, 2, 3)[labels] * is_right), rel=1e-5)


def test_a_function_of_several_outputs_is_a_metric(worker, arrays):
    dataset = ClientDataset.from_arrays([arrays], lambda e: (e["x"], (e["label"], e["label"])))

    def loss(y_true, y_pred):
        return SPARSE(y_true[0], y_pred[0]) + SPARSE(y_true[1], y_pred[1])

    def second(y_true, y_pred):
        return tf.keras.metrics.sparse_categorical_accuracy(y_true[1], y_pred[1])

    def mean(y_true, y_pred):
        return tf.reduce_mean(second(y_true, y_pred))

    model = two_outputs()
    functional = functional_model_from_keras(model, loss, dataset.batch_spec, [second, mean])
    weights = tff.learning.models.ModelWeights(*functional.initial_weights)
    found = build_fed_eval(functional, dataset, batch_size=5)(weights, [0])
    expected = np.mean(np.argmax(model(arrays["x"])[1], -1) == arrays["label"])
    assert [found["second"], found["mean"]] == pytest.approx([expected, expected])


@pytest.mark.parametrize("units", [1, 3])
def test_crossentropy_is_the_one_that_keras_takes_for_it(worker, arrays, units):
    labels = arrays["label"] % (units + 1)
    loss = "sparse_categorical_crossentropy" if units > 1 else "binary_crossentropy"
    model = tf.keras.Sequential([layers.InputLayer([4]), layers.Dense(units, "softmax" if units > 1 else "sigmoid")])
    model.compile(loss=loss, metrics=["crossentropy"])
    dataset = ClientDataset.from_arrays([{"x": arrays["x"], "y": labels}])
    found = evaluate(worker, model, loss, dataset, ["crossentropy", "ce"])
    expected = model.evaluate(arrays["x"], labels, verbose=0, return_dict=True)["crossentropy"]
    assert [found["crossentropy"], found["ce"]] == pytest.approx([expected, expected], rel=1e-5)


@pytest.mark.parametrize("last", ["float32", None])
def test_the_global_policy_mixed_bfloat16_is_taken_as_in_keras(worker, arrays, dataset_of, last):
    with global_policy("mixed_bfloat16"):
        build = lambda: sequential(layers.Dense(5, "relu"), layers.Dense(3, dtype=last))  # noqa: E731
        x, y = arrays["x"], arrays["label"]
        assert_step_is_kerass(worker, build, SPARSE, dataset_of("x", "label"), x, y, tolerance=2e-2)
        assert 0 < evaluate(worker, build(), SPARSE, dataset_of("x", "label"), ["accuracy"])["loss"] < 5


@pytest.mark.parametrize("units", [1, 2, 12])
def test_metrics_of_a_regression_are_those_of_keras(worker, arrays, dataset_of, units):
    model = sequential(units=units)
    metrics = ["mae", tf.keras.metrics.RootMeanSquaredError(), tf.keras.metrics.MeanSquaredError]
    found = evaluate(worker, model, "mse", dataset_of("x", "value"), metrics)
    model.compile(loss="mse", metrics=["mae", "RootMeanSquaredError", "MeanSquaredError"])
    loss, mae, rmse, mse = model.evaluate(arrays["x"], arrays["value"], verbose=0)
    expected = {"loss": loss, "mae": mae, "root_mean_squared_error": rmse, "mean_squared_error": mse}
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_metric_of_ones_own_may_name_labels_and_outputs_otherwise(worker, arrays, dataset_of):
    class Error(tf.keras.metrics.Mean):
        def update_state(self, labels, outputs, sample_weight=None):
            return super().update_state(tf.abs(labels - outputs))

    found = evaluate(worker, sequential(units=1), "mae", dataset_of("x", "value"), {"error": Error})
    assert found["error"] == pytest.approx(found["loss"])


def test_a_metric_of_ones_own_that_keras_has_used_is_taken(worker, arrays):
    class OwnScore(tf.keras.metrics.F1Score):
        pass

    labels = (arrays["value"] > 0).astype(np.float32)
    metrics = [OwnScore("micro", threshold=0.5)]
    model = sequential(units=1)
    model.compile(loss="mse", metrics=metrics)
    expected = model.evaluate(arrays["x"], labels, verbose=0)
    found = evaluate(worker, model, "mse", ClientDataset.from_arrays([{"x": arrays["x"], "y": labels}]), metrics)
    assert list(found.values()) == pytest.approx(expected, rel=1e-5)


def test_metrics_that_keras_builds_at_the_first_batch_are_those_of_keras(worker, arrays):
    tf.keras.utils.set_random_seed(2)
    metrics = [tf.keras.metrics.R2Score(), tf.keras.metrics.F1Score("micro", threshold=0.5)]
    model = sequential(units=1)
    labels = (arrays["value"] > 0).astype(np.float32)
    found = evaluate(worker, model, "mse", ClientDataset.from_arrays([{"x": arrays["x"], "y": labels}]), metrics)
    model.compile(loss="mse", metrics=metrics)
    expected = model.evaluate(arrays["x"], labels, verbose=0)
    assert list(found.values()) == pytest.approx(expected, rel=1e-5)
    assert found["f1_score"] > 0


@pytest.mark.parametrize(("units", "loss"), [(3, SPARSE), (1, tf.keras.losses.BinaryCrossentropy(from_logits=True))])
def test_accuracy_and_auc_are_those_of_keras(worker, arrays, units, loss):
    model = sequential(units=units)
    metrics = {"accuracy": "accuracy"}
    if units == 1:
        metrics["auc"] = tf.keras.metrics.AUC(from_logits=True, name="auc")
    y = "label" if units == 3 else "binary"
    binary = {**arrays, "binary": (arrays["label"] == 1).astype(np.int32)}
    dataset = ClientDataset.from_arrays([binary], lambda example: (example["x"], example[y]))
    found = evaluate(worker, model, loss, dataset, metrics)
    model.compile(loss=loss, metrics=list(metrics.values()))
    expected = model.evaluate(binary["x"], binary[y], verbose=0)
    assert list(found.values()) == pytest.approx(expected, rel=1e-5)


def test_a_loss_may_use_what_is_outside_of_it(worker, arrays, dataset_of):
    """Such as the weights of classes, here of 200 to be more than TensorFlow would copy by itself."""
    weights = tf.constant(np.linspace(0.5, 2, 200), tf.float32)

    def loss(y_true, y_pred):
        losses = tf.keras.losses.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True)
        return losses * tf.gather(weights, tf.cast(tf.reshape(y_true, [-1]), tf.int32))

    dataset = dataset_of("x", "label")
    assert_step_is_kerass(worker, sequential, loss, dataset, arrays["x"], arrays["label"])
    model = sequential()
    found = evaluate(worker, model, loss, dataset, ())
    model.compile(loss=loss)
    assert found["loss"] == pytest.approx(model.evaluate(arrays["x"], arrays["label"], verbose=0), rel=1e-5)


def test_the_loss_of_texts_is_the_mean_over_the_lines_of_what_is_trained_on(worker):
    """A line's loss is a sum over its symbols, divided by the unroll: here 5; 9 is padding. f(w) of Figures 3 and 8."""
    labels = np.array([[1, 2, 3, 4], [5, 9, 9, 9], [6, 7, 9, 9]])
    dataset = ClientDataset.from_arrays([{"x": labels, "y": labels}])
    model = tf.keras.Sequential(
        [layers.InputLayer([4], dtype=tf.int64), layers.Embedding(10, 2), layers.Dense(10, kernel_initializer="zeros")]
    )
    functional = functional_model_from_keras(model, MaskedCrossentropy(9, 5), dataset.batch_spec)
    weights = tff.learning.models.ModelWeights(*functional.initial_weights)
    loss = build_fed_eval(functional, dataset, batch_size=2)(weights, [0])["loss"]
    assert loss == pytest.approx(np.log(10) * (4 + 1 + 2) / 5 / 3, rel=1e-6)  # ln 10 a symbol.


@pytest.mark.parametrize(("integer", "number"), [(np.int8, int), (np.int64, np.float64), (np.uint16, np.float16)])
def test_numbers_may_be_of_any_type(worker, dataset_of, integer, number):
    dataset = dataset_of("x", "label")
    model = functional_model_from_keras(sequential(), SPARSE, dataset.batch_spec)

    def run(integer, number):
        settings = dict(epochs=integer(2), batch_size=integer(5), learning_rate=number(1), seed=integer(3))
        process = build_fed_avg(model, dataset, **settings)
        return process.next(process.initialize(), [0]).state.global_model_weights.trainable

    assert max_difference(run(integer, number), run(int, float)) == 0
