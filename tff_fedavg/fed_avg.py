"""Federated Averaging and FedSGD (Algorithm 1 and Section 2) as TFF learning processes.

One round of both is

    server:    send w_t and t to the clients S_t
    client k:  d_k <- w_t - ClientUpdate(k, w_t)         # FedSGD: d_k <- eta grad F_k(w_t)
    server:    d <- sum_{k in S_t} (n_k / m_t) d_k       # m_t = sum_{k in S_t} n_k, as in the erratum (arXiv v4)
               w_{t+1} <- w_t - d

The last line is the paper's w_{t+1} <- sum_{k in S_t} (n_k / m_t) w^k_{t+1}, written as a step of a server optimizer
(SGD with rate 1), so that another optimizer can take its place. A client whose d_k or loss is not finite is left out of
both sums, and counted.

What TFF calls a client is, for the paper's average, a share of S_t: as many shares as there are cores, each of which
runs its clients one after another and sends up the sums of n_k d_k and of n_k. So a round takes the memory of a few
updates and not of all, and with more clients no longer for each. Another aggregator gets each client's update.
"""

import collections
import numbers
from collections.abc import Callable, Mapping

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from tff_fedavg import runtime
from tff_fedavg.client_data import ClientDataset
from tff_fedavg.client_ids import ForClients
from tff_fedavg.client_update import (
    as_epochs_and_batch_size,
    client_gradient,
    client_update,
    minibatch_seed,
)
from tff_fedavg.traced import TracedFunction, first_error, fits
from tff_fedavg.traced_optimizer import TracedOptimizer

# eta: a number, or a function of the number of finished rounds (float32 scalar), such as a Keras schedule.
LearningRate = float | Callable[[tf.Tensor], tf.Tensor]
Factory = tff.aggregators.WeightedAggregationFactory | tff.aggregators.UnweightedAggregationFactory
Optimizer = tff.learning.optimizers.Optimizer
ClientWeighting = tff.learning.ClientWeighting


def build_fed_avg(
    model: tff.learning.models.FunctionalModel,
    client_dataset: ClientDataset,
    *,
    epochs: int,
    batch_size: int | None,
    learning_rate: LearningRate | None = None,
    client_optimizer: Optimizer | None = None,
    proximal_strength: float = 0.0,
    client_weighting: ClientWeighting = ClientWeighting.NUM_EXAMPLES,
    server_optimizer: Optimizer | None = None,
    aggregator: Factory | None = None,
    seed: int = 0,
) -> tff.learning.templates.LearningProcess:
    """Builds FederatedAveraging (Algorithm 1).

    `next(state, client_ids)` runs a round with the clients `client_ids` of `client_dataset` (any integers). It is a
    pure function, but for aggregators that draw at random: the clients' minibatches depend on `seed`, the round that
    the state counts, and the client.

    Args:
      model: The model, as `functional_model_from_keras` makes it. TFF's function of that name makes one too, without
        the losses that layers add.
      client_dataset: The client files.
      epochs: E, the number of local epochs.
      batch_size: B, the local minibatch size; None is the paper's B = inf.
      learning_rate: eta, the clients' learning rate; variables that its function uses keep the values that they have
        now. May be left out if the optimizer has one, which it replaces.
      client_optimizer: What the clients use in place of SGD; it starts anew in each round.
      proximal_strength: mu of FedProx (Li et al. 2020): how much a client is drawn to w_t; 0 is FedAvg.
      client_weighting: The weight of a client in the average: n_k, or 1 for each client of the round.
      server_optimizer: Applies the averaged update; by default SGD with rate 1, which is the paper's averaging. Others
        are FedAvgM, FedAdam, FedYogi and FedAdagrad (Reddi et al. 2021).
      aggregator: Averages the updates; by default it is the paper's average, as of `tff.aggregators.MeanFactory`. An
        unweighted factory gives every client of the round the same weight, also to one that is left out, whose update
        is 0.
      seed: Seeds the split of the clients' data into minibatches, their augmentation and the model's random layers.

    Returns:
      A process whose state is a `tff.learning.templates.LearningAlgorithmState`, with the number of finished rounds as
      `client_work`. Its metrics are "client_work" / "train" (loss: the mean over what local SGD saw; num_examples:
      m_t), "clients_left_out", "aggregator" and "finalizer" (update_non_finite: 1 if the weights stay as they were, for
      want of an average).

    Raises:
      TypeError: If an argument has another type.
      ValueError: If an argument is out of range, or the aggregator needs more than TFF's runtime can do.
    """
    check_model_and_data(model, client_dataset)
    epochs, batch_size = as_epochs_and_batch_size(epochs, batch_size, client_dataset.num_examples)
    if not isinstance(proximal_strength, numbers.Real):
        raise TypeError(f"proximal_strength (mu) is {proximal_strength!r}; it must be a number")
    if not 0 <= proximal_strength < np.inf:
        raise ValueError(f"proximal_strength (mu) is {proximal_strength}; it must be a number from 0 on")
    if client_optimizer is not None:
        client_optimizer = TracedOptimizer("client_optimizer", client_optimizer, model.initial_weights[0])
    if learning_rate is not None or client_optimizer is None:
        learning_rate = traced_learning_rate(learning_rate)

    def client_fn(weights, num_examples, batch_fn, round_number, seed):
        new_weights, loss_sum = client_update(
            model,
            weights,
            num_examples,
            batch_fn,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=None if learning_rate is None else learning_rate(round_number),
            seed=seed,
            optimizer=client_optimizer,
            proximal_strength=proximal_strength,
        )
        return [old - new for old, new in zip(weights.trainable, new_weights)], loss_sum / epochs

    return _build_learning_process(
        model, client_dataset, client_fn, seed, client_weighting, server_optimizer, aggregator
    )


