"""--matmul_precision=bfloat16: what is computed in bfloat16 and what is not, against NumPy and against float32."""

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf

from binaries.experiment import Experiment, precision, runner
from tff_fedavg import models
from tff_fedavg.metrics_table import read_metrics


def bfloat16(array):
    return np.asarray(array).astype(ml_dtypes.bfloat16).astype(np.float32)


def build(keras_model_fn):
    tf.keras.utils.set_random_seed(0)
    return keras_model_fn()


def test_hidden_layers_round_to_bfloat16_and_logits_do_not():
    model = build(precision.in_bfloat16(models.mnist_2nn))
    x = np.random.default_rng(0).normal(size=[3, 28, 28]).astype(np.float32)
    w_1, b_1, w_2, b_2, w_3, b_3 = (w.numpy() for w in model.trainable_variables)
    hidden = bfloat16(x).reshape(3, -1)
    for w, b in ((w_1, b_1), (w_2, b_2)):
        hidden = np.maximum(bfloat16(bfloat16(hidden @ bfloat16(w)) + bfloat16(b)), 0)
    expected = hidden @ w_3 + b_3
    # The order of a sum decides how its last bit is rounded: 2^-8 of it. In float32 the logits are 0.01 apart.
    np.testing.assert_allclose(model(x), expected, atol=2e-3 * np.abs(expected).max())
    assert np.abs(build(models.mnist_2nn)(x) - expected).max() > 2e-3 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("keras_model_fn", "shape"),
    [(models.mnist_2nn, [28, 28]), (models.mnist_cnn, [28, 28]), (models.cifar_cnn, [24, 24, 3])],
)
def test_models_have_nearly_the_same_gradients_as_in_float32(keras_model_fn, shape):
    x, y = tf.random.stateless_normal([8, *shape], [0, 0]), tf.range(8)
    gradients = []
    for fn in (keras_model_fn, precision.in_bfloat16(keras_model_fn)):
        model = build(fn)
        for kernel in (w for w in model.trainable_variables if w.shape.rank == 4):
            kernel.assign(0.05 * kernel / tf.math.reduce_std(kernel))  # Else the CIFAR CNN's gradients are its biases'.
        with tf.GradientTape() as tape:
            logits = model(x, training=True)
            loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)(y, logits)
        assert logits.dtype == tf.float32
        gradients.append(tape.gradient(loss, model.trainable_variables))
    assert all(g.dtype == tf.float32 for g in gradients[1])
    exact, rounded = (np.concatenate([np.ravel(g) for g in each]) for each in gradients)
    # Rounding to 8 bits also decides here and there which pixel the pooling takes.
    assert 0 < np.linalg.norm(rounded - exact) < 0.1 * np.linalg.norm(exact)


def test_a_model_whose_output_would_be_in_bfloat16_is_told_what_to_do():
    model = lambda: tf.keras.Sequential([tf.keras.layers.InputLayer([2]), tf.keras.layers.Dense(3)])  # noqa: E731
    message = 'the output of this model would be bfloat16; give its last layer dtype="float32"$'
    with pytest.raises(ValueError, match=message):
        precision.in_bfloat16(model)()


def test_keras_computes_in_float32_again_afterwards():
    precision.in_bfloat16(models.mnist_2nn)()
    assert models.mnist_2nn().layers[1].compute_dtype == "float32"


@pytest.mark.parametrize("keras_model_fn", [models.char_lstm, models.word_lstm])
def test_a_model_without_products_in_bfloat16_is_refused(keras_model_fn):
    with pytest.raises(ValueError, match="^--matmul_precision=bfloat16: no layer .*; leave it out$"):
        precision.in_bfloat16(keras_model_fn)()


@pytest.mark.parametrize(
    ("flags", "has_it"),
    [("fpu avx512f avx512_bf16", True), ("fpu amx_bf16", True), ("asimd bf16 sve", True), ("fpu avx2 avx512f", False)],
)
def test_a_processor_without_it_is_refused(tmp_path, flags, has_it):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\nbogomips\t: 5000\n")
    if has_it:
        precision.check_processor(cpuinfo)
    else:
        with pytest.raises(ValueError, match="^--matmul_precision=bfloat16: this processor .*; leave it out$"):
            precision.check_processor(cpuinfo)


def test_a_run_is_refused_before_it_leaves_anything_where_the_processor_has_none(tmp_path, monkeypatch):
    def refuse():
        raise ValueError("no instructions")

    monkeypatch.setattr(precision, "check_processor", refuse)
    with pytest.raises(ValueError, match="no instructions"):
        runner.run(Experiment(data="embedded", matmul_precision="bfloat16"), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_run_learns_as_in_float32_and_goes_on_in_its_own_precision_only(tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "check_processor", lambda: None)  # Without it, it is slow and the same.
    losses = {}
    for name in ("float32", "bfloat16"):
        experiment = Experiment(data="embedded", clients=20, rounds=1, target_accuracy=1.0, matmul_precision=name)
        runner.run(experiment, tmp_path / name)
        losses[name] = read_metrics(tmp_path / name / "metrics.csv")[1]["client_work/train/loss"]
    assert losses["float32"] != losses["bfloat16"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)
    with pytest.raises(ValueError, match="matmul_precision=bfloat16, not float32"):
        Experiment.read(tmp_path / "bfloat16").go_on(tmp_path / "bfloat16", {"matmul_precision": "float32"})
