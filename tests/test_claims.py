"""The paper's claims, against its own numbers and against numbers that contradict it."""

import pytest

from binaries.reproduction import claims, published
from binaries.reproduction.claims import Claim
from binaries.reproduction.published import Cell

ROUNDS = {row: row.rounds for row in published.rows() if row.rounds}
MIXTURES = {panel: curves["mixture"] for panel, curves in published.curves(1).items()}


@pytest.mark.parametrize("claim", Claim)
def test_claim_holds_in_the_papers_numbers(claim):
    comparisons = claims.check(ROUNDS, {}, MIXTURES)[claim]
    assert comparisons and all(comparisons.values())


def test_comparisons_are_those_of_the_tables():
    found = {claim: len(comparisons) for claim, comparisons in claims.check(ROUNDS, {}, MIXTURES).items()}
    # Table 1 has 8 pairs of columns and rows below C = 0 in each half, 5 without their partner: a dash. Its columns
    # B = 10 have 4 such rows each. Tables 2 and 4 have 8 rows of digits below FedSGD each, Table 2 has 5 of plays.
    assert found[Claim.SMALL_BATCHES] == 16 - 5
    assert found[Claim.MORE_CLIENTS] == 2 * 4
    assert found[Claim.LOCAL_UPDATES] == 8 + 8 + 5
    assert found[Claim.PATHOLOGICAL] == 2
    assert found[Claim.DIGITS] == 8 + 8
    assert found[Claim.PLAYS] == found[Claim.ROLES] == 5


@pytest.mark.parametrize(
    ("claim", "worse"),
    [
        (Claim.SMALL_BATCHES, Cell("mnist_cnn", "iid", "fedavg", 0.5, 5, 10)),
        (Claim.MORE_CLIENTS, Cell("mnist_2nn", "pathological", "fedavg", 1.0, 1, 10)),
        (Claim.LOCAL_UPDATES, Cell("mnist_2nn", "iid", "fedavg", 0.1, 10, None)),
        (Claim.DIGITS, Cell("mnist_2nn", "iid", "fedavg", 0.1, 10, None)),
        (Claim.PLAYS, Cell("shakespeare_lstm", "role", "fedavg", 0.1, 5, 50)),
        (Claim.ROLES, Cell("shakespeare_lstm", "role", "fedavg", 0.1, 5, 50)),
    ],
)
def test_claim_does_not_hold_for_a_cell_that_takes_too_many_rounds(claim, worse):
    rounds = {row: 10_000 if row.cell == worse else n for row, n in ROUNDS.items()}
    against = [name for name, holds in claims.check(rounds, {}, MIXTURES)[claim].items() if not holds]
    assert against == [worse.name]


def test_order_does_not_hold_for_two_cells_that_change_places():
    slow, fast = (Cell("mnist_cnn", "iid", "fedavg", 0.1, E, B) for E, B in ((1, 50), (1, 10)))
    places = {slow.name: 34, fast.name: 65}
    rounds = {row: places.get(row.cell.name, n) for row, n in ROUNDS.items()}
    comparisons = claims.check(rounds, {}, MIXTURES)[Claim.ORDER]
    assert not comparisons[f"{fast.name} before E=1 B=50"]
    assert comparisons["mnist_2nn-iid-C0.1-E1-B10 before E=1 B=50"]
    # 29 and 32 rounds are in no order.
    assert "mnist_cnn-iid-C0.1-E5-B50 before E=20 B=50" not in comparisons


def test_pathological_data_need_one_setting_only_that_saves_rounds():
    rounds = {row: n * 2 if row.cell.partition == "pathological" else n for row, n in ROUNDS.items()}
    fed_sgd = [row for row in rounds if row.cell.algorithm == "fedsgd" and row.cell.task == "mnist_cnn"]
    assert all(claims.check(rounds, {}, MIXTURES)[Claim.PATHOLOGICAL].values())
    rounds.update((row, 300) for row in fed_sgd)  # Its best cell takes 346.
    assert claims.check(rounds, {}, MIXTURES)[Claim.PATHOLOGICAL] == {"mnist_2nn": True, "mnist_cnn": False}


def test_mean_of_two_models_is_compared_with_both():
    mixtures = {"shared": [(0, 0.3), (0.5, 0.35), (1, 0.4)], "independent": [(0, 0.5), (0.5, 1.0), (1, 1.1)]}
    found = claims.check({}, {}, mixtures)
    assert found[Claim.SAME_START] == {"shared": False}
    assert found[Claim.OTHER_START] == {"independent": False}
    assert not any(found[claim] for claim in Claim if claim not in (Claim.SAME_START, Claim.OTHER_START))


def test_what_was_not_measured_is_not_compared():
    baselines = {row.column: row for row in reversed(published.rows())}
    rounds = {row: n for row, n in ROUNDS.items() if row != baselines[row.column]}
    found = claims.check(rounds, {}, {"shared": []})
    without_baseline = (Claim.ROLES, Claim.ORDER)
    assert not any(found[claim] for claim in Claim if claim not in without_baseline)
    assert all(found[claim] for claim in without_baseline)


@pytest.mark.parametrize(
    ("reached", "stopped", "holds"), [("role", "iid", True), ("iid", "role", False)], ids=["not yet", "already passed"]
)
def test_run_that_was_stopped_is_compared_where_the_other_one_took_fewer_rounds(reached, stopped, holds):
    rows = {row.cell.partition: row for row in published.rows() if row.cell.label == "E=1 B=10" and row.table == 2}
    name = rows["role"].cell.name
    for last_round, comparison in ((307, {name: holds}), (155, {name: holds}), (154, {})):
        found = claims.check({rows[reached]: 155 - 0.5}, {rows[stopped]: last_round}, {})
        assert found[Claim.ROLES] == comparison
        assert not any(found[claim] for claim in Claim if claim is not Claim.ROLES)


def test_two_runs_that_were_stopped_are_not_compared():
    assert not any(claims.check({}, ROUNDS, {}).values())


def test_run_that_was_stopped_too_late_contradicts_the_order():
    slow, fast = (
        next(row for row in ROUNDS if row.cell == Cell("mnist_cnn", "iid", "fedavg", 0.1, E, B))
        for E, B in ((1, 50), (1, 10))
    )
    assert claims.check({slow: 40}, {fast: 50}, {})[Claim.ORDER] == {f"{fast.cell.name} before E=1 B=50": False}
