"""Federated Averaging (McMahan et al., AISTATS 2017) on TensorFlow Federated."""

import importlib
from typing import TYPE_CHECKING

_MODULES = {
    "CentralizedSGD": "centralized",
    "ClientDataset": "client_data",
    "build_client_eval": "evaluation",
    "build_fed_avg": "fed_avg",
    "build_fed_eval": "evaluation",
    "build_fed_sgd": "fed_avg",
    "build_personalization_eval": "personalization",
    "build_sampling_fn": "sampling",
    "bytes_per_client": "communication",
    "functional_model_from_keras": "functional_model",
    "keras_model": "export",
    "local_worker": "runtime",
    "remote_workers": "runtime",
}

__all__ = list(_MODULES)

__version__: str

if TYPE_CHECKING:
    from tff_fedavg.centralized import CentralizedSGD as CentralizedSGD
    from tff_fedavg.client_data import ClientDataset as ClientDataset
    from tff_fedavg.communication import bytes_per_client as bytes_per_client
    from tff_fedavg.evaluation import build_client_eval as build_client_eval
    from tff_fedavg.evaluation import build_fed_eval as build_fed_eval
    from tff_fedavg.export import keras_model as keras_model
    from tff_fedavg.fed_avg import build_fed_avg as build_fed_avg
    from tff_fedavg.fed_avg import build_fed_sgd as build_fed_sgd
    from tff_fedavg.functional_model import functional_model_from_keras as functional_model_from_keras
    from tff_fedavg.personalization import build_personalization_eval as build_personalization_eval
    from tff_fedavg.runtime import local_worker as local_worker
    from tff_fedavg.runtime import remote_workers as remote_workers
    from tff_fedavg.sampling import build_sampling_fn as build_sampling_fn
else:

    def __getattr__(name: str):
        """Imports TFF, which takes four seconds, with the first name that needs it: to read results does not."""
        if name == "__version__":
            from importlib import metadata  # Takes longer than all else here.

            return metadata.version(__name__)
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
