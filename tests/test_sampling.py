import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tff_fedavg.sampling import build_sampling_fn, num_sampled_clients


@pytest.mark.parametrize(
    ("num_clients", "client_fraction", "m"),
    [(100, 0.0, 1), (100, 0.1, 10), (100, 0.29, 29), (100, 1.0, 100), (1146, 0.1, 114), (3, 0.1, 1)],
)
def test_m_is_the_larger_of_ck_and_1(num_clients, client_fraction, m):
    assert num_sampled_clients(num_clients, client_fraction) == m


@given(st.integers(1, 200), st.floats(0, 1), st.integers(0, 2**31), st.integers(1, 10**6))
def test_samples_are_distinct_clients_that_depend_on_seed_and_round_only(num_clients, fraction, seed, round_number):
    sample = build_sampling_fn(num_clients, fraction, seed)
    clients = sample(round_number)
    assert len(clients) == len(set(clients)) == num_sampled_clients(num_clients, fraction)
    assert set(clients) <= set(range(num_clients))
    sample(round_number + 1)
    assert sample(round_number) == build_sampling_fn(num_clients, fraction, seed)(round_number) == clients


def test_rounds_and_seeds_sample_different_clients():
    sample = build_sampling_fn(100, 0.1, 0)
    assert sample(1) != sample(2)
    assert sample(1) != build_sampling_fn(100, 0.1, 1)(1)


def test_every_client_is_sampled_equally_often():
    sample = build_sampling_fn(20, 0.25, 7)
    counts = np.bincount(np.concatenate([sample(t) for t in range(1, 4001)]), minlength=20)
    # Each count is binomial with mean 1,000 and standard deviation sqrt(4000 * 0.25 * 0.75) = 27.
    assert np.abs(counts - 1000).max() < 5 * 27


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_fraction_outside_0_to_1_is_refused(fraction):
    with pytest.raises(ValueError, match=r"client_fraction \(C\) is .*; it must be in \[0, 1\]"):
        build_sampling_fn(100, fraction, 0)
    with pytest.raises(TypeError, match=r"client_fraction \(C\) is '0.5'; it must be a number"):
        build_sampling_fn(100, "0.5", 0)


def test_integers_of_any_type_are_seeds_and_rounds_and_others_are_refused():
    expected = build_sampling_fn(100, 0.05, 5)(3)
    assert build_sampling_fn(100, 0.05, np.int64(5))(np.int32(3)) == expected
    for seed in (1.5, "a", None, True):
        with pytest.raises(TypeError, match="seed is .*; it must be an integer"):
            build_sampling_fn(100, 0.05, seed)
    with pytest.raises(ValueError, match="seed is -1; it must be from 0 to"):
        build_sampling_fn(100, 0.05, -1)


def test_a_fraction_is_what_is_written_in_any_precision():
    for fraction in (np.float16(0.29), np.float32(0.29), np.float64(0.29), 0.29):
        assert num_sampled_clients(100, fraction) == 29
