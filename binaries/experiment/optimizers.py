"""The optimizers that an experiment can choose: TFF's, for the clients and for the server."""

from collections.abc import Callable

import tensorflow_federated as tff

from binaries.experiment.record import Experiment

_BUILDERS: dict[str, Callable[..., tff.learning.optimizers.Optimizer]] = {
    "sgd": tff.learning.optimizers.build_sgdm,
    "momentum": tff.learning.optimizers.build_sgdm,
    "adam": tff.learning.optimizers.build_adam,
    "adagrad": tff.learning.optimizers.build_adagrad,
    "yogi": tff.learning.optimizers.build_yogi,
}
_PARAMETERS = ("momentum", "beta_1", "beta_2", "epsilon", "initial_preconditioner_value")


def build_client_optimizer(experiment: Experiment) -> tff.learning.optimizers.Optimizer | None:
    """Returns the clients' optimizer; None is SGD."""
    if experiment.client_optimizer == "sgd":
        return None
    return _build(experiment, "client", experiment.learning_rate)


def build_server_optimizer(experiment: Experiment) -> tff.learning.optimizers.Optimizer:
    """Returns the server's optimizer."""
    return _build(experiment, "server", experiment.server_learning_rate)


def _build(experiment: Experiment, side: str, learning_rate: float) -> tff.learning.optimizers.Optimizer:
    values = {name: getattr(experiment, f"{side}_{name}") for name in _PARAMETERS}
    chosen = {name: value for name, value in values.items() if value is not None}
    return _BUILDERS[getattr(experiment, f"{side}_optimizer")](learning_rate, **chosen)
