"""Which runs `binaries.reproduce` plans, how it runs them, and the program as a user runs it."""

import csv
import dataclasses
import functools
import pathlib

import numpy as np
import pytest
from programs import run_at_once, run_program

from binaries.experiment import runner
from binaries.reproduction import execution, figure_1, plan, published
from binaries.reproduction.outcome import write_outcome
from binaries.reproduction.published import Cell
from tff_fedavg.json_record import write_record
from tff_fedavg.learning_curve import Target
from tff_fedavg.training import DivergedError, Progress

CELL = Cell("mnist_2nn", "iid", "fedavg", 0.1, 1, 10)


def grid_of(cell, table):
    return next(grid for grid in plan.table(table) if grid.cell == cell)


def record(results_dir, run, rounds_to_target, *, ended="target", best_accuracy=0.97, rounds=None):
    """Leaves a run as if it had been run."""
    directory = run.directory(results_dir)
    directory.mkdir(parents=True)
    outcome = {
        "ended": ended,
        "rounds": rounds or rounds_to_target,
        "rounds_to_target": rounds_to_target,
        "best_accuracy": best_accuracy,
        "training_seconds": 1.0,
        "date": "2017-04-20",
    }
    write_record(directory / "config.json", {"settings": {}})
    (directory / "metrics.csv").write_text("round_num\n")
    write_outcome(directory, outcome, "metrics.csv")


def stop(results_dir, run, rounds):
    """Leaves a run as if it had been stopped."""
    states = run.directory(results_dir) / "states"
    states.mkdir(parents=True)
    (states / f"round_{rounds}.npz").touch()


def all_runs():
    grids = [grid for number in (1, 2, 3, 4) for grid in plan.table(number)]
    grids += [curve.grid for figure in plan.figures().values() for curve in figure.curves]
    return [grid.run(rate) for grid in grids for rate in grid.rates]


@pytest.mark.parametrize(
    ("table", "cell", "rounds"),
    [
        (2, Cell("mnist_cnn", "iid", "fedsgd", 0.1, 1, None), 1300),  # 2 * 626
        (1, CELL, 200),  # 2 * 92: Table 4 has more rounds than Table 1.
        (1, Cell("mnist_2nn", "iid", "fedsgd", 0.5, 1, None), 3400),  # A dash; the column's largest is 1658.
        (1, Cell("mnist_cnn", "iid", "fedavg", 1.0, 5, 10), 40),  # 2 * 16
        (3, Cell("cifar_cnn", "iid", "fedsgd", 0.1, 1, None), 13_200),  # 2 * 6600; N/A for 85 %.
    ],
)
def test_runs_stop_in_the_first_evaluation_after_twice_the_papers_rounds(table, cell, rounds):
    assert grid_of(cell, table).rounds == rounds


def test_evaluations_are_in_the_rounds_of_the_papers_figures():
    assert grid_of(CELL, 1).eval_every == 0
    for figure, curve, cell in (
        (4, "FedAvg eta=0.15", Cell("cifar_cnn", "iid", "fedavg", 0.1, 5, 50)),
        (4, "FedSGD eta=0.6", Cell("cifar_cnn", "iid", "fedsgd", 0.1, 1, None)),
        (9, "SGD eta=0.15", Cell("cifar_cnn", "iid", "sgd", None, None, 100)),
    ):
        rounds = [x for x, _ in published.curves(figure)["cifar_cnn"][curve]]
        assert grid_of(cell, 3).eval_every == round(min(np.diff(rounds)))


def test_runs_of_the_same_name_compute_the_same():
    """Else a cell that two tables or figures share would be refused as a run with other settings."""
    experiments = {}
    for run in all_runs():
        chosen = dataclasses.replace(run.experiment, rounds=1, target_accuracy=None)
        assert experiments.setdefault(run.name, chosen) == chosen
    names = {run.name for run in all_runs() if run.grid.cell == CELL}
    assert "mnist_2nn-iid-C0.1-E1-B10/eta0.1" in names


