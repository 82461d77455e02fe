"""A computation on many clients in subrounds: some of the clients at a time, each time in any worker.

TFF divides a computation (`tff.framework.MergeableCompForm`) into what is done with some of the clients up to a partial
aggregate, what merges two of these, and what is done with the whole. TFF's own context for such forms merges in the
order in which the partial aggregates arrive, and so gives other bits each time. Here it is that of the clients.
"""

import functools
import itertools
import math
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import tensorflow_federated as tff

from tff_fedavg.communication import num_bytes

# Of the worker's memory, for the results of the clients of a subround. Not what is free: the cut, and with it the last
# bits of a sum, must not depend on that.
_BYTES = 1e9
# What a client's result takes there, in the size of the aggregate: measured with the 2NN and the CNN, 3.2 to 4.
_COPIES = 4

Submit = Callable[..., Future]


def num_clients(comp: tff.framework.ConcreteComputation, arg: Any) -> int:
    """Returns how many TFF clients the argument of a computation is of; 0 if it cannot be divided by clients."""
    types, values = _parameters(comp, arg)
    if not all(isinstance(t, tff.FederatedType) for t in types):
        return 0
    return max((len(v) for t, v in zip(types, values) if _is_per_client(t) and isinstance(v, (list, tuple))), default=0)


def num_for_memory(
    comp: tff.framework.ConcreteComputation, arg: Any, clients_per_subround: int | None, cores: int
) -> int:
    """Returns in how many subrounds the results of the clients fit into the worker's memory.

    Args:
      comp: The computation, which can be divided by clients.
      arg: Its argument.
      clients_per_subround: How many fit; by default it follows from the size of the aggregate.
      cores: By default at least so many are in a subround, which run at once.
    """
    clients = num_clients(comp, arg)
    if clients_per_subround is None:
        # An aggregate is hardly larger than what the server holds, and then no form has to be compiled.
        at_server = sum(num_bytes(t) for t in _parameters(comp, arg)[0] if not _is_per_client(t))
        if clients * _COPIES * at_server <= _BYTES:
            return 1
        if (form := _mergeable(comp)) is None:
            return 1
        aggregate_bytes = num_bytes(form.up_to_merge.type_signature.result)
        clients_per_subround = max(cores, int(_BYTES / _COPIES / max(1, aggregate_bytes)))
    return math.ceil(clients / clients_per_subround)


def invoke(comp: tff.framework.ConcreteComputation, arg: Any, number: int, submit: Submit) -> Any:
    """Runs a computation in subrounds.

    Args:
      comp: The computation.
      arg: Its argument.
      number: The number of subrounds, at most that of the clients.
      submit: Takes a computation, its argument and whether it is urgent, and returns its result to come.

    Raises:
      ValueError: If the computation aggregates what depends on another aggregate.
    """
    form = _mergeable(comp)
    if form is None:
        raise ValueError(
            "this aggregator needs all clients of a round in one worker, since it adds up what depends on another sum: "
            "use one worker, without clients_per_subround"
        )
    types, values = _parameters(comp, arg)
    clients = num_clients(comp, arg)
    bounds = [clients * i // number for i in range(number + 1)]
    parts = []
    for begin, end in itertools.pairwise(bounds):
        part = [v[begin:end] if _is_per_client(t) else v for t, v in zip(types, values)]
        parts.append(_argument(comp, part))
    partial = [submit(form.up_to_merge, part) for part in parts]
    merged = partial.pop(0).result()
    while partial:
        pair = tff.structure.Struct.unnamed(merged, partial.pop(0).result())
        merged = submit(form.merge, pair, urgent=True).result()
    after = [tff.structure.Struct.unnamed(part, merged) for part in parts]
    if not _is_per_client(comp.type_signature.result):
        return submit(form.after_merge, after[0]).result()
    results = [submit(form.after_merge, part) for part in after]
    return [value for result in results for value in result.result()]


@functools.lru_cache(8)  # They are large.
def _mergeable(comp: tff.framework.ConcreteComputation) -> tff.framework.MergeableCompForm | None:
    result = comp.type_signature.result
    if not _is_per_client(result) and tff.types.contains(result, _is_per_client):
        return None
    try:
        return tff.backends.native.compile_to_mergeable_comp_form(comp)
    except ValueError:  # Of an aggregate that depends on another one.
        return None


def _parameters(comp: tff.framework.ConcreteComputation, arg: Any) -> tuple[list[tff.Type], list[Any]]:
    parameter = comp.type_signature.parameter
    if isinstance(parameter, tff.StructType) and isinstance(arg, tff.structure.Struct):
        return list(parameter.children()), list(arg)
    return ([], []) if parameter is None else ([parameter], [arg])


def _argument(comp: tff.framework.ConcreteComputation, values: list[Any]) -> Any:
    parameter = comp.type_signature.parameter
    if isinstance(parameter, tff.StructType):
        return tff.structure.Struct(zip(tff.structure.name_list_with_nones(parameter), values))
    return values[0]


def _is_per_client(type_spec: tff.Type) -> bool:
    is_at_clients = isinstance(type_spec, tff.FederatedType) and type_spec.placement is tff.CLIENTS
    return is_at_clients and not type_spec.all_equal
