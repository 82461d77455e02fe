"""Computations whose last argument is the ids of clients, checked before TFF's worker sees them."""

from typing import Any

import tensorflow_federated as tff

from tff_fedavg.client_data import ClientDataset
from tff_fedavg.runtime import ComputationError


def for_clients_of(client_dataset: ClientDataset, computation: tff.Computation) -> tff.Computation:
    """Returns the computation `(value@SERVER, client_ids@CLIENTS)` for ids that are integers of any kind.

    Raises:
      TypeError: When it is called, if an id is no integer.
      ValueError: When it is called, if there is no such client, or none is given.
      ComputationError: When it is called, if it fails on a client: with the client and its files.
    """
    return _ForClients(client_dataset, computation)


class _ForClients(tff.framework.ConcreteComputation):
    def __init__(self, client_dataset: ClientDataset, computation: tff.framework.ConcreteComputation):
        super().__init__(
            computation_proto=tff.framework.ConcreteComputation.get_proto(computation),
            context_stack=tff.framework.get_context_stack(),
            annotated_type=computation.type_signature,
        )
        self._client_dataset = client_dataset

    def __call__(self, server_value: Any, client_ids: Any) -> Any:
        if not isinstance(client_ids, tff.Value):  # As it is where another computation is made of this one.
            client_ids = self._client_dataset.check_client_ids(client_ids)
            return self._call(server_value, client_ids)
        return super().__call__(server_value, client_ids)

    def _call(self, server_value: Any, client_ids: list[int]) -> Any:
        try:
            return super().__call__(server_value, client_ids)
        except ComputationError:
            # Which client it was is not told: TFF computes for one like for all, so each is asked by itself.
            for client_id in client_ids:
                try:
                    super().__call__(server_value, [client_id])
                except ComputationError as e:
                    raise ComputationError(f"client {client_id} of {self._client_dataset.directory}: {e}") from None
            raise
