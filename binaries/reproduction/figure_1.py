"""Figure 1: the loss of mixtures of two models that were trained on different clients (Section 2).

Both parents are a round of Federated Averaging with one client of the IID partition each: E = 20, B = 50, eta = 0.1,
240 updates. The mixture theta w + (1 - theta) w' is evaluated on the whole training set.
"""

import csv
import io
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from binaries.experiment import Experiment
from binaries.experiment.workers import Workers
from binaries.reproduction.outcome import read_table, write_outcome
from tff_fedavg.replacement import replacement

# The seeds of w_0 for the two parents, by panel.
PANELS = {"independent": (0, 1), "shared": (0, 0)}
THETAS = np.linspace(-0.2, 1.2, 50)

_LOSSES_CSV = "losses.csv"
_FIELDS = ("theta", "loss")


def name(panel: str) -> str:
    """Returns the name of a panel's run, as a directory below results/runs/."""
    return f"figure_1-{panel}"


def experiment(data: str | None) -> Experiment:
    """Returns what a parent trains: the task, its data source (None is the paper's) and its partition."""
    return Experiment(task="mnist_2nn", data=data, partition="iid", local_epochs=20, batch_size=50, learning_rate=0.1)


def read(results_dir: pathlib.Path, panel: str) -> list[tuple[float, float]]:
    """Returns theta and the loss of the mixture, for each theta; nothing if it has not been run."""
    table = read_table(_directory(results_dir, panel)) or b""
    rows = csv.DictReader(io.StringIO(table.decode(), newline=""))
    return [(float(row["theta"]), float(row["loss"])) for row in rows]


def mix(w: Sequence[np.ndarray], v: Sequence[np.ndarray], theta: float) -> list[np.ndarray]:
    """Returns theta w + (1 - theta) v, of weights of any shapes."""
    return [theta * a + (1 - theta) * b for a, b in zip(w, v, strict=True)]


def execute(
    panel: str,
    data: str | None,
    results_dir: pathlib.Path,
    say: Callable[[str], None],
    *,
    data_dir: str,
    cache_dir: str,
    workers: Workers | None = None,
) -> str:
    """Trains the parents of a panel, and writes the losses of their mixtures to losses.csv.

    Args:
      panel: One of `PANELS`.
      data: Data source of the task mnist_2nn; None is the paper's.
      results_dir: Where the results are.
      say: Takes a line of progress.
      data_dir: As the flag of `binaries.command_line.data_flags`.
      cache_dir: As that flag.
      workers: As for `binaries.experiment.runner.run`.

    Returns:
      What came of it, in a line.

    Raises:
      ValueError: If the data are bad.
      OSError: If the file cannot be written.
    """
    import tensorflow_federated as tff

    import tff_fedavg

    setting = experiment(data)
    with (workers or Workers()).start():
        task = setting.build_task(data_dir, cache_dir)
        parents = []
        for client, seed in enumerate(PANELS[panel]):
            model = task.build_model(seed)
            process = tff_fedavg.build_fed_avg(
                model,
                task.train,
                epochs=setting.local_epochs,
                batch_size=setting.batch_size,
                learning_rate=setting.learning_rate,
            )
            state = process.next(process.initialize(), [client]).state
            parents.append(state.global_model_weights.trainable)
        fed_eval = tff_fedavg.build_fed_eval(model, task.train)
        clients = list(range(task.train.num_clients))
        losses = []
        for theta in THETAS:
            weights = tff.learning.models.ModelWeights(tuple(mix(*parents, theta)), ())
            losses.append(float(fed_eval(weights, clients)["loss"]))
            say(f"theta {theta:.2f}, loss {losses[-1]:.4f}")
    directory = _directory(results_dir, panel)
    directory.mkdir(parents=True, exist_ok=True)
    with replacement(directory / _LOSSES_CSV) as temporary, open(temporary, "w", newline="") as file:
        csv.writer(file).writerows([_FIELDS, *zip(THETAS.round(6).tolist(), losses)])
    write_outcome(directory, {}, _LOSSES_CSV)
    best = int(np.argmin(losses))
    return f"lowest loss {losses[best]:.4f} at theta {THETAS[best]:.2f}, highest {max(losses):.4f}"


def _directory(results_dir: pathlib.Path, panel: str) -> pathlib.Path:
    return results_dir / "runs" / name(panel)