def build_fed_sgd(
    model: tff.learning.models.FunctionalModel,
    client_dataset: ClientDataset,
    *,
    learning_rate: LearningRate,
    client_weighting: ClientWeighting = ClientWeighting.NUM_EXAMPLES,
    server_optimizer: Optimizer | None = None,
    aggregator: Factory | None = None,
    seed: int = 0,
) -> tff.learning.templates.LearningProcess:
    """Builds FederatedSGD (Section 2): each client sends one gradient over all its data.

    Equivalent to `build_fed_avg` with E = 1 and B = inf.

    Args:
      model: As for `build_fed_avg`.
      client_dataset: As for `build_fed_avg`.
      learning_rate: eta; as for `build_fed_avg`.
      client_weighting: As for `build_fed_avg`.
      server_optimizer: As for `build_fed_avg`; what it gets is eta times the averaged gradient.
      aggregator: As for `build_fed_avg`.
      seed: Seeds the augmentation of the clients' data and the model's random layers.

    Returns:
      A process as from `build_fed_avg`.

    Raises:
      TypeError: As `build_fed_avg`.
      ValueError: As `build_fed_avg`.
    """
    check_model_and_data(model, client_dataset)
    learning_rate = traced_learning_rate(learning_rate)

    def client_fn(weights, num_examples, batch_fn, round_number, seed):
        gradient, loss_sum = client_gradient(model, weights, num_examples, batch_fn, seed=seed)
        eta = learning_rate(round_number)
        return [eta * g for g in gradient], loss_sum

    return _build_learning_process(
        model, client_dataset, client_fn, seed, client_weighting, server_optimizer, aggregator
    )


