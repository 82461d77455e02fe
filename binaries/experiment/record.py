"""What an experiment is: the record that flags, config.json, the plan of the paper and notebooks share.

A field is all that a new setting takes: its flag, its check, its place in config.json and its part in the comparison of
two runs come from it.
"""

import dataclasses
import os
import pathlib
import re
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import tasks
from binaries.experiment.setting import field
from tff_fedavg import run_directory
from tff_fedavg.integer import INT32_MAX

if TYPE_CHECKING:
    from tasks.task import Task

_FLOAT32_MAX = 3.4e38

_OPTIMIZERS = ("sgd", "momentum", "adam", "adagrad", "yogi")
_PLAIN = ("sgd", "momentum")  # Those for which a learning rate of SGD is a good one.
_ROBUST = ("robust", "compressed")


def _optimizer_parameter(
    side: str, name: str, takes: tuple[float, float], defaults: Mapping[str, float], **more: Any
) -> Any:
    """A parameter, named as in `tff.learning.optimizers`, of the optimizers that have a default for it."""
    optimizer = f"{side}_optimizer"
    listed = ", ".join(f"{default:g} for {optimizer}" for optimizer, default in defaults.items())
    return field(
        f"{name} of --{optimizer}; by default {listed}.",
        lambda experiment: defaults.get(getattr(experiment, optimizer)),
        takes=takes,
        needs=(optimizer, *defaults),
        **more,
    )


def _default_learning_rate(experiment: "Experiment") -> float | None:
    is_known = experiment.task in tasks.TASKS and experiment.client_optimizer in _PLAIN
    return tasks.TASKS[experiment.task].learning_rate if is_known else None


def _default_dirichlet_alpha(experiment: "Experiment") -> float | None:
    is_known = experiment.task in tasks.TASKS and experiment.partition == "dirichlet"
    return tasks.DIRICHLET_ALPHA if is_known else None


