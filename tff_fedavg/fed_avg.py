"""Federated Averaging and FedSGD (Algorithm 1 and Section 2) as TFF learning processes.

One round of both is

    server:    send w_t and t to the clients S_t
    client k:  d_k <- w_t - ClientUpdate(k, w_t)         # FedSGD: d_k <- eta grad F_k(w_t)
    server:    d <- sum_{k in S_t} (n_k / m_t) d_k       # m_t = sum_{k in S_t} n_k, as in the erratum (arXiv v4)
               w_{t+1} <- w_t - d

The last line is the paper's w_{t+1} <- sum_{k in S_t} (n_k / m_t) w^k_{t+1}, written as a step of a server optimizer
(SGD with rate 1), so that another optimizer can take its place.
"""

import collections
from collections.abc import Callable

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from tff_fedavg.client_data import ClientDataset
from tff_fedavg.client_update import client_gradient, client_update, minibatch_seed

LearningRate = float | tf.keras.optimizers.schedules.LearningRateSchedule
Factory = tff.aggregators.WeightedAggregationFactory | tff.aggregators.UnweightedAggregationFactory


def build_fed_avg(
    model: tff.learning.models.FunctionalModel,
    client_dataset: ClientDataset,
    *,
    epochs: int,
    batch_size: int | None,
    learning_rate: LearningRate,
    seed: int = 0,
    server_optimizer: tff.learning.optimizers.Optimizer | None = None,
    aggregator: Factory | None = None,
) -> tff.learning.templates.LearningProcess:
    """Builds FederatedAveraging (Algorithm 1).

    `next(state, client_ids)` runs a round with the clients `client_ids` (int32) of `client_dataset`. It is a pure
    function: the clients' minibatches depend on `seed`, the round that the state counts, and the client.

    Args:
      model: The model, as `tff.learning.models.functional_model_from_keras` makes it.
      client_dataset: The client files.
      epochs: E, the number of local epochs.
      batch_size: B, the local minibatch size; None is the paper's B = inf.
      learning_rate: eta, the clients' learning rate; a schedule is a function of the number of finished rounds.
      seed: Seeds the split of the clients' data into minibatches, and their augmentation.
      server_optimizer: Applies the averaged update; by default SGD with rate 1, which is the paper's averaging.
      aggregator: Averages the updates; by default `tff.aggregators.MeanFactory`, weighted by n_k. An unweighted
        factory gives every client of the round the same weight.

    Returns:
      A process whose state is a `tff.learning.templates.LearningAlgorithmState`, with the number of finished rounds as
      `client_work`. Its metrics are "client_work" / "train" (loss: the mean over what local SGD saw; num_examples:
      m_t), "aggregator" and "finalizer".

    Raises:
      ValueError: If an argument is out of range.
    """
    if epochs < 1:
        raise ValueError(f"epochs (E) is {epochs}; it must be at least 1")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size (B) is {batch_size}; it must be at least 1, or None for B = inf")
    check_learning_rate(learning_rate)

    def client_fn(weights, num_examples, batch_fn, learning_rate, seed):
        new_weights, loss_sum = client_update(
            model,
            weights,
            num_examples,
            batch_fn,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=seed,
        )
        return [old - new for old, new in zip(weights, new_weights)], loss_sum / epochs

    server_optimizer = server_optimizer or tff.learning.optimizers.build_sgdm(1.0)
    return _build_learning_process(model, client_dataset, client_fn, learning_rate, seed, server_optimizer, aggregator)


def build_fed_sgd(
    model: tff.learning.models.FunctionalModel,
    client_dataset: ClientDataset,
    *,
    learning_rate: LearningRate,
    seed: int = 0,
    aggregator: Factory | None = None,
) -> tff.learning.templates.LearningProcess:
    """Builds FederatedSGD (Section 2): each client sends one gradient over all its data.

    Equivalent to `build_fed_avg` with E = 1 and B = inf.

    Args:
      model: As for `build_fed_avg`.
      client_dataset: As for `build_fed_avg`.
      learning_rate: eta; as for `build_fed_avg`.
      seed: Seeds the augmentation of the clients' data.
      aggregator: As for `build_fed_avg`.

    Returns:
      A process as from `build_fed_avg`.

    Raises:
      ValueError: If the learning rate is out of range.
    """
    check_learning_rate(learning_rate)

    def client_fn(weights, num_examples, batch_fn, learning_rate, seed):
        gradient, loss_sum = client_gradient(model, weights, num_examples, batch_fn, seed=seed)
        return [learning_rate * g for g in gradient], loss_sum

    server_optimizer = tff.learning.optimizers.build_sgdm(1.0)
    return _build_learning_process(model, client_dataset, client_fn, learning_rate, seed, server_optimizer, aggregator)


