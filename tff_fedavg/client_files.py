"""The client files of a directory: written whole or not at all, and checked before they are read.

They are three, whatever the number of clients:

    examples.bin   the examples of client 0, of client 1, ...; each example has the same size
    offsets.bin    K + 1 little-endian int64; client k has the examples offsets[k] to offsets[k + 1]
    manifest.json  features (name, dtype, shape), counts and checksums, also of itself; written last
"""

import collections
import dataclasses
import os
import pathlib
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO, Self

import numpy as np
import tensorflow as tf
import tqdm

from tff_fedavg import columns
from tff_fedavg.json_record import read_record, write_record
from tff_fedavg.regular_file import open_regular
from tff_fedavg.scratch import locked, scratch_directory

FORMAT_VERSION = 2
EXAMPLES, OFFSETS, MANIFEST = "examples.bin", "offsets.bin", "manifest.json"
BYTES_AT_ONCE = 1 << 24  # Of examples in memory, beside what the user has there.
PREPARING = ".preparing-"


class DamagedFilesError(ValueError):
    """The client files of a directory are missing, or are not what was written."""


def write_client_dataset(
    directory: str | os.PathLike[str], clients: Iterable[Mapping[str, Any]], num_clients: int | None = None
) -> bool:
    """Writes client files, which are there as a whole or not at all. Holds one client in memory at a time.

    Args:
      directory: The directory, made if need be.
      clients: For client 0, 1, ... a mapping from the names of columns to arrays `[n_k, ...]`, tensors, or lists of
        numbers (int64 or float64, as NumPy makes them). All clients have the same names, dtypes and trailing shapes;
        n_k may be 0, and an empty list fits any dtype and shape. A dtype is bool, an integer, float16, bfloat16,
        float32, float64 or complex.
      num_clients: Length of `clients`, for the progress bar.

    Returns:
      Whether they are new: the directory may have had files of the same examples.

    Raises:
      TypeError: If a client is not a mapping from strings.
      ValueError: If there is no client, a column cannot be stored, a client's columns are not those of the clients
        before it, or the directory has client files of other examples.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with locked(directory):
        are_there = (directory / MANIFEST).exists()
        for path in (directory / EXAMPLES, directory / OFFSETS):
            if path.exists() and not are_there:
                raise ValueError(f"{path} is in the way of client files: remove it")
    where = () if are_there else (directory, PREPARING)  # Where they are, nothing is written.
    with scratch_directory(*where) as scratch:
        write_files(scratch, clients, num_clients)
        with locked(directory):
            if (directory / MANIFEST).exists():
                if (directory / MANIFEST).read_bytes() != (scratch / MANIFEST).read_bytes():
                    raise ValueError(f"{directory} has client files of other examples: remove them")
                return False
            for name in (EXAMPLES, OFFSETS, MANIFEST):  # Without the manifest the others are none.
                (scratch / name).replace(directory / name)
    return True


def write_files(directory: pathlib.Path, clients: Iterable[Mapping[str, Any]], num_clients: int | None) -> None:
    """Writes the client files into an empty directory."""
    with open(directory / EXAMPLES, "wb") as file:
        # The bar shows only when the work takes longer than `delay` seconds.
        bar = tqdm.tqdm(clients, "preparing client files", num_clients, unit=" clients", delay=2, disable=None)
        offsets, features = _write_examples(file, bar)
    np.asarray(offsets, "<i8").tofile(directory / OFFSETS)
    element_spec = collections.OrderedDict(
        (name, tf.TensorSpec(dtype.shape, dtype.base)) for name, dtype in features.items()
    )
    crc32 = {name: _crc32(directory / name) for name in (EXAMPLES, OFFSETS)}
    Manifest(len(offsets) - 1, offsets[-1], element_spec, crc32).write(directory)


def remove_files(directory: pathlib.Path) -> None:
    """Removes the client files of a directory."""
    for name in (EXAMPLES, OFFSETS, MANIFEST):
        (directory / name).unlink(missing_ok=True)


def remove_client_dataset(directory: pathlib.Path) -> None:
    """Removes client files with their directory; what else is there stays."""
    try:
        remove_files(directory)
        directory.rmdir()
    except OSError as e:
        raise ValueError(f"{directory} is in the way of client files: remove it ({e.strerror})") from e


def _write_examples(file: BinaryIO, clients: Iterable[Mapping[str, Any]]) -> tuple[list[int], dict[str, np.dtype]]:
    """Returns the offsets of the clients, and of each feature the dtype, with the shape in it."""
    offsets = [0]
    features: dict[str, np.dtype | None] = {}
    for k, client in enumerate(clients):
        arrays = columns.to_arrays(client, f"client {k}")
        features = features or dict.fromkeys(arrays)
        if arrays.keys() != features.keys():
            raise ValueError(
                f"client {k} has the columns {columns.listed(arrays)}, but those before it have "
                f"{columns.listed(features)}: all need the same"
            )
        for name, array in arrays.items():
            if array is None:
                continue
            dtype = np.dtype((array.dtype.newbyteorder("<"), array.shape[1:]))
            # Not `in`: NumPy takes None for float64.
            if features[name] is not None and features[name] != dtype:
                raise ValueError(
                    f"client {k}, column {name!r}, has examples of {_description(dtype)}, but those before it have "
                    f"{_description(features[name])}: all need the same"
                )
            features[name] = dtype
        num_examples = max(0 if array is None else len(array) for array in arrays.values())
        if num_examples:
            dtype = np.dtype(list(features.items()))
            at_once = 1 + BYTES_AT_ONCE // dtype.itemsize
            for begin in range(0, num_examples, at_once):
                records = np.empty(min(at_once, num_examples - begin), dtype)
                for name, array in arrays.items():
                    records[name] = array[begin : begin + at_once]
                file.write(records.tobytes())
        offsets.append(offsets[-1] + num_examples)
    if not features:
        raise ValueError("a client dataset needs at least one client, got none")
    if unknown := [name for name, dtype in features.items() if dtype is None]:
        raise ValueError(
            f"column {unknown[0]!r} is an empty list in every client, which has no dtype: make it, for example, "
            "np.zeros([0], np.float32)"
        )
    return offsets, features


def _description(dtype: np.dtype) -> str:
    return f"{dtype.base.name} {list(dtype.shape)}"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What manifest.json says of the other two files.

    Attributes:
      num_clients: K.
      num_examples: Those of all clients.
      element_spec: As of the `ClientDataset`.
      crc32: CRC-32 of the other files, by name.
    """

    num_clients: int
    num_examples: int
    element_spec: Mapping[str, tf.TensorSpec]
    crc32: Mapping[str, int]

    @property
    def record_bytes(self) -> int:
        """Size of one example."""
        return sum(map(num_bytes, self.element_spec.values()))

    @classmethod
    def read(cls, directory: pathlib.Path) -> Self:
        """Reads it, and holds the other files against it.

        Raises:
          DamagedFilesError: If it is missing or damaged, or they are.
        """
        path = directory / MANIFEST
        try:
            content = read_record(path)
            if content["format_version"] != FORMAT_VERSION:
                raise ValueError(f"{path} has format {content['format_version']}; this version reads {FORMAT_VERSION}")
            element_spec = collections.OrderedDict(
                (f["name"], tf.TensorSpec(f["shape"], f["dtype"])) for f in content["features"]
            )
            manifest = cls(content["num_clients"], content["num_examples"], element_spec, content["crc32"])
            sizes = {
                EXAMPLES: manifest.num_examples * manifest.record_bytes,
                OFFSETS: (manifest.num_clients + 1) * np.dtype(np.int64).itemsize,
            }
        except FileNotFoundError as e:
            raise DamagedFilesError(f"{directory} has no client files: its {MANIFEST} is missing") from e
        except ValueError as e:
            raise DamagedFilesError(str(e)) from e
        except (KeyError, TypeError) as e:
            raise DamagedFilesError(f"{path} is damaged: {e!r}") from e
        for name, size in sizes.items():
            try:
                found = (directory / name).stat().st_size, _crc32(directory / name)
            except OSError as e:
                raise DamagedFilesError(f"{directory / name} is damaged: {e.strerror or e}") from e
            if found != (size, manifest.crc32.get(name)):
                raise DamagedFilesError(f"{directory / name} is damaged: its size or checksum is not the manifest's")
        return manifest

    def write(self, directory: pathlib.Path) -> None:
        """Writes it."""
        features = [
            {"name": name, "dtype": spec.dtype.name, "shape": spec.shape.as_list()}
            for name, spec in self.element_spec.items()
        ]
        content = {
            "format_version": FORMAT_VERSION,
            "num_clients": self.num_clients,
            "num_examples": self.num_examples,
            "features": features,
            "crc32": self.crc32,
        }
        write_record(directory / MANIFEST, content)


def read_offsets(directory: pathlib.Path, manifest: Manifest) -> np.ndarray:
    """Returns where the examples of each client begin, and the last end: int64 `[K + 1]`."""
    offsets = np.fromfile(directory / OFFSETS, "<i8")
    if offsets[0] != 0 or offsets[-1] != manifest.num_examples or (np.diff(offsets) < 0).any():
        raise DamagedFilesError(f"{directory / OFFSETS} is damaged: it does not divide the examples among clients")
    return offsets


def num_bytes(spec: tf.TensorSpec) -> int:
    """Returns the size of a feature of one example."""
    return spec.shape.num_elements() * spec.dtype.size


def _crc32(path: pathlib.Path) -> int:
    """Returns the CRC-32 of a file."""
    crc32 = 0
    with open_regular(path) as file:
        while chunk := file.read(BYTES_AT_ONCE):
            crc32 = zlib.crc32(chunk, crc32)
    return crc32
