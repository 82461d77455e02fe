"""What a client and the server send each other in a round, in bytes."""

import math

import numpy as np
import tensorflow_federated as tff


def bytes_per_client(process: tff.learning.templates.LearningProcess) -> tuple[int, int]:
    """Returns the bytes that a client sends up and gets in a round.

    They are the sizes of the tensors that TFF sends, as they are: compressed where the aggregator compresses, and with
    the numbers that aggregators and metrics need besides the update.

    Args:
      process: A process whose `next` takes its state and the clients' values.
    """
    # Where TFF divides a round into what a client is sent, what it does, and what becomes of that.
    form = tff.backends.mapreduce.get_map_reduce_form_for_computation(process.next)
    return num_bytes(form.work.type_signature.result), num_bytes(form.prepare.type_signature.result)


def num_bytes(type_spec: tff.Type) -> int:
    """Returns the bytes of a value of a type; of a dimension that is open, those of one entry."""
    if isinstance(type_spec, tff.TensorType):
        return math.prod(size or 1 for size in type_spec.shape or ()) * np.dtype(type_spec.dtype).itemsize
    return sum(map(num_bytes, type_spec.children()))
