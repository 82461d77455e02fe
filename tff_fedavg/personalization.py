"""Personalization: what each client gains by training the shared model further, on its own examples."""

import collections

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from tff_fedavg.client_data import ClientDataset
from tff_fedavg.client_ids import ForClients
from tff_fedavg.client_update import as_epochs_and_batch_size, client_update, minibatch_seed
from tff_fedavg.evaluation import metrics_state, model_weights_type
from tff_fedavg.fed_avg import check_model_and_data, traced_learning_rate

# One example of so many is held out.
_HELD_OUT = 5

# What the seed of a client is for, where ClientUpdate has the round.
_SPLIT, _UPDATE = 0, 1


def num_held_out(num_examples: np.ndarray | tf.Tensor) -> np.ndarray | tf.Tensor:
    """Returns how many of the examples of a client it is measured on: a fifth, rounded up."""
    return (num_examples + _HELD_OUT - 1) // _HELD_OUT


def build_personalization_eval(
    model: tff.learning.models.FunctionalModel,
    client_dataset: ClientDataset,
    *,
    epochs: int,
    batch_size: int | None,
    learning_rate: float,
    seed: int = 0,
) -> tff.Computation:
    """Builds the evaluation of the model on each client before and after it was trained on examples of that client.

        (P_k^train, P_k^test) <- (split P_k at random: a fifth, at least one example, is held out)
        before <- metrics of w on P_k^test
        after  <- metrics of ClientUpdate(k, w) on P_k^test, where ClientUpdate gets P_k^train

    As `tff.learning.algorithms.build_personalization_eval_computation`, on client files.

    Args:
      model: The model, with its metrics.
      client_dataset: The client files.
      epochs: E of ClientUpdate (Algorithm 1).
      batch_size: Its B; None is B = inf.
      learning_rate: Its eta.
      seed: Seeds the split of P_k, and that into minibatches.

    Returns:
      A computation `(weights@SERVER, client_ids@CLIENTS) -> metrics@CLIENTS`: called, it returns a list with the
      metrics "before" and "after" of each client. Those of a client without examples mean nothing.

    Raises:
      TypeError: If an argument has another type.
      ValueError: If an argument is out of range.
    """
    check_model_and_data(model, client_dataset)
    epochs, batch_size = as_epochs_and_batch_size(epochs, batch_size, client_dataset.num_examples)
    eta = traced_learning_rate(learning_rate)
    weights_type = model_weights_type(model)

    @tff.tensorflow.computation(weights_type, np.int32)
    def personalize(weights, client_id):
        records = client_dataset.read(client_id)
        num_examples = tf.shape(records)[0]
        order = tf.random.experimental.stateless_shuffle(
            tf.range(num_examples), minibatch_seed(seed, tf.constant(_SPLIT), client_id)
        )
        held_out = num_held_out(num_examples)

        def metrics(weights):
            state = metrics_state(
                model,
                weights,
                held_out,
                lambda indices: client_dataset.batch(records, tf.gather(order, indices), tf.zeros([2], tf.int64)),
            )
            return model.finalize_metrics(state)

        trainable, _ = client_update(
            model,
            weights,
            num_examples - held_out,
            lambda indices, seed: client_dataset.batch(records, tf.gather(order, held_out + indices), seed),
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=eta(0),
            seed=minibatch_seed(seed, tf.constant(_UPDATE), client_id),
        )
        personalized = tff.learning.models.ModelWeights(tuple(trainable), weights.non_trainable)
        return collections.OrderedDict(before=metrics(weights), after=metrics(personalized))

    @tff.federated_computation(tff.FederatedType(weights_type, tff.SERVER), tff.FederatedType(np.int32, tff.CLIENTS))
    def personalization_eval(weights, client_ids):
        return tff.federated_map(personalize, (tff.federated_broadcast(weights), client_ids))

    return ForClients(client_dataset, personalization_eval)
