"""What a task is: all that an algorithm of `tff_fedavg` needs to train and evaluate one of the paper's models."""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import tensorflow as tf
import tensorflow_federated as tff

from tff_fedavg.client_data import ClientDataset

# The loss and the metrics of a task whose examples have one label each, from logits.
CLASSIFICATION = {
    "loss": tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    "metrics": {
        "loss": lambda: tf.keras.metrics.SparseCategoricalCrossentropy(from_logits=True, name="loss"),
        "accuracy": lambda: tf.keras.metrics.SparseCategoricalAccuracy(name="accuracy"),
    },
}


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
