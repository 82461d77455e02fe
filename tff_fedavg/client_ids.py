"""Computations whose last argument is the ids of clients: checked, and dealt out, before TFF's worker sees them."""

import heapq
from collections.abc import Sequence
from typing import Any

import tensorflow_federated as tff

from tff_fedavg import runtime
from tff_fedavg.client_data import ClientDataset


def for_clients_of(client_dataset: ClientDataset, computation: tff.Computation) -> tff.Computation:
    """Returns the computation `(value@SERVER, client_ids@CLIENTS)` for ids that are integers of any kind.

    Where the computation takes a list of ids from each TFF client, they are dealt out into such lists.

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
        self._takes_shares = computation.type_signature.parameter[1].member.shape == (None,)

    def __call__(self, server_value: Any, client_ids: Any) -> Any:
        if not isinstance(client_ids, tff.Value):  # As it is where another computation is made of this one.
            client_ids = self._client_dataset.check_client_ids(client_ids)
            runtime.require_client_files(self._client_dataset.directory)
            return self._call(server_value, client_ids)
        return super().__call__(server_value, client_ids)

    def _call(self, server_value: Any, client_ids: list[int]) -> Any:
        try:
            return self._call_dealt_out(server_value, client_ids)
        except runtime.ComputationError:
            # Which client it was is not told: TFF computes for one like for all, so each is asked by itself.
            for client_id in client_ids:
                try:
                    self._call_dealt_out(server_value, [client_id])
                except runtime.ComputationError as e:
                    message = f"client {client_id} of {self._client_dataset.directory}: {e}"
                    raise runtime.ComputationError(message) from None
            raise

    def _call_dealt_out(self, server_value: Any, client_ids: list[int]) -> Any:
        if self._takes_shares:
            sizes = self._client_dataset.num_examples[client_ids]
            client_ids = _deal_out(client_ids, sizes, runtime.num_shares(len(client_ids)))
        return super().__call__(server_value, client_ids)


def _deal_out(client_ids: Sequence[int], sizes: Sequence[int], num_shares: int) -> list[list[int]]:
    """Deals out clients into shares of about the same size: the largest first, each to the smallest share so far."""
    shares = [(0, i, []) for i in range(num_shares)]
    for size, client_id in sorted(zip(sizes, client_ids), key=lambda pair: -pair[0]):
        share_size, i, share = shares[0]
        share.append(client_id)
        heapq.heapreplace(shares, (share_size + size, i, share))
    return [share for _, _, share in sorted(shares, key=lambda entry: entry[1])]
