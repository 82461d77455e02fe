"""Exported models, loaded by Keras in a process of its own, and the program `binaries/export.py`."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff
from conftest import NO_SEED, ROOT
from numpy_model import max_difference
from programs import run_at_once, run_program
from tensorflow.keras import layers

import tasks
import tff_fedavg
from tff_fedavg import export, learning_curve, metrics_table, models, saved_state

SPARSE = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)

# Loads a model after importing some modules, and says what it computes and what has been imported.
IN_PLAIN_KERAS = """
import importlib, json, sys
import numpy as np, tensorflow as tf
path, data, *modules = sys.argv[1:]
for module in modules:
    importlib.import_module(module)
x, y = (np.load(data)[name] for name in "xy")
predictions = tf.keras.models.load_model(path).predict(x, verbose=0)
imported = [name for name in ("tensorflow_federated", "tff_fedavg") if name in sys.modules]
print(json.dumps({"accuracy": float(np.mean(predictions.argmax(-1) == y)), "imported": imported}))
"""


def export_run(run_dir, output, *flags):
    return run_program(
        "binaries.export", f"--run_dir={run_dir}", f"--cache_dir={run_dir.parent}/cache", f"--output={output}", *flags
    )


def in_plain_keras(path, data, *modules):
    """Runs where the directories of this project are not on Python's path, unless a module of it is imported."""
    program = [sys.executable, "-c", IN_PLAIN_KERAS, path, data, *modules]
    result = subprocess.run(
        program, capture_output=True, text=True, cwd=ROOT if modules else path.parent, check=True, timeout=120
    )
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def test_set(short_run):
    """The test set of the run, in a file."""
    task = tasks.build_task("mnist_2nn", data="embedded", cache_dir=short_run.parent / "cache")
    parts = [task.test.read(tf.constant(k)) for k in range(task.test.num_clients)]
    batches = [task.test.batch(records, tf.range(len(records)), NO_SEED) for records in parts]
    path = short_run.parent / "test_set.npz"
    np.savez(path, x=np.concatenate([x for x, _ in batches]), y=np.concatenate([y for _, y in batches]))
    return path


@pytest.fixture(scope="module", params=["model.keras", "model"])
def exported(request, short_run):
    """The run's model, as a file and as a directory, and what the program said."""
    output = short_run.parent / request.param
    return output, export_run(short_run, output)


def test_plain_keras_measures_what_the_run_measured(short_run, test_set, exported):
    path, result = exported
    assert (result.returncode, result.stderr) == (0, "")
    assert path.is_dir() == (path.suffix == "")
    _, accuracies = learning_curve.evaluations(metrics_table.read_metrics(short_run / "metrics.csv"))
    found = in_plain_keras(path, test_set)
    assert found["accuracy"] == pytest.approx(accuracies[-1], abs=1e-6)
    assert found["imported"] == []
    lines = result.stdout.splitlines()
    assert lines[1] == f"{path}: 199,210 parameters, for float32 [None, 28, 28]"
    assert lines[2].startswith("on the test set of mnist_2nn: loss ")
    assert lines[2].endswith(f", accuracy {accuracies[-1]:.4f}")


