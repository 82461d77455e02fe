"""Evaluation of model weights, on a whole data set or on that of each client, as federated computations."""

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff
import tqdm

from tff_fedavg.client_data import ClientDataset
from tff_fedavg.client_ids import ForClients
from tff_fedavg.fed_avg import check_model_and_data
from tff_fedavg.integer import as_integer

# The worker prepares anew for each number of clients that it meets.
_CLIENTS_PER_CALL = 50


def build_fed_eval(
    model: tff.learning.models.FunctionalModel, client_dataset: ClientDataset, *, batch_size: int = 50
) -> tff.Computation:
    """Builds the evaluation of the model's metrics.

    Args:
      model: The model, with its metrics.
      client_dataset: The data to evaluate on. A centralised test set is stored as clients too: its parts are evaluated
        in parallel, and the metrics do not depend on how it is cut.
      batch_size: Examples that go through the model at once.

    Returns:
      A computation `(weights@SERVER, client_ids@CLIENTS) -> metrics@SERVER`. The weights are a
      `tff.learning.models.ModelWeights`; the metrics are those of the model, over all examples of these clients, and
      mean nothing if there are none.

    Raises:
      TypeError: If an argument has another type.
      ValueError: If batch_size is out of range, there are no examples, or the model does not take them.
    """
    weights_type, client_metrics = _client_metrics(model, client_dataset, batch_size)

    @tff.federated_computation(tff.FederatedType(weights_type, tff.SERVER), tff.FederatedType(np.int32, tff.CLIENTS))
    def fed_eval(weights, client_ids):
        unfinalized = tff.federated_map(client_metrics, (tff.federated_broadcast(weights), client_ids))
        return tff.learning.metrics.sum_then_finalize(model.finalize_metrics)(unfinalized)

    return ForClients(client_dataset, fed_eval)


def build_client_eval(
    model: tff.learning.models.FunctionalModel, client_dataset: ClientDataset, *, batch_size: int = 50
) -> tff.Computation:
    """Builds the evaluation of the model's metrics on the examples of each client by itself.

    Args:
      model: As for `build_fed_eval`.
      client_dataset: As for `build_fed_eval`.
      batch_size: As for `build_fed_eval`.

    Returns:
      A computation `(weights@SERVER, client_ids@CLIENTS) -> metrics@CLIENTS`, as `build_fed_eval`: called, it returns a
      list with the metrics of each client. Those of a client without examples mean nothing.

    Raises:
      TypeError: If an argument has another type.
      ValueError: If batch_size is out of range, there are no examples, or the model does not take them.
    """
    weights_type, client_metrics = _client_metrics(model, client_dataset, batch_size)
    finalize = tff.tensorflow.computation(model.finalize_metrics, client_metrics.type_signature.result)

    @tff.federated_computation(tff.FederatedType(weights_type, tff.SERVER), tff.FederatedType(np.int32, tff.CLIENTS))
    def client_eval(weights, client_ids):
        unfinalized = tff.federated_map(client_metrics, (tff.federated_broadcast(weights), client_ids))
        return tff.federated_map(finalize, unfinalized)

    return ForClients(client_dataset, client_eval)


def for_all_clients(
    computation: tff.Computation, weights: tff.learning.models.ModelWeights, client_dataset: ClientDataset
) -> dict[int, Any]:
    """Calls a computation for all clients that have examples, a number of them at a time.

    Args:
      computation: What `build_client_eval` returns, or another that takes and returns the same.
      weights: The weights.
      client_dataset: The client files.

    Returns:
      The result of each client, by its id, ascending.
    """
    # The largest first, so that those of a call are about equally large.
    clients = sorted(client_dataset.num_examples.nonzero()[0].tolist(), key=lambda k: -client_dataset.num_examples[k])
    size = min(_CLIENTS_PER_CALL, len(clients))
    results = {}
    with tqdm.tqdm(total=len(clients), unit=" clients", delay=2, disable=None) as bar:
        for start in range(0, len(clients), size):
            called = clients[start : start + size]
            filled_up = called + clients[: size - len(called)]
            results.update(zip(called, computation(weights, filled_up)))
            bar.update(len(called))
    return dict(sorted(results.items()))


def _client_metrics(
    model: tff.learning.models.FunctionalModel, client_dataset: ClientDataset, batch_size: int
) -> tuple[tff.Type, tff.Computation]:
    """Returns the type of the model's weights, and the computation of the unfinalized metrics of a client."""
    check_model_and_data(model, client_dataset, trains=False)
    batch_size = as_integer("batch_size", batch_size)
    weights_type = model_weights_type(model)

    @tff.tensorflow.computation(weights_type, np.int32)
    def client_metrics(weights, client_id):
        records = client_dataset.read(client_id)
        return metrics_state(
            model,
            weights,
            tf.shape(records)[0],
            lambda i: client_dataset.batch(records, i, tf.zeros([2], tf.int64)),
            batch_size,
        )

    return weights_type, client_metrics


def model_weights_type(model: tff.learning.models.FunctionalModel) -> tff.Type:
    """Returns the type of the model's weights, as a `tff.learning.models.ModelWeights`."""
    types = tf.nest.map_structure(lambda w: tff.TensorType(w.dtype, w.shape), model.initial_weights)
    return tff.to_type(tff.learning.models.ModelWeights(*types))


def metrics_state(
    model: tff.learning.models.FunctionalModel,
    weights: tff.learning.models.ModelWeights,
    num_examples: tf.Tensor,
    batch_fn: Callable[[tf.Tensor], tuple[Any, ...]],
    batch_size: int = 50,
) -> Any:
    """Computes the unfinalized metrics of some examples, in the graph.

    Args:
      model: The model.
      weights: Its weights.
      num_examples: int32 scalar.
      batch_fn: Maps int32 indices `[batch]` of examples to the batch `(x, y)` or `(x, y, sample_weight)`.
      batch_size: Examples that go through the model at once.
    """

    def evaluate_batch(start, state):
        x, y, *_ = batch_fn(tf.range(start, tf.minimum(start + batch_size, num_examples)))
        predictions = model.predict_on_batch((weights.trainable, weights.non_trainable), x, training=False)
        output = tff.learning.models.BatchOutput(predictions=predictions)
        return start + batch_size, model.update_metrics_state(state, y, output)

    _, state = tf.while_loop(
        lambda start, _: start < num_examples, evaluate_batch, (0, model.initialize_metrics_state())
    )
    return state
