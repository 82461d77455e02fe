"""Centralised SGD, the baseline of Table 3: the data of all clients in one place, one minibatch update a round."""

import collections

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from tff_fedavg.client_data import ClientDataset
from tff_fedavg.client_update import sgd_step
from tff_fedavg.fed_avg import LearningRate, check_model_and_data, traced_learning_rate
from tff_fedavg.integer import as_integer


class CentralizedSGD:
    """SGD on the examples of all clients together: `initialize` and `next`, on the state that `build_fed_avg` has.

    It runs in this process on all cores, not in TFF's worker: a computation call per update would take longer than the
    update. The examples stay on disk; each update reads its own.
    """

    def __init__(
        self,
        model: tff.learning.models.FunctionalModel,
        client_dataset: ClientDataset,
        *,
        batch_size: int,
        learning_rate: LearningRate,
        seed: int = 0,
    ):
        """Builds the process.

        Args:
          model: The model, as `functional_model_from_keras` makes it.
          client_dataset: The client files.
          batch_size: B, examples per update; the paper has 100. The last minibatch of an epoch is smaller when B does
            not divide the number of examples.
          learning_rate: eta; a schedule is a function of the number of finished updates.
          seed: Seeds the order of the examples, a new one in each epoch, their augmentation and random layers.

        Raises:
          TypeError: If an argument has another type.
          ValueError: If an argument is out of range, or there are no examples.
        """
        batch_size = as_integer("batch_size (B)", batch_size)
        seed = as_integer("seed", seed, 0, 2**63 - 1)
        learning_rate = traced_learning_rate(learning_rate)
        check_model_and_data(model, client_dataset)
        self._model = model
        self._client_dataset = client_dataset
        self._batch_size = batch_size
        self._seed = seed
        self._num_examples = int(client_dataset.num_examples.sum())

        # A session, since a call of it costs less than one of a `tf.function`.
        with tf.Graph().as_default():
            weights = tf.nest.map_structure(
                lambda w: tf.compat.v1.placeholder(w.dtype, w.shape),
                tff.learning.models.ModelWeights(*model.initial_weights),
            )
            records = tf.compat.v1.placeholder(tf.uint8, [None, client_dataset.record_bytes])
            update_number = tf.compat.v1.placeholder(tf.int64, [])
            step_seed = tf.compat.v1.placeholder(tf.int64, [2])
            batch = client_dataset.batch(records, tf.range(tf.shape(records)[0]), step_seed)
            step = sgd_step(model, weights, batch, learning_rate(update_number), step_seed)
            inputs = [*tf.nest.flatten(weights), records, update_number, step_seed]
            self._update = tf.compat.v1.Session().make_callable(step, inputs)

    def initialize(self) -> tff.learning.templates.LearningAlgorithmState:
        """Returns the initial state. It counts the finished updates as `client_work`."""
        return tff.learning.templates.LearningAlgorithmState(
            global_model_weights=tff.learning.models.ModelWeights(*self._model.initial_weights),
            distributor=(),
            client_work=np.int32(0),
            aggregator=(),
            finalizer=(),
        )

    def next(
        self, state: tff.learning.templates.LearningAlgorithmState, num_updates: int
    ) -> tff.learning.templates.LearningProcessOutput:
        """Runs some updates; a pure function, however the updates are divided among calls.

        Args:
          state: The state.
          num_updates: How many updates, each counted as a round.

        Returns:
          The new state, and the metrics "client_work" / "train" (loss: the mean over what these updates saw;
          num_examples) and "finalizer" (update_non_finite: 1 if a weight is no longer finite).

        Raises:
          TypeError: If num_updates is no integer.
          ValueError: If it is less than 1.
        """
        num_updates = as_integer("num_updates", num_updates)
        first = int(state.client_work)
        weights, non_trainable = state.global_model_weights.trainable, state.global_model_weights.non_trainable
        losses, sizes = [], []
        for update_number in range(first, first + num_updates):
            indices, seed = self._minibatch(update_number)
            records = self._client_dataset.gather(indices)
            weights, loss = self._update(*weights, *non_trainable, records, update_number, seed)
            losses.append(loss)
            sizes.append(len(indices))
        new_state = state._replace(
            global_model_weights=state.global_model_weights._replace(trainable=tuple(weights)),
            client_work=np.int32(first + num_updates),
        )
        train = collections.OrderedDict(loss=np.average(losses, weights=sizes), num_examples=sum(sizes))
        metrics = collections.OrderedDict(
            client_work=collections.OrderedDict(train=train),
            finalizer=collections.OrderedDict(update_non_finite=int(not all(np.isfinite(w).all() for w in weights))),
        )
        return tff.learning.templates.LearningProcessOutput(new_state, metrics)

    def _minibatch(self, update_number: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the int64 indices of the examples of an update, and the int64 `[2]` seed of their augmentation."""
        updates_per_epoch = -(-self._num_examples // self._batch_size)
        epoch, position = divmod(update_number, updates_per_epoch)
        seed = tf.random.experimental.stateless_fold_in(tf.constant([self._seed, 0], tf.int64), epoch)
        begin = position * self._batch_size
        places = tf.range(begin, min(begin + self._batch_size, self._num_examples), dtype=tf.int64)
        # Only these places of the epoch's random order are computed: there may be 10^8 examples.
        indices = tf.random.experimental.index_shuffle(places, seed, self._num_examples - 1)
        return indices.numpy(), tf.random.experimental.stateless_fold_in(seed, position).numpy()
