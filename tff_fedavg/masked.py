"""Loss and accuracy over the real symbols of padded sequences.

The loss of an example is a sum over its symbols, divided by a constant, and not the mean over the real symbols of a
batch: so f(w) is the mean of the examples' losses f_i(w), as in Equation 1. It is also what the paper did, it seems:
Figure 3 starts with a plateau at 1.71, where the model has learned no more than how frequent each symbol is. That
takes 3.19 nats a symbol of the training text, of which a line has 42.9: 3.19 * 42.9 / 80 = 1.71.
"""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf


@tf.keras.saving.register_keras_serializable("tff_fedavg")
class MaskedCrossentropy(tf.keras.losses.Loss):
    """The cross entropy (nats) of a sequence, summed over the labels other than `ignore_class`, over the unroll.

    Labels are integers `[batch, time]`, logits float32 `[batch, time, classes]`, time at most `unroll`.
    """

    def __init__(self, ignore_class: int, unroll: int, name: str = "loss", reduction: str = "auto"):
        super().__init__(reduction, name)
        self.ignore_class = ignore_class
        self.unroll = unroll

    def call(self, y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
        # Not `!=`, which compares Python objects in the graphs that TFF builds.
        real = tf.not_equal(y_true, self.ignore_class)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.where(real, y_true, 0), y_pred)
        return tf.reduce_sum(tf.where(real, losses, 0.0), axis=-1) / self.unroll

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "ignore_class": self.ignore_class, "unroll": self.unroll}


@tf.keras.saving.register_keras_serializable("tff_fedavg")
class MaskedAccuracy(tf.keras.metrics.SparseCategoricalAccuracy):
    """The share of labels whose logit is the largest, among the labels other than `ignore_classes`.

    Labels are integers `[batch, time]`, logits float32 `[batch, time, classes]`. 0 if there is no label to count.
    """

    def __init__(self, ignore_classes: Sequence[int], name: str = "accuracy", dtype: tf.DType | None = None):
        super().__init__(name, dtype)
        self.ignore_classes = list(ignore_classes)

    def update_state(self, y_true: tf.Tensor, y_pred: tf.Tensor, sample_weight: tf.Tensor | None = None):
        counted = tf.reduce_all(tf.not_equal(y_true[..., tf.newaxis], self.ignore_classes), axis=-1)
        weight = tf.cast(counted, tf.float32)
        return super().update_state(y_true, y_pred, weight if sample_weight is None else weight * sample_weight)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "ignore_classes": list(self.ignore_classes)}
