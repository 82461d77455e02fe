"""Fixtures that several test modules share."""

import collections
import os
import pathlib
import signal
import subprocess
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import psutil
import pytest
import tensorflow as tf
import tensorflow_federated as tff

from tff_fedavg.client_data import ClientDataset
from tff_fedavg.client_files import write_client_dataset
from tff_fedavg.runtime import local_worker

# A shell has its background jobs ignore Ctrl-C, and so would the programs that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = pathlib.Path(__file__).parent.parent
NO_SEED = tf.zeros([2], tf.int64)
NUM_FEATURES = 4
NUM_CLASSES = 3


def pytest_addoption(parser):
    parser.addoption("--damage_cases", type=int, default=200, help="How many times each kind of file is damaged.")


def identity(example, seed):
    """The preprocess_fn for examples of "x" and "y"."""
    return example["x"], example["y"]


def read_in_graph(dataset, client_id):
    """All examples of a client, as a batch."""

    @tf.function
    def read(k):
        records = dataset.read(k)
        return dataset.batch(records, tf.range(tf.shape(records)[0]), NO_SEED)

    return [t.numpy() for t in read(tf.constant(client_id))]


@pytest.fixture(scope="session")
def worker():
    """A running TFF worker."""
    with local_worker():
        yield


def own_worker():
    """The process of the worker that was started last."""
    workers = [p for p in psutil.Process().children(recursive=True) if p.name() == "worker_binary"]
    return max(workers, key=psutil.Process.create_time)


@pytest.fixture(scope="session")
def short_run(tmp_path_factory):
    """The directory of a run of three rounds of mnist_2nn; beside it, the client files are in cache/."""
    directory = tmp_path_factory.mktemp("short_run")
    flags = ["--data=embedded", "--rounds=3", f"--run_dir={directory}/run", f"--cache_dir={directory}/cache"]
    subprocess.run([sys.executable, "-m", "binaries.train", *flags], cwd=ROOT, check=True, timeout=120)
    return directory / "run"


@pytest.fixture(scope="session")
def full_data_dir():
    """The directory with the full data sets, for tests that need them."""
    if not (path := os.environ.get("TFF_FEDAVG_TEST_DATA")):
        pytest.skip("TFF_FEDAVG_TEST_DATA does not name a directory with the full data sets")
    return pathlib.Path(path)


@pytest.fixture(scope="session")
def client_arrays():
    """Examples of six clients of unequal size, one of them empty."""
    rng = np.random.default_rng(0)
    return [
        {
            "x": rng.normal(size=[n, NUM_FEATURES]).astype(np.float32),
            "y": rng.integers(NUM_CLASSES, size=n).astype(np.uint8),
        }
        for n in (7, 1, 0, 20, 10, 12)
    ]


@pytest.fixture(scope="session")
def client_dataset(tmp_path_factory, client_arrays):
    directory = tmp_path_factory.mktemp("clients")
    write_client_dataset(directory, client_arrays)
    return ClientDataset(directory, lambda e, seed: (e["x"], tf.cast(e["y"], tf.int32)))


@pytest.fixture(scope="session")
def model(client_dataset):
    """A network with one hidden layer; the weights are W1, b1, W2, b2."""
    tf.keras.utils.set_random_seed(0)
    keras_model = tf.keras.Sequential(
        [
            tf.keras.layers.InputLayer([NUM_FEATURES]),
            tf.keras.layers.Dense(5, activation="relu"),
            tf.keras.layers.Dense(NUM_CLASSES),
        ]
    )
    return tff.learning.models.functional_model_from_keras(
        keras_model,
        tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        client_dataset.batch_spec,
        collections.OrderedDict(
            loss=lambda: tf.keras.metrics.SparseCategoricalCrossentropy(from_logits=True, name="loss"),
            accuracy=lambda: tf.keras.metrics.SparseCategoricalAccuracy(name="accuracy"),
        ),
    )
