"""The aggregators that an experiment can choose: what they compute, what they send, and the privacy of "dp"."""

import dataclasses
import math

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import tensorflow_federated as tff
from numpy_model import max_difference
from test_fed_avg import diverging_for

from binaries.experiment import Experiment, aggregators
from tff_fedavg import build_fed_avg, build_fed_sgd
from tff_fedavg.communication import bytes_per_client

CLIENTS = [0, 1, 3, 4]
# Of a client's weight in the average, its loss, its number of examples, and whether it was left out.
BESIDES_THE_UPDATE = 4 + 4 + 8 + 8


def build(model, client_dataset, experiment):
    return build_fed_avg(
        model,
        client_dataset,
        epochs=1,
        batch_size=None,
        learning_rate=0.1,
        client_weighting=tff.learning.ClientWeighting[experiment.client_weighting.upper()],
        aggregator=aggregators.build_aggregator(experiment, len(CLIENTS)),
    )


def weights_after_a_round(process, clients=CLIENTS):
    return process.next(process.initialize(), clients).state.global_model_weights.trainable


@pytest.mark.parametrize("name", ["robust", "compressed"])
@pytest.mark.parametrize("weighting", ["num_examples", "uniform"])
def test_without_zeroing_and_clipping_a_small_model_is_averaged_as_by_the_mean(
    worker, model, client_dataset, name, weighting
):
    """Values of up to 20,000 elements are not compressed."""
    plain = Experiment(aggregator=name, zeroing=False, clipping=False, client_weighting=weighting)
    mean = Experiment(client_weighting=weighting)
    found, expected = (weights_after_a_round(build(model, client_dataset, each)) for each in (plain, mean))
    assert max_difference(found, expected) < 1e-7


def test_a_client_that_is_left_out_has_no_part_in_an_average_in_which_all_count_the_same(worker, model, client_dataset):
    plain = Experiment(aggregator="robust", zeroing=False, clipping=False, client_weighting="uniform")
    found = weights_after_a_round(build(model, diverging_for(client_dataset, [3]), plain))
    expected = weights_after_a_round(build(model, client_dataset, plain), [0, 1, 4])
    assert max_difference(found, expected) < 1e-7


def test_clipping_and_zeroing_bound_an_update(worker, model, client_dataset):
    """With a rate of 1e6 the updates are large: they are zeroed, or clipped, at first to a norm of about 1."""
    norms = {}
    for zeroing, clipping in ((False, False), (False, True), (True, False)):
        experiment = Experiment(aggregator="robust", zeroing=zeroing, clipping=clipping)
        aggregator = aggregators.build_aggregator(experiment, len(CLIENTS))
        process = build_fed_sgd(model, client_dataset, learning_rate=1e6, aggregator=aggregator)
        steps = [w - v for w, v in zip(model.initial_weights[0], weights_after_a_round(process))]
        norms[zeroing, clipping] = math.sqrt(sum((step**2).sum() for step in steps))
    assert norms[False, False] > 1e4 and norms[False, True] <= 1.01 and norms[True, False] == 0


def test_the_mean_sends_the_weights_and_a_few_numbers(model, client_dataset):
    num_weights = 4 * 5 + 5 + 5 * 3 + 3
    up, down = bytes_per_client(build(model, client_dataset, Experiment()))
    assert up == 4 * num_weights + BESIDES_THE_UPDATE
    assert down == 4 * num_weights + 4  # And the round.


def test_compression_sends_eight_bits_a_value_packed_into_28_of_32(tmp_path):
    """As TFF packs them; only tensors of more than 20,000 values, each with its range of two numbers."""
    experiment = Experiment(data="embedded", aggregator="compressed", zeroing=False, clipping=False)
    task = experiment.build_task(cache_dir=tmp_path)
    aggregator = aggregators.build_aggregator(experiment, 10)
    process = build_fed_sgd(task.build_model(0), task.train, learning_rate=0.1, aggregator=aggregator)
    up, _ = bytes_per_client(process)
    packed = sum(4 * math.ceil(8 * n / 28) + 8 for n in (784 * 200, 200 * 200))
    assert up == packed + 4 * (200 + 200 + 200 * 10 + 10) + BESIDES_THE_UPDATE


def test_the_noise_of_dp_has_the_deviation_that_the_multiplier_says(worker, model, client_dataset):
    """At a rate of almost zero an update is noise: the multiplier for values, times the first norm, over the clients.

    The noise of the count, of deviation s, takes a part of the privacy: z^-2 = z_v^-2 + (2 s)^-2 (Andrew et al. 2021).
    """
    z = 3.0
    aggregator = aggregators.build_aggregator(Experiment(aggregator="dp", noise_multiplier=z), len(CLIENTS))
    process = build_fed_sgd(model, client_dataset, learning_rate=1e-9, aggregator=aggregator)
    w_0 = model.initial_weights[0]
    noise = np.concatenate([(v - w).ravel() for _ in range(40) for v, w in zip(weights_after_a_round(process), w_0)])
    z_of_values = (z**-2 - (2 * z) ** -2) ** -0.5
    assert noise.std() == pytest.approx(z_of_values * 0.1 / len(CLIENTS), rel=0.1)


@pytest.mark.parametrize(("z", "rounds", "delta"), [(4.0, 1, 1e-5), (10.0, 50, 1e-6), (30.0, 100, 1e-5)])
def test_epsilon_of_all_clients_in_each_round_is_that_of_the_gaussian_mechanism(z, rounds, delta):
    """Its exact privacy is known (Balle and Wang 2018); the bound here is above it, and not far."""
    deviation = z / 2 / math.sqrt(rounds)  # In sensitivities: to replace a client changes the sum by two norms.

    def excess(epsilon):
        normal = scipy.stats.norm.cdf
        return (
            normal(1 / (2 * deviation) - epsilon * deviation)
            - math.exp(epsilon) * normal(-1 / (2 * deviation) - epsilon * deviation)
            - delta
        )

    exact = scipy.optimize.brentq(excess, 0, 100)
    experiment = Experiment(aggregator="dp", noise_multiplier=z, delta=delta)
    assert exact <= aggregators.epsilon(experiment, 100, 100, rounds) < 1.25 * exact


def test_epsilon_falls_with_noise_and_sampling_and_grows_with_rounds():
    experiment = Experiment(aggregator="dp", noise_multiplier=2.0)

    def epsilon(num_clients=1000, clients_per_round=10, rounds=100, **changes):
        changed = dataclasses.replace(experiment, **changes)
        return aggregators.epsilon(changed, num_clients, clients_per_round, rounds)

    assert epsilon(noise_multiplier=4.0) < epsilon() < epsilon(noise_multiplier=1.0)
    assert epsilon(clients_per_round=5) < epsilon() < epsilon(clients_per_round=100)
    assert epsilon(rounds=50) < epsilon() < epsilon(rounds=200)
    assert epsilon(delta=1e-4) < epsilon() < epsilon(delta=1e-6)
    assert epsilon(rounds=0) == 0