def test_figures_have_the_papers_rates_and_all_of_its_curves():
    rates = {
        number: sorted({rate for curve in figure.curves for rate in curve.grid.rates})
        for number, figure in plan.figures().items()
    }
    assert rates[3] == [1.47]
    assert rates[8] == [0.1, 0.215]
    assert rates[4] == [0.05, 0.15, 0.25, 0.45, 0.6, 0.7]
    assert rates[5] == [3, 6, 9, 18, 22]
    assert rates[9] == [0.05, 0.15, 0.17, 0.3, 0.5]
    assert {number: len(plan.figures()[number].curves) for number in (3, 4, 5, 8, 9, 10)} == {
        3: 12,
        4: 6,
        5: 8,
        8: 14,
        9: 7,
        10: 12,
    }
    for number, figure in plan.figures().items():
        measured = {(curve.panel, curve.label) for curve in figure.curves}
        assert {(p, label) for p, curves in published.curves(number).items() for label in curves} <= measured
    # "One round = C K E 10 gradient computations", to 300,000.
    assert all(curve.grid.rounds * curve.x_per_round == 300_000 for curve in plan.figures()[9].curves)
    sampled = plan.figures()[5].curves[0].grid.cell.C * 342_477
    assert sampled == pytest.approx(200)


def test_grid_goes_on_in_the_direction_of_the_best_rate_until_that_is_not_at_an_edge(tmp_path):
    rounds = {0.0215: 90, 0.0464: 60, 0.1: 50, 0.215: 40, 0.464: 30, 1.0: 70, 2.15: 99}
    grid = grid_of(CELL, 1)
    started = []
    while wanted := grid.progress(tmp_path)[1]:
        started.append(wanted[0].learning_rate)
        record(tmp_path, wanted[0], rounds[wanted[0].learning_rate])
    assert started == [0.1, 0.0464, 0.215, 0.464, 1.0]
    assert [run.learning_rate for run in grid.progress(tmp_path)[0]] == [0.0464, 0.1, 0.215, 0.464, 1.0]


def test_rates_that_were_run_beyond_the_edge_are_in_the_grid_too(tmp_path):
    grid = grid_of(CELL, 1)
    for rate, rounds in {0.0464: 60, 0.1: 50, 0.215: 55, 0.464: 70}.items():
        record(tmp_path, grid.run(rate), rounds)
    finished, wanted = grid.progress(tmp_path)
    assert ([run.learning_rate for run in finished], wanted) == ([0.0464, 0.1, 0.215, 0.464], [])


def test_rate_that_diverged_is_a_result_and_the_worst_one(tmp_path):
    grid = grid_of(CELL, 1)
    for rate in (0.1, 0.215):
        record(tmp_path, grid.run(rate), None, ended="diverged", best_accuracy=0.96, rounds=3)
    record(tmp_path, grid.run(0.0464), None, ended="cap", best_accuracy=0.5, rounds=200)
    assert [run.learning_rate for run in grid.progress(tmp_path)[1]] == [0.0215]


def test_grid_ends_where_its_rates_make_no_difference(tmp_path):
    grid = grid_of(CELL, 1)
    for rate in (0.1, 0.0464, 0.215):
        record(tmp_path, grid.run(rate), None, ended="cap", best_accuracy=0.1, rounds=200)
    assert grid.progress(tmp_path)[1] == []


def test_run_that_stopped_early_is_wanted_again_for_more_rounds(tmp_path):
    grid = grid_of(CELL, 1)
    record(tmp_path, grid.run(0.1), None, ended="cap", best_accuracy=0.9, rounds=30)
    assert 0.1 not in [run.learning_rate for run in plan.limit(grid, 30).progress(tmp_path)[1]]
    assert 0.1 in [run.learning_rate for run in grid.progress(tmp_path)[1]]


def test_run_that_went_on_for_longer_than_another_took_to_the_target_is_not_wanted_again(tmp_path):
    grid = grid_of(CELL, 1)
    record(tmp_path, grid.run(0.1), 50)
    record(tmp_path, grid.run(0.0464), None, ended="cap", best_accuracy=0.9, rounds=49)
    record(tmp_path, grid.run(0.215), None, ended="cap", best_accuracy=0.9, rounds=50)
    assert [run.learning_rate for run in grid.progress(tmp_path)[1]] == [0.0464]


