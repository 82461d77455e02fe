"""Computations whose last argument is the ids of clients: checked before TFF's worker sees them."""

from typing import Any

import tensorflow_federated as tff

from tff_fedavg.client_data import ClientDataset


def for_clients_of(client_dataset: ClientDataset, computation: tff.Computation) -> tff.Computation:
    """Returns the computation with a check of its client ids, which may be integers of any kind.

    Raises:
      TypeError: From a call, if an id is no integer.
      ValueError: From a call, if there is no such client, or none is given.
    """
    return _ForClients(client_dataset, computation)


class _ForClients:
    """The computation in all but a call."""

    def __init__(self, client_dataset: ClientDataset, computation: tff.Computation):
        self._client_dataset = client_dataset
        self._computation = computation

    def __getattr__(self, name: str) -> Any:
        return getattr(self._computation, name)

    def __call__(self, server_value: Any, client_ids: Any) -> Any:
        if not isinstance(client_ids, tff.Value):  # As it is where another computation is made of this one.
            client_ids = self._client_dataset.check_client_ids(client_ids)
        return self._computation(server_value, client_ids)
