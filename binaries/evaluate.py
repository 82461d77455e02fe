"""Evaluates the saved model of a run: on the test set, on each client, and after it was personalized.

    python -m binaries.evaluate --run_dir=runs/mnist_2nn
    python -m binaries.evaluate --run_dir=runs/mnist_2nn --split=train
    python -m binaries.evaluate --run_dir=runs/mnist_2nn --personalize_epochs=5

The test set belongs to no client: it is cut into parts only to be evaluated in parallel. So what is said of single
clients is measured on their own training examples, as they are in training. With --personalize_epochs a fifth of the
examples of each client, drawn by the seed of the run, is held out: on it the model is measured before and after it was
trained on the client's other examples, by SGD. The run itself has trained on all of them. A row per client and the
histograms are left in --output_dir.
"""

import csv
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from binaries.command_line import program, saved_run, worker_flags
from binaries.command_line.number import Number
from binaries.command_line.output_dir import make_output_dir
from binaries.experiment import Experiment
from binaries.experiment.record import SETTINGS
from tff_fedavg.replacement import replacement

if TYPE_CHECKING:
    from tasks.task import Task
    from tff_fedavg.learning_curve import Target

_SPLIT = flags.DEFINE_enum(
    "split", "test", ["test", "train"], "The test set as a whole, or the training examples of each client."
)
_EPOCHS = flags.DEFINE(
    Number(SETTINGS["local_epochs"]),
    "personalize_epochs",
    None,
    "E, the epochs for which each client trains the model on.",
)
_BATCH_SIZE = flags.DEFINE(
    Number(SETTINGS["batch_size"]), "batch_size", None, "B of it; 0 is B = inf. By default that of the run."
)
_LEARNING_RATE = flags.DEFINE(
    Number(SETTINGS["learning_rate"]), "learning_rate", None, "eta of it; by default the run's, without its decay."
)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Where the files go; by default RUN_DIR/evaluation.")

flags.adopt_module_key_flags(saved_run)
flags.adopt_module_key_flags(worker_flags)


def main() -> None:
    run_dir, experiment, round_number = saved_run.chosen()
    personalization = _personalization(experiment)
    workers = worker_flags.chosen()
    if personalization or _SPLIT.value == "train":
        output_dir = make_output_dir(_OUTPUT_DIR.value or f"{run_dir}/evaluation")
    elif _OUTPUT_DIR.value:
        raise ValueError("--output_dir is of no use without --split=train or --personalize_epochs: leave it out")
    print(f"round {round_number} of {run_dir} (TensorFlow takes some seconds to start)", flush=True)
    # Last, since they import TensorFlow.
    import tff_fedavg
    from binaries.experiment.process import choose_target
    from tff_fedavg.evaluation import for_all_clients

    weights = saved_run.load_weights(run_dir, round_number)
    with workers.start():
        task = saved_run.build_task(run_dir, experiment)
        target = choose_target(experiment, task)
        model = task.build_model(experiment.seed)
        saved_run.check_weights(weights, model)
        prefix = f"round_{round_number}"
        if personalization:
            computation = tff_fedavg.build_personalization_eval(model, task.train, **personalization)
            results = for_all_clients(computation, weights, task.train)
            _report_personalization(output_dir / f"{prefix}_personalized_E{_EPOCHS.value}", results, task, target)
        elif _SPLIT.value == "train":
            results = for_all_clients(tff_fedavg.build_client_eval(model, task.train), weights, task.train)
            _report_clients(output_dir / f"{prefix}_train", results, task, target)
        else:
            metrics = tff_fedavg.build_fed_eval(model, task.test)(weights, range(task.test.num_clients))
            numbers = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            print(f"on the {task.test.num_examples.sum()} examples of the test set: {numbers}")