def test_seconds_left_follow_the_clients_the_local_epochs_and_what_was_run(tmp_path):
    grid = grid_of(CELL, 1)

    def left(grid):
        last_rounds = [run.last_round(tmp_path) for run in grid.progress(tmp_path)[1]]
        return plan.seconds_left(grid, last_rounds, plan.outcomes(tmp_path))

    assert left(grid) is None
    record(tmp_path, grid.run(0.1), 50)  # 0.02 s a round.
    other = grid_of(Cell("mnist_2nn", "iid", "fedavg", 0.2, 1, 10), 1)
    # Three rates, half of the 200 rounds at most, twice the clients.
    assert left(other) == pytest.approx(3 * 100 * 0.02 * 2, rel=0.01)
    stop(tmp_path, other.run(0.1), 40)
    stop(tmp_path, other.run(0.215), 110)
    assert left(other) == pytest.approx((100 + 60 + 90) * 0.02 * 2, rel=0.01)
    assert left(plan.limit(grid, 30)) == pytest.approx(2 * 30 * 0.02, rel=0.01)  # All of them, which are few.
    assert grid.run(0.1).last_round(tmp_path) == 0  # As in a clone: without a state it would begin anew.


def test_what_takes_least_is_run_first_and_what_is_not_known_last(tmp_path):
    record(tmp_path, grid_of(CELL, 1).run(0.1), 50)  # 0.02 s a round, of 2 rates that are left.
    cells = [
        Cell("mnist_cnn", "iid", "fedavg", 0.1, 5, 10),  # Not known.
        Cell("mnist_2nn", "iid", "fedavg", 0.5, 1, 10),
        Cell("mnist_2nn", "iid", "fedavg", 0.0, 1, 10),  # 316 rounds of a tenth of the clients.
        CELL,
    ]
    grids = [grid_of(cell, 1) for cell in cells]
    assert [grid.cell for grid in plan.cheapest_first(grids, tmp_path)] == [cells[2], cells[3], cells[1], cells[0]]


@pytest.fixture
def fake_training(monkeypatch):
    """Replaces the training by one that gains an accuracy of 0.01 a round, and may diverge."""

    def train(experiment, run_dir, *, observer, diverges_after=10**9, **_):
        directory = pathlib.Path(run_dir)
        directory.mkdir(parents=True)
        write_record(directory / "config.json", {"settings": experiment.to_json()})
        with open(directory / "metrics.csv", "w", newline="", buffering=1) as file:
            writer = csv.writer(file)
            writer.writerow(["round_num", "evaluation/accuracy", "training_time_in_seconds"])
            for t in range(experiment.rounds + 1):
                if t > diverges_after:
                    raise DivergedError("diverged")
                accuracy = min(0.01 * t, 0.96)
                writer.writerow([t, accuracy, 0.5])
                observer.update(Progress(t, {"evaluation/accuracy": accuracy}, Target(0.97), accuracy))

    monkeypatch.setattr(runner, "run", train)
    return train


def test_rate_is_given_up_when_it_can_no_longer_win(tmp_path, fake_training):
    grid = grid_of(CELL, 1)
    record(tmp_path, grid.run(0.215), 40.0)
    said = []
    execution.execute(grid.run(0.1), tmp_path, said.append, data_dir="", cache_dir="")
    outcome = grid.run(0.1).outcome(tmp_path)
    assert (outcome["ended"], outcome["rounds"], outcome["best_accuracy"]) == ("slower", 40, 0.4)
    assert outcome["rounds_to_target"] is None
    assert outcome["training_seconds"] == pytest.approx(0.5 * 41)
    assert said[30] == "round 30/200, best accuracy 0.3000"
    assert grid.run(0.1) in grid.progress(tmp_path)[0]


def test_run_without_a_better_one_goes_to_its_cap(tmp_path, fake_training):
    run = grid_of(CELL, 1).run(0.1)
    execution.execute(run, tmp_path, lambda line: None, data_dir="", cache_dir="")
    assert (run.outcome(tmp_path)["ended"], run.outcome(tmp_path)["rounds"]) == ("cap", 200)


