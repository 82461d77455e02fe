import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tff_fedavg import learning_curve, picture
from tff_fedavg.learning_curve import Target

accuracy = st.floats(0, 1, width=32)
accuracies = st.lists(accuracy, min_size=1, max_size=50)


def test_crossing_is_interpolated_between_evaluations():
    # From (600, 0.985) to (700, 0.995): 0.99 lies in the middle.
    assert Target(0.99).rounds([500, 600, 700], [0.9, 0.985, 0.995]) == pytest.approx(650)


def test_crossing_is_interpolated_on_the_monotone_curve():
    # The best before round 30 is 0.8, not 0.5: (20, 0.8) to (30, 0.9) reaches 0.85 in round 25.
    assert Target(0.85).rounds([10, 20, 30], [0.8, 0.5, 0.9]) == pytest.approx(25)


def test_target_reached_by_the_first_evaluation_is_not_extrapolated():
    assert Target(0.5).rounds([5, 10], [0.9, 0.95]) == 5


def test_target_that_is_not_reached_gives_none():
    assert Target(0.3).rounds([1, 2], [0.1, 0.2]) is None
    assert Target(0.3).rounds([], []) is None


@given(accuracies)
def test_monotone_curve_is_the_best_of_all_prior_rounds(values):
    curve = Target(None).monotone(values)
    assert curve.tolist() == [max(values[: i + 1]) for i in range(len(values))]


@pytest.mark.parametrize("examples", [200, 1000, 10_000])
def test_a_target_that_is_met_exactly_is_met_and_one_example_less_is_not(examples):
    for right in range(1, examples):
        target = Target(right / examples)
        assert target.is_reached(float(np.float32(right) / np.float32(examples)))
        assert not target.is_reached(float(np.float32(right - 1) / np.float32(examples)))


def test_an_accuracy_that_is_none_does_not_hide_a_later_one():
    assert Target(0.85).rounds([10, 20, 30], [0.8, math.nan, 0.9]) == pytest.approx(25)
    assert Target(0.85).rounds([10, 20, 30], [math.nan, math.nan, 0.9]) == 30
    assert Target(0.85).best([math.nan, 0.8, math.nan]) == 0.8
    assert math.isnan(Target(0.85).best([math.nan]))


@given(accuracies, accuracy)
def test_crossing_lies_between_the_last_evaluation_below_and_the_first_above(values, target):
    rounds = list(range(0, 10 * len(values), 10))
    crossing = Target(target).rounds(rounds, values)
    above = [r for r, a in zip(rounds, values) if a >= target]
    if not above:
        assert crossing is None
    else:
        assert max(above[0] - 10, 0) <= crossing <= above[0]


@given(accuracies, accuracy)
def test_an_error_that_falls_to_a_target_is_an_accuracy_that_rises_to_it(errors, target):
    rounds = list(range(0, 10 * len(errors), 10))
    falling = Target(target, "error", lower_is_better=True)
    rising = Target(-target)
    opposite = [-error for error in errors]
    assert falling.rounds(rounds, errors) == rising.rounds(rounds, opposite)
    assert falling.monotone(errors).tolist() == [-value for value in rising.monotone(opposite)]
    assert falling.best(errors) == min(errors)
    assert falling.is_reached(min(errors)) == (min(errors) <= target)


def test_without_a_value_no_round_reaches_it():
    assert Target(None).rounds([0, 1], [0.5, 1.0]) is None


def test_the_evaluations_are_the_rows_that_have_the_metric():
    rows = [
        {"round_num": 0.0, "evaluation/accuracy": 0.5},
        {"round_num": 1.0},
        {"round_num": 2.0, "evaluation/accuracy": 0.75},
    ]
    assert learning_curve.evaluations(rows) == ([0, 2], [0.5, 0.75])


@pytest.mark.parametrize(
    ("rounds_per_evaluation", "expected"),
    [(1, [1, 2, 3, 4]), (7, [7, 14, 21, 28]), (0, [*range(1, 10), *range(10, 100, 10), 100, 200, 300, 400])],
)
def test_evaluations_are_multiples_or_in_the_rounds_of_the_papers_figures(rounds_per_evaluation, expected):
    found = [0]
    while len(found) <= len(expected):
        found.append(learning_curve.next_evaluation(found[-1], rounds_per_evaluation))
    assert found[1:] == expected
    for after in range(expected[-1]):  # Also of rounds that are none.
        assert learning_curve.next_evaluation(after, rounds_per_evaluation) == min(r for r in expected if r > after)


def test_plot_draws_a_picture_and_leaves_no_temporary_file(tmp_path):
    path = tmp_path / "curve.png"
    learning_curve.plot(path, [0, 1, 2], [0.1, 0.8, 0.7], target=Target(0.75), title="test")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert np.array_equal([p.name for p in tmp_path.iterdir()], ["curve.png"])


@pytest.mark.parametrize(
    ("values", "num_panels"), [([0.1, 0.8, 0.96], 2), ([0.8, 0.95, 0.96], 1), ([0.1, math.nan, 0.8], 1), ([], 1)]
)
def test_picture_cuts_off_no_round_and_shows_the_last_per_cents_beside_them_where_they_are_flat(values, num_panels):
    figure = picture.new_figure()
    panels = learning_curve.panels(figure, values, Target(0.97))
    for axes in panels:
        axes.plot(range(len(values)), values)
    assert len(panels) == num_panels
    if values:
        bottom, top = panels[0].get_ylim()
        assert bottom < min(values) < np.nanmax(values) < top
    if num_panels == 2:
        assert panels[1].get_ylim() == pytest.approx((0.88, 0.97 + 0.05 * 0.09))
