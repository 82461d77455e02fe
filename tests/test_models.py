import numpy as np
import pytest
import tensorflow as tf

from tff_fedavg import models


@pytest.mark.parametrize(
    ("build", "count"),
    [(models.mnist_2nn, 199_210), (models.mnist_cnn, 1_663_370), (models.cifar_cnn, 1_068_298)],
)
def test_parameter_count_is_the_papers(build, count):
    model = build()
    assert sum(np.prod(w.shape) for w in model.trainable_weights) == count
    assert not model.non_trainable_weights


@pytest.mark.parametrize("build", [models.mnist_2nn, models.mnist_cnn])
def test_outputs_are_ten_logits(build):
    outputs = build()(tf.random.stateless_normal([7, 28, 28], [0, 0])).numpy()
    assert outputs.shape == (7, 10)
    assert outputs.min() < 0  # Neither ReLU nor softmax comes after the last layer.


def test_cifar_cnn_starts_with_the_tutorials_values_of_2015():
    tf.keras.utils.set_random_seed(0)
    weights = models.cifar_cnn().get_weights()
    for kernel, stddev in zip(weights[::2], [1e-4, 1e-4, 0.04, 0.04, 1 / 192], strict=True):
        # A normal distribution that is cut at two standard deviations has 0.8796 of its standard deviation left.
        assert 1.9 * stddev < np.abs(kernel).max() <= 2 * stddev
        assert kernel.std() == pytest.approx(0.8796 * stddev, rel=0.04)
        assert abs(kernel.mean()) < 4 * stddev / kernel.size**0.5
    assert [set(bias) for bias in weights[1::2]] == [{np.float32(b)} for b in (0, 0.1, 0.1, 0.1, 0)]


def _convolve(x, kernel, bias):
    """SAME convolution and ReLU, in NumPy."""
    _, height, width, _ = x.shape
    padded = np.pad(x, [(0, 0), (2, 2), (2, 2), (0, 0)])
    windows = ((padded[:, i : i + height, j : j + width], kernel[i, j]) for i in range(5) for j in range(5))
    return np.maximum(sum(window @ k for window, k in windows) + bias, 0)


def _pool(x):
    """3x3 max pooling with stride 2; SAME padding of an even size is one row below and one column to the right."""
    padded = np.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)], constant_values=-np.inf)
    _, height, width, _ = x.shape
    return np.max([padded[:, i : i + height : 2, j : j + width : 2] for i in range(3) for j in range(3)], axis=0)


def _normalize(x):
    """y_c = x_c / (1 + 0.001 / 9 * sum of the squares of x_{c-4}, ..., x_{c+4})^0.75."""
    squares = np.pad(x**2, [(0, 0), (0, 0), (0, 0), (4, 4)])
    return x / (1 + 0.001 / 9 * sum(squares[..., i : i + x.shape[-1]] for i in range(9))) ** 0.75


def test_cifar_cnn_computes_the_tutorials_layers_in_numpy():
    tf.keras.utils.set_random_seed(0)
    model = models.cifar_cnn()
    model.set_weights([500 * w if w.ndim == 4 else w for w in model.get_weights()])  # Else only biases are seen.
    images = 100 * tf.random.normal([2, 24, 24, 3]).numpy()  # Large enough for the normalization to matter.
    k1, b1, k2, b2, w3, b3, w4, b4, w5, b5 = (w.astype(np.float64) for w in model.get_weights())
    x = _normalize(_pool(_convolve(images, k1, b1)))
    x = _pool(_normalize(_convolve(x, k2, b2)))
    x = np.maximum(x.reshape(2, -1) @ w3 + b3, 0)
    expected = np.maximum(x @ w4 + b4, 0) @ w5 + b5
    np.testing.assert_allclose(model(images), expected, rtol=1e-4, atol=1e-5)


def test_word_lstm_has_the_papers_parameters_and_gives_logits_of_ten_thousand_words():
    model = models.word_lstm()
    assert sum(np.prod(w.shape) for w in model.trainable_weights) == 4_950_544
    assert model(tf.constant([[2, 9_999, 4]])).shape == (1, 3, 10_000)


# The count of the paper, and 52 more outputs with a weight for each of the last 200 or 512 units and a bias.
@pytest.mark.parametrize(
    ("build", "count"), [(models.mnist_2nn, 199_210 + 52 * 201), (models.mnist_cnn, 1_663_370 + 52 * 513)]
)
def test_62_classes_add_outputs_only(build, count):
    model = build(62)
    assert model.count_params() == count
    assert model.output_shape == (None, 62)
