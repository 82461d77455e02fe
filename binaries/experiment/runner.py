"""One experiment of the paper: a task trained with an algorithm, with its files, progress and outcome."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import tensorflow as tf
import tensorflow_federated as tff

import tasks
import tff_fedavg
from tasks.task import Task
from tff_fedavg import learning_curve, training
from tff_fedavg.run_directory import RunDirectory
from tff_fedavg.sampling import num_sampled_clients

# Settings that say when to stop and to look, not what the run computes.
_MAY_DIFFER = ("rounds", "target_accuracy", "eval_every")
# Updates of SGD between two lines of metrics and of progress: a second or a few.
_UPDATES_PER_CALL = 20


class Observer(Protocol):
    """Is told how the training goes. What it raises ends the run, after the state has been saved."""

    def start(self, round_number: int) -> None:
        """The training goes on after this round; 0 is a new run."""

    def update(self, progress: training.Progress) -> None:
        """A round has been run."""

    def report_damaged(self, path: pathlib.Path, error: Exception) -> None:
        """A saved state cannot be read, and is left aside for the one before it."""


def run(settings: Mapping[str, Any], *, data_dir: str, cache_dir: str, run_dir: str, observer: Observer) -> str:
    """Trains as `settings` say.

    Args:
      settings: The flags of `binaries.train`, by name, except for the three directories.
      data_dir: As that flag.
      cache_dir: As that flag.
      run_dir: As that flag. When it holds a run with the same settings, that one goes on.
      observer: Is told of the start and of every round.

    Returns:
      What came of it, in a line.

    Raises:
      ValueError: If the settings or the data are bad. Nothing has been computed then.
      DivergedError: If the loss is no longer finite.
      NotSavedError: If a state or metrics cannot be written.
    """
    directory = RunDirectory(run_dir, settings, may_differ=_MAY_DIFFER)
    with tff_fedavg.local_worker():
        task = tasks.build_task(
            settings["task"],
            data=settings["data"],
            data_dir=data_dir,
            cache_dir=cache_dir,
            partition=settings["partition"],
            clients=settings["clients"],
            seed=settings["seed"],
        )
        target = task.target_accuracy if settings["target_accuracy"] is None else settings["target_accuracy"]
        directory.start(task.checksums)
        model = task.build_model(settings["seed"])
        evaluate = _build_evaluate(settings, task, model)
        process, training_selection_fn = _build_process(settings, task, model)
        try:
            training.train(
                process,
                directory,
                training_selection_fn=training_selection_fn,
                evaluate=evaluate,
                total_rounds=settings["rounds"],
                rounds_per_evaluation=settings["eval_every"],
                target_accuracy=target,
                on_start=observer.start,
                on_round=observer.update,
                on_damaged=observer.report_damaged,
            )
        except training.DivergedError as e:
            rate = settings["learning_rate"]
            raise training.DivergedError(f"{e} at learning_rate={rate:g}; {run_dir} keeps the state before it") from e
        finally:
            title = f"{task.name}, {settings['partition']}, {settings['algorithm']}"
            curve = learning_curve.evaluations(learning_curve.read_metrics(directory.metrics_csv))
            learning_curve.plot(directory.learning_curve_png, *curve, target=target, title=title)
    return _outcome(directory, target, settings, task, model)


def _build_evaluate(
    settings: Mapping[str, Any], task: Task, model: tff.learning.models.FunctionalModel
) -> Callable[[tff.learning.models.ModelWeights], Mapping[str, float]]:
    """Returns the evaluation on the test set; with `eval_train` also f(w) (Equation 1), as "train_loss"."""
    fed_eval = tff_fedavg.build_fed_eval(model, task.test)
    test_parts = list(range(task.test.num_clients))
    if not settings["eval_train"]:
        return lambda weights: fed_eval(weights, test_parts)
    train_model = dataclasses.replace(task, metrics={"loss": lambda: objective(task.loss)}).build_model(
        settings["seed"]
    )
    train_eval = tff_fedavg.build_fed_eval(train_model, task.train)
    clients = sorted(range(task.train.num_clients), key=lambda k: -task.train.num_examples[k])
    return lambda weights: {**fed_eval(weights, test_parts), "train_loss": train_eval(weights, clients)["loss"]}


def objective(loss: tf.keras.losses.Loss) -> tf.keras.metrics.Metric:
    """Returns f(w) (Equation 1), the mean over the examples of the loss that is trained on, as a metric.

    The metric "loss" of a task of texts is another one: it is per symbol, and not per line.
    """

    def losses(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
        return loss.call(tf.cast(labels, tf.int32), logits)  # Keras hands the labels to a metric as float32.

    return tf.keras.metrics.MeanMetricWrapper(losses, name="loss")


def _build_process(
    settings: Mapping[str, Any], task: Task, model: tff.learning.models.FunctionalModel
) -> tuple[tff.learning.templates.LearningProcess | tff_fedavg.CentralizedSGD, Callable[[int], Any]]:
    """Returns the process, and what it takes for each round."""
    learning_rate = settings["learning_rate"]
    if settings["learning_rate_decay"]:
        learning_rate = tf.keras.optimizers.schedules.ExponentialDecay(
            learning_rate, settings["decay_every"], settings["learning_rate_decay"], staircase=True
        )
    arguments = {"learning_rate": learning_rate, "seed": settings["seed"]}
    if settings["algorithm"] == "sgd":
        process = tff_fedavg.CentralizedSGD(model, task.train, batch_size=settings["batch_size"], **arguments)
        return process, lambda first_update: _num_updates(first_update, settings)
    if settings["algorithm"] == "fedsgd":
        process = tff_fedavg.build_fed_sgd(model, task.train, **arguments)
    else:
        process = tff_fedavg.build_fed_avg(
            model,
            task.train,
            epochs=settings["local_epochs"],
            batch_size=settings["batch_size"] or None,
            **arguments,
        )
    sample = tff_fedavg.build_sampling_fn(task.train.num_clients, settings["client_fraction"], settings["seed"])
    # The largest first: no core is left waiting for a large client that started last.
    return process, lambda t: sorted(sample(t), key=lambda k: -task.train.num_examples[k])


def _num_updates(first_update: int, settings: Mapping[str, Any]) -> int:
    """Returns how many updates of SGD, counted from 1, are run from this one to the next evaluation, or progress."""
    before = first_update - 1
    to_evaluation = settings["eval_every"] - before % settings["eval_every"]
    return min(to_evaluation, settings["rounds"] - before, _UPDATES_PER_CALL)


def _outcome(
    directory: RunDirectory,
    target: float,
    settings: Mapping[str, Any],
    task: Task,
    model: tff.learning.models.FunctionalModel,
) -> str:
    metrics = learning_curve.read_metrics(directory.metrics_csv)
    rounds, accuracies = learning_curve.evaluations(metrics)
    crossing = learning_curve.rounds_to_target(rounds, accuracies, target)
    last_round = int(metrics[-1][learning_curve.ROUND_FIELD])
    seconds = sum(row.get("training_time_in_seconds", 0.0) for row in metrics)
    traffic = ""
    if settings["algorithm"] != "sgd":
        clients = num_sampled_clients(task.train.num_clients, settings["client_fraction"])
        megabytes = sum(w.nbytes for w in model.initial_weights[0]) * clients * last_round / 1e6
        traffic = f", {megabytes:.1f} MB up, {megabytes:.1f} MB down"
    return (
        f"{last_round} rounds, best accuracy {max(accuracies):.4f}, "
        f"rounds to {target:g}: {'not reached' if crossing is None else f'{crossing:.1f}'}, "
        f"{seconds:.1f} s of training{traffic}; see {directory.path}"
    )