def _build_learning_process(
    model: tff.learning.models.FunctionalModel,
    client_dataset: ClientDataset,
    client_fn: Callable,
    seed: int,
    client_weighting: ClientWeighting,
    server_optimizer: Optimizer | None,
    aggregator: Factory | None,
) -> tff.learning.templates.LearningProcess:
    """Builds the round that the module's docstring shows; `client_fn` computes d_k and the loss sum."""
    server_optimizer = tff.learning.optimizers.build_sgdm(1.0) if server_optimizer is None else server_optimizer
    server_optimizer = TracedOptimizer("server_optimizer", server_optimizer, model.initial_weights[0])
    if not isinstance(client_weighting, ClientWeighting):
        raise TypeError(f"client_weighting is {client_weighting!r}; it must be a tff.learning.ClientWeighting")

    @tff.tensorflow.computation
    def initial_weights():
        return tff.learning.models.ModelWeights(*tf.nest.map_structure(tf.constant, model.initial_weights))

    weights_type = initial_weights.type_signature.result

    client_work = _build_client_work(client_dataset, client_fn, seed, client_weighting)
    if aggregator is None:
        work, aggregation = _build_share_work(client_work, weights_type), _build_mean_of_shares(weights_type.trainable)
    else:
        work = tff.tensorflow.computation(client_work, weights_type, np.int32, np.int32)
        aggregation = _build_aggregation(aggregator, weights_type.trainable)

    @tff.tensorflow.computation(work.type_signature.result[2])
    def finalize_metrics(sums):
        loss = tf.math.divide_no_nan(sums["loss"], tf.cast(sums["num_examples"], tf.float32))
        return collections.OrderedDict(train=collections.OrderedDict(loss=loss, num_examples=sums["num_examples"]))

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
    @tff.federated_computation(
        initialize.type_signature.result, tff.FederatedType(work.type_signature.parameter[2], tff.CLIENTS)
    )
    def next_round(state, client_ids):
        w_t = state.global_model_weights
        round_number = state.client_work
        update, weight, sums = tff.federated_map(
            work, (tff.federated_broadcast(w_t), tff.federated_broadcast(round_number), client_ids)
        )
        averaged = aggregation.next(state.aggregator, update, weight)
        finalized = finalizer.next(state.finalizer, w_t, averaged.result)
        new_state = tff.learning.templates.LearningAlgorithmState(
            global_model_weights=finalized.result,
            distributor=state.distributor,
            client_work=tff.federated_map(increment, round_number),
            aggregator=averaged.state,
            finalizer=finalized.state,
        )
        sums = tff.federated_sum(sums)
        metrics = collections.OrderedDict(
            client_work=tff.federated_map(finalize_metrics, sums),
            clients_left_out=sums["clients_left_out"],
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

    return _LearningProcess(client_dataset, initialize, next_round, get_model_weights, set_model_weights)


def _build_client_work(
    client_dataset: ClientDataset, client_fn: Callable, seed: int, client_weighting: ClientWeighting
) -> Callable:
    """Builds the function of the weights, the round's number and a client's id that computes the client's part."""

    def client_work(weights, round_number, client_id):
        """Returns d_k, its weight, and what is summed up for the metrics."""
        records = client_dataset.read(client_id)
        num_examples = tf.shape(records)[0]
        update, loss_sum = client_fn(
            weights,
            num_examples,
            lambda indices, seed: client_dataset.batch(records, indices, seed),
            round_number,
            minibatch_seed(seed, round_number, client_id),
        )
        # A sum is finite if all its terms are, and takes less time than to look at each of them. That of the squares is
        # the norm's, by which aggregators clip: where it is infinite they would make NaN of the whole average.
        is_finite = tf.math.is_finite(loss_sum + 2 * tf.add_n([tf.nn.l2_loss(value) for value in update]))
        kept = tf.cast(is_finite, tf.int64)
        update = tf.cond(is_finite, lambda: update, lambda: [tf.zeros_like(value) for value in update])
        num_examples = kept * tf.cast(num_examples, tf.int64)
        weight = num_examples if client_weighting is ClientWeighting.NUM_EXAMPLES else kept
        sums = collections.OrderedDict(
            loss=tf.where(is_finite, loss_sum, 0.0), num_examples=num_examples, clients_left_out=1 - kept
        )
        return tuple(update), tf.cast(weight, tf.float32), sums

    return client_work


def _build_share_work(client_work: Callable, weights_type: tff.types.StructType) -> tff.Computation:
    """Builds `client_work` for the clients of a share of S_t, whose ids come as `[n]`."""

    @tff.tensorflow.computation(weights_type, np.int32, tff.TensorType(np.int32, [None]))
    def share_work(weights, round_number, client_ids):
        """Returns the sums of what `client_work` returns for each, with d_k times its weight."""

        def add_client(i, sums):
            update, weight, other = client_work(weights, round_number, client_ids[i])
            added = tuple(weight * value for value in update), weight, other
            return i + 1, tf.nest.map_structure(tf.add, sums, added)

        no_sums = collections.OrderedDict(loss=0.0, num_examples=np.int64(0), clients_left_out=np.int64(0))
        zero = tuple(tf.zeros_like(value) for value in weights.trainable), 0.0, no_sums
        _, sums = tf.while_loop(lambda i, _: i < tf.size(client_ids), add_client, (0, zero), parallel_iterations=1)
        return sums

    return share_work


class _LearningProcess(tff.learning.templates.LearningProcess):
    """A learning process that checks the ids of the clients, and warns where no worker is entered."""

    def __init__(self, client_dataset: ClientDataset, *computations: tff.Computation):
        super().__init__(*map(runtime.Computation, computations))
        self._checked_next = ForClients(client_dataset, super().next)

    @property
    def next(self):
        return self._checked_next


def _build_mean_of_shares(update_type: tff.types.StructType) -> tff.templates.AggregationProcess:
    """Builds the average of updates that come as weighted sums."""

    @tff.tensorflow.computation(update_type, np.float32)
    def divide(update_sum, weight_sum):
        # Where no client has a weight it is 0 / 0, and the finalizer leaves all as it is.
        return tf.nest.map_structure(lambda value: value / weight_sum, update_sum)

    @tff.federated_computation
    def initialize():
        return tff.federated_value((), tff.SERVER)

    @tff.federated_computation(
        initialize.type_signature.result,
        tff.FederatedType(update_type, tff.CLIENTS),
        tff.FederatedType(np.float32, tff.CLIENTS),
    )
    def next_average(state, update, weight):
        average = tff.federated_map(divide, (tff.federated_sum(update), tff.federated_sum(weight)))
        return tff.templates.MeasuredProcessOutput(state, average, tff.federated_value((), tff.SERVER))

    return tff.templates.AggregationProcess(initialize, next_average)


def _build_aggregation(aggregator: Factory, update_type: tff.types.StructType) -> tff.templates.AggregationProcess:
    if isinstance(aggregator, tff.aggregators.UnweightedAggregationFactory):
        aggregator = tff.aggregators.as_weighted_aggregator(aggregator)
    if not isinstance(aggregator, tff.aggregators.WeightedAggregationFactory):
        raise TypeError(
            f"aggregator is {aggregator!r}; it must be an aggregation factory, such as tff.learning.robust_aggregator()"
        )
    kind = type(aggregator).__name__
    try:
        aggregation = aggregator.create(update_type, tff.TensorType(np.float32))
        tff.test.assert_not_contains_secure_aggregation(aggregation.next)
    except AssertionError as e:
        raise ValueError(
            f"aggregator is a {kind} that needs secure sums, which TFF's runtime does not have; "
            "tff.learning.robust_aggregator() is the same without them"
        ) from e
    except Exception as e:  # Of any kind: it may be somebody else's code.
        raise ValueError(f"aggregator is a {kind} of which TFF can make nothing here: {first_error(e)}") from e
    return aggregation


def check_model_and_data(
    model: tff.learning.models.FunctionalModel, client_dataset: ClientDataset, *, trains: bool = True
) -> None:
    """Raises a `TypeError` for what is something else, and says what to call; a `ValueError` if they do not fit.

    Only to train both have to have sample weights, or neither.
    """
    if not isinstance(model, tff.learning.models.FunctionalModel):
        raise TypeError(
            f"model is a {type(model).__name__}; make a functional model of a Keras model with "
            "tff_fedavg.functional_model_from_keras(keras_model, loss, client_dataset.batch_spec)"
        )
    if not isinstance(client_dataset, ClientDataset):
        raise TypeError(
            f"client_dataset is a {type(client_dataset).__name__}; it must be a ClientDataset, which "
            "ClientDataset.from_arrays and ClientDataset.from_client_data make"
        )
    if not client_dataset.num_examples.sum():
        raise ValueError("client_dataset has no examples")
    takes, has = model.input_spec, client_dataset.batch_spec
    takes = tuple(takes.values() if isinstance(takes, Mapping) else takes)  # TFF's examples name them x and y.
    if not trains:
        takes, has = takes[:2], has[:2]
    if not fits(takes, has):
        takes, has = (tf.nest.map_structure(lambda s: f"{s.dtype.name} {s.shape}", spec) for spec in (takes, has))
        raise ValueError(
            f"model takes batches {takes}, and client_dataset has {has}: make the model with its batch_spec"
        )


def traced_learning_rate(learning_rate: LearningRate) -> Callable[[tf.Tensor], float | tf.Tensor]:
    """Returns eta as a function of the number of finished rounds, an integer scalar in any graph.

    Raises:
      TypeError: If it is neither a number nor a function.
      ValueError: If it is no number above 0, or its function fails.
    """
    if callable(learning_rate):
        traced = TracedFunction("learning_rate", learning_rate, [tf.TensorSpec([], tf.float32)])
        spec = traced.output_spec
        is_number = isinstance(spec, tf.TensorSpec) and spec.shape.rank == 0
        if not (is_number and (spec.dtype.is_floating or spec.dtype.is_integer)):
            raise ValueError(f"learning_rate (eta) is a function that returns {spec}; it must return a number")
        return lambda round_number: tf.cast(traced(tf.cast(round_number, tf.float32)), tf.float32)
    if isinstance(learning_rate, bool) or not isinstance(learning_rate, numbers.Real):
        raise TypeError(f"learning_rate (eta) is {learning_rate!r}; it must be a number or a function of the rounds")
    if not np.float32(learning_rate) > 0 or not np.isfinite(np.float32(learning_rate)):
        raise ValueError(f"learning_rate (eta) is {learning_rate}; it must be a number above 0, also in float32")
    learning_rate = float(learning_rate)
    return lambda round_number: learning_rate