def test_what_is_there_is_replaced_only_when_that_is_asked_for(short_run, exported):
    """Also where a link leads there."""
    path, _ = exported
    refused = export_run(short_run, path)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == f"export: --output={path} exists: take another name, or --overwrite\n"
    before = (path if path.suffix else path / "fingerprint.pb").stat().st_mtime_ns
    link = short_run.parent / f"link{path.suffix}"
    link.symlink_to(path.name)
    replaced = export_run(short_run, link, "--overwrite", "--round=3")
    assert (replaced.returncode, replaced.stderr) == (0, "")
    assert link.is_symlink()
    link.unlink()
    assert (path if path.suffix else path / "fingerprint.pb").stat().st_mtime_ns > before
    names = {"run", "cache", "test_set.npz", "model", "model.keras"}
    assert {found.name for found in short_run.parent.iterdir()} <= names


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--output is missing: give NAME.keras, or NAME"),
        (["--output={}/model.h5"], "model.h5: take a name that ends in .keras, or has no suffix"),
        (["--output={}", "--overwrite"], "exists, and is no model: take another name"),
        (["--output={}/model"], "--run_dir is missing"),
        (["--output={}/model", "--run_dir={}/missing"], "missing holds no run"),
        (["--output={}/model", "--run_dir={run}", "--round=2"], "has no state of round 2: take one of [0, 3]"),
        (["--output={}/model", "--run_dir={run}", "--round=two"], "--round=two"),
    ],
)
def test_bad_flags_get_one_line_at_once(tmp_path, short_run, flags, message):
    result = run_at_once("binaries.export", *(flag.format(tmp_path, run=short_run) for flag in flags))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("export: ") and result.stderr.count("\n") == 1
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_damaged_state_is_told_and_nothing_is_written(short_run, tmp_path):
    states = tmp_path / "run" / "states"
    states.mkdir(parents=True)
    content = (short_run / "states" / "round_3.npz").read_bytes()
    (states / "round_3.npz").write_bytes(content)
    (states / "round_7.npz").write_bytes(content[:-1])
    (tmp_path / "run" / "config.json").write_bytes((short_run / "config.json").read_bytes())
    flags = [f"--run_dir={tmp_path}/run", f"--cache_dir={short_run.parent}/cache", f"--output={tmp_path}/model"]
    result = run_program("binaries.export", *flags)
    assert result.returncode == 2
    assert result.stderr.startswith(f"export: {states / 'round_7.npz'} is damaged (")
    assert result.stderr.endswith("); the other saved rounds are [3]\n") and result.stderr.count("\n") == 1
    assert not (tmp_path / "model").exists()


def test_saved_rounds_are_those_of_whole_states(tmp_path):
    (tmp_path / "states").mkdir()
    for name in ("round_10.npz", "round_9.npz", "round_11.npz.tmp", "damaged_1_round_8.npz", "round_x.npz"):
        (tmp_path / "states" / name).write_bytes(b"")
    assert saved_state.saved_rounds(tmp_path) == [9, 10]
    assert saved_state.choose_round(tmp_path) == 10
    with pytest.raises(ValueError, match="has no saved state"):
        saved_state.choose_round(tmp_path / "other")


def functional(keras_model, x_spec):
    """The model with which FedAvg starts."""
    return tff_fedavg.functional_model_from_keras(keras_model, SPARSE, (x_spec, tf.TensorSpec([None], tf.int32)))


def shifted(weights):
    """Other weights of the same shapes, in the order of FedAvg's model."""
    return tff.learning.models.ModelWeights(*(tuple(w + 0.01 for w in part) for part in weights))


