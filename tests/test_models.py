import numpy as np
import pytest
import tensorflow as tf

from tff_fedavg import models


@pytest.mark.parametrize(("build", "count"), [(models.mnist_2nn, 199_210), (models.mnist_cnn, 1_663_370)])
def test_parameter_count_is_the_papers(build, count):
    model = build()
    assert sum(np.prod(w.shape) for w in model.trainable_weights) == count
    assert not model.non_trainable_weights


@pytest.mark.parametrize("build", [models.mnist_2nn, models.mnist_cnn])
def test_outputs_are_ten_logits(build):
    outputs = build()(tf.random.stateless_normal([7, 28, 28], [0, 0])).numpy()
    assert outputs.shape == (7, 10)
    assert outputs.min() < 0  # Neither ReLU nor softmax comes after the last layer.


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
