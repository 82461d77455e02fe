import collections

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from tff_fedavg.masked import MaskedAccuracy, MaskedCrossentropy

PADDING = 256


def test_loss_is_the_mean_over_lines_of_their_sums_over_80():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=[2, 4, 258]).astype(np.float32)
    labels = np.array([[7, 8, 9, PADDING], [5, PADDING, PADDING, PADDING]])
    nats = np.log(np.exp(logits).sum(-1))
    lines = [
        sum(nats[0, t] - logits[0, t, labels[0, t]] for t in range(3)) / 80,
        (nats[1, 0] - logits[1, 0, 5]) / 80,
    ]
    loss = MaskedCrossentropy.from_config(MaskedCrossentropy(PADDING, 80).get_config())
    np.testing.assert_allclose(loss(labels, logits), np.mean(lines), rtol=1e-5)
    # A batch that is cut at its longest line, or is not, has the same loss.
    np.testing.assert_allclose(loss(labels[:, :3], logits[:, :3]), np.mean(lines), rtol=1e-5)


def test_loss_of_a_batch_is_the_mean_of_the_losses_of_its_lines():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=[5, 6, 258]).astype(np.float32)
    labels = np.where(np.arange(6) < rng.integers(1, 7, size=[5, 1]), rng.integers(256, size=[5, 6]), PADDING)
    loss = MaskedCrossentropy(PADDING, 80)
    np.testing.assert_allclose(
        loss(labels, logits), np.mean([loss(labels[i : i + 1], logits[i : i + 1]) for i in range(5)]), rtol=1e-5
    )


def test_padding_has_no_gradient():
    logits = tf.random.stateless_normal([1, 3, 258], [0, 0])
    with tf.GradientTape() as tape:
        tape.watch(logits)
        loss = MaskedCrossentropy(PADDING, 80)(tf.constant([[1, 2, PADDING]]), logits)
    gradient = tape.gradient(loss, logits).numpy()
    assert np.all(gradient[0, 2] == 0) and np.all(np.abs(gradient[0, :2]).sum(-1) > 0)


def test_masked_accuracy_counts_real_characters_in_keras_and_in_tff():
    labels = [np.array([[1, 2, PADDING]]), np.array([[PADDING, PADDING, PADDING]]), np.array([[3, 4, 5]])]
    # Right, wrong, padding predicted "right"; all padding; right, right, padding predicted for a real character.
    guesses = [np.array([[1, 0, PADDING]]), np.array([[PADDING, 0, 0]]), np.array([[3, 4, PADDING]])]
    logits = [np.eye(258, dtype=np.float32)[guess] for guess in guesses]

    metric = MaskedAccuracy.from_config(MaskedAccuracy([PADDING]).get_config())
    assert metric.result() == 0
    for y_true, y_pred in zip(labels, logits):
        metric.update_state(y_true, y_pred)
    np.testing.assert_allclose(metric.result(), 3 / 5)

    initialize, update, finalize = tff.learning.metrics.create_functional_metric_fns(
        collections.OrderedDict(accuracy=lambda: MaskedAccuracy([PADDING]))
    )
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        state = initialize()
        for y_true, y_pred in zip(labels, logits):
            state = update(state, y_true, tff.learning.models.BatchOutput(predictions=y_pred))
        np.testing.assert_allclose(session.run(finalize(state)["accuracy"]), 3 / 5)


def test_masked_accuracy_leaves_out_several_classes():
    labels = np.array([[1, 0, 2, 5], [4, 3, 3, 0]])
    guesses = np.array([[1, 0, 2, 6], [4, 3, 7, 0]])
    logits = np.eye(8, dtype=np.float32)[guesses]
    metric = MaskedAccuracy.from_config(MaskedAccuracy([0, 1, 3]).get_config())
    metric.update_state(labels, logits)
    # Of the labels 2, 5 and 4 the second is missed.
    np.testing.assert_allclose(metric.result(), 2 / 3)
