"""What a task is: all that an algorithm of `tff_fedavg` needs to train and evaluate a model on data of clients."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from tasks.labels import check_labels
from tff_fedavg.client_data import ClientDataset
from tff_fedavg.functional_model import Loss, Metric, functional_model_from_keras
from tff_fedavg.learning_curve import Target
from tff_fedavg.masked import MaskedAccuracy, MaskedCrossentropy

_EXAMPLES_PER_TEST_PART = 1000

# The metric that every model has; see `functional_model_from_keras`.
LOSS = "loss"

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
      loss: Loss of the model's outputs, as for `functional_model_from_keras`.
      metrics: The metrics on the test set, or their constructors, by name.
      target: The target whose rounds are counted, if there is one; for the paper's tasks, a test accuracy.
      label_names: Returns what the labels stand for, if they are names. Of a text they read as it does when set next to
        each other: a word ends in a space, and padding is empty.
      checksums: SHA-256 of the files that the data came from, by file name; of a large database, see its task.
      labels_checked: Whether the labels were held against the number of classes when the files were read. Else that is
        done when the model is built, where the loss is a sparse categorical cross entropy of one output.

    Raises:
      TypeError: If one of them is of another type.
      ValueError: If there are no examples to train or to test on.
    """

    name: str
    train: ClientDataset
    test: ClientDataset
    keras_model_fn: Callable[[], tf.keras.Model]
    loss: Loss
    metrics: Mapping[str, Metric]
    target: Target | None = None
    label_names: Callable[[], Sequence[str]] | None = None
    checksums: Mapping[str, str] = dataclasses.field(default_factory=dict)
    labels_checked: bool = False

    def __post_init__(self):
        takes = {
            "name": (isinstance(self.name, str), "a string"),
            "train": (isinstance(self.train, ClientDataset), "a ClientDataset"),
            "test": (
                isinstance(self.test, ClientDataset),
                "a ClientDataset, such as ClientDataset.from_arrays([test])",
            ),
            "keras_model_fn": (
                callable(self.keras_model_fn) and not isinstance(self.keras_model_fn, tf.keras.Model),
                "a function that builds a model anew",
            ),
            "loss": (
                isinstance(self.loss, str) or (callable(self.loss) and not isinstance(self.loss, type)),
                "a tf.keras.losses.Loss, a function of (y_true, y_pred) or a name",
            ),
            "metrics": (
                isinstance(self.metrics, Mapping) and all(isinstance(name, str) and name for name in self.metrics),
                "a mapping from names to metrics",
            ),
            "target": (self.target is None or isinstance(self.target, Target), "a Target, or None"),
            "label_names": (self.label_names is None or callable(self.label_names), "a function, or None"),
            "checksums": (isinstance(self.checksums, Mapping), "a mapping from file names to checksums"),
        }
        for field, (is_right, what) in takes.items():
            if not is_right:
                raise TypeError(f"{field} of the task is {getattr(self, field)!r}; it must be {what}")
        for field in ("train", "test"):
            if not getattr(self, field).num_examples.sum():
                raise ValueError(f"{field} of the task {self.name} has no examples")

    def build_model(self, seed: int) -> tff.learning.models.FunctionalModel:
        """Builds the model with initial weights w_0 drawn from `seed` (sets the global seeds of Keras on the way).

        Raises:
          ValueError: If the model cannot be trained, or a label is none of its classes.
        """
        tf.keras.utils.set_random_seed(seed)
        model = functional_model_from_keras(self.keras_model_fn, self.loss, self.train.batch_spec, self.metrics)
        if not self.labels_checked:
            check_labels(model, self.loss, {"training set": self.train, "test set": self.test})
        return model
