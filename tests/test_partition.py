import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tff_fedavg import partition

LABELS = np.repeat(np.arange(10), 6000)[np.random.default_rng(1).permutation(60000)]

sizes_and_clients = st.integers(2, 300).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n // 2)))


def assert_exact_cover(clients, num_examples):
    np.testing.assert_array_equal(np.sort(np.concatenate(clients)), np.arange(num_examples))


@given(sizes_and_clients, st.integers(0, 2**31))
def test_every_partition_is_an_exact_cover_with_no_empty_client(size, seed):
    n, k = size
    labels = np.random.default_rng(seed).integers(10, size=n)
    for clients in (
        partition.iid(n, k, seed),
        partition.pathological(labels, k, seed),
        partition.unbalanced_iid(n, k, seed),
        partition.unbalanced_pathological(labels, k, seed),
        partition.dirichlet(labels, k, seed, alpha=0.5),
    ):
        assert len(clients) == k
        assert min(map(len, clients)) > 0
        assert_exact_cover(clients, n)


@given(st.lists(st.integers(0, 20), min_size=1))
def test_natural_partition_gives_each_owner_exactly_its_examples(owners):
    owners = np.array(owners)
    clients = partition.natural(owners)
    assert len(clients) == len(set(owners))
    assert all(len(set(owners[c])) == 1 for c in clients)
    assert_exact_cover(clients, len(owners))


def test_iid_mnist_has_600_examples_a_client_of_all_labels():
    clients = partition.iid(60000, 100, 0)
    assert {len(c) for c in clients} == {600}
    assert all(len(set(LABELS[c])) == 10 for c in clients)


def test_pathological_mnist_has_two_labels_at_most_and_600_examples_a_client():
    clients = partition.pathological(LABELS, 100, 0)
    assert {len(c) for c in clients} == {600}
    # 6,000 digits of each class are 20 shards of 300, so here no shard has two labels.
    assert max(len(set(LABELS[c])) for c in clients) == 2


def test_pathological_clients_hold_two_runs_of_the_examples_sorted_by_label():
    by_label = np.argsort(LABELS, kind="stable")
    rank = np.empty_like(by_label)
    rank[by_label] = np.arange(len(by_label))
    for client in partition.pathological(LABELS, 100, 3):
        shards = rank[client].reshape(2, 300)
        np.testing.assert_array_equal(shards, shards[:, :1] + np.arange(300))
        assert all(shards[:, 0] % 300 == 0)


def test_unbalanced_sizes_are_log_normal():
    for clients, sigma in (
        (partition.unbalanced_iid(10**6, 2000, 0), 1.0),
        (partition.unbalanced_pathological(np.zeros(10**6), 2000, 0, shards_per_client=1), 1.0),
    ):
        logs = np.log([len(c) for c in clients])
        assert np.std(logs) == pytest.approx(sigma, abs=0.05)
        skewness = np.mean((logs - logs.mean()) ** 3) / np.std(logs) ** 3
        assert abs(skewness) < 0.2


