"""What a task is: all that an algorithm of `tff_fedavg` needs to train and evaluate one of the paper's models."""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from tff_fedavg.client_data import ClientDataset
from tff_fedavg.masked import MaskedAccuracy, MaskedCrossentropy

_EXAMPLES_PER_TEST_PART = 1000

# The loss and the metrics of a task whose examples have one label each, from logits.
CLASSIFICATION = {
    "loss": tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    "metrics": {
        "loss": lambda: tf.keras.metrics.SparseCategoricalCrossentropy(from_logits=True, name="loss"),
        "accuracy": lambda: tf.keras.metrics.SparseCategoricalAccuracy(name="accuracy"),
    },
}


def next_symbol(*, padding: int, unroll: int, not_counted: Sequence[int] = ()) -> dict[str, Any]:
    """Returns the loss and the metrics of a task that predicts the next symbol of a text, from logits.

    Args:
      padding: The label that fills up a text; it counts nowhere.
      unroll: The constant by which the loss of a text is divided.
      not_counted: Other labels that do not count in the accuracy.
    """
    return {
        "loss": MaskedCrossentropy(padding, unroll),
        "metrics": {
            # In nats per label, unlike the training loss.
            "loss": lambda: tf.keras.metrics.SparseCategoricalCrossentropy(
                from_logits=True, ignore_class=padding, name="loss"
            ),
            "accuracy": lambda: MaskedAccuracy([padding, *not_counted]),
        },
    }


def cut_into_parts(examples: Mapping[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """Cuts a test set (arrays `[n, ...]` by name) into parts of 1,000 examples, to be evaluated in parallel."""
    num_examples = len(next(iter(examples.values())))
    for start in range(0, num_examples, _EXAMPLES_PER_TEST_PART):
        yield {name: array[start : start + _EXAMPLES_PER_TEST_PART] for name, array in examples.items()}


@dataclasses.dataclass(frozen=True)
class Task:
    """A data set with its partition, a model and a target.

    Attributes:
      name: Name of the task, such as "mnist_2nn".
      train: The clients' training examples.
      test: The test set. It is cut into "clients" too, which are evaluated in parallel.
      keras_model_fn: Builds the architecture.
      loss: Loss of the model's outputs.
      metrics: Constructors of the metrics on the test set; "accuracy" is the one that the target is about.
      target_accuracy: Test accuracy whose rounds the paper counts.
      label_names: Returns what the labels stand for. Of a text they read as it does when set next to each other: a
        word ends in a space, and padding is empty.
      checksums: SHA-256 of the files that the data came from, by file name; of a large database, see its task.
    """

    name: str
    train: ClientDataset
    test: ClientDataset
    keras_model_fn: Callable[[], tf.keras.Model]
    loss: tf.keras.losses.Loss
    metrics: Mapping[str, Callable[[], tf.keras.metrics.Metric]]
    target_accuracy: float
    label_names: Callable[[], Sequence[str]]
    checksums: Mapping[str, str]

    def build_model(self, seed: int) -> tff.learning.models.FunctionalModel:
        """Builds the model with initial weights w_0 drawn from `seed` (sets the global seeds of Keras on the way)."""
        tf.keras.utils.set_random_seed(seed)
        return tff.learning.models.functional_model_from_keras(
            self.keras_model_fn(), self.loss, self.train.batch_spec, collections.OrderedDict(self.metrics)
        )
