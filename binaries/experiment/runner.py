"""The run of one experiment, with its files, progress and outcome."""

import os

import tensorflow_federated as tff

import tasks
import tff_fedavg
from binaries.experiment.observer import Observer
from binaries.experiment.process import build_evaluate, build_process
from binaries.experiment.record import Experiment
from tasks.task import Task
from tff_fedavg import learning_curve, training
from tff_fedavg.run_directory import RunDirectory
from tff_fedavg.sampling import num_sampled_clients


def run(
    experiment: Experiment,
    run_dir: str | os.PathLike[str],
    *,
    data_dir: str | os.PathLike[str] = tasks.DATA_DIR,
    cache_dir: str | os.PathLike[str] = tasks.CACHE_DIR,
    observer: Observer | None = None,
) -> str:
    """Runs an experiment.

    Args:
      experiment: The experiment.
      run_dir: Where the run is kept. When the directory holds a run of the same experiment, that one goes on.
      data_dir: As for `tasks.build_task`.
      cache_dir: As for `tasks.build_task`.
      observer: Is told of the start and of every round.

    Returns:
      What came of it, in a line.

    Raises:
      ValueError: If the data are bad, or the directory holds a run of another experiment. Nothing has been computed
        then.
      DivergedError: If the loss is no longer finite.
      NotSavedError: If a state or metrics cannot be written.
    """
    observer = observer or Observer()
    directory = RunDirectory(run_dir)
    if held := Experiment.read(run_dir):
        held.go_on(run_dir, experiment.to_json())  # Refuses another experiment.
    with tff_fedavg.local_worker():
        task = experiment.build_task(data_dir, cache_dir)
        target = task.target_accuracy if experiment.target_accuracy is None else experiment.target_accuracy
        directory.start(experiment.to_json(), task.checksums)
        model = task.build_model(experiment.seed)
        evaluate = build_evaluate(experiment, task, model)
        process, training_selection_fn = build_process(experiment, task, model)
        try:
            training.train(
                process,
                directory,
                training_selection_fn=training_selection_fn,
                evaluate=evaluate,
                total_rounds=experiment.rounds,
                rounds_per_evaluation=experiment.eval_every,
                target_accuracy=target,
                on_start=observer.start,
                on_round=observer.update,
                on_damaged=observer.report_damaged,
            )
        except training.DivergedError as e:
            rate = experiment.learning_rate
            raise training.DivergedError(f"{e} at learning_rate={rate:g}; {run_dir} keeps the state before it") from e
        finally:
            title = f"{task.name}, {experiment.partition}, {experiment.algorithm}"
            curve = learning_curve.evaluations(learning_curve.read_metrics(directory.metrics_csv))
            learning_curve.plot(directory.learning_curve_png, *curve, target=target, title=title)
    return _outcome(experiment, directory, task, model, target)


def _outcome(
    experiment: Experiment,
    directory: RunDirectory,
    task: Task,
    model: tff.learning.models.FunctionalModel,
    target: float,
) -> str:
    metrics = learning_curve.read_metrics(directory.metrics_csv)
    rounds, accuracies = learning_curve.evaluations(metrics)
    crossing = learning_curve.rounds_to_target(rounds, accuracies, target)
    last_round = int(metrics[-1][learning_curve.ROUND_FIELD])
    seconds = sum(row.get("training_time_in_seconds", 0.0) for row in metrics)
    traffic = ""
    if experiment.algorithm != "sgd":
        clients = num_sampled_clients(task.train.num_clients, experiment.client_fraction)
        megabytes = sum(w.nbytes for w in model.initial_weights[0]) * clients * last_round / 1e6
        traffic = f", {megabytes:.1f} MB up, {megabytes:.1f} MB down"
    return (
        f"{last_round} rounds, best accuracy {max(accuracies):.4f}, "
        f"rounds to {target:g}: {'not reached' if crossing is None else f'{crossing:.1f}'}, "
        f"{seconds:.1f} s of training{traffic}; see {directory.path}"
    )
