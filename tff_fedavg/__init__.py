"""Federated Averaging (McMahan et al., AISTATS 2017) on TensorFlow Federated."""

import importlib

_MODULES = {
    "CentralizedSGD": "centralized",
    "ClientDataset": "client_data",
    "build_fed_avg": "fed_avg",
    "build_fed_eval": "evaluation",
    "build_fed_sgd": "fed_avg",
    "build_sampling_fn": "sampling",
    "local_worker": "runtime",
}

__all__ = list(_MODULES)


def __getattr__(name: str):
    """Imports TFF, which takes ten seconds, with the first name that needs it: to read results does not."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
