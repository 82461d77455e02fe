"""Which runs reproduce the paper: a grid of learning rates for each cell of the tables, fixed rates for the figures.

A run is kept by what it computes, not by the table or figure that shows it: several share it.
"""

import dataclasses
import functools
import math
import pathlib
import statistics
from collections.abc import Collection, Mapping
from typing import Any

from binaries.experiment import Experiment
from binaries.reproduction import published
from binaries.reproduction.outcome import read_outcome
from binaries.reproduction.published import Cell
from tff_fedavg import learning_curve, saved_state

_CAP = 2  # Rounds of a run at most, in multiples of the paper's; then it goes on to the next evaluation.

# A good eta for each model and B: those of Figures 1 and 8 where the paper names one for B = 10, found in trials for
# the others. On the grid of 10^(k/6), which has all rates that the paper names outside of CIFAR-10 and the word LSTM. A
# centre that is off costs time only: the grid goes on in the direction of the best rate.
_CENTRES = {
    ("mnist_2nn", 10): 0.1,
    ("mnist_2nn", 50): 0.1,
    ("mnist_2nn", None): 0.215,
    ("mnist_cnn", 10): 0.215,
    ("mnist_cnn", 50): 0.215,
    ("mnist_cnn", None): 0.215,
    ("shakespeare_lstm", 10): 3.16,
    ("shakespeare_lstm", 50): 3.16,
    ("shakespeare_lstm", None): 3.16,
}

# CIFAR-10: eta and its decay are those of Figure 4. Taken literally, a decay per round would end the training long
# before the paper's curves do; 0.9934 is the tutorial's decay per epoch of data, which at C = 0.1 is 10 rounds. The
# paper names none for SGD (Table 3), whose epoch is 500 updates, and no other eta than that of Figure 9.
_CIFAR_RATES = {"fedavg": (0.15, 0.05, 0.25), "fedsgd": (0.45, 0.6, 0.7), "sgd": (0.15,)}
_CIFAR_DECAY = {"fedavg": (0.99, 10), "fedsgd": (0.9934, 10), "sgd": (0.9934, 500)}
_CIFAR_EVAL_EVERY = {"fedavg": 10, "fedsgd": 50, "sgd": 500}  # As the points of Figures 4 and 9, FedAvg's first ones.
_BATCHES_PER_EPOCH = 10  # Of a CIFAR-10 client, at B = 50 (Figure 9).
_CIFAR_SGD = Cell("cifar_cnn", "iid", "sgd", None, None, 100)  # Figure 9's too (docs).

# 200 authors a round, of the 342,477 of Stack Overflow, which stand for the paper's private posts (Section 3).
_WORD_LSTM_C = 200 / 342_477


