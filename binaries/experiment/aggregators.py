"""The aggregators that an experiment can choose, and the privacy that "dp" gives."""

import tensorflow_federated as tff

from binaries.experiment.record import Experiment

# Andrew et al. (2021), who adapt the clipping norm, recommend this much noise for the count that they do it by.
_COUNT_NOISE_PER_CLIENT = 1 / 20


def build_aggregator(experiment: Experiment, clients_per_round: int) -> tff.aggregators.AggregationFactory | None:
    """Returns the aggregator; None is the paper's mean."""
    match experiment.aggregator:
        case "robust":
            return tff.learning.robust_aggregator(zeroing=experiment.zeroing, clipping=experiment.clipping)
        case "compressed":
            return tff.learning.compression_aggregator(zeroing=experiment.zeroing, clipping=experiment.clipping)
        case "dp":
            # As `tff.learning.dp_aggregator`, without its zeroing, which looks at the updates without noise. Its noise
            # of the count is too little for a few clients: half of a multiplier z is the least that adds up to z.
            z = experiment.noise_multiplier
            return tff.aggregators.DifferentiallyPrivateFactory.gaussian_adaptive(
                z, clients_per_round, clipped_count_stddev=max(_COUNT_NOISE_PER_CLIENT * clients_per_round, z)
            )
    return None


def epsilon(experiment: Experiment, num_clients: int, clients_per_round: int, rounds: int) -> float:
    """Returns epsilon at the experiment's delta.

    It is about one client's data being replaced by others: that is what the sampling of a fixed number of clients,
    without replacement, has a bound for (Wang et al. 2019), in Renyi differential privacy (Mironov 2017).

    Args:
      experiment: An experiment with the aggregator "dp".
      num_clients: K.
      clients_per_round: m.
      rounds: Finished rounds.
    """
    import dp_accounting
    from dp_accounting import rdp

    if not rounds:  # Which the accountant does not take.
        return 0.0
    # Replacing a client changes the sum by up to two clipping norms, and the multiplier is per one.
    gaussian = dp_accounting.GaussianDpEvent(experiment.noise_multiplier / 2)
    event = dp_accounting.SampledWithoutReplacementDpEvent(num_clients, clients_per_round, gaussian)
    accountant = rdp.RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE)
    return float(accountant.compose(event, rounds).get_epsilon(experiment.delta))
