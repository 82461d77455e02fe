"""RESULTS.md, against numbers worked out by hand from runs that are written by hand."""

import csv
import dataclasses
import pathlib
import shutil

import matplotlib.figure
import pytest

from binaries.reproduction import plan, published, report
from binaries.reproduction.claims import Claim
from binaries.reproduction.outcome import write_outcome
from binaries.reproduction.published import Cell
from tff_fedavg.json_record import write_record

ROOT = pathlib.Path(__file__).parent.parent
FED_SGD = Cell("mnist_2nn", "iid", "fedsgd", 0.1, 1, None)
FED_AVG = Cell("mnist_2nn", "iid", "fedavg", 0.1, 1, 10)
FED_AVG_50 = Cell("mnist_2nn", "iid", "fedavg", 0.1, 1, 50)
FED_AVG_20 = Cell("mnist_2nn", "iid", "fedavg", 0.1, 20, 10)


def record(results_dir, run, rows, ended="target", date="2017-04-20"):
    """Leaves a run with these rows of metrics: round, accuracy and loss."""
    directory = run.directory(results_dir)
    directory.mkdir(parents=True)
    with open(directory / "metrics.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["round_num", "evaluation/accuracy", "evaluation/train_loss"])
        writer.writerows(rows)
    write_record(directory / "config.json", {"settings": run.experiment.to_json()})
    accuracies = [row[1] for row in rows]
    outcome = {
        "ended": ended,
        "rounds": rows[-1][0],
        "rounds_to_target": rows[-1][0] if ended == "target" else None,
        "best_accuracy": max(accuracies),
        "training_seconds": 1.0,
        "date": date,
    }
    write_outcome(directory, outcome, "metrics.csv")


def grid_of(cell, table):
    return next(grid for grid in plan.table(table) if grid.cell == cell)


@pytest.fixture(scope="module")
def results_dir(tmp_path_factory):
    """Two cells of Table 4 with a grid of three rates each, a curve of Figure 8, and a half of Figure 1."""
    path = tmp_path_factory.mktemp("results")
    slow, fast = grid_of(FED_SGD, 4), grid_of(FED_AVG, 4)
    record(path, slow.run(0.215), [(0, 0.1, ""), (1000, 0.96, ""), (2000, 0.98, "")])  # 0.97 in round 1500.
    record(path, slow.run(0.1), [(0, 0.1, ""), (2211, 0.95, "")], ended="cap")
    record(path, slow.run(0.464), [(0, 0.1, ""), (1, 0.2, "")], ended="diverged")
    record(path, fast.run(0.1), [(0, 0.1, ""), (40, 0.965, ""), (60, 0.975, "")], date="2017-04-21")  # In round 50.
    record(path, fast.run(0.0464), [(0, 0.1, ""), (70, 0.97, "")])
    record(path, fast.run(0.215), [(0, 0.1, ""), (80, 0.97, "")])
    large = next(curve.grid for curve in plan.figures()[8].curves if (curve.panel, curve.label) == ("iid", "E=5"))
    record(path, large.run(0.215), [(0, 0.1, 2.3), (5, 0.9, 0.06)], ended="cap")
    figure_1 = path / "runs" / "figure_1-shared"
    figure_1.mkdir()
    (figure_1 / "losses.csv").write_text("theta,loss\n-0.2,0.9\n0.0,0.5\n0.5,0.4\n1.0,0.45\n1.2,0.8\n")
    write_outcome(figure_1, {"date": "2017-04-20"}, "losses.csv")
    report.write(path)
    return path


def lines(results_dir):
    return (results_dir / "RESULTS.md").read_text().splitlines()


def cells(results_dir, name, heading):
    """Returns the cells of the row that starts with this name, below this heading."""
    text = lines(results_dir)
    start = next(i for i, line in enumerate(text) if line.startswith(heading))
    row = next(line for line in text[start:] if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_row_has_the_papers_rounds_and_the_measured_ones_at_the_best_rate(results_dir):
    row = cells(results_dir, FED_AVG.name, "## Table 4")
    # 50 / 92; speed-ups 1468 / 92 and 1500 / 50.
    assert row[:7] == [FED_AVG.name, "97 %", "92", "50.0", "**0.54**", "16.0x", "30.0x"]
    assert row[7:11] == ["0.1", "0.0464, 0.1, 0.215", "0", "2017-04-21"]
    assert row[11] == published.explanations().get(FED_AVG.name, "open")


def test_row_within_a_quarter_of_the_paper_is_not_marked(results_dir):
    row = cells(results_dir, FED_SGD.name, "## Table 4")
    assert row[3:5] == ["1500.0", "1.02"]
    assert row[8] == "0.1, 0.215, 0.464"
    assert row[11] == ""


def test_run_that_was_evaluated_in_other_rounds_is_marked(results_dir, tmp_path):
    shutil.copytree(results_dir, tmp_path, dirs_exist_ok=True)
    run = grid_of(FED_SGD, 4).run(0.215)
    settings = dataclasses.replace(run.experiment, eval_every=7).to_json()
    write_record(run.directory(tmp_path) / "config.json", {"settings": settings})
    report.write(tmp_path)
    assert cells(tmp_path, FED_SGD.name, "## Table 4")[11] == "evaluated every 7 rounds, not as in the paper"


def test_table_is_summed_up_by_its_median_ratio_and_largest_speedup(results_dir):
    # The ratios are 50 / 92 and 1500 / 1468; the paper's largest of them is 1468 / 92.
    summary = cells(results_dir, "mnist_2nn | iid", "## Table 4")
    assert summary == ["mnist_2nn", "iid", "2 of 9", "0.78", "1 of 2", "16.0x", "30.0x"]
    assert cells(results_dir, "mnist_2nn | pathological", "## Table 4")[2:] == ["0 of 9", "", "", "", ""]


def test_all_tables_are_summed_up_in_a_sentence(results_dir):
    # Tables 1 and 4 have both cells: 50 of 87, 50 of 92, 1500 of 1474 and of 1468.
    (sentence,) = [line for line in lines(results_dir) if line.startswith("Of the 91 numbers of Tables 1 to 4")]
    assert sentence == (
        "Of the 91 numbers of Tables 1 to 4, 4 are measured. The target was reached in 4 of them. The median ratio, "
        "here over the paper, is 0.80, with 2 of 4 within 25 %: iid 0.80, with 2 of 4 within 25 %."
    )


def test_same_run_is_shown_in_every_table_that_has_its_cell(results_dir):
    assert cells(results_dir, FED_AVG.name, "## Table 1")[2:5] == ["87", "50.0", "**0.57**"]


def test_table_is_set_as_the_paper_prints_it(results_dir):
    text = lines(results_dir)
    assert "| mnist_2nn | fedavg, E = 1, B = 10 | 92 (16.0x) → 50 (30.0x) | 831 (2.2x) → not run |" in text
    assert "| sgd | B = 100 | 18000 → not run | 31000 → not run | 99000 → not run |" in text
    row = next(line for line in text if line.startswith("| mnist_2nn | C = 0.5 |"))
    assert row == ("| mnist_2nn | C = 0.5 | - → not run | 75 (4.2x) → not run | - → not run | 443 (7.4x) → not run |")


def test_rounds_of_all_tables_are_drawn_over_the_papers(results_dir, tmp_path, monkeypatch):
    shutil.copytree(results_dir, tmp_path, dirs_exist_ok=True)
    for cell, rates in ((FED_AVG_50, (0.1, 0.0464, 0.215)), (FED_AVG_20, (0.1,))):  # The second is not finished.
        for rate in rates:
            record(tmp_path, grid_of(cell, 4).run(rate), [(0, 0.1, ""), (300, 0.96 - abs(rate - 0.1), "")], ended="cap")
    drawn = []

    def savefig(figure, path, **_):
        drawn.extend(figure.axes)
        pathlib.Path(path).touch()

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    report.write(tmp_path)
    (axes,) = [axes for axes in drawn if axes.get_title().startswith("Tables 1 to 4")]
    points = {line.get_label(): set(zip(*line.get_data())) for line in axes.lines}
    # FedSGD and FedAvg with B = 10 are in Table 1 and in Table 4.
    assert points["mnist_2nn iid"] == {(1474, 1500), (1468, 1500), (87, 50), (92, 50)}
    assert points["mnist_2nn iid, not reached until here"] == {(144, 300)}


def test_a_setting_has_one_colour_in_all_panels_and_in_the_legend(results_dir, tmp_path, monkeypatch):
    shutil.copytree(results_dir, tmp_path, dirs_exist_ok=True)
    for part, rate in (("iid", 0.215), ("pathological", 0.1)):
        grid = next(c.grid for c in plan.figures()[8].curves if (c.panel, c.label) == (part, "E=25"))
        record(tmp_path, grid.run(rate), [(0, 0.1, 2.0), (5, 0.9, 0.06)], ended="cap")
    drawn = []
    monkeypatch.setattr(report.picture, "save", lambda figure, path: drawn.append(figure))
    report.write(tmp_path)
    (figure,) = [figure for figure in drawn if "Figure 8" in figure.get_suptitle()]
    legend = {line.get_label(): line.get_color() for line in figure.legends[0].get_lines()}
    for axes in figure.axes:
        measured = {line.get_color() for line in axes.lines if list(line.get_ydata()) == [2.0, 0.06]}
        assert measured == {legend["E=25"]}
    settings = [color for label, color in legend.items() if label.startswith("E=")]
    assert len(settings) == len(set(settings)) == 7


def test_claims_are_put_to_what_was_run_and_what_contradicts_one_is_named(results_dir, tmp_path):
    shutil.copytree(results_dir, tmp_path, dirs_exist_ok=True)
    record(tmp_path, grid_of(FED_AVG_50, 4).run(0.1), [(0, 0.1, ""), (40, 0.97, "")])  # Before B = 10, with 50.
    report.write(tmp_path)
    heading = "## What the paper concludes"
    assert cells(results_dir, Claim.LOCAL_UPDATES.value[0], heading)[1:] == ["Tables 2, 4", "1 of 1", ""]
    assert cells(results_dir, Claim.PLAYS.value[0], heading)[1:] == ["Table 2", "not run", ""]
    against = f"{FED_AVG.name} before {FED_AVG_50.label}"
    assert cells(tmp_path, Claim.ORDER.value[0], heading)[1:] == ["Tables 2, 4", "2 of 3", against]


def test_what_was_not_run_is_said_to_be_so_and_not_estimated(results_dir):
    row = cells(results_dir, "mnist_2nn-iid-C0.1-E20-B10", "## Table 4")
    assert row[:4] == ["mnist_2nn-iid-C0.1-E20-B10", "97 %", "32", "not run"]
    assert row[4:] == ["", "45.9x", "", "", "", "", "", ""]
    text = "\n".join(lines(results_dir))
    assert "## Figure 9: test accuracy on CIFAR-10 over gradient computations, B = 50, of SGD 100\n\nnot run\n" in text
    assert "## Figure 5: test accuracy of the word LSTM, best up to each round\n\nnot run: the paper's authors " in text


@pytest.mark.parametrize("explanations, said", [({}, "open"), ({FED_AVG.name: "an explanation"}, "an explanation")])
def test_grid_that_is_not_finished_and_a_target_that_was_not_reached_are_said(
    tmp_path, monkeypatch, explanations, said
):
    monkeypatch.setattr(published, "explanations", lambda: explanations)
    run = grid_of(FED_AVG, 4).run(0.1)
    record(tmp_path, run, [(0, 0.1, ""), (200, 0.961, "")], ended="cap")
    report.write(tmp_path)
    row = cells(tmp_path, FED_AVG.name, "## Table 4")
    assert row[3:5] == ["not in 200 rounds (0.9610)", "**-**"]
    assert row[11] == f"{said}; the grid is not finished"


def test_run_that_was_stopped_counts_for_the_targets_that_it_has_reached(tmp_path):
    grid = next(grid for grid in plan.table(3) if grid.cell.algorithm == "sgd")
    record(tmp_path, grid.run(0.15), [(0, 0.1, ""), (16000, 0.79, ""), (20000, 0.81, "")], ended="cap")
    report.write(tmp_path)
    text = lines(tmp_path)
    assert "| sgd | B = 100 | 18000 → 18000 | 31000 → > 20000 | 99000 → > 20000 |" in text
    row = cells(tmp_path, f"{grid.cell.name} | 80 %", "## Table 3")
    assert row[2:5] == ["18000", "18000.0", "1.00"]
    assert row[11] == ""
    assert "Of the 91 numbers of Tables 1 to 4, 1 are measured." in "\n".join(text)
    row = cells(tmp_path, f"{grid.cell.name} | 82 %", "## Table 3")
    assert row[2:5] == ["31000", "stopped: not in 20000 rounds (0.8100)", ""]


def test_run_whose_table_was_damaged_since_counts_as_not_run(tmp_path, capfd):
    """Also where it went on, after the rounds that its outcome is of."""
    grid = grid_of(FED_AVG, 4)
    record(tmp_path, grid.run(0.1), [(0, 0.1, ""), (60, 0.975, "")])
    with open(grid.run(0.1).directory(tmp_path) / "metrics.csv", "a") as file:
        file.write("70,0.98\0,\n")
    report.write(tmp_path)
    assert cells(tmp_path, FED_AVG.name, "## Table 4")[3] == "not run"
    assert capfd.readouterr().err.endswith(": left out\n")


def test_run_under_way_is_not_said_to_be_without_a_target_that_it_has_passed(tmp_path):
    grid = next(grid for grid in plan.table(3) if grid.cell.algorithm == "sgd")
    run = grid.run(0.15)
    record(tmp_path, run, [(0, 0.1, ""), (16000, 0.79, ""), (20000, 0.81, "")], ended="cap")
    (run.directory(tmp_path) / "outcome.json").unlink()
    report.write(tmp_path)
    assert "| sgd | B = 100 | 18000 → not run | 31000 → > 20000 | 99000 → > 20000 |" in lines(tmp_path)


def test_report_without_runs_says_so(tmp_path):
    report.write(tmp_path)
    assert "Tables 1 to 4: not run" in lines(tmp_path)


def test_figures_are_drawn_and_compared_where_the_measured_curve_ends(results_dir):
    # The paper's curve of E = 5 has a marker in round 5, at 0.0627.
    assert cells(results_dir, "iid | E=5", "## Figure 8") == ["iid", "E=5", "0.215", "5", "0.0600", "0.0627"]
    assert cells(results_dir, "iid | E=25", "## Figure 8")[4] == "not run"
    assert cells(results_dir, "shared | here", "## Figure 1")[2:] == ["0.4500", "0.4000", "0.4000 at 0.50", "0.5000"]
    assert cells(results_dir, "independent | here", "## Figure 1")[2] == "not run"
    drawn = {path.name for path in (results_dir / "figures").iterdir()}
    assert drawn == {"tables.png", "figure_1.png", "figure_7.png", "figure_8.png"}


def test_monotone_curve_is_followed_to_its_target(results_dir):
    # A line from 0.1 in round 0 to 0.965 in round 40, and on to 0.975 in round 60.
    assert cells(results_dir, "mnist_2nn-iid | E=1 B=10", "## Figure 7")[6] == "90 %: 37.0, 95 %: 39.3, 97 %: 50.0"
    assert cells(results_dir, "mnist_2nn-iid | E=10 B=10", "## Figure 7")[4:] == ["not run", "", ""]


def test_committed_results_are_what_the_committed_runs_give(tmp_path):
    """No number of RESULTS.md enters by hand."""
    shutil.copytree(ROOT / "results" / "runs", tmp_path / "runs", ignore=shutil.ignore_patterns("states"))
    report.write(tmp_path)
    assert (tmp_path / "RESULTS.md").read_text() == (ROOT / "results" / "RESULTS.md").read_text()
