"""Computations whose last argument is the ids of clients: checked, and dealt out, before TFF's worker sees them."""

import heapq
import inspect
from collections.abc import Sequence
from typing import Any

import tensorflow_federated as tff

from tff_fedavg import runtime
from tff_fedavg.client_data import ClientDataset
from tff_fedavg.export import check_shapes


class ForClients(runtime.Computation):
    """The computation `(value@SERVER, client_ids@CLIENTS)` for ids that are integers of any kind.

    Where the computation takes a list of ids from each TFF client, they are dealt out into such lists.

    Raises:
      TypeError: When it is called, if an id is no integer.
      ValueError: When it is called, if there is no such client, or none is given.
      ComputationError: When it is called, if it fails on a client: with the client and its files.
    """

    def __init__(self, client_dataset: ClientDataset, computation: tff.framework.ConcreteComputation):
        super().__init__(computation)
        self._client_dataset = client_dataset
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        names = [name for name, _ in tff.structure.to_elements(computation.type_signature.parameter)]
        self._signature = inspect.Signature([inspect.Parameter(name, kind) for name in names])
        self._takes_shares = computation.type_signature.parameter[1].member.shape == (None,)

    def _compute(self, *args: Any, **kwargs: Any) -> Any:
        server_value, client_ids = self._signature.bind(*args, **kwargs).args
        if not isinstance(client_ids, tff.Value):  # As it is where another computation is made of this one.
            client_ids = self._client_dataset.check_client_ids(client_ids)
            self._check(server_value)
            runtime.require_client_files(self._client_dataset.manifest)
            return self._call(server_value, client_ids)
        return super()._compute(server_value, client_ids)

    def _check(self, server_value: Any) -> None:
        """Checks the kind of the server's value, and the shapes of weights: TFF would print all that is in it."""
        takes = self.type_signature.parameter[0].member
        kind = getattr(takes, "python_container", None)
        if kind is None or isinstance(server_value, (tff.Value, tff.structure.Struct)):
            return
        name = next(iter(self._signature.parameters))
        if isinstance(server_value, kind):
            weights, of_model = (getattr(each, "global_model_weights", each) for each in (server_value, takes))
            for part in ("trainable", "non_trainable"):
                check_shapes(f"the {part} weights of {name}", getattr(weights, part), list(getattr(of_model, part)))
            return
        parts = ("state", "global_model_weights")
        hint = "".join(f": give its {part}" for part in parts if isinstance(getattr(server_value, part, None), kind))
        raise TypeError(f"{name} is a {type(server_value).__name__}; it must be a {kind.__name__}{hint}")

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
        return super()._compute(server_value, client_ids)


def _deal_out(client_ids: Sequence[int], sizes: Sequence[int], num_shares: int) -> list[list[int]]:
    """Deals out clients into shares of about the same size: the largest first, each to the smallest share so far."""
    shares = [(0, i, []) for i in range(num_shares)]
    for size, client_id in sorted(zip(sizes, client_ids), key=lambda pair: -pair[0]):
        share_size, i, share = shares[0]
        share.append(client_id)
        heapq.heapreplace(shares, (share_size + size, i, share))
    return [share for _, _, share in sorted(shares, key=lambda entry: entry[1])]