def _is_federated(experiment: "Experiment") -> bool:
    return experiment.algorithm != "sgd"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """What a run computes, and when it stops; each field is a flag of `binaries.train`, whose help says what it is.

    None is the default, which depends on the task and the algorithm: it is filled in. What stays None does not apply,
    but for what is known when the task is built: `clients` (the paper's number), `target_accuracy` (the task's), what a
    task of one's own has defaults for, and `clients_per_subround`.

        Experiment(task="mnist_2nn", rounds=20)

    Raises:
      ValueError: If a value is out of its range, or does not go with the others: a line that names the flag.
    """

    task: str = field(
        f"Data set and model: one of {', '.join(sorted(tasks.TASKS))}; or your own, as FILE.py (docs/own_task.md).",
        "mnist_2nn",
    )
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
    dirichlet_alpha: float | None = field(
        "alpha of the partition dirichlet (Hsu et al. 2019): near 0 a client has one label, at 100 the partition is "
        "all but IID. By default 1.",
        _default_dirichlet_alpha,
        takes=(0, 1e6),
        above=True,
        needs=("partition", "dirichlet", None),  # A task of one's own may have no other partition.
    )
    clients: int | None = field("K, the number of clients; by default the paper's.", takes=(1, INT32_MAX))
    seed: int = field(
        "Seeds the initial weights, the partition, the sampling and the minibatches.", 0, takes=(0, INT32_MAX)
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
        takes=(0, INT32_MAX),
        needs=("algorithm", "fedavg", "sgd"),
    )
    client_optimizer: str = field(
        "What the clients use: SGD is the paper's. It starts anew in each round.",
        "sgd",
        takes=_OPTIMIZERS,
        needs=("algorithm", "fedavg"),
    )
    learning_rate: float = field(
        "eta, the learning rate; by default one that the paper names for the model, with SGD with or without momentum.",
        _default_learning_rate,
        takes=(0, _FLOAT32_MAX),
        above=True,
    )
    learning_rate_decay: float | None = field(
        "Factor on eta every --decay_every rounds; by default eta is constant.", takes=(0, 1), above=True
    )
    decay_every: int | None = field(
        "Rounds between two decays of eta; by default 1.",
        lambda experiment: None if experiment.learning_rate_decay is None else 1,
        takes=(1, INT32_MAX),
        needs=("learning_rate_decay",),
    )
    client_momentum: float | None = _optimizer_parameter("client", "momentum", (0, 1), {"momentum": 0.9})
    client_beta_1: float | None = _optimizer_parameter(
        "client", "beta_1", (0, 1), {"adam": 0.9, "yogi": 0.9}, below=True
    )
    client_beta_2: float | None = _optimizer_parameter(
        "client", "beta_2", (0, 1), {"adam": 0.999, "yogi": 0.999}, below=True
    )
    client_epsilon: float | None = _optimizer_parameter(
        "client", "epsilon", (0, 1), {"adam": 1e-7, "adagrad": 1e-7, "yogi": 1e-3}
    )
    client_initial_preconditioner_value: float | None = _optimizer_parameter(
        "client", "initial_preconditioner_value", (0, 1), {"adagrad": 0.1, "yogi": 1e-6}
    )
    proximal_strength: float = field(
        "mu of FedProx (Li et al. 2020), which draws a client to the weights that it was sent. By default 0.",
        0.0,
        takes=(0, 1e6),
        needs=("algorithm", "fedavg"),
    )
    server_optimizer: str = field(
        "What applies the averaged update: SGD is the paper's; others are FedAvgM, FedAdam, FedAdagrad and FedYogi "
        "(Reddi et al. 2021).",
        "sgd",
        takes=_OPTIMIZERS,
        needs=("algorithm", "fedavg", "fedsgd"),
    )
    server_learning_rate: float | None = field(
        "Learning rate of the server; by default 1 for SGD with or without momentum.",
        lambda experiment: 1.0 if _is_federated(experiment) and experiment.server_optimizer in _PLAIN else None,
        takes=(0, 1e6),
        above=True,
        needs=("algorithm", "fedavg", "fedsgd"),
    )
    # The defaults of the adaptive ones are those of Reddi et al.: beta_2 of 0.99, and tau, of 0.001, in two places.
    server_momentum: float | None = _optimizer_parameter("server", "momentum", (0, 1), {"momentum": 0.9})
    server_beta_1: float | None = _optimizer_parameter(
        "server", "beta_1", (0, 1), {"adam": 0.9, "yogi": 0.9}, below=True
    )
    server_beta_2: float | None = _optimizer_parameter(
        "server", "beta_2", (0, 1), {"adam": 0.99, "yogi": 0.99}, below=True
    )
    server_epsilon: float | None = _optimizer_parameter(
        "server", "epsilon", (0, 1), {"adam": 1e-3, "adagrad": 1e-3, "yogi": 1e-3}
    )
    server_initial_preconditioner_value: float | None = _optimizer_parameter(
        "server", "initial_preconditioner_value", (0, 1), {"adagrad": 1e-6, "yogi": 1e-6}
    )
    aggregator: str = field(
        "How the updates are averaged: the paper's mean; robust, which zeroes what is too large and clips; compressed, "
        "the same with updates of 8 bits a value; or dp, with noise for differential privacy. No seed repeats what the "
        "last two draw.",
        "mean",
        takes=("mean", "robust", "compressed", "dp"),
        needs=("algorithm", "fedavg", "fedsgd"),
    )
    client_weighting: str = field(
        "The weight of a client in the average: its number of examples, as in the paper, or the same for all, as it is "
        "with --aggregator=dp.",
        lambda experiment: "uniform" if experiment.aggregator == "dp" else "num_examples",
        takes=("num_examples", "uniform"),
        needs=("aggregator", "mean", "robust", "compressed"),
    )
    zeroing: bool | None = field(
        "Whether updates are zeroed that are much larger than others have been; by default true.",
        lambda experiment: True if experiment.aggregator in _ROBUST else None,
        needs=("aggregator", *_ROBUST),
    )
    clipping: bool | None = field(
        "Whether updates are clipped to a norm that is larger than most; by default true.",
        lambda experiment: True if experiment.aggregator in _ROBUST else None,
        needs=("aggregator", *_ROBUST),
    )
    noise_multiplier: float | None = field(
        "Standard deviation of the noise of --aggregator=dp, in multiples of the norm that updates are clipped to.",
        takes=(1e-6, 1e6),
        needs=("aggregator", "dp"),
    )
    delta: float | None = field(
        "The delta at which epsilon is told, with --aggregator=dp; by default 1e-5.",
        lambda experiment: 1e-5 if experiment.aggregator == "dp" else None,
        takes=(0, 1),
        above=True,
        needs=("aggregator", "dp"),
    )
    matmul_precision: str = field(
        "Of the matrix products and convolutions of the model: bfloat16 is faster for convolutions, on processors that "
        "have it.",
        "float32",
        takes=("float32", "bfloat16"),
    )
    clients_per_subround: int | None = field(
        "How many clients' updates the worker has in memory at once, which is not needed for the mean; by default as "
        "many as take about a gigabyte.",
        takes=(1, INT32_MAX),
        needs=("aggregator", *_ROBUST, "dp"),
        may_differ=True,
    )
    rounds: int = field(
        "Communication rounds at most; by default 100, for sgd 10,000.",
        {"fedavg": 100, "fedsgd": 100, "sgd": 10_000},
        takes=(1, INT32_MAX),
        may_differ=True,
    )
    eval_every: int = field(
        "Rounds between evaluations on the test set; 0 for those of the paper's Figures 2, 6 and 7: rounds 1 to 10, "
        "every tenth up to 100, then every hundredth. By default 1, for sgd 100.",
        {"fedavg": 1, "fedsgd": 1, "sgd": 100},
        takes=(0, INT32_MAX),
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
        object.__setattr__(self, "data", _choose(self.task, self.data, self.partition, self.clients)[0])
        if self.learning_rate is None:
            of = "task" if self.client_optimizer in _PLAIN else "client_optimizer"
            raise ValueError(f"--learning_rate has no default for --{of}={getattr(self, of)}: give it")
        if self.server_learning_rate is None and _is_federated(self):
            of = f"--server_optimizer={self.server_optimizer}"
            raise ValueError(f"--server_learning_rate has no default for {of}: give it")
        if self.aggregator == "dp" and self.noise_multiplier is None:
            raise ValueError("--noise_multiplier has no default for --aggregator=dp: give it")
        if self.algorithm == "sgd" and self.batch_size == 0:
            raise ValueError("--batch_size=0: --algorithm=sgd takes minibatches, give their size")
        if self.algorithm == "sgd" and self.client_weighting != "num_examples":
            raise ValueError(f"--client_weighting={self.client_weighting}: --algorithm=sgd has none, leave it out")

    @classmethod
    def read(cls, run_dir: str | os.PathLike[str]) -> "Experiment | None":
        """Reads the experiment of a run directory; None if there is none. What config.json lacks has its default.

        Raises:
          ValueError: If config.json is damaged, or has settings that are not known here.
        """
        config = run_directory.read_config(run_dir)
        return None if config is None else cls._from_config(config, f"run_dir={run_dir}")

    @classmethod
    def read_json(cls, path: str | os.PathLike[str]) -> "Experiment":
        """Reads the experiment of a config.json; see `read`.

        Raises:
          ValueError: As `read`, or if there is none.
        """
        try:
            return cls._from_config(run_directory.read_config_json(path), str(path))
        except FileNotFoundError as e:
            raise ValueError(f"config={path}: there is no such file") from e

    @classmethod
    def _from_config(cls, config: Mapping[str, Any], where: str) -> "Experiment":
        settings = run_directory.settings_of(config)
        if unknown := sorted(settings.keys() - SETTINGS.keys()):
            raise ValueError(f"{where} holds a run with {unknown[0]}, which this version does not know")
        try:
            return cls(**settings)
        except ValueError as e:
            raise ValueError(f"{where} holds a run that this version does not take: {e}") from e

    @property
    def task_name(self) -> str:
        """The task as a file name: of a task of one's own the name of its file or module."""
        return re.sub(r"(\.py)?(:\w+)?$", "", self.task).rpartition("/")[2]

    def to_json(self) -> dict[str, Any]:
        """Returns the settings in config.json, by name."""
        return dataclasses.asdict(self)

    def change(self, changes: Mapping[str, Any]) -> "Experiment":
        """Returns an experiment like this one, with some settings changed.

        What follows from them is chosen anew: defaults, and settings of what is not there any more.
        """
        chosen = dict(changes)
        changed = types.SimpleNamespace(**{**vars(self), **changes})
        for name, setting in SETTINGS.items():
            if name in changes:
                continue
            if getattr(self, name) == setting.default_for(self) or setting.lacking(changed):
                setattr(changed, name, setting.default_for(changed))
            else:
                chosen[name] = getattr(self, name)
        return Experiment(**chosen)

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

    def find_data(self, data_dir: str | os.PathLike[str] = tasks.DATA_DIR) -> list[pathlib.Path]:
        """Finds the files of its data, or downloads them; see `tasks.find_data`. Needs no TensorFlow."""
        return tasks.find_data(self.task, self.data, self.partition, data_dir)

    def build_task(
        self, data_dir: str | os.PathLike[str] = tasks.DATA_DIR, cache_dir: str | os.PathLike[str] = tasks.CACHE_DIR
    ) -> "Task":
        """Builds its task; see `tasks.build_task`."""
        task = tasks.build_task(
            self.task,
            data=self.data,
            data_dir=data_dir,
            cache_dir=cache_dir,
            partition=self.partition,
            dirichlet_alpha=self.dirichlet_alpha,
            clients=self.clients,
            seed=self.seed,
        )
        if self.matmul_precision == "float32":
            return task
        from binaries.experiment import precision  # Imports TensorFlow.

        return dataclasses.replace(task, keras_model_fn=precision.in_bfloat16(task.keras_model_fn))


# By name.
SETTINGS = {
    f.name: dataclasses.replace(f.metadata["setting"], kind=(*typing.get_args(f.type), f.type)[0])
    for f in dataclasses.fields(Experiment)
}


def _choose(
    task: str, data: str | None = None, partition: str | None = None, clients: int | None = None
) -> tuple[str, str]:
    """As `tasks.choose`, which names an argument in what it raises: here it is a flag."""
    try:
        return tasks.choose(task, data, partition, clients)
    except ValueError as e:
        raise ValueError(f"--{e}") from e