@dataclasses.dataclass(frozen=True)
class Grid:
    """The runs of a cell, with one learning rate each.

    Attributes:
      cell: The setting.
      rates: The learning rates to start with, in this order.
      extends: Whether rates follow until the best one is not at an edge, and those that cannot win are given up.
      rounds: Where a run stops at the latest.
      eval_every: Rounds between evaluations; 0 for those of the paper's figures.
      target: Test accuracy where a run stops; None if it goes on to the last round.
      decay: Factor on eta, and the rounds between two decays; None if eta is constant.
      eval_train: Whether the loss on all training data is evaluated too.
      shrunk: Whether the runs are on embedded data, with one client a round and two local epochs at most.
    """

    cell: Cell
    rates: tuple[float, ...]
    extends: bool
    rounds: int
    eval_every: int
    target: float | None
    decay: tuple[float, int] | None = None
    eval_train: bool = False
    shrunk: bool = False

    def run(self, rate: float) -> "Run":
        return Run(self, rate)

    def progress(self, results_dir: pathlib.Path) -> tuple[list["Run"], list["Run"]]:
        """Returns the finished runs of the grid, and those that are to be run next; there are none when it is done."""
        centre = self.rates[0]  # Known to be good.
        rates = sorted(self.rates)
        while True:
            outcomes = {rate: self.run(rate).outcome(results_dir) for rate in rates}
            fewest = min((o["rounds_to_target"] or math.inf for o in outcomes.values() if o), default=math.inf)
            done = [rate for rate in rates if self._is_done(outcomes[rate], fewest)]
            wanted = [rate for rate in rates if rate not in done]
            if not wanted and self.extends:
                # Of equal rates the one nearest to the first: no grid goes on where nothing changes any more.
                best = min(rates, key=lambda rate: (self.rank(outcomes[rate], rate), abs(math.log(rate / centre))))
                # Those that have been run are in it too, where another centre would not have led there.
                beyond = {_neighbour(rates[0], -2): rates[0], _neighbour(rates[-1], 2): rates[-1]}
                was_run = {rate: self._is_done(self.run(rate).outcome(results_dir), fewest) for rate in beyond}
                more = [rate for rate, edge in beyond.items() if edge == best or was_run[rate]]
                if more:
                    rates = sorted([*rates, *more])
                    continue
            wanted.sort(key=lambda rate: rate != centre)  # Against it others are given up.
            return [self.run(rate) for rate in done], [self.run(rate) for rate in wanted]

    def rank(self, outcome: Mapping[str, Any], rate: float) -> tuple[int, float]:
        """Returns a key that is the smaller the better a rate is: by rounds to the target, or by accuracy."""
        if outcome["rounds_to_target"] is not None:
            return 0, outcome["rounds_to_target"]
        return (2, rate) if outcome["ended"] == "diverged" else (1, -outcome["best_accuracy"])

    def _is_done(self, outcome: Mapping[str, Any] | None, fewest: float) -> bool:
        """Whether a run has nothing more to show, where another rate takes `fewest` rounds to the target."""
        return outcome is not None and (
            outcome["rounds"] >= self.rounds
            or outcome["ended"] == "diverged"
            or (self.extends and (outcome["ended"] == "slower" or outcome["rounds"] >= fewest))
            or learning_curve.Target(self.target).is_reached(outcome["best_accuracy"])
        )


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of a grid.

    Attributes:
      grid: The grid.
      learning_rate: eta.
    """

    grid: Grid
    learning_rate: float

    @property
    def name(self) -> str:
        """Such as "mnist_2nn-iid-C0.1-E1-B10/eta0.1": the directory below results/runs/."""
        decay = f"-decay{self.grid.decay[0]}" if self.grid.decay else ""
        return f"{self.grid.cell.name}/eta{self.learning_rate:g}{decay}{'-train_loss' * self.grid.eval_train}"

    def directory(self, results_dir: pathlib.Path) -> pathlib.Path:
        """Returns the run directory."""
        return results_dir / "runs" / self.name

    def outcome(self, results_dir: pathlib.Path) -> Mapping[str, Any] | None:
        """Returns outcome.json of the run; None if it has not ended, or is not what was written.

        Its fields: ended ("target", "cap", "diverged" or "slower"), rounds, rounds_to_target, best_accuracy,
        training_seconds and date.
        """
        return read_outcome(self.directory(results_dir))

    def last_round(self, results_dir: pathlib.Path) -> int:
        """Returns the round from which the run goes on: that of its newest state, 0 without one."""
        return max(saved_state.saved_rounds(self.directory(results_dir)), default=0)

    @property
    def experiment(self) -> Experiment:
        """What the run computes."""
        grid, cell = self.grid, self.grid.cell
        factor, decay_every = grid.decay or (None, None)
        return Experiment(
            task=cell.task,
            data="embedded" if grid.shrunk else None,
            partition=cell.partition,
            algorithm=cell.algorithm,
            client_fraction=0.0 if grid.shrunk else cell.C,
            local_epochs=min(cell.E, 2) if grid.shrunk else cell.E,
            batch_size=cell.B or 0,
            learning_rate=self.learning_rate,
            learning_rate_decay=factor,
            decay_every=decay_every,
            rounds=grid.rounds,
            eval_every=grid.eval_every,
            eval_train=grid.eval_train,
            target_accuracy=1.0 if grid.target is None else grid.target,
        )


@dataclasses.dataclass(frozen=True)
class Curve:
    """A curve of a figure.

    Attributes:
      panel: Name of the panel; as in `published.curves`.
      label: Name of the curve; as in `published.curves`.
      grid: Its runs: one, or those of a cell of the tables.
      x_per_round: What a round counts on the x axis.
    """

    panel: str
    label: str
    grid: Grid
    x_per_round: float = 1.0


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure of the paper whose curves are runs: all but Figure 1.

    Attributes:
      title: What it shows.
      metric: Name of the y values in metrics.csv.
      curves: The curves.
      monotone: Whether a point is the best value up to its round, of all rates (Section 3).
      x_label: The x axis.
      note: How what is shown differs from the paper's.
    """

    title: str
    metric: str
    curves: tuple[Curve, ...]
    monotone: bool = False
    x_label: str = "communication rounds"
    note: str = ""


