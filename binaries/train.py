"""Trains one model of the paper with one algorithm; leaves metrics, states and a learning curve in --run_dir.

    python -m binaries.train --task=mnist_2nn --partition=iid --client_fraction=0.1 --local_epochs=1 --batch_size=10

Started again with the same --run_dir, it goes on where it was.
"""

import math
import os
from collections.abc import Mapping
from typing import Any

from absl import flags

import tasks
from binaries.command_line import data_flags, program, task_flags

flags.adopt_module_key_flags(data_flags)
flags.adopt_module_key_flags(task_flags)
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
_EVAL_TRAIN = flags.DEFINE_boolean(
    "eval_train", False, "Evaluates the loss on the training data of all clients too (Figures 3, 6 and 8)."
)
_TARGET_ACCURACY = flags.DEFINE_float(
    "target_accuracy",
    None,
    "Test accuracy to stop at; by default the task's target; 1 for none.",
    lower_bound=0,
    upper_bound=1,
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


def main() -> None:
    settings = _settings()
    run_dir = os.path.expanduser(_RUN_DIR.value or f"runs/{settings['task']}")
    print(_description(settings, run_dir), flush=True)
    try:
        # Last, since they import TensorFlow.
        from binaries.command_line.progress import ProgressPrinter
        from binaries.experiment import runner

        with ProgressPrinter(run_dir, settings["rounds"]) as printer:
            outcome = runner.run(settings, **data_flags.directories(), run_dir=run_dir, observer=printer)
        print(outcome)
    except KeyboardInterrupt as e:
        raise KeyboardInterrupt(f"interrupted; the same command goes on where {run_dir} stopped") from e


def _settings() -> dict[str, Any]:
    """Returns what the run depends on, with the defaults of the task and the algorithm filled in."""
    settings = task_flags.settings()
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
    rate = tasks.TASKS[settings["task"]].learning_rate if _LEARNING_RATE.value is None else _LEARNING_RATE.value
    return {
        **settings,
        **chosen,
        "learning_rate": rate,
        "learning_rate_decay": _LEARNING_RATE_DECAY.value,
        "decay_every": _LEARNING_RATE_DECAY.value and (_DECAY_EVERY.value or 1),
        "algorithm": _ALGORITHM.value,
        "target_accuracy": _TARGET_ACCURACY.value,
        "eval_train": _EVAL_TRAIN.value or None,  # As in the runs that are older than this flag.
    }


def _description(settings: Mapping[str, Any], run_dir: str) -> str:
    symbols = {"C": settings["client_fraction"], "E": settings["local_epochs"], "B": settings["batch_size"] or math.inf}
    values = [f"{symbol} = {value:g}" for symbol, value in symbols.items() if value is not None]
    decay = ""
    if settings["learning_rate_decay"]:
        decay = " x {learning_rate_decay:g} every {decay_every} rounds".format(**settings)
    return (
        "{algorithm} on {task}, {data}, {partition}, with {values}, eta = {learning_rate:g}{decay}, in {run_dir} "
        "(TensorFlow takes some seconds to start)"
    ).format(**settings, values=", ".join(values), decay=decay, run_dir=run_dir)


if __name__ == "__main__":
    program.run("train", main)