ARCHITECTURES = {
    "mnist_2nn": (models.mnist_2nn, tf.TensorSpec([None, 28, 28])),
    "mnist_cnn": (models.mnist_cnn, tf.TensorSpec([None, 28, 28])),
    "cifar_cnn": (models.cifar_cnn, tf.TensorSpec([None, 24, 24, 3])),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("is_built", [False, True])
def test_exported_model_computes_what_the_papers_model_does_with_those_weights(name, is_built):
    build, x_spec = ARCHITECTURES[name]
    original = build()
    weights = shifted(functional(original, x_spec).initial_weights)
    before = original.get_weights()
    exported = tff_fedavg.keras_model(original if is_built else build, weights)
    x = np.random.default_rng(0).normal(size=[5, *x_spec.shape[1:]]).astype(np.float32)
    assert max_difference(original.get_weights(), before) == 0
    original.set_weights([*weights.trainable, *weights.non_trainable])
    np.testing.assert_array_equal(exported.predict(x, verbose=0), original.predict(x, verbose=0))
    foreign = {type(layer).__name__ for layer in exported.layers if not type(layer).__module__.startswith("keras.")}
    assert foreign == ({"LocalResponseNormalization"} if name == "cifar_cnn" else set())


def normalized():
    normalization = layers.Normalization()
    normalization.adapt(np.array([[1.0, 2, 3, 4], [2, 2, 5, 8]]))
    return tf.keras.Sequential([layers.InputLayer([4]), normalization, layers.Dense(3)])


def frozen():
    model = tf.keras.Sequential([layers.InputLayer([4]), layers.Dense(5, activation="relu"), layers.Dense(3)])
    model.layers[0].trainable = False
    return model


def with_batch_normalization():
    return tf.keras.Sequential([layers.InputLayer([4]), layers.BatchNormalization(trainable=False), layers.Dense(3)])


@tf.keras.saving.register_keras_serializable("test_export")
class Subclassed(tf.keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(3)

    def call(self, x):
        return self.dense(x)


class Scale(layers.Layer):
    """Keras does not know it: it is not registered."""

    def build(self, shape):
        self.scale = self.add_weight("scale", [shape[-1]], initializer="ones")

    def call(self, x):
        return x * self.scale


def with_own_layer():
    return tf.keras.Sequential([layers.InputLayer([4]), tf.keras.Sequential([Scale()]), layers.Dense(3)])


def shifted_relu(x):
    return tf.nn.relu(x) + 0.5


class Twos(tf.keras.initializers.Initializer):
    def __call__(self, shape, dtype=None, **kwargs):
        return tf.fill(shape, 2.0)


def with_own_functions():
    return tf.keras.Sequential([layers.InputLayer([4]), layers.Dense(3, shifted_relu, kernel_initializer=Twos())])


def with_lambda():
    return tf.keras.Sequential([layers.InputLayer([4]), layers.Lambda(lambda x: 2 * x), layers.Dense(3)])


class Unregistered(Subclassed):
    pass


def with_lookup():
    """Keras lists its table among the weights."""
    lookup = layers.IntegerLookup()
    lookup.adapt(np.arange(-3, 3))
    before, after = (layers.Lambda(lambda x, dtype=dtype: tf.cast(x, dtype)) for dtype in ("int64", "float32"))
    return tf.keras.Sequential([layers.InputLayer([4]), before, lookup, after, layers.Dense(3)])


@pytest.mark.parametrize(
    "build",
    [
        normalized,
        frozen,
        with_batch_normalization,
        with_lookup,
        with_own_layer,
        with_own_functions,
        Subclassed,
        Unregistered,
    ],
)
def test_weights_go_to_any_keras_model_and_come_back(build):
    original = build()
    own = functional(original, tf.TensorSpec([None, 4])).initial_weights
    weights = tf.nest.map_structure(lambda w: w + np.ones_like(w), own)
    exported = tff_fedavg.keras_model(original, tff.learning.models.ModelWeights(*weights))
    for name, values in zip(("trainable_variables", "non_trainable_variables"), weights):
        exported_variables = [v for v in getattr(exported, name) if isinstance(v, tf.Variable)]
        assert max_difference([0, *exported_variables], [0, *values]) == 0
        variables = [v for v in getattr(original, name) if isinstance(v, tf.Variable)]
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)
    if build is normalized:
        original.layers[0].finalize_state()  # As Keras does where it loads weights.
    x = np.random.default_rng(0).normal(size=[5, 4]).astype(np.float32)
    np.testing.assert_array_equal(exported.predict(x, verbose=0), original.predict(x, verbose=0))
    again = functional(exported, tf.TensorSpec([None, 4])).initial_weights
    for part, expected in zip(again, weights):
        assert max_difference([0, *part], [0, *expected]) == 0


def test_a_function_builds_a_normalization_that_has_not_been_adapted(worker):
    def build():
        return tf.keras.Sequential([tf.keras.layers.InputLayer([4]), tf.keras.layers.Normalization()])

    x = np.random.default_rng(0).normal(3, 2, size=[50, 4]).astype(np.float32)
    adapted = build()
    adapted.layers[0].adapt(x)
    variables = tff.learning.models.ModelWeights([], [v.numpy() for v in adapted.non_trainable_variables])
    exported = tff_fedavg.keras_model(build, variables)
    np.testing.assert_array_equal(exported.predict(x, verbose=0), adapted.predict(x, verbose=0))
    assert abs(exported.predict(x, verbose=0).mean()) < 1e-4


def test_layers_that_keras_lacks_need_one_import_and_not_tff(tmp_path):
    build = models.char_lstm
    weights = tff.learning.models.ModelWeights(
        *functional(build, tf.TensorSpec([None, None], tf.int32)).initial_weights
    )
    exported = tff_fedavg.keras_model(build, weights)
    exported.save(tmp_path / "lstm.keras")
    x = np.random.default_rng(0).integers(258, size=[3, 7])
    np.savez(tmp_path / "data.npz", x=x, y=exported.predict(x, verbose=0).argmax(-1))
    found = in_plain_keras(tmp_path / "lstm.keras", tmp_path / "data.npz", "tff_fedavg.layers", "tff_fedavg.masked")
    assert found == {"accuracy": 1.0, "imported": ["tff_fedavg"]}


class Uncopied(Subclassed):
    def get_config(self):
        raise NotImplementedError("no configuration")


@pytest.mark.parametrize(
    ("build", "needs"),
    [
        (normalized, []),
        (Unregistered, ["it has what is not Keras's, and load_model takes as custom_objects: Unregistered"]),
        (
            with_own_functions,
            ["it has what is not Keras's, and load_model takes as custom_objects: Twos, shifted_relu"],
        ),
        (with_own_layer, ["it has what is not Keras's, and load_model takes as custom_objects: Scale"]),
        (models.mnist_cnn, ["it has layers of tff_fedavg.layers: import that before it is loaded"]),
        (with_lambda, ["Keras cannot load it so (ValueError: Requested the deserialization of a Lambda layer"]),
    ],
)
def test_what_loading_needs_is_told(tmp_path, build, needs):
    model = build()
    if not model.built:
        model(np.zeros([1, 4], np.float32))
    model.save(tmp_path / "model.keras")
    told = export.what_loading_needs(model, tmp_path / "model.keras")
    assert [line[: len(need)] for line, need in zip(told, needs, strict=True)] == needs


def test_a_model_that_cannot_be_copied_is_told_in_one_line():
    model = Uncopied()
    weights = tff.learning.models.ModelWeights(*functional(model, tf.TensorSpec([None, 4])).initial_weights)
    with pytest.raises(ValueError, match="the model cannot be copied .*no configuration.*: give a function that") as e:
        tff_fedavg.keras_model(model, weights)
    assert "\n" not in str(e.value)


def test_what_does_not_fit_is_told_in_one_line():
    weights = tff.learning.models.ModelWeights(*functional(frozen, tf.TensorSpec([None, 4])).initial_weights)
    with pytest.raises(ValueError, match=r"the trainable weights have the shapes \[\(5, 3\), \(3,\)\], but those of"):
        tff_fedavg.keras_model(models.mnist_2nn, weights)
    with pytest.raises(ValueError, match=r"the non_trainable weights have the shapes \[\], but"):
        tff_fedavg.keras_model(frozen, weights._replace(non_trainable=()))
    with pytest.raises(ValueError, match="the model has no weights yet"):
        tff_fedavg.keras_model(Subclassed, weights)
    with pytest.raises(TypeError, match="model is 'dense'; it must be a tf.keras.Model"):
        tff_fedavg.keras_model("dense", weights)
    with pytest.raises(TypeError, match="weights is a list; it must be a tff.learning.models.ModelWeights"):
        tff_fedavg.keras_model(frozen, [])
