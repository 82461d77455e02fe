"""Labels held against a model's outputs: one out of range ends the worker amid a run, or makes the loss NaN."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from tasks.files import first_outside
from tff_fedavg.client_data import ClientDataset
from tff_fedavg.functional_model import Loss

_CHUNK_BYTES = 1 << 24


def check_labels(model: tff.learning.models.FunctionalModel, loss: Loss, datasets: Mapping[str, ClientDataset]) -> None:
    """Checks that the labels are classes of the model, where the loss takes integers for classes.

    Args:
      model: The model.
      loss: Its loss, as for `functional_model_from_keras`.
      datasets: Data sets, by what they are, such as "test set".

    Raises:
      ValueError: If a label is none. It names the data set, the client, and the place among the client's examples.
    """
    x_spec, y_spec, *_ = model.input_spec
    if not _takes_classes(loss) or not isinstance(y_spec, tf.TensorSpec):
        return
    num_classes = _num_outputs(model, x_spec)
    if num_classes is None:
        return
    for name, dataset in datasets.items():
        ends = np.cumsum(dataset.num_examples)
        for start, labels in _labels(dataset):
            with np.errstate(invalid="ignore"):  # NaN is no class, either.
                classes = labels.astype(np.int64, copy=False)  # As Keras does.
            if (place := first_outside(classes, num_classes)) is not None:
                example = start + place[0]
                client = np.searchsorted(ends, example, side="right")
                position = example - ends[client] + dataset.num_examples[client]
                raise ValueError(
                    f"client {client} of the {name} has the label {labels[place]} at position {position}, but the "
                    f"model has {num_classes} outputs: take 0 to {num_classes - 1}"
                )


def _takes_classes(loss: Loss) -> bool:
    if isinstance(loss, str):
        loss = tf.keras.losses.get(loss)
    if type(loss) is tf.keras.losses.SparseCategoricalCrossentropy:
        return loss.get_config()["ignore_class"] is None
    return loss is tf.keras.losses.sparse_categorical_crossentropy


def _num_outputs(model: tff.learning.models.FunctionalModel, x_spec: Any) -> int | None:
    """Returns the size of the last dimension of what the model predicts, None if it is not known before."""
    weights_spec = tf.nest.map_structure(lambda w: tf.TensorSpec(w.shape, w.dtype), model.initial_weights)
    predict = tf.function(lambda weights, x: model.predict_on_batch(weights, x, training=False))
    return predict.get_concrete_function(weights_spec, x_spec).structured_outputs.shape[-1]


def _labels(dataset: ClientDataset) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the labels of all examples, some at a time, each time with the number of those before them."""

    def labels(records):
        _, y, *_ = dataset.batch(records, tf.range(tf.shape(records)[0]), tf.zeros([2], tf.int32))
        return y  # What only x is made of is not computed.

    # A concrete function: TensorFlow warns when functions of the same code are traced again and again.
    labels_of = tf.function(labels).get_concrete_function(tf.TensorSpec([None, dataset.record_bytes], tf.uint8))
    total = dataset.num_examples.sum()
    step = max(_CHUNK_BYTES // dataset.record_bytes, 1)
    for start in range(0, total, step):
        yield start, labels_of(tf.constant(dataset.gather(np.arange(start, min(start + step, total))))).numpy()
