"""The systems that `round_time` compares: each builds a function that runs one round of a task.

All of them start from the same weights, and get the same examples in the same order, in batches of the same size. The
norms of their updates show it.
"""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

import tff_fedavg
from benchmarks.peers.work import Work
from tasks.task import Task
from tff_fedavg.client_update import client_update, minibatch_seed
from tff_fedavg.masked import MaskedCrossentropy

# The speed does not depend on them, but by how much the rounding of float32 changes the updates: in the text models of
# small ones more, in the CNN of large ones, since it decides which of many equal pixels the pooling takes.
_LEARNING_RATES = {"mnist_cnn": 0.01, "shakespeare_lstm": 1.0, "stackoverflow_lstm": 1.0}
_DEFAULT_LEARNING_RATE = 0.1

_PEERS = pathlib.Path(__file__).parent / "peers"

KerasModelFn = Callable[[], tf.keras.Model]
Weights = Sequence[np.ndarray]
# Runs a round. What it returns computes the norm of the update of each weight, in Keras's order: that is not timed.
RoundFn = Callable[[], Callable[[], list[float]]]


def initial_weights(keras_model_fn: KerasModelFn) -> Weights:
    """Returns the weights with which all systems start."""
    tf.keras.utils.set_random_seed(0)
    return keras_model_fn().get_weights()


def tff_fedavg_round(
    task: Task, keras_model_fn: KerasModelFn, *, weights: Weights, clients: int, batch_size: int
) -> RoundFn:
    """This project's round, E = 1."""
    model = tff_fedavg.functional_model_from_keras(keras_model_fn, task.loss, task.train.batch_spec)
    process = tff_fedavg.build_fed_avg(
        model, task.train, epochs=1, batch_size=batch_size, learning_rate=_learning_rate(task)
    )
    state = process.set_model_weights(
        process.initialize(), tff.learning.models.ModelWeights(tuple(weights), tuple(model.initial_weights[1]))
    )

    def run_round():
        output = process.next(state, list(range(clients)))
        return lambda: _norms(output.state.global_model_weights.trainable, weights)

    return run_round


def tff_learning_round(
    task: Task,
    keras_model_fn: KerasModelFn,
    *,
    weights: Weights,
    clients: int,
    batch_size: int,
    loop_implementation: tff.learning.LoopImplementation,
) -> RoundFn:
    """TFF's `build_weighted_fed_avg` as its users have it: examples in memory, tf.data, and TFF's own runtime."""
    datasets = [
        tf.data.Dataset.from_tensor_slices(_stored(task, k))
        .batch(batch_size)
        .map(lambda examples: task.train.preprocess_fn(examples))
        for k in range(clients)
    ]
    process = tff.learning.algorithms.build_weighted_fed_avg(
        lambda: tff.learning.models.from_keras_model(keras_model_fn(), task.loss, input_spec=task.train.batch_spec),
        client_optimizer_fn=tff.learning.optimizers.build_sgdm(_learning_rate(task)),
        loop_implementation=loop_implementation,
    )
    context = tff.backends.native.create_sync_local_cpp_execution_context()
    with tff.framework.get_context_stack().install(context):
        state = process.set_model_weights(process.initialize(), tff.learning.models.ModelWeights(list(weights), []))

    def run_round():
        with tff.framework.get_context_stack().install(context):
            output = process.next(state, datasets)
        return lambda: _norms(output.state.global_model_weights.trainable, weights)

    return run_round


