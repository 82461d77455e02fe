"""Accuracy over the real characters of padded lines.

The losses need nothing of the kind: `tf.keras.losses.SparseCategoricalCrossentropy` and the metric of that name take
`ignore_class`, and divide by the number of labels that are not ignored.
"""

from typing import Any

import tensorflow as tf


@tf.keras.saving.register_keras_serializable("tff_fedavg")
class MaskedAccuracy(tf.keras.metrics.SparseCategoricalAccuracy):
    """The share of labels whose logit is the largest, among the labels other than `ignore_class`.

    Labels are integers `[batch, time]`, logits float32 `[batch, time, classes]`. 0 if there is no label to count.
    """

    def __init__(self, ignore_class: int, name: str = "accuracy", dtype: tf.DType | None = None):
        super().__init__(name, dtype)
        self.ignore_class = ignore_class

    def update_state(self, y_true: tf.Tensor, y_pred: tf.Tensor, sample_weight: tf.Tensor | None = None):
        # Not `!=`, which compares Python objects in the graphs that TFF builds.
        weight = tf.cast(tf.not_equal(y_true, self.ignore_class), tf.float32)
        return super().update_state(y_true, y_pred, weight if sample_weight is None else weight * sample_weight)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "ignore_class": self.ignore_class}
