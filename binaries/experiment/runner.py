"""The run of one experiment, with its files, progress and outcome."""

import contextlib
import os

import tensorflow_federated as tff

import tasks
import tff_fedavg
from binaries.experiment import aggregators, precision
from binaries.experiment.observer import Observer
from binaries.experiment.process import build_evaluate, build_process, choose_target, clients_per_round
from binaries.experiment.record import Experiment
from binaries.experiment.workers import Workers
from tasks import own
from tasks.task import Task
from tff_fedavg import learning_curve, training
from tff_fedavg.communication import bytes_per_client
from tff_fedavg.learning_curve import Target
from tff_fedavg.metrics_table import ROUND_FIELD
from tff_fedavg.run_directory import RunDirectory, check_data, read_metrics, task_has_changed

# Names in metrics.csv.
_BYTES_UP = "bytes_up"
_BYTES_DOWN = "bytes_down"


def run(
    experiment: Experiment,
    run_dir: str | os.PathLike[str] | RunDirectory,
    *,
    data_dir: str | os.PathLike[str] = tasks.DATA_DIR,
    cache_dir: str | os.PathLike[str] = tasks.CACHE_DIR,
    workers: Workers | None = None,
    observer: Observer | None = None,
) -> str:
    """Runs an experiment.

    Args:
      experiment: The experiment.
      run_dir: Where the run is kept, maybe opened already. When the directory holds a run of the same experiment, that
        one goes on.
      data_dir: As for `tasks.build_task`.
      cache_dir: As for `tasks.build_task`.
      workers: What runs the computations; by default a worker that is started for it.
      observer: Is told of the start and of every round.

    Returns:
      What came of it, in a line.

    Raises:
      ValueError: If the data are bad, or the directory holds a run of another experiment. Nothing has been computed
        then.
      DivergedError: As from `training.train`.
      NotSavedError: If a state or metrics cannot be written.
    """
    observer = observer or Observer()
    directory = run_dir if isinstance(run_dir, RunDirectory) else RunDirectory(run_dir)
    run_dir = directory.path
    workers = workers or Workers()
    with contextlib.closing(directory):  # An error may be kept, as in a notebook, and the directory with it.
        if experiment.matmul_precision == "bfloat16" and not workers.addresses:
            precision.check_processor()
        if held := Experiment.read(run_dir):
            held.go_on(run_dir, experiment.to_json())  # Refuses another experiment.
        with workers.start(experiment.clients_per_subround):
            task = experiment.build_task(data_dir, cache_dir)
            target = choose_target(experiment, task)
            model = task.build_model(experiment.seed)
            evaluate = build_evaluate(experiment, task, model)
            process, training_selection_fn = build_process(experiment, task, model)
            check_data(run_dir, task.checksums)
            task_file = own.checksum(experiment.task)

            first_round = 0

            def start(round_number: int) -> None:
                nonlocal first_round
                first_round = round_number
                if round_number and task_has_changed(run_dir, task_file):
                    observer.warn(
                        f"{experiment.task} has changed since round {round_number} of the run in {run_dir}, which goes "
                        "on with what is in it now; give another run_dir to start a new run"
                    )
                # Until here the model may be refused, and then there is no run.
                directory.start(
                    experiment.to_json(), task.checksums, target, task_file=task_file, after_round=round_number
                )
                observer.start(round_number)

            def draw() -> None:
                title = ", ".join(part for part in (task.name, experiment.partition, experiment.algorithm) if part)
                curve = learning_curve.evaluations(read_metrics(run_dir), target.metric)
                learning_curve.plot(directory.learning_curve_png, *curve, target=target, title=title)

            try:
                training.train(
                    process,
                    directory,
                    training_selection_fn=training_selection_fn,
                    evaluate=evaluate,
                    target=target,
                    total_rounds=experiment.rounds,
                    rounds_per_evaluation=experiment.eval_every,
                    also_released=_bytes_sent(experiment, task, process),
                    on_start=start,
                    on_round=observer.update,
                    on_mended=observer.warn,
                )
            except BaseException as e:
                with contextlib.suppress(OSError, ValueError):  # What has ended the training is what is to be told.
                    draw()
                if not isinstance(e, training.DivergedError):
                    raise
                rate = experiment.learning_rate
                raise training.DivergedError(
                    f"{e} at learning_rate={rate:g}; {run_dir} keeps the state before it"
                ) from e
            draw()
        return _outcome(experiment, directory, task, target, first_round)


def _bytes_sent(
    experiment: Experiment, task: Task, process: tff.learning.templates.LearningProcess | tff_fedavg.CentralizedSGD
) -> dict[str, int]:
    """Returns what all clients of a round send up and get, by the names in metrics.csv."""
    if experiment.algorithm == "sgd":
        return {}
    up, down = bytes_per_client(process)
    clients = clients_per_round(experiment, task)
    return {_BYTES_UP: clients * up, _BYTES_DOWN: clients * down}


def _outcome(experiment: Experiment, directory: RunDirectory, task: Task, target: Target, first_round: int) -> str:
    metrics = read_metrics(directory.path)
    rounds, values = learning_curve.evaluations(metrics, target.metric)
    last_round = int(metrics[-1][ROUND_FIELD])
    sums = {
        name: sum(row.get(name, 0.0) for row in metrics)
        for name in ("training_time_in_seconds", _BYTES_UP, _BYTES_DOWN, "clients_left_out")
    }
    parts = [f"{last_round} rounds", f"best {target.metric} {target.best(values):.4f}"]
    if rounds and rounds[-1] < last_round:  # Of a run that was stopped there, and goes no further.
        parts[-1] += f" up to round {rounds[-1]}, the last that was evaluated"
    if target.value is not None:
        crossing = target.rounds(rounds, values)
        parts.append(f"rounds to {target.value:g}: {'not reached' if crossing is None else f'{crossing:.1f}'}")
        if crossing is not None and last_round == first_round:
            parts[-1] += " (reached before; --target_accuracy=1 goes on without a target)"
    parts.append(f"{sums['training_time_in_seconds']:.1f} s of training")
    if experiment.algorithm != "sgd":
        parts += [f"{sums[_BYTES_UP] / 1e6:.1f} MB up", f"{sums[_BYTES_DOWN] / 1e6:.1f} MB down"]
    if sums["clients_left_out"]:
        parts.append(f"{sums['clients_left_out']:.0f} times a client left out, whose update was not finite")
    if experiment.aggregator == "dp":
        sampled = task.train.num_clients, clients_per_round(experiment, task)
        epsilon = aggregators.epsilon(experiment, *sampled, last_round)
        parts.append(f"epsilon {epsilon:.3g} at delta {experiment.delta:g}")
    return f"{', '.join(parts)}; see {directory.path}"
