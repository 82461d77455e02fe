"""Trains one model of the paper with one algorithm; leaves metrics, states and a learning curve in --run_dir.

    python -m binaries.train --task=mnist_2nn --partition=iid --client_fraction=0.1 --local_epochs=1 --batch_size=10

Started again with the same --run_dir, it goes on where it was.
"""

import gc
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any

from absl import app, flags, logging

import tasks

_TASK = flags.DEFINE_enum("task", "mnist_2nn", sorted(tasks.TASKS), "Data set and model.")
_DATA = flags.DEFINE_string(
    "data",
    None,
    "Data source of the task, such as mnist or mnist5k; embedded is the one that comes with the packages. By default "
    "the paper's own.",
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", "~/.cache/tff_fedavg/data", "Where the data are, or are kept after a download."
)
_CACHE_DIR = flags.DEFINE_string("cache_dir", "~/.cache/tff_fedavg/clients", "Where the client files are kept.")
_PARTITION = flags.DEFINE_string(
    "partition", None, "How the examples are divided among the clients, such as iid or pathological; by default iid."
)
_CLIENTS = flags.DEFINE_integer("clients", None, "K, the number of clients; by default the paper's.", lower_bound=1)
_CLIENT_FRACTION = flags.DEFINE_float(
    "client_fraction",
    None,
    "C, the fraction of clients in a round; 0 is one client. By default 0.1.",
    lower_bound=0,
    upper_bound=1,
)
_LOCAL_EPOCHS = flags.DEFINE_integer(
    "local_epochs", None, "E, epochs of local SGD in a round; by default 5.", lower_bound=1
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", None, "B, the local minibatch size; 0 is B = inf. By default 10, for sgd 100.", lower_bound=0
)
_LEARNING_RATE = flags.DEFINE_float(
    "learning_rate", None, "eta, the learning rate; by default one that the paper names for the model."
)
_LEARNING_RATE_DECAY = flags.DEFINE_float(
    "learning_rate_decay", None, "Factor on eta every --decay_every rounds; by default eta is constant."
)
_DECAY_EVERY = flags.DEFINE_integer(
    "decay_every", None, "Rounds between two decays of eta; by default 1.", lower_bound=1
)
_ALGORITHM = flags.DEFINE_enum(
    "algorithm",
    "fedavg",
    ["fedavg", "fedsgd", "sgd"],
    "Federated Averaging, FedSGD (E = 1, B = inf), or centralised SGD on the data of all clients together (a round is "
    "one update).",
)
_ROUNDS = flags.DEFINE_integer(
    "rounds", None, "Communication rounds at most; by default 100, for sgd 10,000.", lower_bound=1
)
_EVAL_EVERY = flags.DEFINE_integer(
    "eval_every", None, "Rounds between evaluations on the test set; by default 1, for sgd 100.", lower_bound=1
)
_TARGET_ACCURACY = flags.DEFINE_float(
    "target_accuracy",
    None,
    "Test accuracy to stop at; by default the task's target; 1 for none.",
    lower_bound=0,
    upper_bound=1,
)
_SEED = flags.DEFINE_integer(
    "seed", 0, "Seeds the initial weights, the partition, the sampling and the minibatches.", lower_bound=0
)
_RUN_DIR = flags.DEFINE_string("run_dir", None, "Where the run is kept; by default runs/TASK.")

flags.register_validator(
    "learning_rate", lambda rate: rate is None or 0 < rate < float("inf"), "eta must be a number above 0"
)
flags.register_validator(
    "learning_rate_decay", lambda decay: decay is None or 0 < decay <= 1, "the factor must be above 0 and at most 1"
)

_DEFAULTS = {
    "fedavg": {"client_fraction": 0.1, "local_epochs": 5, "batch_size": 10, "rounds": 100, "eval_every": 1},
    "fedsgd": {"client_fraction": 0.1, "local_epochs": 1, "batch_size": 0, "rounds": 100, "eval_every": 1},
    "sgd": {"client_fraction": None, "local_epochs": None, "batch_size": 100, "rounds": 10_000, "eval_every": 100},
}
# What an algorithm leaves no choice of, and why.
_FIXED = {
    "fedavg": ((), ""),
    "fedsgd": (("local_epochs", "batch_size"), "has E = 1 and B = inf"),
    "sgd": (("client_fraction", "local_epochs"), "has all data in one place"),
}