def table(number: int, shrunk: bool = False) -> list[Grid]:
    """Returns the grids of a table, in the paper's order; if `shrunk`, what shows in seconds whether they run."""
    grids = [_table_grid(cell) for cell in dict.fromkeys(r.cell for r in published.rows() if r.table == number)]
    return list(_in_small(grids).values()) if shrunk else grids


@functools.cache
def figures(shrunk: bool = False) -> Mapping[int, Figure]:
    """Returns the figures by number, `shrunk` or not as the tables; of Figure 1 see `figure_1`."""
    if shrunk:
        return {number: _figure_in_small(figure) for number, figure in figures().items()}
    accuracy, train_loss = "evaluation/accuracy", "evaluation/train_loss"
    large_epochs = (1, 5, 25, 50, 100, 200)
    word_lstm = tuple(
        Curve("stackoverflow_lstm", f"{label} eta={rate}", _fixed(_word_lstm_cell(algorithm, epochs), rate, 1000, 5))
        for label, algorithm, epochs, rates in (
            ("FedSGD", "fedsgd", 1, (6, 9, 18, 22)),
            ("FedAvg E=1", "fedavg", 1, (3, 6, 9, 18)),
            ("FedAvg E=5", "fedavg", 5, (3, 6, 9, 18)),
        )
        for rate in rates
    )
    return {
        2: Figure("test accuracy, C = 0.1", accuracy, _table_curves(2), monotone=True),
        3: Figure(
            "large E: training loss of the character LSTM, B = 10, eta = 1.47",
            train_loss,
            tuple(
                Curve(part, f"E={epochs}", _large_epochs("shakespeare_lstm", part, epochs, 1.47, rounds=60))
                for part in ("iid", "role")
                for epochs in large_epochs
            ),
        ),
        4: Figure(
            "test accuracy on CIFAR-10, eta with decay",
            accuracy,
            tuple(
                Curve("cifar_cnn", f"{label} eta={rate}", _table_run(cell, rate, 3000))
                for label, cell in (
                    ("FedAvg", Cell("cifar_cnn", "iid", "fedavg", 0.1, 5, 50)),
                    ("FedSGD", Cell("cifar_cnn", "iid", "fedsgd", 0.1, 1, None)),
                )
                for rate in sorted(_CIFAR_RATES[cell.algorithm])
            ),
        ),
        5: Figure(
            "test accuracy of the word LSTM, best up to each round",
            accuracy,
            tuple(curve for curve in word_lstm if "E=5" not in curve.label),
            monotone=True,
        ),
        6: Figure(
            "training loss (as seen by local SGD) of the CNN, C = 0.1",
            "client_work/train/loss",
            tuple(curve for curve in _table_curves(2) if curve.panel.startswith("mnist_cnn")),
            note="Not what the paper shows, the loss of the global model on all training data, but the mean loss of a "
            "round's minibatches as the clients trained on them. For FedSGD that is the loss of the global model on "
            "the round's clients; with E > 1 it is lower, most of all on pathological data.",
        ),
        7: Figure("test accuracy of the 2NN, C = 0.1", accuracy, _table_curves(4), monotone=True),
        8: Figure(
            "large E: training loss of the CNN, B = 10, eta = 0.215 (IID) and 0.1 (non-IID)",
            train_loss,
            tuple(
                Curve(part, f"E={epochs}", _large_epochs("mnist_cnn", part, epochs, rate, rounds=100))
                for part, rate in (("iid", 0.215), ("pathological", 0.1))
                for epochs in (*large_epochs, 400)
            ),
        ),
        9: Figure(
            "test accuracy on CIFAR-10 over gradient computations, B = 50, of SGD 100",
            accuracy,
            (
                *(_gradient_curve(*setting) for setting in _FIGURE_9),
                Curve("cifar_cnn", "SGD eta=0.15", _table_run(_CIFAR_SGD, 0.15, 300_000)),
            ),
            x_label="minibatch gradient computations",
        ),
        10: Figure("test accuracy of the word LSTM, as measured", accuracy, word_lstm),
    }


