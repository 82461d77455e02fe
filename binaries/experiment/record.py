"""What an experiment is: the record that flags, config.json, the plan of the paper and notebooks share.

A field is all that a new setting takes: its flag, its check, its place in config.json and its part in the comparison of
two runs come from it.
"""

import dataclasses
import os
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import tasks
from binaries.experiment.setting import field
from tff_fedavg import run_directory

if TYPE_CHECKING:
    from tasks.task import Task

_INT32_MAX = 2**31 - 1  # Rounds, steps and ids are int32 in TensorFlow's graphs.
_FLOAT32_MAX = 3.4e38


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """What a run computes, and when it stops; each field is a flag of `binaries.train`, whose help says what it is.

    None is the default, which depends on the task and the algorithm: it is filled in. What stays None does not apply,
    but for `clients` (the paper's number) and `target_accuracy` (the task's), which the task knows when it is built.

        Experiment(task="mnist_2nn", rounds=20)

    Raises:
      ValueError: If a value is out of its range, or does not go with the others: a line that names the flag.
    """

    task: str = field(f"Data set and model: one of {', '.join(sorted(tasks.TASKS))}.", "mnist_2nn")
    data: str = field(
        "Data source of the task, such as mnist or mnist5k; embedded is the one that comes with the packages. By "
        "default the paper's own.",
        lambda experiment: _choose(experiment.task)[0],
    )
    partition: str = field(
        "How the examples are divided among the clients, such as iid or pathological; by default the first of the "
        "task's.",
        lambda experiment: _choose(experiment.task)[1],
    )
    clients: int | None = field("K, the number of clients; by default the paper's.", takes=(1, _INT32_MAX))
    seed: int = field(
        "Seeds the initial weights, the partition, the sampling and the minibatches.", 0, takes=(0, _INT32_MAX)
    )
    algorithm: str = field(
        "Federated Averaging, FedSGD (E = 1, B = inf), or centralised SGD on the data of all clients together (a round "
        "is one update).",
        "fedavg",
        takes=("fedavg", "fedsgd", "sgd"),
    )
    client_fraction: float | None = field(
        "C, the fraction of clients in a round; 0 is one client. By default 0.1.",
        {"fedavg": 0.1, "fedsgd": 0.1},
        takes=(0, 1),
        needs=("algorithm", "fedavg", "fedsgd"),
    )
    local_epochs: int | None = field(
        "E, epochs of local SGD in a round; by default 5.",
        {"fedavg": 5, "fedsgd": 1},
        takes=(1, 1_000_000),
        needs=("algorithm", "fedavg"),
    )
    batch_size: int = field(
        "B, the local minibatch size; 0 is B = inf. By default 10, for sgd 100.",
        {"fedavg": 10, "fedsgd": 0, "sgd": 100},
        takes=(0, _INT32_MAX),
        needs=("algorithm", "fedavg", "sgd"),
    )
    learning_rate: float = field(
        "eta, the learning rate; by default one that the paper names for the model.",
        lambda experiment: tasks.TASKS[experiment.task].learning_rate if experiment.task in tasks.TASKS else None,
        takes=(0, _FLOAT32_MAX),
        above=True,
    )
    learning_rate_decay: float | None = field(
        "Factor on eta every --decay_every rounds; by default eta is constant.", takes=(0, 1), above=True
    )
    decay_every: int | None = field(
        "Rounds between two decays of eta; by default 1.",
        lambda experiment: None if experiment.learning_rate_decay is None else 1,
        takes=(1, _INT32_MAX),
        needs=("learning_rate_decay",),
    )
    rounds: int = field(
        "Communication rounds at most; by default 100, for sgd 10,000.",
        {"fedavg": 100, "fedsgd": 100, "sgd": 10_000},
        takes=(1, _INT32_MAX),
        may_differ=True,
    )
    eval_every: int = field(
        "Rounds between evaluations on the test set; by default 1, for sgd 100.",
        {"fedavg": 1, "fedsgd": 1, "sgd": 100},
        takes=(1, _INT32_MAX),
        may_differ=True,
    )
    eval_train: bool = field("Evaluates the loss on the training data of all clients too (Figures 3, 6 and 8).", False)
    target_accuracy: float | None = field(
        "Test accuracy to stop at; by default the task's target; 1 for none.", takes=(0, 1), may_differ=True
    )

    def __post_init__(self):
        for name, setting in SETTINGS.items():
            value, default = getattr(self, name), setting.default_for(self)
            if value is None or value == default:
                value = default
            elif not setting.allows(value):
                shown = value if setting.kind is str else repr(value)  # In Python a number may come as a text.
                raise ValueError(f"--{name}={shown}: take {setting.range}")
            elif lacking := setting.lacking(self):
                raise ValueError(f"--{name}={value} needs {lacking}: give that, or leave it out")
            else:
                value = setting.kind(value)
            object.__setattr__(self, name, value)
        object.__setattr__(self, "data", _choose(self.task, self.data, self.partition)[0])
        if self.learning_rate is None:
            raise ValueError(f"--learning_rate has no default for --task={self.task}: give it")
        if self.algorithm == "sgd" and self.batch_size == 0:
            raise ValueError("--batch_size=0: --algorithm=sgd takes minibatches, give their size")

    @classmethod
    def read(cls, run_dir: str | os.PathLike[str]) -> "Experiment | None":
        """Reads the experiment of a run directory; None if there is none. What config.json lacks has its default.

        Raises:
          ValueError: If config.json is damaged, or has settings that are not known here.
        """
        config = run_directory.read_config(run_dir)
        if config is None:
            return None
        if unknown := sorted(config["settings"].keys() - SETTINGS.keys()):
            raise ValueError(f"run_dir={run_dir} holds a run with {unknown[0]}, which this version does not know")
        try:
            return cls(**config["settings"])
        except ValueError as e:
            raise ValueError(f"run_dir={run_dir} holds a run that this version does not take: {e}") from e

    def to_json(self) -> dict[str, Any]:
        """Returns the settings in config.json, by name."""
        return dataclasses.asdict(self)

    def go_on(self, run_dir: str | os.PathLike[str], changes: Mapping[str, Any]) -> "Experiment":
        """Returns the experiment with which the run of this one goes on.

        Args:
          run_dir: Its directory.
          changes: Settings that may differ, by name. Others have to agree.

        Raises:
          ValueError: If one does not agree.
        """
        for name, value in changes.items():
            if name == "data":
                value, _ = _choose(self.task, value, self.partition)
            held = getattr(self, name)
            if value != held and not SETTINGS[name].may_differ:
                raise ValueError(
                    f"run_dir={run_dir} holds a run with {name}={held}, not {value}: give another run_dir to start a "
                    "new run"
                )
        return dataclasses.replace(self, **changes)

    def build_task(
        self, data_dir: str | os.PathLike[str] = tasks.DATA_DIR, cache_dir: str | os.PathLike[str] = tasks.CACHE_DIR
    ) -> "Task":
        """Builds its task; see `tasks.build_task`."""
        return tasks.build_task(
            self.task,
            data=self.data,
            data_dir=data_dir,
            cache_dir=cache_dir,
            partition=self.partition,
            clients=self.clients,
            seed=self.seed,
        )


# By name.
SETTINGS = {
    f.name: dataclasses.replace(f.metadata["setting"], kind=(*typing.get_args(f.type), f.type)[0])
    for f in dataclasses.fields(Experiment)
}


def _choose(task: str, data: str | None = None, partition: str | None = None) -> tuple[str, str]:
    """As `tasks.choose`, which names an argument in what it raises: here it is a flag."""
    try:
        return tasks.choose(task, data, partition)
    except ValueError as e:
        raise ValueError(f"--{e}") from e
