"""The flags that choose a task, its data and its partition."""

from typing import Any

from absl import flags

import tasks

_TASK = flags.DEFINE_enum("task", "mnist_2nn", sorted(tasks.TASKS), "Data set and model.")
_DATA = flags.DEFINE_string(
    "data",
    None,
    "Data source of the task, such as mnist or mnist5k; embedded is the one that comes with the packages. By default "
    "the paper's own.",
)
_PARTITION = flags.DEFINE_string(
    "partition",
    None,
    "How the examples are divided among the clients, such as iid or pathological; by default the first of the task's.",
)
_CLIENTS = flags.DEFINE_integer("clients", None, "K, the number of clients; by default the paper's.", lower_bound=1)
_SEED = flags.DEFINE_integer(
    "seed", 0, "Seeds the initial weights, the partition, the sampling and the minibatches.", lower_bound=0
)


def settings() -> dict[str, Any]:
    """Returns what the client files depend on, with the defaults of the task filled in.

    Raises:
      ValueError: If the task does not have such data or such a partition.
    """
    data, partition = tasks.choose(_TASK.value, _DATA.value, _PARTITION.value)
    return {
        "task": _TASK.value,
        "data": data,
        "partition": partition,
        "clients": _CLIENTS.value,
        "seed": _SEED.value,
    }
