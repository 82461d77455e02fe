"""Client files: the local data set P_k of every client, on disk, read in the graph.

A `ClientDataset` is a directory of three files, whatever the number of clients:

    examples.bin   the examples of client 0, of client 1, ...; each example has the same size
    offsets.bin    K + 1 little-endian int64; client k has the examples offsets[k] to offsets[k + 1]
    manifest.json  features (name, dtype, shape), counts and checksums; written last

A federated computation is handed client *ids*, and reads the files where it runs. Passing the examples themselves
as arguments costs more time than training on them.
"""

import collections
import hashlib
import json
import os
import pathlib
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf
import tqdm

_FORMAT_VERSION = 1
_CHECKSUM_CHUNK = 1 << 24
_OFFSET_BYTES = 8

PreprocessFn = Callable[[Mapping[str, tf.Tensor], tf.Tensor], tuple[tf.Tensor, tf.Tensor]]


class ClientDataset:
    """The local data sets of K clients, stored in one directory.

    Attributes:
      directory: Where the files are.
      element_spec: Ordered mapping from feature name to the `tf.TensorSpec` of one stored example.
      num_examples: int64 `[K]`, n_k of every client.
      record_bytes: Size of one stored example.
      preprocess_fn: Maps a batch of stored examples and a seed to the `(x, y)` that the model takes.
    """

    def __init__(self, directory: str | os.PathLike[str], preprocess_fn: PreprocessFn):
        """Opens and checks a directory written by `write_client_dataset`.

        Args:
          directory: The directory.
          preprocess_fn: Maps a batch of stored examples (mapping from feature name to a tensor `[batch, ...]`) and a
            seed (int64 `[2]`, for stateless random augmentation) to `(x, y)`. Runs in the graph.

        Raises:
          ValueError: If a file is missing, has the wrong size or the wrong checksum.
        """
        self.directory = pathlib.Path(directory).absolute()
        self.preprocess_fn = preprocess_fn
        try:
            manifest = json.loads((self.directory / "manifest.json").read_text())
        except (OSError, ValueError) as e:
            raise ValueError(f"{self.directory} is not a client dataset: its manifest.json is unreadable ({e})") from e
        if manifest["format_version"] != _FORMAT_VERSION:
            raise ValueError(
                f"{self.directory} has format {manifest['format_version']}; this version reads {_FORMAT_VERSION}"
            )
        for name, crc32 in manifest["crc32"].items():
            if _crc32(self.directory / name) != crc32:
                raise ValueError(f"{self.directory / name} is damaged: its checksum differs from the manifest's")
        self.element_spec = collections.OrderedDict(
            (f["name"], tf.TensorSpec(f["shape"], f["dtype"])) for f in manifest["features"]
        )
        self.record_bytes = sum(_num_bytes(spec) for spec in self.element_spec.values())
        self._offsets = np.fromfile(self.directory / "offsets.bin", "<i8")
        self.num_examples = np.diff(self._offsets)

    @property
    def num_clients(self) -> int:
        """K, the number of clients."""
        return len(self.num_examples)

    @property
    def batch_spec(self) -> tuple[tf.TensorSpec, tf.TensorSpec]:
        """Specs of the batches `(x, y)` that `batch` returns, with an open first dimension."""
        batched = collections.OrderedDict(
            (name, tf.TensorSpec([None, *spec.shape], spec.dtype)) for name, spec in self.element_spec.items()
        )
        seed = tf.TensorSpec([2], tf.int64)
        outputs = tf.function(self.preprocess_fn).get_concrete_function(batched, seed).structured_outputs
        return tuple(tf.TensorSpec(t.shape, t.dtype) for t in outputs)

    def read(self, client_id: tf.Tensor) -> tf.Tensor:
        """Reads P_k, in the graph.

        Args:
          client_id: Scalar integer tensor k in `[0, K)`.

        Returns:
          uint8 `[n_k, record_bytes]`: one example a row, for `batch`.
        """
        k = tf.cast(client_id, tf.int64)
        in_range = tf.debugging.Assert((k >= 0) & (k < self.num_clients), ["There is no client", k])
        with tf.control_dependencies([in_range]):
            bounds = _read_bytes(self.directory / "offsets.bin", k * _OFFSET_BYTES, 2 * _OFFSET_BYTES)
        begin, end = tf.unstack(tf.io.decode_raw(bounds, tf.int64), 2)

        def read_examples():
            path = self.directory / "examples.bin"
            return _read_bytes(path, begin * self.record_bytes, (end - begin) * self.record_bytes)

        content = tf.cond(end > begin, read_examples, lambda: tf.constant(b""))
        return tf.reshape(tf.io.decode_raw(content, tf.uint8), [-1, self.record_bytes])

    def batch(self, records: tf.Tensor, indices: tf.Tensor, seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the preprocessed batch `(x, y)` of some rows of what `read` gave.

        Args:
          records: uint8 `[n, record_bytes]`.
          indices: Integer `[batch]`, the rows.
          seed: int64 `[2]`, for random augmentation.
        """
        rows = tf.gather(records, indices)
        features = collections.OrderedDict()
        column = 0
        for name, spec in self.element_spec.items():
            content = rows[:, column : column + _num_bytes(spec)]
            column += _num_bytes(spec)
            if spec.dtype != tf.uint8:
                content = tf.bitcast(tf.reshape(content, [-1, *spec.shape, spec.dtype.size]), spec.dtype)
            features[name] = tf.reshape(content, [-1, *spec.shape])
        return self.preprocess_fn(features, seed)

    def gather(self, indices: np.ndarray) -> np.ndarray:
        """Reads examples of all clients by their places in the file, outside any graph.

        Args:
          indices: Integer `[n]`, from 0 to the number of all examples: client 0's, then client 1's, ...

        Returns:
          uint8 `[n, record_bytes]`: one example a row, for `batch`.
        """
        shape = (int(self._offsets[-1]), self.record_bytes)
        return np.memmap(self.directory / "examples.bin", np.uint8, "r", shape=shape)[indices]

    def load(self, client_id: int) -> dict[str, np.ndarray]:
        """Returns the stored examples of one client as arrays `[n_k, ...]`, outside any graph."""
        begin, end = self._offsets[client_id : client_id + 2]
        dtype = np.dtype([(name, spec.dtype.as_numpy_dtype, spec.shape) for name, spec in self.element_spec.items()])
        path = self.directory / "examples.bin"
        records = np.fromfile(path, dtype, count=end - begin, offset=begin * dtype.itemsize)
        return {name: records[name] for name in self.element_spec}


def write_client_dataset(
    directory: str | os.PathLike[str], clients: Iterable[Mapping[str, np.ndarray]], *, num_clients: int | None = None
) -> None:
    """Writes client files into an existing, empty directory. Holds one client in memory at a time.

    Args:
      directory: The directory.
      clients: For client 0, 1, ... a mapping from feature name to an array `[n_k, ...]`. All clients have the same
        names, dtypes and trailing shapes; n_k may be 0.
      num_clients: Length of `clients`, for the progress bar.

    Raises:
      ValueError: If there is no client, or the features of the clients do not agree.
    """
    directory = pathlib.Path(directory)
    offsets = [0]
    record_dtype = None
    with open(directory / "examples.bin", "wb") as file:
        # The bar shows only when the work takes longer than `delay` seconds.
        for arrays in tqdm.tqdm(
            clients, "preparing client files", num_clients, unit=" clients", delay=2, disable=not sys.stderr.isatty()
        ):
            dtype = np.dtype([(name, a.dtype.newbyteorder("<"), a.shape[1:]) for name, a in arrays.items()])
            sizes = {len(a) for a in arrays.values()}
            if record_dtype not in (None, dtype) or len(sizes) != 1:
                raise ValueError(
                    f"client {len(offsets) - 1} has the features {dtype} with {sizes} examples; "
                    f"all clients need {record_dtype or 'features'} of one length"
                )
            record_dtype = dtype
            records = np.empty(sizes.pop(), dtype)
            for name, array in arrays.items():
                records[name] = array
            file.write(records.tobytes())
            offsets.append(offsets[-1] + len(records))
    if record_dtype is None:
        raise ValueError("a client dataset needs at least one client, got none")
    np.asarray(offsets, "<i8").tofile(directory / "offsets.bin")
    manifest = {
        "format_version": _FORMAT_VERSION,
        "num_clients": len(offsets) - 1,
        "num_examples": offsets[-1],
        "features": [
            {"name": name, "dtype": field[0].base.name, "shape": list(field[0].shape)}
            for name, field in record_dtype.fields.items()
        ],
        "crc32": {name: _crc32(directory / name) for name in ("examples.bin", "offsets.bin")},
    }
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=2))


def prepare_client_dataset(
    cache_dir: str | os.PathLike[str],
    key: Mapping[str, Any],
    build_clients: Callable[[], Iterable[Mapping[str, np.ndarray]]],
    preprocess_fn: PreprocessFn,
    *,
    num_clients: int | None = None,
) -> ClientDataset:
    """Opens the client dataset for `key` in a cache, after writing it where it is missing or damaged.

    The files are written under a temporary name and renamed, so a crash leaves nothing half-written, and runs that
    prepare the same data at once do not disturb each other: the first to finish wins.

    Args:
      cache_dir: The cache directory; made if need be.
      key: What the client files depend on (checksum of the data, partition, seed, ...), as JSON values. Its "name"
        starts the name of the directory.
      build_clients: Returns the clients, as for `write_client_dataset`. Not called when the cache has them.
      preprocess_fn: As for `ClientDataset`.
      num_clients: As for `write_client_dataset`.

    Raises:
      ValueError: As `write_client_dataset`.
      OSError: If the cache cannot be written.
    """
    digest = hashlib.sha256(json.dumps({**key, "format": _FORMAT_VERSION}, sort_keys=True).encode()).hexdigest()
    cache_dir = pathlib.Path(cache_dir)
    directory = cache_dir / f"{key['name']}-{digest[:16]}"
    if directory.exists():
        try:
            return ClientDataset(directory, preprocess_fn)
        except ValueError as e:
            print(f"{e}; preparing it anew", file=sys.stderr)
            shutil.rmtree(directory, ignore_errors=True)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".preparing-", dir=cache_dir, ignore_cleanup_errors=True) as parent:
            temporary = pathlib.Path(parent) / "client_dataset"
            temporary.mkdir()
            write_client_dataset(temporary, build_clients(), num_clients=num_clients)
            try:
                temporary.rename(directory)
            except OSError:
                if not directory.exists():  # Otherwise another run has finished the same work first.
                    raise
    except OSError as e:
        raise OSError(f"the client files could not be written to {cache_dir}: {e.strerror}") from e
    return ClientDataset(directory, preprocess_fn)


def _read_bytes(path: pathlib.Path, begin: tf.Tensor, length: int | tf.Tensor) -> tf.Tensor:
    """Returns `length` bytes of a file from `begin` on, as a scalar string tensor."""
    end = path.stat().st_size
    # One record of the wanted length is all that header and footer leave of the file.
    dataset = tf.data.FixedLengthRecordDataset(
        str(path), record_bytes=length, header_bytes=begin, footer_bytes=end - begin - length
    )
    return dataset.get_single_element()


def _num_bytes(spec: tf.TensorSpec) -> int:
    return spec.shape.num_elements() * spec.dtype.size


def _crc32(path: pathlib.Path) -> int | None:
    """Returns the CRC-32 of a file, None for a file that is missing."""
    crc32 = 0
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHECKSUM_CHUNK):
                crc32 = zlib.crc32(chunk, crc32)
    except FileNotFoundError:
        return None
    return crc32
