"""Seconds a round: this project beside TFF's own FedAvg, on the same model, data, batches and machine.

    python -m benchmarks.round_time --task=mnist_2nn --data=mnist --data_dir=...

The systems take turns within one run, so a machine that is slow for a while is slow for all of them.
"""

import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff
from absl import app, flags

import tasks
import tff_fedavg

_TASK = flags.DEFINE_enum("task", "mnist_2nn", sorted(tasks.TASKS), "Data set and model.")
_DATA = flags.DEFINE_string("data", None, "Data source of the task; by default the embedded one.")
_DATA_DIR = flags.DEFINE_string("data_dir", "~/.cache/tff_fedavg/data", "Where the data are.")
_CACHE_DIR = flags.DEFINE_string("cache_dir", "~/.cache/tff_fedavg/clients", "Where the client files are kept.")
_CLIENTS_PER_ROUND = flags.DEFINE_integer("clients_per_round", 10, "Clients in a round.", lower_bound=1)
_LOCAL_EPOCHS = flags.DEFINE_integer("local_epochs", 1, "E, epochs of local SGD in a round.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 10, "B, the local minibatch size.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed rounds of each system, after one to warm up.", lower_bound=1)

_LEARNING_RATE = 0.1


def build_rounds(task, model):
    """Returns, by name of the system, a function that runs one round from the initial weights."""
    client_ids = list(range(_CLIENTS_PER_ROUND.value))
    process = tff_fedavg.build_fed_avg(
        model,
        task.train,
        epochs=_LOCAL_EPOCHS.value,
        batch_size=_BATCH_SIZE.value,
        learning_rate=_LEARNING_RATE,
    )
    state = process.initialize()
    rounds = {"tff_fedavg": lambda: process.next(state, client_ids)}

    # The data as a user of TFF has them: examples in memory, preprocessed and batched by tf.data.
    datasets = [
        tf.data.Dataset.from_tensor_slices(task.train.load(k)).batch(_BATCH_SIZE.value).repeat(_LOCAL_EPOCHS.value)
        for k in client_ids
    ]
    datasets = [dataset.map(task.train.preprocess_fn) for dataset in datasets]
    # TFF's own runtime, with its own worker and settings.
    context = tff.backends.native.create_sync_local_cpp_execution_context()
    for name, loop in (
        ("build_weighted_fed_avg, default", tff.learning.LoopImplementation.DATASET_REDUCE),
        ("build_weighted_fed_avg, iterator", tff.learning.LoopImplementation.DATASET_ITERATOR),
    ):
        reference = tff.learning.algorithms.build_weighted_fed_avg(
            model,
            client_optimizer_fn=tff.learning.optimizers.build_sgdm(_LEARNING_RATE),
            loop_implementation=loop,
        )
        with tff.framework.get_context_stack().install(context):
            reference_state = reference.initialize()

        def reference_round(reference=reference, reference_state=reference_state):
            with tff.framework.get_context_stack().install(context):
                return reference.next(reference_state, datasets)

        rounds[name] = reference_round
    return rounds


def main(argv):
    del argv
    with tff_fedavg.local_worker():
        entry = tasks.TASKS[_TASK.value]
        task = tasks.build_task(
            _TASK.value,
            data=_DATA.value or entry.embedded,
            data_dir=os.path.expanduser(_DATA_DIR.value),
            cache_dir=os.path.expanduser(_CACHE_DIR.value),
            partition=entry.partitions[0],
            clients=None,
            seed=0,
        )
        rounds = build_rounds(task, task.build_model(0))
        seconds = {name: [] for name in rounds}
        for repeat in range(_REPEATS.value + 1):
            for name, run_round in rounds.items():
                start = time.monotonic()
                run_round()
                if repeat > 0:
                    seconds[name].append(time.monotonic() - start)
        ours = np.median(seconds["tff_fedavg"])
        for name, values in seconds.items():
            print(f"{name:34} {np.median(values):8.3f} s a round   {np.median(values) / ours:5.2f}x")


if __name__ == "__main__":
    app.run(main)