def _build_learning_process(
    model: tff.learning.models.FunctionalModel,
    client_dataset: ClientDataset,
    client_fn: Callable,
    learning_rate: LearningRate,
    seed: int,
    server_optimizer: tff.learning.optimizers.Optimizer,
    aggregator: Factory | None,
) -> tff.learning.templates.LearningProcess:
    """Builds the round that the module's docstring shows; `client_fn` computes d_k and the loss sum."""

    @tff.tensorflow.computation
    def initial_weights():
        return tff.learning.models.ModelWeights(*tf.nest.map_structure(tf.constant, model.initial_weights))

    weights_type = initial_weights.type_signature.result

    @tff.tensorflow.computation(weights_type.trainable, np.int32, np.int32)
    def client_work(weights, round_number, client_id):
        records = client_dataset.read(client_id)
        num_examples = tf.shape(records)[0]
        update, loss_sum = client_fn(
            list(weights),
            num_examples,
            lambda indices, seed: client_dataset.batch(records, indices, seed),
            learning_rate(round_number) if callable(learning_rate) else learning_rate,
            minibatch_seed(seed, round_number, client_id),
        )
        result = tff.learning.templates.ClientResult(tuple(update), tf.cast(num_examples, tf.float32))
        return result, collections.OrderedDict(loss=loss_sum, num_examples=tf.cast(num_examples, tf.int64))

    @tff.tensorflow.computation(client_work.type_signature.result[1])
    def finalize_metrics(sums):
        loss = tf.math.divide_no_nan(sums["loss"], tf.cast(sums["num_examples"], tf.float32))
        return collections.OrderedDict(train=collections.OrderedDict(loss=loss, num_examples=sums["num_examples"]))

    # A round whose clients are all empty leaves the weights as they are, where a plain mean would be 0 / 0.
    aggregator = aggregator or tff.aggregators.MeanFactory(no_nan_division=True)
    if isinstance(aggregator, tff.aggregators.UnweightedAggregationFactory):
        aggregator = tff.aggregators.as_weighted_aggregator(aggregator)
    aggregation = aggregator.create(weights_type.trainable, tff.TensorType(np.float32))
    finalizer = tff.learning.templates.build_apply_optimizer_finalizer(server_optimizer, weights_type)

    @tff.tensorflow.computation(np.int32)
    def increment(round_number):
        return round_number + 1

    @tff.federated_computation
    def initialize():
        return tff.federated_zip(
            tff.learning.templates.LearningAlgorithmState(
                global_model_weights=tff.federated_eval(initial_weights, tff.SERVER),
                distributor=tff.federated_value((), tff.SERVER),
                client_work=tff.federated_value(0, tff.SERVER),
                aggregator=aggregation.initialize(),
                finalizer=finalizer.initialize(),
            )
        )

    # The state comes first: TFF's multi-worker runtime gives wrong sums when the last argument is on the server.
    @tff.federated_computation(initialize.type_signature.result, tff.FederatedType(np.int32, tff.CLIENTS))
    def next_round(state, client_ids):
        w_t = state.global_model_weights
        round_number = state.client_work
        results, sums = tff.federated_map(
            client_work,
            (tff.federated_broadcast(w_t.trainable), tff.federated_broadcast(round_number), client_ids),
        )
        averaged = aggregation.next(state.aggregator, results.update, results.update_weight)
        finalized = finalizer.next(state.finalizer, w_t, averaged.result)
        new_state = tff.learning.templates.LearningAlgorithmState(
            global_model_weights=finalized.result,
            distributor=state.distributor,
            client_work=tff.federated_map(increment, round_number),
            aggregator=averaged.state,
            finalizer=finalized.state,
        )
        metrics = collections.OrderedDict(
            client_work=tff.federated_map(finalize_metrics, tff.federated_sum(sums)),
            aggregator=averaged.measurements,
            finalizer=finalized.measurements,
        )
        return tff.learning.templates.LearningProcessOutput(tff.federated_zip(new_state), tff.federated_zip(metrics))

    state_type = initialize.type_signature.result.member

    @tff.tensorflow.computation(state_type)
    def get_model_weights(state):
        return state.global_model_weights

    @tff.tensorflow.computation(state_type, weights_type)
    def set_model_weights(state, weights):
        return state._replace(global_model_weights=weights)

    return tff.learning.templates.LearningProcess(initialize, next_round, get_model_weights, set_model_weights)


def check_learning_rate(learning_rate: LearningRate) -> None:
    """Raises a `ValueError` for a learning rate that is no number above 0. A schedule may be anything."""
    if callable(learning_rate):
        return
    if not learning_rate > 0 or not np.isfinite(learning_rate):
        raise ValueError(f"learning_rate (eta) is {learning_rate}; it must be a number above 0")
