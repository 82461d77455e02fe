"""Evaluation of model weights on a whole data set, as a federated computation."""

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from tff_fedavg.client_data import ClientDataset
from tff_fedavg.client_ids import for_clients_of
from tff_fedavg.fed_avg import check_model_and_data


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
      `tff.learning.models.ModelWeights`; the metrics are those of the model, over all examples of these clients.

    Raises:
      TypeError: If an argument has another type.
    """
    check_model_and_data(model, client_dataset)
    weights_type = tff.to_type(
        tff.learning.models.ModelWeights(
            *tf.nest.map_structure(lambda w: tff.TensorType(w.dtype, w.shape), model.initial_weights)
        )
    )

    @tff.tensorflow.computation(weights_type, np.int32)
    def client_metrics(weights, client_id):
        records = client_dataset.read(client_id)
        num_examples = tf.shape(records)[0]

        def evaluate_batch(start, state):
            batch = tf.range(start, tf.minimum(start + batch_size, num_examples))
            x, y, *_ = client_dataset.batch(records, batch, seed=tf.zeros([2], tf.int64))
            predictions = model.predict_on_batch((weights.trainable, weights.non_trainable), x, training=False)
            output = tff.learning.models.BatchOutput(predictions=predictions)
            return start + batch_size, model.update_metrics_state(state, y, output)

        _, state = tf.while_loop(
            lambda start, _: start < num_examples, evaluate_batch, (0, model.initialize_metrics_state())
        )
        return state

    @tff.federated_computation(tff.FederatedType(weights_type, tff.SERVER), tff.FederatedType(np.int32, tff.CLIENTS))
    def fed_eval(weights, client_ids):
        unfinalized = tff.federated_map(client_metrics, (tff.federated_broadcast(weights), client_ids))
        return tff.learning.metrics.sum_then_finalize(model.finalize_metrics)(unfinalized)

    return for_clients_of(client_dataset, fed_eval)
