"""The systems that `round_time` compares: each builds a function that runs one round of a task.

All of them start from the initial weights, and get the same examples and batches of the same size.
"""

import concurrent.futures
import os
from collections.abc import Callable

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

import tff_fedavg
from tasks.task import Task
from tff_fedavg.client_update import client_update, minibatch_seed

LEARNING_RATE = 0.1

KerasModelFn = Callable[[], tf.keras.Model]
RoundFn = Callable[[], object]


def tff_fedavg_round(task: Task, keras_model_fn: KerasModelFn, *, clients: int, batch_size: int) -> RoundFn:
    """This project's round, E = 1."""
    model = tff_fedavg.functional_model_from_keras(keras_model_fn, task.loss, task.train.batch_spec)
    process = tff_fedavg.build_fed_avg(model, task.train, epochs=1, batch_size=batch_size, learning_rate=LEARNING_RATE)
    state = process.initialize()
    return lambda: process.next(state, list(range(clients)))


def tff_learning_round(
    task: Task,
    keras_model_fn: KerasModelFn,
    *,
    clients: int,
    batch_size: int,
    loop_implementation: tff.learning.LoopImplementation,
) -> RoundFn:
    """TFF's `build_weighted_fed_avg` as its users have it: examples in memory, tf.data, and TFF's own runtime."""
    datasets = [
        tf.data.Dataset.from_tensor_slices(task.train.load(k))
        .batch(batch_size)
        .map(lambda examples: task.train.preprocess_fn(examples, tf.zeros([2], tf.int64)))
        for k in range(clients)
    ]
    process = tff.learning.algorithms.build_weighted_fed_avg(
        lambda: tff.learning.models.from_keras_model(keras_model_fn(), task.loss, input_spec=task.train.batch_spec),
        client_optimizer_fn=tff.learning.optimizers.build_sgdm(LEARNING_RATE),
        loop_implementation=loop_implementation,
    )
    context = tff.backends.native.create_sync_local_cpp_execution_context()
    with tff.framework.get_context_stack().install(context):
        state = process.initialize()

    def run_round():
        with tff.framework.get_context_stack().install(context):
            return process.next(state, datasets)

    return run_round


def bare_loop_round(
    task: Task, keras_model_fn: KerasModelFn, *, clients: int, batch_size: int, client_per_core: bool
) -> RoundFn:
    """The limit: the same SGD steps without TFF, in this process, on examples in memory, averaged by NumPy.

    Args:
      task: The task.
      keras_model_fn: Builds the model.
      clients: Clients in the round.
      batch_size: B.
      client_per_core: As many clients at once as there are cores, each on one core; else one client after the other,
        on all cores.
    """
    cores = len(os.sched_getaffinity(0))
    at_once, threads = (cores, 1) if client_per_core else (1, cores)
    model = tff_fedavg.functional_model_from_keras(keras_model_fn, task.loss, task.train.batch_spec)
    offsets = np.concatenate([[0], np.cumsum(task.train.num_examples[:clients])])
    records = [task.train.gather(np.arange(*bounds)) for bounds in zip(offsets, offsets[1:])]
    with tf.Graph().as_default():
        weights = tf.nest.map_structure(
            lambda w: tf.compat.v1.placeholder(w.dtype, w.shape),
            tff.learning.models.ModelWeights(*model.initial_weights),
        )
        examples = tf.compat.v1.placeholder(tf.uint8, [None, task.train.record_bytes])
        client_id = tf.compat.v1.placeholder(tf.int32, [])
        new_weights, _ = client_update(
            model,
            weights,
            tf.shape(examples)[0],
            lambda indices, seed: task.train.batch(examples, indices, seed),
            epochs=1,
            batch_size=batch_size,
            learning_rate=LEARNING_RATE,
            seed=minibatch_seed(0, 0, client_id),
        )
        config = tf.compat.v1.ConfigProto(intra_op_parallelism_threads=threads, inter_op_parallelism_threads=threads)
        inputs = [*weights.trainable, examples, client_id]
        update = tf.compat.v1.Session(config=config).make_callable(new_weights, inputs)

    def train(k):
        return update(*model.initial_weights[0], records[k], k)

    pool = concurrent.futures.ThreadPoolExecutor(at_once)

    def run_round():
        updated = pool.map(train, range(clients))
        return [np.average(w, axis=0, weights=task.train.num_examples[:clients]) for w in zip(*updated)]

    return run_round


class PeepholeLSTMCell(tf.keras.layers.LSTMCell):
    """Keras's LSTM cell with the peepholes that its former `PeepholeLSTMCell` had."""

    def build(self, input_shape):
        super().build(input_shape)
        self.peepholes = [self.add_weight(name, (self.units,)) for name in ("input", "forget", "output")]

    def _compute_carry_and_output_fused(self, z, c_tm1):
        p_i, p_f, p_o = self.peepholes
        i = self.recurrent_activation(z[0] + p_i * c_tm1)
        f = self.recurrent_activation(z[1] + p_f * c_tm1)
        c = f * c_tm1 + i * self.activation(z[2])
        return c, self.recurrent_activation(z[3] + p_o * c)


def keras_lstm() -> tf.keras.layers.Layer:
    """The LSTM without peepholes that Keras users would take."""
    return tf.keras.layers.LSTM(256, return_sequences=True)


def keras_peephole_lstm() -> tf.keras.layers.Layer:
    """The LSTM with peepholes as Keras users would write it."""
    return tf.keras.layers.RNN(PeepholeLSTMCell(256, implementation=2), return_sequences=True)


# By task: symbols, dimensions of their embedding, and number of LSTM layers.
_LSTM_SHAPES = {"shakespeare_lstm": (258, 8, 2), "stackoverflow_lstm": (10_000, 192, 1)}


def lstm_model_fn(task_name: str, lstm_layer: Callable[[], tf.keras.layers.Layer]) -> KerasModelFn | None:
    """Returns a builder of `models.char_lstm` or `models.word_lstm` with other LSTM layers; None for other tasks."""
    if task_name not in _LSTM_SHAPES:
        return None
    symbols, dimensions, layers = _LSTM_SHAPES[task_name]
    return lambda: tf.keras.Sequential(
        [
            tf.keras.layers.InputLayer([None], dtype=tf.int32),
            tf.keras.layers.Embedding(symbols, dimensions),
            *[lstm_layer() for _ in range(layers)],
            tf.keras.layers.Dense(symbols),
        ]
    )
