"""Seconds, CPU seconds and memory of a round: this project beside TFF's own FedAvg, on the same data and machine.

    python -m benchmarks.round_time --task=mnist_2nn --data=embedded
    python -m benchmarks.round_time --task=shakespeare_lstm --data=embedded

The systems take turns within one run, so a machine that is slow for a while is slow for all of them. The times are
medians; the ratios are those to this project. For the LSTMs, TFF gets the layer that Keras users would write, and this
project's loop runs with Keras's LSTM layers too, which shows what `tff_fedavg.layers.PeepholeLSTM` alone brings. The
memory is the largest that a system's worker has had; variants of one system in one worker share it.
"""

import collections
import os
import pathlib
import re
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import psutil
import tensorflow as tf
import tensorflow_federated as tff
from absl import app, flags

import tasks
import tff_fedavg
from binaries import task_flags

_CLIENTS_PER_ROUND = flags.DEFINE_integer("clients_per_round", 10, "Clients in a round.", lower_bound=1)
_LOCAL_EPOCHS = flags.DEFINE_integer("local_epochs", 1, "E, epochs of local SGD in a round.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 10, "B, the local minibatch size.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed rounds of each system, after one to warm up.", lower_bound=1)

_LEARNING_RATE = 0.1


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


def lstm_network(symbols, dimensions, lstm_layers):
    """Keras's own layers in the shape of `models.char_lstm` and `models.word_lstm`."""
    return tf.keras.Sequential(
        [
            tf.keras.layers.InputLayer([None], dtype=tf.int32),
            tf.keras.layers.Embedding(symbols, dimensions),
            *lstm_layers,
            tf.keras.layers.Dense(symbols),
        ]
    )


def keras_lstm():
    return tf.keras.layers.LSTM(256, return_sequences=True)


def keras_peephole_lstm():
    return tf.keras.layers.RNN(PeepholeLSTMCell(256, implementation=2), return_sequences=True)


# By task: symbols, dimensions of their embedding, and number of layers.
LSTM_SHAPES = {"shakespeare_lstm": (258, 8, 2), "stackoverflow_lstm": (10_000, 192, 1)}


def build_our_round(task, keras_model_fn):
    model = tff.learning.models.functional_model_from_keras(keras_model_fn, task.loss, task.train.batch_spec)
    process = tff_fedavg.build_fed_avg(
        model,
        task.train,
        epochs=_LOCAL_EPOCHS.value,
        batch_size=_BATCH_SIZE.value,
        learning_rate=_LEARNING_RATE,
    )
    state = process.initialize()
    return lambda: process.next(state, list(range(_CLIENTS_PER_ROUND.value)))


def build_tff_round(task, keras_model_fn, loop_implementation):
    """TFF's FedAvg as its users have it: examples in memory, batched by tf.data, in TFF's own runtime."""
    datasets = [
        tf.data.Dataset.from_tensor_slices(task.train.load(k))
        .batch(_BATCH_SIZE.value)
        .enumerate()
        .map(lambda step, examples: task.train.preprocess_fn(examples, tf.stack([step, 0])))
        .repeat(_LOCAL_EPOCHS.value)
        for k in range(_CLIENTS_PER_ROUND.value)
    ]
    process = tff.learning.algorithms.build_weighted_fed_avg(
        lambda: tff.learning.models.from_keras_model(keras_model_fn(), task.loss, input_spec=task.train.batch_spec),
        client_optimizer_fn=tff.learning.optimizers.build_sgdm(_LEARNING_RATE),
        loop_implementation=loop_implementation,
    )
    context = tff.backends.native.create_sync_local_cpp_execution_context()
    with tff.framework.get_context_stack().install(context):
        state = process.initialize()

    def run_round():
        with tff.framework.get_context_stack().install(context):
            return process.next(state, datasets)

    return run_round


def build_rounds(task):
    """Returns, by name of the system, a function that runs one round from the initial weights."""
    reduce, iterator = tff.learning.LoopImplementation.DATASET_REDUCE, tff.learning.LoopImplementation.DATASET_ITERATOR
    keras_model_fn = task.keras_model_fn
    rounds = {"tff_fedavg": build_our_round(task, keras_model_fn)}
    if shape := LSTM_SHAPES.get(task.name):
        symbols, dimensions, layers = shape

        def build_network(layer):
            return lambda: lstm_network(symbols, dimensions, [layer() for _ in range(layers)])

        rounds["tff_fedavg, Keras LSTM"] = build_our_round(task, build_network(keras_lstm))
        keras_model_fn = build_network(keras_peephole_lstm)
    rounds["build_weighted_fed_avg, default"] = build_tff_round(task, keras_model_fn, reduce)
    rounds["build_weighted_fed_avg, iterator"] = build_tff_round(task, keras_model_fn, iterator)
    return rounds


def cpu_seconds():
    """CPU time of this program and of its workers."""
    processes = [psutil.Process(), *psutil.Process().children()]
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def peak_megabytes(process):
    """The largest resident memory that a process has had."""
    status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1e3


def main(argv):
    del argv
    settings = task_flags.settings()
    with tff_fedavg.local_worker():
        workers = psutil.Process().children()
        task = tasks.build_task(settings.pop("task"), **settings, **task_flags.directories())
        rounds = build_rounds(task)
        worker, seconds, cpu = {}, collections.defaultdict(list), collections.defaultdict(list)
        for name, run_round in rounds.items():  # To warm up. TFF starts a worker when it runs its first round.
            run_round()
            worker[name] = next((child for child in psutil.Process().children() if child not in workers), workers[0])
            workers.append(worker[name])
        for _ in range(_REPEATS.value):
            for name, run_round in rounds.items():
                start, cpu_start = time.monotonic(), cpu_seconds()
                run_round()
                seconds[name].append(time.monotonic() - start)
                cpu[name].append(cpu_seconds() - cpu_start)
        for name in rounds:
            wall, cpu_time = np.median(seconds[name]), np.median(cpu[name])
            print(
                f"{name:34} {wall:8.3f} s {wall / np.median(seconds['tff_fedavg']):6.2f}x   "
                f"{cpu_time:8.3f} CPU s {cpu_time / np.median(cpu['tff_fedavg']):6.2f}x   "
                f"worker {peak_megabytes(worker[name]):6.0f} MB"
            )
        print(f"{'program':34} {'':49} {peak_megabytes(psutil.Process()):6.0f} MB")
        # TFF's own worker would outlive the program.
        for process in psutil.Process().children():
            process.kill()


if __name__ == "__main__":
    app.run(main)