def _personalization(experiment: Experiment) -> dict[str, Any]:
    """Returns the arguments of `build_personalization_eval`; none if that is not asked for."""
    if _EPOCHS.value is None:
        for flag in (_BATCH_SIZE, _LEARNING_RATE):
            if flag.value is not None:
                raise ValueError(f"--{flag.name}={flag.value} needs --personalize_epochs: give that, or leave it out")
        return {}
    if _SPLIT.present:
        raise ValueError("--split is of no use with --personalize_epochs, which splits the examples of each client")
    if _LEARNING_RATE.value is None and experiment.client_optimizer != "sgd":
        raise ValueError(f"--learning_rate is missing: that of the run is for {experiment.client_optimizer}, not SGD")
    batch_size = experiment.batch_size if _BATCH_SIZE.value is None else _BATCH_SIZE.value
    return {
        "epochs": _EPOCHS.value,
        "batch_size": batch_size or None,
        "learning_rate": _LEARNING_RATE.value or experiment.learning_rate,
        "seed": experiment.seed,
    }


def _report_clients(path: pathlib.Path, results: Mapping[int, Any], task: "Task", target: "Target") -> None:
    from tff_fedavg import distribution

    num_examples = [int(task.train.num_examples[k]) for k in results]
    rows = [{"client": k, "num_examples": n, **metrics} for (k, metrics), n in zip(results.items(), num_examples)]
    _write_csv(path, rows)
    num_examples, values = _known(target, num_examples, [metrics[target.metric] for metrics in results.values()])
    title = f"{task.name}: {target.metric} on the clients' training examples"
    distribution.plot(path.with_suffix(".png"), {f"{len(values)} clients": values}, target=target, title=title)
    summary = distribution.summarize(values, num_examples, lower_is_better=target.lower_is_better)
    print(f"{target.metric} of {len(values)} clients on their training examples: {summary}")
    print(f"see {path}.csv and {path}.png")


def _report_personalization(path: pathlib.Path, results: Mapping[int, Any], task: "Task", target: "Target") -> None:
    from tasks.task import LOSS
    from tff_fedavg import distribution, personalization

    if diverged := np.sum(~np.isfinite([metrics["after"][LOSS] for metrics in results.values()])):
        raise ValueError(f"{diverged} of {len(results)} clients diverged: give a smaller --learning_rate")
    held_out = [int(personalization.num_held_out(task.train.num_examples[k])) for k in results]
    rows = []
    for (k, metrics), n in zip(results.items(), held_out):
        named = {f"{name}_{when}": value for when, each in metrics.items() for name, value in each.items()}
        rows.append({"client": k, "num_examples": task.train.num_examples[k] - n, "num_held_out": n, **named})
    _write_csv(path, rows)
    values = [[metrics[when][target.metric] for metrics in results.values()] for when in ("before", "after")]
    held_out, before, after = _known(target, held_out, *values)
    title = f"{task.name}: {target.metric} on a fifth of each client's examples"
    distribution.plot(
        path.with_suffix(".png"), {"before": before, f"after {_EPOCHS.value} epochs": after}, target=target, title=title
    )
    print(f"{target.metric} of {len(before)} clients on a fifth of their training examples, held out only now:")
    for when, values in (("before", before), ("after", after)):
        summary = distribution.summarize(values, held_out, lower_is_better=target.lower_is_better)
        print(f"{when + ':':7} {summary}")
    gains = before - after if target.lower_is_better else after - before
    print(f"better for {np.sum(gains > 0)} clients, worse for {np.sum(gains < 0)}")
    print(f"see {path}.csv and {path}.png")


def _known(target: "Target", num_examples: Sequence[int], *values: Sequence[float]) -> tuple[np.ndarray, ...]:
    """Returns the numbers, `[clients]` each, of the clients whose metric is a number."""
    known = np.isfinite(values).all(axis=0)
    if not known.any():
        raise ValueError(f"{target.metric} is no number for any client")
    if not known.all():
        print(f"{np.sum(~known)} clients are left out, whose {target.metric} is no number")
    return np.array(num_examples)[known], *np.array(values)[:, known]


def _write_csv(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with replacement(path.with_suffix(".csv")) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    program.run("evaluate", main)