_FAILED = 2


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        _fail(f"unknown argument {argv[1]!r}: flags start with --")
    # TensorFlow reads this when it is imported, which is why that comes last; the worker inherits it.
    verbose = logging.get_verbosity() > logging.WARNING
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "0" if verbose else "3")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    run_dir = os.path.expanduser(_RUN_DIR.value or f"runs/{_TASK.value}")
    try:
        settings = _settings()
        print(_description(settings, run_dir), flush=True)
        from binaries import experiment

        experiment.run(
            settings,
            data_dir=os.path.expanduser(_DATA_DIR.value),
            cache_dir=os.path.expanduser(_CACHE_DIR.value),
            run_dir=run_dir,
        )
    except KeyboardInterrupt:
        _fail(f"interrupted; the same command goes on where {run_dir} stopped", 128 + signal.SIGINT)
    except (ValueError, OSError, RuntimeError) as e:
        if verbose:
            raise
        _fail(_first_line(e))


def _settings() -> dict[str, Any]:
    """Returns what the run depends on, with the defaults of the task filled in."""
    entry = tasks.TASKS[_TASK.value]
    defaults = _DEFAULTS[_ALGORITHM.value]
    chosen = {
        flag.name: defaults[flag.name] if flag.value is None else flag.value
        for flag in (_CLIENT_FRACTION, _LOCAL_EPOCHS, _BATCH_SIZE, _ROUNDS, _EVAL_EVERY)
    }
    fixed, reason = _FIXED[_ALGORITHM.value]
    for name in fixed:
        if chosen[name] != defaults[name]:
            raise ValueError(f"--{name} is {chosen[name]}, but --algorithm={_ALGORITHM.value} {reason}: leave it out")
    if _ALGORITHM.value == "sgd" and chosen["batch_size"] == 0:
        raise ValueError("--batch_size is 0, but --algorithm=sgd takes minibatches: give their size")
    if _DECAY_EVERY.value and not _LEARNING_RATE_DECAY.value:
        raise ValueError("--decay_every needs --learning_rate_decay, the factor")
    if _DATA.value == "embedded" and entry.embedded is None:
        raise ValueError(f"--data is embedded, but no package comes with data for {_TASK.value}: leave it out")
    settings = {
        "task": _TASK.value,
        "data": entry.embedded if _DATA.value == "embedded" else _DATA.value or entry.data[0],
        "partition": _PARTITION.value or entry.partitions[0],
        "clients": _CLIENTS.value,
        **chosen,
        "learning_rate": entry.learning_rate if _LEARNING_RATE.value is None else _LEARNING_RATE.value,
        "learning_rate_decay": _LEARNING_RATE_DECAY.value,
        "decay_every": _LEARNING_RATE_DECAY.value and (_DECAY_EVERY.value or 1),
        "algorithm": _ALGORITHM.value,
        "target_accuracy": _TARGET_ACCURACY.value,
        "seed": _SEED.value,
    }
    for name, values in (("data", entry.data), ("partition", entry.partitions)):
        if settings[name] not in values:
            raise ValueError(f"--{name} is {settings[name]}; {_TASK.value} takes {', '.join(values)}")
    return settings


def _description(settings: Mapping[str, Any], run_dir: str) -> str:
    symbols = {"C": settings["client_fraction"], "E": settings["local_epochs"], "B": settings["batch_size"] or "inf"}
    values = [f"{symbol} = {value}" for symbol, value in symbols.items() if value is not None]
    decay = ""
    if settings["learning_rate_decay"]:
        decay = " x {learning_rate_decay:g} every {decay_every} rounds".format(**settings)
    return (
        "{algorithm} on {task}, {data}, {partition}, with {values}, eta = {learning_rate:g}{decay}, in {run_dir} "
        "(TensorFlow takes some seconds to start)"
    ).format(**settings, values=", ".join(values), decay=decay, run_dir=run_dir)


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as e:
        _fail(_first_line(e))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _fail(message: str, status: int = _FAILED) -> None:
    print(f"train: {message}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    # Not `app.run`: below it Keras 2.14 makes no symbolic inputs when TensorFlow was not imported before.
    app.define_help_flags()
    try:
        main(_parse_flags(sys.argv))
    finally:
        gc.freeze()  # Python's last collections would take a second or two on what TensorFlow has imported.