# C, E and eta (with the paper's digits).
_FIGURE_9 = (
    (0.0, 5, "0.05"),
    (0.1, 1, "0.3"),
    (0.1, 5, "0.17"),
    (0.1, 10, "0.17"),
    (0.1, 20, "0.15"),
    (1.0, 5, "0.5"),
)


def outcomes(results_dir: pathlib.Path) -> dict[Cell, list[Mapping[str, Any]]]:
    """Returns outcome.json of all runs that have one, by cell."""
    cells = {curve.grid.cell for figure in figures().values() for curve in figure.curves}
    cells |= {row.cell for row in published.rows()}
    return {
        cell: [
            outcome
            for directory in sorted((results_dir / "runs" / cell.name).glob("*"))
            if (outcome := read_outcome(directory)) is not None
        ]
        for cell in cells
    }


def seconds_left(
    grid: Grid, last_rounds: Collection[int], outcomes: Mapping[Cell, Collection[Mapping[str, Any]]]
) -> float | None:
    """Returns how long the runs that a grid wants, which go on from these rounds, take on one core; None if not known.

    A run is expected to take about the paper's rounds; beyond them, all that it may. A round takes what it took in
    other runs of the cell; else of a cell with the same task and B, in proportion to E and to the clients of a round.
    """
    if not last_rounds:
        return 0.0
    alike = (
        [grid.cell] if outcomes[grid.cell] else [c for c in outcomes if (c.task, c.B) == (grid.cell.task, grid.cell.B)]
    )
    seconds = [
        outcome["training_seconds"] / outcome["rounds"] * _work(grid.cell) / _work(cell)
        for cell in alike
        for outcome in outcomes[cell]
        if outcome["rounds"]
    ]
    if not seconds:
        return None
    expected = grid.rounds if grid.target is None else min(grid.rounds, _table_grid(grid.cell).rounds / _CAP)
    return statistics.median(seconds) * sum((expected if n < expected else grid.rounds) - n for n in last_rounds)


def cheapest_first(grids: Collection[Grid], results_dir: pathlib.Path) -> list[Grid]:
    """Returns the grids by the time that the rest of them takes; at the end those of which it is not known."""
    found = outcomes(results_dir)

    def seconds(grid: Grid) -> float:
        _, wanted = grid.progress(results_dir)
        left = seconds_left(grid, [run.last_round(results_dir) for run in wanted], found)
        return math.inf if left is None else left

    return sorted(grids, key=seconds)


def _work(cell: Cell) -> float:
    """Returns C E, where C = 0 is one client of a hundred."""
    return 1.0 if cell.algorithm == "sgd" else max(cell.C, 0.01) * cell.E


def limit(grid: Grid, rounds: int) -> Grid:
    """Returns the grid with runs of so many rounds at most. A run goes on from there when more are wanted."""
    return dataclasses.replace(grid, rounds=min(grid.rounds, rounds))


