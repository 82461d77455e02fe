"""Federated Averaging (McMahan et al., AISTATS 2017) on TensorFlow Federated."""

from tff_fedavg.centralized import CentralizedSGD
from tff_fedavg.client_data import ClientDataset
from tff_fedavg.evaluation import build_fed_eval
from tff_fedavg.fed_avg import build_fed_avg, build_fed_sgd
from tff_fedavg.runtime import local_worker
from tff_fedavg.sampling import build_sampling_fn

__all__ = [
    "CentralizedSGD",
    "ClientDataset",
    "build_fed_avg",
    "build_fed_eval",
    "build_fed_sgd",
    "build_sampling_fn",
    "local_worker",
]