@given(sizes_and_clients, st.integers(0, 2**31), st.floats(1e-310, 1e300), st.integers(1, 20))
def test_dirichlet_clients_have_equally_many_examples_whatever_alpha(size, seed, alpha, num_labels):
    n, k = size
    labels = np.random.default_rng(seed).integers(num_labels, size=n) * 7 - 3
    clients = partition.dirichlet(labels, k, seed, alpha=alpha)
    assert_exact_cover(clients, n)
    assert {len(c) for c in clients} <= {n // k, -(-n // k)}


UNEVEN = np.repeat(np.arange(4), [6000, 3000, 2000, 1000])
P = np.array([6, 3, 2, 1]) / 12


def label_shares(labels, clients):
    return np.array([np.bincount(labels[c], minlength=labels.max() + 1) / len(c) for c in clients])


def test_a_large_alpha_gives_each_client_the_mix_of_all():
    shares = label_shares(UNEVEN, partition.dirichlet(UNEVEN, 60, 0, alpha=1e9))
    # Of 200 examples drawn by p. Four labels of 60 clients; what the clients before a client drew by chance adds to it.
    assert np.abs((shares - P) / np.sqrt(P * (1 - P) / 200)).max() < 5
    assert np.std((shares - P) / np.sqrt(P * (1 - P) / 200)) == pytest.approx(1, abs=0.15)


def test_a_small_alpha_gives_a_client_one_label_or_two():
    clients = partition.dirichlet(LABELS, 100, 0, alpha=1e-9)
    num_labels = np.array([len(set(LABELS[c])) for c in clients])
    assert (num_labels == 1).mean() > 0.8
    assert (num_labels <= 2).mean() > 0.95


@pytest.mark.parametrize("alpha", [0.3, 2.0, 20.0])
def test_label_shares_have_the_mean_and_variance_of_a_dirichlet_distribution(alpha):
    """First, of the first clients of many partitions, where no label has run out; then, of all clients of one."""
    m = 200
    # q has the variance p (1 - p) / (alpha + 1); that of m draws by q is added.
    variance = P * (1 - P) / (alpha + 1) * (1 + alpha / m)
    first = [partition.dirichlet(UNEVEN, 60, seed, alpha=alpha)[0] for seed in range(600)]
    shares = label_shares(UNEVEN, first)
    assert np.abs((shares.mean(0) - P) / np.sqrt(variance / 600)).max() < 4
    # The relative standard deviation of a variance over 600 samples is sqrt((kurtosis - 1) / 600); kurtosis is below 9.
    np.testing.assert_allclose(shares.var(0), variance, rtol=0.35)
    np.testing.assert_allclose(shares.var(0).sum(), variance.sum(), rtol=0.15)
    everyone = label_shares(np.tile(UNEVEN, 5), partition.dirichlet(np.tile(UNEVEN, 5), 600, 0, alpha=alpha))
    np.testing.assert_allclose(everyone.mean(0), P)
    np.testing.assert_allclose(everyone.var(0).sum(), variance.sum(), rtol=0.2)


def test_mnist_is_divided_in_less_than_a_second():
    start = time.perf_counter()
    partition.dirichlet(LABELS, 100, 0, alpha=1.0)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("alpha", [0, -1.0, float("inf"), float("nan"), None, "1"])
def test_alpha_that_is_no_number_above_0_is_refused(alpha):
    with pytest.raises(ValueError, match=f"^alpha is {alpha}; it must be a number above 0"):
        partition.dirichlet(LABELS, 100, 0, alpha=alpha)


@pytest.mark.parametrize("name", ["iid", "pathological", "unbalanced_iid", "unbalanced_pathological"])
def test_partition_by_name_is_that_of_the_function(name):
    expected = getattr(partition, name)(600 if name.endswith("iid") else LABELS[:600], 10, 3)
    for client, indices in zip(partition.build_partition(name, LABELS[:600], 10, 3), expected, strict=True):
        np.testing.assert_array_equal(client, indices)


def test_dirichlet_partition_by_name_is_that_of_the_function():
    expected = partition.dirichlet(LABELS[:600], 10, 3, alpha=0.2)
    by_name = partition.build_partition("dirichlet", LABELS[:600], 10, 3, dirichlet_alpha=0.2)
    assert all(map(np.array_equal, by_name, expected))


def test_partition_of_another_name_is_refused():
    with pytest.raises(ValueError, match="there is no partition 'pareto'"):
        partition.build_partition("pareto", LABELS, 10, 0)


def test_same_seed_same_partition_other_seed_other_partition():
    for build in (
        lambda seed: partition.iid(600, 10, seed),
        lambda seed: partition.pathological(LABELS[:600], 10, seed),
        lambda seed: partition.unbalanced_iid(600, 10, seed),
        lambda seed: partition.unbalanced_pathological(LABELS[:600], 10, seed),
        lambda seed: partition.dirichlet(LABELS[:600], 10, seed, alpha=1.0),
    ):
        first, again, other = build(0), build(0), build(1)
        assert all(np.array_equal(a, b) for a, b in zip(first, again))
        assert not all(np.array_equal(a, b) for a, b in zip(first, other))


def test_more_pieces_than_examples_are_refused():
    with pytest.raises(ValueError, match="11 clients need 11 pieces of data, but there are 10 examples"):
        partition.iid(10, 11, 0)
    with pytest.raises(ValueError, match="6 clients need 12 pieces of data, but there are 10 examples"):
        partition.pathological(np.zeros(10), 6, 0)
    with pytest.raises(ValueError, match="must be at least 1"):
        partition.unbalanced_iid(10, 0, 0)


@pytest.mark.parametrize("name", ["pathological", "unbalanced_pathological", "dirichlet"])
def test_labels_may_be_a_column_as_keras_has_them_and_no_other_shape(name):
    labels = np.random.default_rng(0).integers(0, 10, 1000)
    more = {"dirichlet_alpha": 1.0} if name == "dirichlet" else {}
    expected = partition.build_partition(name, labels, 10, 0, **more)
    for labels_of_keras in (labels[:, None], labels[:, None].tolist()):
        found = partition.build_partition(name, labels_of_keras, 10, 0, **more)
        assert all(map(np.array_equal, found, expected))
    with pytest.raises(ValueError, match=r"labels has the shape \[1000, 10\]; .* of one-hot labels take labels.argmax"):
        partition.build_partition(name, np.eye(10)[labels], 10, 0, **more)
