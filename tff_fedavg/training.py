"""The round loop: sample, train, evaluate, release metrics, save the state; resume where an earlier run stopped.

Like `tff.simulation.run_training_process`, and with what that lacks: a stop at a target accuracy, a stop when nothing
finite is left, and a fall back to an older state when the newest is damaged. The state is the truth: it has the
metrics up to its round, from which metrics.csv is mended.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow_federated as tff

from tff_fedavg import learning_curve, saved_state
from tff_fedavg.centralized import CentralizedSGD
from tff_fedavg.event_log import EventLog
from tff_fedavg.learning_curve import Target
from tff_fedavg.metrics_table import MetricsTable, read_metrics
from tff_fedavg.run_directory import RunDirectory

_SECONDS_BETWEEN_SAVES = 30.0
# Other clients may do better in the next round, from the same weights.
_MOST_LOST_ROUNDS = 3


class DivergedError(RuntimeError):
    """No client has had a finite update for some rounds, or SGD's loss is not finite."""


class NotSavedError(OSError):
    """The state or the metrics of a round could not be written."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """What has happened up to and with one round.

    Attributes:
      round_number: The round, from 1; 0 is the initial model.
      metrics: The metrics of the round, flat, by the names in metrics.csv.
      target: The target of the run.
      best: Best value of its metric in all evaluations so far; NaN before the first.
    """

    round_number: int
    metrics: dict[str, Any]
    target: Target
    best: float


def train(
    process: tff.learning.templates.LearningProcess | CentralizedSGD,
    directory: RunDirectory,
    *,
    training_selection_fn: Callable[[int], Any],
    evaluate: Callable[[tff.learning.models.ModelWeights], Mapping[str, float]],
    target: Target,
    total_rounds: int,
    rounds_per_evaluation: int = 1,
    also_released: Mapping[str, float] | None = None,
    on_start: Callable[[int], None] = lambda round_number: None,
    on_round: Callable[[Progress], None] = lambda progress: None,
    on_mended: Callable[[str], None] = lambda message: None,
) -> Any:
    """Trains until `total_rounds` or until an evaluation reaches the target, from where `directory` stopped.

    The state is saved every 30 s, and in the end however that comes, an exception or Ctrl-C included. A round is a pure
    function of the state and the sampled clients, so a resumed run repeats the unsaved rounds exactly.

    Args:
      process: The learning process. Its state counts the finished rounds as `client_work`.
      directory: Gets the states, and the metrics of each round as CSV and for TensorBoard.
      training_selection_fn: Maps the round, from 1, to what `process.next` takes: the ids of its clients, or how many
        rounds are run in one call. These must end with every round that is evaluated.
      evaluate: Maps model weights to metrics on the test set, that of the target among them.
      target: Where to stop, and the metric of which the best value is kept.
      total_rounds: Last round.
      rounds_per_evaluation: As for `learning_curve.next_evaluation`; round 0 and the last one, when it is run, are
        evaluated, too.
      also_released: What is released with the metrics of each round, such as the bytes that are sent.
      on_start: Called once, before anything is written, with the round that training goes on after, 0 for a new run.
      on_round: Called after each round.
      on_mended: Called with a line for each file that is not what was written: a state that is left aside for the one
        before it, or a table that is written anew.

    Returns:
      The final state.

    Raises:
      DivergedError: If no client had a finite update in three rounds on end, or SGD's loss or weights are not finite.
        The state before the last round is saved.
      NotSavedError: If the disk is full, or a file cannot be written for another reason.
      ValueError: If something else is in the place of a file, or the saved state is of another model.
    """
    state, saved_round, saved_metrics = _load_latest_state(process, directory, on_mended)
    round_number = saved_round
    on_start(max(round_number, 0))
    table = MetricsTable(directory.metrics_csv)
    try:
        if mended := table.restore(saved_metrics, saved_round):
            on_mended(mended)
        log = EventLog(directory.tensorboard)
    except OSError as e:
        raise NotSavedError(f"the metrics cannot be written to {directory.path}: {e}") from e
    _, values = learning_curve.evaluations(read_metrics(directory.metrics_csv), target.metric)
    best = target.best(values)
    lost_rounds = 0
    saved_at = time.monotonic()

    def record(round_number, metrics, state):
        nonlocal best
        is_next = round_number == learning_curve.next_evaluation(round_number - 1, rounds_per_evaluation)
        if is_next or round_number in (0, total_rounds):
            evaluation = evaluate(state.global_model_weights)
            metrics.update((f"evaluation/{name}", float(value)) for name, value in evaluation.items())
            best = target.best([best, metrics[target.field]])
        try:
            table.append(round_number, metrics)
            log.append(round_number, metrics)
        except OSError as e:
            raise NotSavedError(f"the metrics of round {round_number} could not be written: {e}") from e
        return Progress(round_number, metrics, target, best)

    def save(round_number, state):
        nonlocal saved_round, saved_at
        if round_number != saved_round:
            try:
                saved_state.save_state(directory.path, round_number, state, run=directory.run, metrics=table.content)
            except OSError as e:
                raise NotSavedError(f"the state of round {round_number} could not be written: {e}") from e
        saved_round = round_number
        saved_at = time.monotonic()

    try:
        if round_number < 0:
            progress = record(0, {}, state)
            round_number = 0
            save(round_number, state)
            on_round(progress)
        while round_number < total_rounds and not target.is_reached(best):
            start = time.monotonic()
            output = process.next(state, training_selection_fn(round_number + 1))
            metrics = _flatten(output.metrics)
            next_round_number = int(output.state.client_work)
            lost_rounds = lost_rounds + 1 if _is_lost(metrics) else 0
            if lost_rounds == (_MOST_LOST_ROUNDS if "clients_left_out" in metrics else 1):
                raise DivergedError(_diverged(next_round_number, lost_rounds, metrics))
            metrics["training_time_in_seconds"] = time.monotonic() - start
            metrics.update(also_released or {})
            progress = record(next_round_number, metrics, output.state)
            round_number, state = next_round_number, output.state
            on_round(progress)
            if time.monotonic() - saved_at > _SECONDS_BETWEEN_SAVES:
                save(round_number, state)
    finally:
        with log:
            if round_number >= 0:
                try:
                    save(round_number, state)
                except (KeyboardInterrupt, SystemExit):  # It came just now: the save has to be made before the end.
                    save(round_number, state)
                    raise
    return state


def _load_latest_state(process, directory, on_mended):
    """Returns the newest saved state that is good, its round, and the metrics up to it.

    Without one it is the initial state, and -1.
    """
    state = process.initialize()
    saved_state.remove_unfinished(directory.path)
    for round_number in reversed(saved_state.saved_rounds(directory.path)):
        try:
            good, metrics = saved_state.load_state(directory.path, round_number, state, run=directory.run)
            return good, round_number, metrics
        except saved_state.DamagedStateError as e:
            path = saved_state.path_of(directory.path, round_number)
            aside = path.with_name(f"damaged_{time.time_ns()}_{path.name}")
            path.rename(aside)
            on_mended(f"{e}: going on from the state before it; it is kept as {aside.name}")
    return state, -1, b""


def _is_lost(metrics):
    """Whether a round had nothing finite to go on with."""
    if not np.isfinite(metrics["client_work/train/loss"]):
        return True
    num_examples = metrics["client_work/train/num_examples"]
    if metrics.get("clients_left_out") and not num_examples:  # An aggregator may have made something of zeros.
        return True
    # Without an average, for want of any examples, the weights stay as well.
    return bool(metrics["finalizer/update_non_finite"] and num_examples)


def _diverged(round_number, lost_rounds, metrics):
    if lost_rounds > 1:
        return f"rounds {round_number - lost_rounds + 1} to {round_number} diverged: no client had a finite update"
    return f"round {round_number} diverged: its training loss is {metrics['client_work/train/loss']:g}"


def _flatten(metrics):
    """Flattens nested metrics to "a/b" names, as TFF's release managers name them."""
    flat = collections.OrderedDict()
    for name, value in metrics.items():
        if isinstance(value, dict):
            flat.update((f"{name}/{inner}", v) for inner, v in _flatten(value).items())
        elif np.ndim(value) == 0:
            flat[name] = np.asarray(value).item()
    return flat