def _table_grid(cell: Cell) -> Grid:
    """Returns the grid of a cell of the tables; one that several tables have is run for all of them."""
    shown = [row for row in published.rows() if row.cell == cell]
    columns = {row.column for row in shown}
    most = max(
        [row.rounds for row in shown if row.rounds is not None]
        or [row.rounds for row in published.rows() if row.column in columns and row.rounds is not None]
    )
    eval_every = _CIFAR_EVAL_EVERY[cell.algorithm] if cell.task == "cifar_cnn" else 0
    limits = {
        "rounds": learning_curve.next_evaluation(_CAP * most - 1, eval_every),
        "eval_every": eval_every,
        "target": max(row.target for row in shown),
    }
    if cell.task == "cifar_cnn":
        decay = _CIFAR_DECAY[cell.algorithm]
        return Grid(cell, _CIFAR_RATES[cell.algorithm], extends=False, decay=decay, **limits)
    centre = _CENTRES[cell.task, cell.B]
    if (cell.C, cell.B) == (0, 10):  # One client's weights, not an average: a smaller rate was better in all trials.
        centre = _neighbour(centre, -2)
    rates = (centre, _neighbour(centre, -2), _neighbour(centre, 2))
    return Grid(cell, rates, extends=True, **limits)


def _table_run(cell: Cell, rate: float, rounds: int) -> Grid:
    """Returns the run of a cell of the tables at one rate, beyond the tables' targets."""
    return dataclasses.replace(_table_grid(cell), rates=(rate,), rounds=rounds, target=None)


def _in_small(grids: Collection[Grid]) -> dict[Grid, Grid]:
    """Returns those grids that are run in small too, and their small form: one rate, two rounds, embedded data.

    Of the models of texts, which take a minute to evaluate, it is one.
    """
    of_texts = [grid for grid in grids if grid.cell.task.endswith("lstm")]
    return {
        grid: dataclasses.replace(
            grid, rates=grid.rates[:1], extends=False, rounds=2, eval_every=2, target=None, shrunk=True
        )
        for grid in grids
        if grid not in of_texts[1:]
    }


def _figure_in_small(figure: Figure) -> Figure:
    small = _in_small([curve.grid for curve in figure.curves])
    curves = (dataclasses.replace(curve, grid=small[curve.grid]) for curve in figure.curves if curve.grid in small)
    return dataclasses.replace(figure, curves=tuple(curves))


def _neighbour(rate: float, sixths: int) -> float:
    """Returns the rate so many sixths of a decade away on the grid of 10^(k/6), with three digits, as the paper's."""
    return float(f"{10 ** ((round(6 * math.log10(rate)) + sixths) / 6):.3g}")


def _table_curves(number: int) -> tuple[Curve, ...]:
    return tuple(Curve(f"{g.cell.task}-{g.cell.partition}", g.cell.label, g) for g in table(number))


def _fixed(cell: Cell, rate: float, rounds: int, eval_every: int, **settings: Any) -> Grid:
    return Grid(cell, (float(rate),), extends=False, rounds=rounds, eval_every=eval_every, target=None, **settings)


def _large_epochs(task: str, partition: str, epochs: int, rate: float, rounds: int) -> Grid:
    cell = Cell(task, partition, "fedavg", 0.1, epochs, 10)
    # With E = 1 the loss on all training data takes longer than a round, and changes little from one to the next.
    return _fixed(cell, rate, rounds, eval_every=5 if epochs == 1 else 1, eval_train=True)


def _word_lstm_cell(algorithm: str, epochs: int) -> Cell:
    return Cell("stackoverflow_lstm", "author", algorithm, _WORD_LSTM_C, epochs, None if algorithm == "fedsgd" else 8)


def _gradient_curve(C: float, epochs: int, rate: str) -> Curve:
    per_round = max(round(100 * C), 1) * epochs * _BATCHES_PER_EPOCH
    rounds = 300_000 // per_round
    grid = _fixed(Cell("cifar_cnn", "iid", "fedavg", C, epochs, 50), float(rate), rounds, max(1, rounds // 300))
    return Curve("cifar_cnn", f"FedAvg C={C:g} E={epochs} eta={rate}", grid, per_round)
