"""Files of data sets: found, and read within bounds, whatever they are and have in them."""

import bz2
import contextlib
import gzip
import hashlib
import lzma
import os
import pathlib
import tarfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from tff_fedavg.regular_file import open_regular

_UNPACK = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}

# The complete works of Shakespeare have 5.5 million.
_MAX_TEXT_BYTES = 1 << 24


def find_file(data_dir: str | os.PathLike[str], subdirectory: str, *names: str) -> pathlib.Path | None:
    """Returns the first of `names` that is in `data_dir` or in its `subdirectory`, None if there is none."""
    for directory in (pathlib.Path(data_dir), pathlib.Path(data_dir) / subdirectory):
        for name in names:
            if os.path.lexists(directory / name):
                return directory / name
    return None


def open_file(path: pathlib.Path) -> BinaryIO:
    """Opens a regular file for reading.

    Raises:
      ValueError: If it is not one, or cannot be read.
    """
    try:
        return open_regular(path)
    except OSError as e:
        raise ValueError(str(e) if e.strerror is None else f"{path} cannot be read: {e.strerror}") from e


class BoundedStream:
    """A stream of which no more than a number of bytes is read: a small file can unpack to any size."""

    def __init__(self, stream: BinaryIO, max_bytes: int):
        self._stream = stream
        self._max_bytes = self._left = max_bytes

    def read(self, size: int = -1) -> bytes:
        """Reads `size` bytes, or all that is left.

        Raises:
          OSError: If that is more than the bound.
        """
        content = self._stream.read(self._left + 1 if size < 0 else min(size, self._left + 1))
        self._left -= len(content)
        if self._left < 0:
            raise OSError(f"it has more than {self._max_bytes} bytes")
        return content


@contextlib.contextmanager
def unpack(path: pathlib.Path, max_bytes: int) -> Iterator[BoundedStream]:
    """Opens a file for reading, unpacked if its name ends with .gz, .xz or .bz2.

    What goes wrong with it, also while it is read, is raised as a `ValueError`.

    Args:
      path: The file.
      max_bytes: How much of its content can be read; more is an error, too.
    """
    with open_file(path) as file:
        try:
            yield BoundedStream(_UNPACK.get(path.suffix, lambda packed: packed)(file), max_bytes)
        except (OSError, EOFError, lzma.LZMAError, tarfile.TarError, zlib.error) as e:
            raise ValueError(f"{path} is damaged, or not what its name says ({e}): replace it") from e


def read_text(path: pathlib.Path) -> str:
    """Returns the content of a UTF-8 file, unpacked as by `unpack`.

    Raises:
      ValueError: If the file cannot be read, unpacked or decoded.
    """
    with unpack(path, _MAX_TEXT_BYTES) as file:
        content = file.read()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text: {e}") from e


def sha256(path: pathlib.Path) -> str:
    """Returns the SHA-256 of a file of any size, in hexadecimal.

    Raises:
      ValueError: As `open_file`.
    """
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_outside(values: np.ndarray, num_values: int) -> tuple[int, ...] | None:
    """Returns the place of the first of some integers that is not from 0 to `num_values` - 1, None if there is none."""
    if not values.size or 0 <= values.min() <= values.max() < num_values:
        return None
    return tuple(np.argwhere((values < 0) | (values >= num_values))[0])


def check_range(where: str | os.PathLike[str], what: str, values: np.ndarray, num_values: int) -> None:
    """Checks integers of examples, `[n, ...]`, such as labels.

    Raises:
      ValueError: If one is not from 0 to `num_values` - 1. It names the first such, and its place among the examples.
    """
    if (place := first_outside(values, num_values)) is not None:
        raise ValueError(f"{where} has the {what} {values[place]} at position {place[0]}: take 0 to {num_values - 1}")