def bare_loop_round(
    task: Task,
    keras_model_fn: KerasModelFn,
    *,
    weights: Weights,
    clients: int,
    batch_size: int,
    client_per_core: bool,
) -> RoundFn:
    """The limit: the same SGD steps without TFF, in this process, on examples in memory, averaged by NumPy.

    Args:
      task: The task.
      keras_model_fn: Builds the model.
      weights: The initial weights.
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
        placeholders = tf.nest.map_structure(
            lambda w: tf.compat.v1.placeholder(w.dtype, w.shape),
            tff.learning.models.ModelWeights(*model.initial_weights),
        )
        examples = tf.compat.v1.placeholder(tf.uint8, [None, task.train.record_bytes])
        client_id = tf.compat.v1.placeholder(tf.int32, [])
        new_weights, _ = client_update(
            model,
            placeholders,
            tf.shape(examples)[0],
            lambda indices, seed: task.train.batch(examples, indices, seed),
            epochs=1,
            batch_size=batch_size,
            learning_rate=_learning_rate(task),
            seed=minibatch_seed(0, 0, client_id),
        )
        config = tf.compat.v1.ConfigProto(intra_op_parallelism_threads=threads, inter_op_parallelism_threads=threads)
        inputs = [*placeholders.trainable, examples, client_id]
        update = tf.compat.v1.Session(config=config).make_callable(new_weights, inputs)

    def train(k):
        return update(*weights, records[k], k)

    pool = concurrent.futures.ThreadPoolExecutor(at_once)

    def run_round():
        updated = pool.map(train, range(clients))
        averaged = [np.average(w, axis=0, weights=task.train.num_examples[:clients]) for w in zip(*updated)]
        return lambda: _norms(averaged, weights)

    return run_round


def peer_round(
    task: Task,
    keras_model_fn: KerasModelFn,
    *,
    weights: Weights,
    clients: int,
    batch_size: int,
    name: str,
    python: pathlib.Path,
) -> RoundFn:
    """A round of a peer: `peers/with_NAME.py`, run by the Python that has what it needs, with a model of its own.

    The program ends when its stdin does: with this process, at the latest.
    """
    del keras_model_fn
    masked = task.loss if isinstance(task.loss, MaskedCrossentropy) else None
    work = Work(
        task=task.name,
        weights=weights,
        clients=[_preprocessed(task, k) for k in range(clients)],
        batch_size=batch_size,
        learning_rate=_learning_rate(task),
        padding=masked and masked.ignore_class,
        unroll=masked and masked.unroll,
    )

    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/work.npz"
        work.save(path)
        process = subprocess.Popen(
            [python, _PEERS / f"with_{name}.py", path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_WAIT_POLICY": "passive"},  # While others have their turn.
            start_new_session=True,  # Ctrl-C in the terminal is for the program, with which this one ends.
        )

        def read_line():
            if line := process.stdout.readline():
                return line
            raise RuntimeError(f"{name} ended with exit status {process.wait()}; see above")

        def run_round():
            with contextlib.suppress(BrokenPipeError):  # Which `read_line` tells better.
                process.stdin.write("\n")
                process.stdin.flush()
            read_line()
            return lambda: json.loads(read_line())

        read_line()
        run_round()()  # Before it, not all of a peer's processes may have read the file.
    return run_round


def _learning_rate(task: Task) -> float:
    return _LEARNING_RATES.get(task.name, _DEFAULT_LEARNING_RATE)


def _order(task: Task, client: int) -> np.ndarray:
    """Returns the order in which this project's first round takes the examples of a client."""
    indices = tf.range(int(task.train.num_examples[client]))
    return tf.random.experimental.stateless_shuffle(indices, minibatch_seed(0, 0, client)).numpy()


def _stored(task: Task, client: int) -> dict[str, np.ndarray]:
    """Returns the examples of a client as they are stored, in that order."""
    order = _order(task, client)
    return {name: column[order] for name, column in task.train.load(client).items()}


def _preprocessed(task: Task, client: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the examples of a client as the model gets them, in that order."""
    x, y = task.train.preprocess_fn(tf.nest.map_structure(tf.constant, _stored(task, client)))
    return x.numpy(), y.numpy()


def _norms(weights: Iterable[np.ndarray], initial: Weights) -> list[float]:
    return [float(np.linalg.norm(np.subtract(w, w_0))) for w, w_0 in zip(weights, initial, strict=True)]


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
            tf.keras.layers.Embedding(
                symbols, dimensions, embeddings_initializer=tf.keras.initializers.RandomUniform(-1, 1)
            ),
            *[lstm_layer() for _ in range(layers)],
            tf.keras.layers.Dense(symbols),
        ]
    )