def test_run_that_diverges_has_an_outcome(tmp_path, monkeypatch, fake_training):
    monkeypatch.setattr(runner, "run", functools.partial(fake_training, diverges_after=5))
    run = grid_of(CELL, 1).run(0.1)
    execution.execute(run, tmp_path, lambda line: None, data_dir="", cache_dir="")
    assert (run.outcome(tmp_path)["ended"], run.outcome(tmp_path)["rounds"]) == ("diverged", 5)


def test_mixture_of_models_is_theirs_at_the_ends_and_linear_between():
    w, v = [np.array([1.0, 2.0]), np.array([[4.0]])], [np.array([3.0, -2.0]), np.array([[0.0]])]
    assert [a.tolist() for a in figure_1.mix(w, v, 1.0)] == [[1.0, 2.0], [[4.0]]]
    assert [a.tolist() for a in figure_1.mix(w, v, 0.0)] == [[3.0, -2.0], [[0.0]]]
    assert [a.tolist() for a in figure_1.mix(w, v, 0.25)] == [[2.5, -1.0], [[1.0]]]
    # "50 evenly spaced values in [-0.2, 1.2]".
    assert (len(figure_1.THETAS), figure_1.THETAS[0], figure_1.THETAS[-1]) == (50, -0.2, 1.2)


def reproduce(*flags):
    return run_program("binaries.reproduce", *flags, timeout=300)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--table=5"], "--table=5"),
        (["--figure=0"], "--figure=0"),
        (["--table=4", "--rows="], "--rows= is empty: give a value, or leave it out"),
        (["--budget_hours=nan"], "--budget_hours=nan: take a number from 0 to 1e+06"),
        (["--table=4", "--rows=mnist_cnn-*"], "--rows=mnist_cnn-* is no cell of what was asked for: see --list"),
        (["--list", "--report"], "--list and --report are two commands: give one of them"),
        (["--rounds=0"], "--rounds=0"),
        (["--report", "--table=4"], "--table is of no use with --report: leave it out"),
        (["--list", "--jobs=3"], "--jobs is of no use with --list: leave it out"),
        (["--report"], "/results: there is no such directory"),
    ],
)
def test_bad_flags_get_one_line(tmp_path, flags, message):
    result = reproduce(*flags, f"--results_dir={tmp_path / 'results'}")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("reproduce: ") and result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not (tmp_path / "results").exists()


def test_list_shows_the_state_of_each_cell(tmp_path):
    grid = grid_of(CELL, 1)
    for rate, rounds in ((0.1, 50), (0.0464, 70), (0.215, 60)):
        record(tmp_path, grid.run(rate), rounds)
    stop(tmp_path, grid_of(Cell("mnist_2nn", "pathological", "fedavg", 0.1, 20, 10), 4).run(0.1), 7)
    result = reproduce("--list", "--table=4", "--rows=mnist_2nn-iid-C0.1-E?-B10,*-E20-B10", f"--results_dir={tmp_path}")
    assert (result.returncode, result.stderr) == (0, "")
    header, *lines = result.stdout.splitlines()
    assert header.split() == ["cell", "state", "rounds", "seconds", "left"]
    assert [line.split()[0] for line in lines] == [
        "mnist_2nn-iid-C0.1-E1-B10",
        "mnist_2nn-iid-C0.1-E20-B10",
        "mnist_2nn-pathological-C0.1-E20-B10",
    ]
    assert " ".join(lines[0].split()[1:]) == "rates run: 3, best 0.1: done 50.0 3 0"
    assert lines[1].split()[1:3] == ["not", "run"]
    assert " one stopped in round 7 " in lines[2]


def test_rows_are_the_names_that_the_list_shows_or_those_of_cells(tmp_path):
    shown = "mnist_cnn-iid-C0.1-E1-B10/eta0.215-train_loss"
    for rows in (shown, "mnist_cnn-iid-C0.1-E1-B10/*", "mnist_cnn-iid-C0.1-E1-B10"):
        result = reproduce("--list", "--figure=8", f"--rows={rows}", f"--results_dir={tmp_path}")
        assert [line.split()[0] for line in result.stdout.splitlines()] == ["cell", shown]


