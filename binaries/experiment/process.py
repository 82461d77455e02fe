"""What an experiment trains with: its learning process, what each round takes, and its evaluation."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf
import tensorflow_federated as tff

import tff_fedavg
from binaries.experiment.aggregators import build_aggregator
from binaries.experiment.optimizers import build_client_optimizer, build_server_optimizer
from binaries.experiment.record import Experiment
from tasks.task import Task
from tff_fedavg.learning_curve import Target, next_evaluation
from tff_fedavg.sampling import num_sampled_clients

# Updates of SGD between two lines of metrics and of progress: a second or a few.
_UPDATES_PER_CALL = 20


def build_evaluate(
    experiment: Experiment, task: Task, model: tff.learning.models.FunctionalModel
) -> Callable[[tff.learning.models.ModelWeights], Mapping[str, float]]:
    """Returns the evaluation on the test set; with `eval_train` also f(w) (Equation 1), as "train_loss"."""
    fed_eval = tff_fedavg.build_fed_eval(model, task.test)
    test_parts = list(range(task.test.num_clients))
    if not experiment.eval_train:
        return lambda weights: fed_eval(weights, test_parts)
    # Without metrics the loss is f, the mean over the examples of what is trained on. That of texts is per symbol.
    train_model = dataclasses.replace(task, metrics={}).build_model(experiment.seed)
    train_eval = tff_fedavg.build_fed_eval(train_model, task.train)
    clients = sorted(range(task.train.num_clients), key=lambda k: -task.train.num_examples[k])
    return lambda weights: {**fed_eval(weights, test_parts), "train_loss": train_eval(weights, clients)["loss"]}


def choose_target(experiment: Experiment, task: Task) -> Target:
    """Returns what a run aims at: the experiment's accuracy, the task's target, or none for its accuracy or loss.

    Raises:
      ValueError: If the experiment has a target accuracy, and the task has no accuracy.
    """
    if experiment.target_accuracy not in (None, 1):
        if "accuracy" not in task.metrics:
            names = ", ".join(("loss", *task.metrics))
            raise ValueError(f"--target_accuracy is given, but {task.name} has no accuracy: its metrics are {names}")
        return Target(experiment.target_accuracy)
    without = Target(None) if "accuracy" in task.metrics else Target(None, "loss", lower_is_better=True)
    target = task.target or without
    return dataclasses.replace(target, value=None) if experiment.target_accuracy == 1 else target


def build_process(
    experiment: Experiment, task: Task, model: tff.learning.models.FunctionalModel
) -> tuple[tff.learning.templates.LearningProcess | tff_fedavg.CentralizedSGD, Callable[[int], Any]]:
    """Returns the process, and what it takes for each round."""
    learning_rate = experiment.learning_rate
    if experiment.learning_rate_decay:
        learning_rate = tf.keras.optimizers.schedules.ExponentialDecay(
            learning_rate, experiment.decay_every, experiment.learning_rate_decay, staircase=True
        )
    arguments = {"learning_rate": learning_rate, "seed": experiment.seed}
    if experiment.algorithm == "sgd":
        process = tff_fedavg.CentralizedSGD(model, task.train, batch_size=experiment.batch_size, **arguments)
        return process, lambda first_update: _num_updates(first_update, experiment)
    sample = tff_fedavg.build_sampling_fn(task.train.num_clients, experiment.client_fraction, experiment.seed)
    arguments |= {
        "client_weighting": tff.learning.ClientWeighting[experiment.client_weighting.upper()],
        "server_optimizer": build_server_optimizer(experiment),
        "aggregator": build_aggregator(experiment, clients_per_round(experiment, task)),
    }
    if experiment.algorithm == "fedsgd":
        process = tff_fedavg.build_fed_sgd(model, task.train, **arguments)
    else:
        process = tff_fedavg.build_fed_avg(
            model,
            task.train,
            epochs=experiment.local_epochs,
            batch_size=experiment.batch_size or None,
            client_optimizer=build_client_optimizer(experiment),
            proximal_strength=experiment.proximal_strength,
            **arguments,
        )
    # The largest first: no core is left waiting for a large client that started last.
    return process, lambda t: sorted(sample(t), key=lambda k: -task.train.num_examples[k])


def clients_per_round(experiment: Experiment, task: Task) -> int:
    """Returns m (Algorithm 1)."""
    return num_sampled_clients(task.train.num_clients, experiment.client_fraction)


def _num_updates(first_update: int, experiment: Experiment) -> int:
    """Returns how many updates of SGD, counted from 1, are run from this one to the next evaluation, or progress."""
    before = first_update - 1
    to_evaluation = next_evaluation(before, experiment.eval_every) - before
    return min(to_evaluation, experiment.rounds - before, _UPDATES_PER_CALL)
