"""Federated EMNIST, characters by writer as TFF has them (made by LEAF), for the paper's two MNIST models (Section 3).

Not in the paper: its natural partitions are for text. Data sources:

- "digits": 341,873 + 40,832 digits by 3,383 writers.
- "all": 671,585 + 77,483 digits, capital and small letters by 3,400 writers; 62 classes.
- "synthetic": the ten digits that TFF ships, once for each of two clients; they are the test set too. For a first look.

TFF's pixels are 1.0 for paper and 0.0 for ink, the inverse of MNIST. The client files keep that, in steps of 1/255:
LEAF made them from 8 bits, so nothing is lost. The model gets -0.5 for paper and 0.5 for ink, as of MNIST.
"""

import functools
import itertools
import operator
import pathlib
import string
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from tasks import TaskSettings, tff_sqlite
from tasks.files import sha256
from tasks.task import CLASSIFICATION, Task, cut_into_parts
from tff_fedavg import models
from tff_fedavg.client_data import prepare_client_dataset
from tff_fedavg.learning_curve import Target
from tff_fedavg.partition import build_partition

_SPLITS = {
    "digits": {"train": "digits_only_train", "test": "digits_only_test"},
    "all": {"train": "all_train", "test": "all_test"},
}
_FEATURES = {
    "pixels": tf.io.FixedLenFeature([28, 28], tf.float32),
    "label": tf.io.FixedLenFeature([], tf.int64),
}
_NUM_CLIENTS = 100

_KERAS_MODELS = {"emnist_2nn": models.mnist_2nn, "emnist_cnn": models.mnist_cnn}
_CLASSES = string.digits + string.ascii_uppercase + string.ascii_lowercase
_NUM_CLASSES = {"digits": 10, "all": 62, "synthetic": 10}
_TARGETS = {
    # Not from the paper: those of MNIST.
    ("emnist_2nn", "digits"): 0.97,
    ("emnist_cnn", "digits"): 0.99,
    # Not from the paper: chosen low enough for letters such as O and o, which look the same.
    ("emnist_2nn", "all"): 0.75,
    ("emnist_cnn", "all"): 0.80,
    ("emnist_2nn", "synthetic"): 1.0,
    ("emnist_cnn", "synthetic"): 1.0,
}

# Arrays "image", uint8 [n, 28, 28], and "label", uint8 [n].
Examples = Mapping[str, np.ndarray]


def build_task(settings: TaskSettings) -> Task:
    """Builds the task "emnist_2nn" or "emnist_cnn".

    Args:
      settings: As for `tasks.build_task`, whose `data_dir` has emnist_all.sqlite, maybe in the subdirectory "emnist".
        The partition by writer has as many clients as there are writers. The others divide the training examples of all
        writers anew, which they hold in memory (up to 1.6 kB each); K is 100 by default. All have the same test set,
        other characters of the same writers.

    Raises:
      ValueError: If the data are missing or damaged, or the partition does not fit them.
    """
    data, partition, clients = settings.data, settings.partition, settings.clients
    if clients is None and partition != "writer":
        clients = _NUM_CLIENTS
    (path,) = settings.files
    read_writers = _read_synthetic if data == "synthetic" else functools.partial(_read_sqlite, path, data)
    checksums = {path.name: sha256(path)}

    def train_clients() -> Iterable[Examples]:
        if partition == "writer":
            return read_writers("train")
        examples = _join(read_writers("train"))
        parts = build_partition(
            partition, examples["label"], clients, settings.seed, dirichlet_alpha=settings.dirichlet_alpha
        )
        return ({name: array[indices] for name, array in examples.items()} for indices in parts)

    def test_parts() -> Iterable[Examples]:
        return cut_into_parts(_join(read_writers("test")))

    return Task(
        name=settings.name,
        train=prepare_client_dataset(
            settings.cache_dir,
            {"name": f"emnist-{data}-{partition}", "checksums": checksums, **settings.partition_key(clients)},
            train_clients,
            _preprocess,
            num_clients=clients,
        ),
        test=prepare_client_dataset(
            settings.cache_dir, {"name": f"emnist-{data}-test", "checksums": checksums}, test_parts, _preprocess
        ),
        keras_model_fn=lambda: _KERAS_MODELS[settings.name](_NUM_CLASSES[data]),
        **CLASSIFICATION,
        target=Target(_TARGETS[settings.name, data]),
        label_names=lambda: list(_CLASSES[: _NUM_CLASSES[data]]),
        checksums=checksums,
        labels_checked=True,
    )


def _preprocess(example: Mapping[str, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
    return 0.5 - tf.cast(example["image"], tf.float32) / 255.0, tf.cast(example["label"], tf.int32)


def _encode(pixels: np.ndarray, labels: np.ndarray) -> Examples:
    return {"image": np.rint(255 * pixels).astype(np.uint8), "label": labels.astype(np.uint8)}


def _join(writers: Iterable[Examples]) -> Examples:
    writers = list(writers)
    return {name: np.concatenate([writer[name] for writer in writers]) for name in writers[0]}


def _read_synthetic(split: str) -> Iterator[Examples]:
    del split  # Both are the same.
    client_data = tff.simulation.datasets.emnist.get_synthetic()
    for client_id in client_data.client_ids:
        dataset = client_data.create_tf_dataset_for_client(client_id)
        features = dataset.batch(dataset.cardinality()).get_single_element()
        yield _encode(features["pixels"].numpy(), features["label"].numpy())


def _read_sqlite(path: pathlib.Path, data: str, split: str) -> Iterator[Examples]:
    """Reads one writer at a time, in TFF's order. Not through TFF, which trusts a damaged file."""
    with tff_sqlite.open_database(path, splits=_SPLITS[data].values()) as database:
        query = (
            "SELECT client_id, serialized_example_proto FROM examples WHERE split_name = ? ORDER BY client_id, rowid"
        )
        rows = database.execute(query, [_SPLITS[data][split]])
        for writer, examples in itertools.groupby(rows, operator.itemgetter(0)):
            yield _parse(writer, [example for _, example in examples], _NUM_CLASSES[data])


def _parse(writer: str, examples: list[bytes], num_classes: int) -> Examples:
    """Parses the `tf.train.Example` protos of a writer."""
    try:
        features = tf.io.parse_example(examples, _FEATURES)
    except (tf.errors.InvalidArgumentError, UnicodeDecodeError) as e:
        # The latter comes from TensorFlow quoting, in its message, bytes that are no text.
        raise ValueError(f"writer {writer} has examples that are not 28x28 pixels and a label") from e
    pixels, labels = features["pixels"].numpy(), features["label"].numpy()
    if not ((pixels >= 0) & (pixels <= 1)).all():
        raise ValueError(f"writer {writer} has pixels that are not from 0 to 1")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"writer {writer} has the labels {labels.min()} to {labels.max()} of {num_classes} classes")
    return _encode(pixels, labels)