def test_budget_that_is_used_up_ends_with_what_is_left(tmp_path):
    result = reproduce("--table=3", "--budget_hours=0", f"--results_dir={tmp_path}")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "left to run: 7 or more; the same command goes on with them\n"


def test_missing_data_of_a_task_are_told_at_once(tmp_path):
    flags = ["--table=2", "--rows=shakespeare_lstm-*", f"--data_dir={tmp_path}", f"--results_dir={tmp_path}"]
    result = run_at_once("binaries.reproduce", *flags)
    first, last = result.stderr.splitlines()
    assert first.startswith("reproduce: shakespeare_lstm: data=gutenberg needs gutenberg-100-1994.txt (.gz or not)")
    assert last == "reproduce: shakespeare_lstm: left out after an error, which is above"
    assert result.returncode == 2


def test_quick_form_runs_a_cell_of_each_kind_leaves_out_a_damaged_run_and_skips_what_is_recorded(tmp_path):
    damaged = tmp_path / "results" / "runs" / "mnist_2nn-iid-C0.1-E1-B10" / "eta0.1" / "config.json"
    damaged.parent.mkdir(parents=True)
    damaged.write_text("{")
    flags = [
        "--quick",
        "--table=4",
        "--figure=1",
        "--figure=8",
        "--rows=figure_1-shared,mnist_2nn-*-C0.1-E1-B10,mnist_cnn-iid-C0.1-E1-B10",
        f"--results_dir={tmp_path / 'results'}",
        f"--cache_dir={tmp_path / 'cache'}",
    ]
    result = reproduce(*flags)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        f"reproduce: mnist_2nn-iid-C0.1-E1-B10/eta0.1: {damaged} is damaged: Expecting property name enclosed in "
        "double quotes: line 1 column 2 (char 1); give another run_dir, or remove this one",
        "reproduce: mnist_2nn-iid-C0.1-E1-B10/eta0.1: left out after an error, which is above",
    ]
    assert result.stdout.splitlines()[-1] == "left to run: 1 or more; the same command goes on with them"
    ended = {line.split(":")[0] for line in result.stdout.splitlines() if not line.startswith(" ")}
    assert {"figure_1-shared", "mnist_cnn-iid-C0.1-E1-B10/eta0.215-train_loss"} <= ended
    assert "mnist_2nn-pathological-C0.1-E1-B10/eta0.1: 2 rounds" in result.stdout  # Of the same task.
    with open(tmp_path / "results/runs/mnist_cnn-iid-C0.1-E1-B10/eta0.215-train_loss/metrics.csv") as file:
        losses = [row["evaluation/train_loss"] for row in csv.DictReader(file)]
    # At the start each of 10 digits is about as likely.
    assert float(losses[0]) == pytest.approx(np.log(10), abs=0.1)
    assert float(losses[2]) < float(losses[0])
    mixtures = figure_1.read(tmp_path / "results", "shared")
    assert [theta for theta, _ in mixtures] == pytest.approx(np.linspace(-0.2, 1.2, 50), abs=1e-6)
    damaged.unlink()
    result = reproduce(*flags)
    assert (result.returncode, result.stderr) == (0, "")
    ended = {line.split(":")[0] for line in result.stdout.splitlines() if not line.startswith(" ")}
    assert ended >= {"mnist_2nn-iid-C0.1-E1-B10/eta0.1", "nothing is left to run"}
    assert not ended & {"figure_1-shared", "mnist_cnn-iid-C0.1-E1-B10/eta0.215-train_loss"}
    nothing = f"nothing is left to run: all is in {tmp_path / 'results'}; another --results_dir runs it anew\n"
    assert run_at_once("binaries.reproduce", *flags).stdout == nothing
    assert reproduce("--quick", "--report", f"--results_dir={tmp_path / 'results'}").returncode == 0
    assert (tmp_path / "results" / "figures" / "figure_8.png").read_bytes().startswith(b"\x89PNG")
