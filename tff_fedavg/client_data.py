"""Client data: the local data set P_k of every client, on disk, read in the graph.

A federated computation is handed client *ids*, and reads the client files (`client_files.py`) where it runs. Passing
the examples themselves as arguments costs more time than training on them.
"""

import atexit
import collections
import contextlib
import hashlib
import inspect
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from tff_fedavg import client_files, columns
from tff_fedavg.integer import as_integer
from tff_fedavg.scratch import locked, remove_left, scratch_directory
from tff_fedavg.traced import TracedFunction, first_error

_TRIED_EXAMPLES = 100  # At most, when preprocess_fn is tried.

# (x, y) or (x, y, sample_weight); x and y may be nested.
Batch = tuple[Any, ...]
PreprocessFn = Callable[[Mapping[str, tf.Tensor], tf.Tensor], Batch | Mapping[str, Any]]


class ClientDataset:
    """The local data sets of K clients, stored in one directory.

    Attributes:
      directory: Where the files are.
      manifest: The one that has the checksums of the others, and so is another one for other examples.
      element_spec: Ordered mapping from feature name to the `tf.TensorSpec` of one stored example.
      num_examples: int64 `[K]`, n_k of every client.
      record_bytes: Size of one stored example.
      preprocess_fn: Maps a batch of stored examples to what the model takes.
    """

    def __init__(self, directory: str | os.PathLike[str], preprocess_fn: PreprocessFn):
        """Opens and checks a directory written by `write_client_dataset`.

        Args:
          directory: The directory.
          preprocess_fn: Maps a batch of stored examples (mapping from feature name to a tensor `[batch, ...]`) and, if
            it has a second argument without a default, a seed (int32 `[2]`, for random augmentation) to `(x, y)` or
            `(x, y, sample_weight)`, or to a mapping with these names. x may be any nest of tensors. Runs in the graph:
            it is traced once, here, as a `tf.function`; variables that it uses keep the values that they have now.

        Raises:
          TypeError: If an argument is of another type.
          DamagedFilesError: If a file is missing, or is not what was written.
          ValueError: If preprocess_fn does not fit.
        """
        if not isinstance(directory, (str, os.PathLike)):
            raise columns.wrong_type("directory", directory, "the path of client files")
        _check_preprocess_fn(preprocess_fn)
        self.directory = pathlib.Path(directory).absolute()
        self.manifest = self.directory / client_files.MANIFEST
        self.preprocess_fn = preprocess_fn
        manifest = client_files.Manifest.read(self.directory)
        self.element_spec = manifest.element_spec
        self.record_bytes = manifest.record_bytes
        self._offsets = client_files.read_offsets(self.directory, manifest)
        self.num_examples = np.diff(self._offsets)
        self._preprocess = _trace(preprocess_fn, self.element_spec)
        self._makes_one_of_each = True  # Otherwise it is looked at in each batch.
        self._try_preprocess_fn()

    @classmethod
    def from_arrays(
        cls,
        clients: Iterable[Mapping[str, Any]] | Mapping[str, Any],
        preprocess_fn: PreprocessFn | None = None,
        *,
        client_column: str | None = None,
        directory: str | os.PathLike[str] | None = None,
    ) -> Self:
        """Writes client files from arrays in memory, and opens them.

        Args:
          clients: The columns of each client, as for `write_client_dataset`. With `client_column`, the columns of all
            clients in one mapping.
          preprocess_fn: As for the constructor. By default the columns are "x", "y" and, if need be, "sample_weight",
            and go to the model as they are.
          client_column: Name of the column that says whose an example is, by strings or other values that can be
            sorted. It is not stored: client k has the k-th of its distinct values, as `np.unique` gives them.
          directory: Where the files are kept, made if need be; those of the same examples may be there already. By
            default they are removed when the program ends.

        Raises:
          TypeError: If an argument is of another type.
          ValueError: As `write_client_dataset`; or if the clients, or what the model gets, cannot be told from the
            columns.
        """
        if isinstance(clients, Mapping):
            if client_column is None:
                of_each = " (of the columns of each client by its name, give list(clients.values()))"
                raise ValueError(
                    "client_column is missing: it names the column of clients that says whose an example is"
                    + of_each * all(isinstance(column, Mapping) for column in clients.values())
                )
            clients = columns.split_by_client(clients, client_column)
        elif not isinstance(clients, (list, tuple, Iterator)):
            raise columns.wrong_type("clients", clients, "a list with the columns of each client")
        elif client_column is not None:
            raise ValueError(f"client_column is {client_column!r}, but clients is divided already: leave it out")
        return cls._write(clients, preprocess_fn, directory)

    @classmethod
    def from_client_data(
        cls,
        client_data: tff.simulation.datasets.ClientData,
        preprocess_fn: PreprocessFn | None = None,
        *,
        directory: str | os.PathLike[str] | None = None,
    ) -> Self:
        """Writes client files from a `ClientData` of TFF, one client at a time, and opens them.

        Args:
          client_data: The clients; client k is `client_data.client_ids[k]`. Its elements are mappings, which name the
            columns, or tuples, whose parts become the columns "x", "y" and "sample_weight".
          preprocess_fn: As for `from_arrays`.
          directory: As for `from_arrays`.

        Raises:
          TypeError: If an argument is of another type.
          ValueError: As `from_arrays`; or if the elements are neither mappings of tensors nor tuples of them.
        """
        if not isinstance(client_data, tff.simulation.datasets.ClientData):
            raise columns.wrong_type("client_data", client_data, "a tff.simulation.datasets.ClientData")
        num_clients = len(client_data.client_ids)
        return cls._write(columns.read_client_data(client_data), preprocess_fn, directory, num_clients)

    @classmethod
    def _write(
        cls,
        clients: Iterable[Mapping[str, Any]],
        preprocess_fn: PreprocessFn | None,
        directory: str | os.PathLike[str] | None,
        num_clients: int | None = None,
    ) -> Self:
        if preprocess_fn is None:
            clients, preprocess_fn = _with_model_columns(clients), _as_they_are
        _check_preprocess_fn(preprocess_fn)
        if directory is None:
            # Until the end, since a process that was built on the files outlives this object.
            scratch, owner = contextlib.ExitStack(), os.getpid()
            directory = scratch.enter_context(scratch_directory()) / "client_dataset"
            atexit.register(lambda: os.getpid() == owner and scratch.close())  # A fork leaves them to this process.
        directory = pathlib.Path(directory)
        are_new = client_files.write_client_dataset(directory, clients, num_clients)
        try:
            return cls(directory, preprocess_fn)
        except BaseException:
            if are_new:
                client_files.remove_files(directory)
            raise

    @property
    def num_clients(self) -> int:
        """K, the number of clients."""
        return len(self.num_examples)

    @property
    def batch_spec(self) -> Batch:
        """Specs of the batches that `batch` returns, with an open first dimension."""
        return self._preprocess.output_spec

    def check_client_ids(self, client_ids: Iterable[int]) -> list[int]:
        """Returns client ids as plain ints.

        Args:
          client_ids: One or more integers in `[0, K)`: a list, range, array, eager tensor, ...

        Raises:
          TypeError: If it is something else.
          ValueError: If it is empty, or an id is out of range.
        """
        try:
            given = list(client_ids)
        except TypeError as e:
            raise TypeError(f"client_ids is {client_ids!r}: it takes a list of integers, such as [0]") from e
        if not given:
            raise ValueError("client_ids is empty: it takes at least one client")
        values = (client_id.numpy() if hasattr(client_id, "numpy") else client_id for client_id in given)
        return [as_integer(f"client_ids[{i}]", value, 0, self.num_clients - 1) for i, value in enumerate(values)]

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
            begin, end = tf.unstack(self._map(client_files.OFFSETS, tf.int64, [self.num_clients + 1])[k : k + 2], 2)
        if not self.num_examples.sum():  # There is no mapping an empty file.
            return tf.zeros([0, self.record_bytes], tf.uint8)
        return self._map(client_files.EXAMPLES, tf.uint8, [self.num_examples.sum(), self.record_bytes])[begin:end]

    def _try_preprocess_fn(self) -> None:
        """Raises a `ValueError` if preprocess_fn fails, or drops or adds examples: n_k is the number of stored ones."""
        num = min(_TRIED_EXAMPLES, 1 + client_files.BYTES_AT_ONCE // self.record_bytes, int(self.num_examples.sum()))
        if not num:
            return
        arguments = tf.constant(self.gather(np.arange(num))), tf.range(num), tf.zeros([2], tf.int32)
        try:
            batch = self.batch(*arguments)
        except (tf.errors.OpError, ValueError) as e:
            raise ValueError(f"preprocess_fn fails with the first {num} examples: {first_error(e)}") from e
        for tensor in tf.nest.flatten(batch):
            if tensor.shape[0] != num:
                raise ValueError(f"preprocess_fn makes {tensor.shape[0]} examples of {num}; it must make one of each")
        with tf.Graph().as_default():  # Where TensorFlow can tell, it is so whatever the examples are.
            batch = tf.nest.flatten(self.batch(*(tf.zeros(t.shape, t.dtype) for t in arguments)))
        self._makes_one_of_each = all(tensor.shape[0] == num for tensor in batch)

    def _map(self, name: str, dtype: tf.DType, shape: Sequence[int]) -> tf.Tensor:
        """Returns a file as a tensor, mapped into memory: what is not looked at is not read."""
        return tf.raw_ops.ImmutableConst(dtype=dtype, shape=shape, memory_region_name=str(self.directory / name))

    def batch(self, records: tf.Tensor, indices: tf.Tensor, seed: tf.Tensor) -> Batch:
        """Returns the preprocessed batch of some rows of what `read` gave: `(x, y)`, or `(x, y, sample_weight)`.

        Args:
          records: uint8 `[n, record_bytes]`.
          indices: Integer `[batch]`, the rows.
          seed: Integer `[2]`, for random augmentation.
        """
        rows = tf.gather(records, indices)
        features = collections.OrderedDict()
        column = 0
        for name, spec in self.element_spec.items():
            content = rows[:, column : column + client_files.num_bytes(spec)]
            column += client_files.num_bytes(spec)
            if spec.dtype == tf.bool:
                content = tf.cast(content, tf.bool)
            elif spec.dtype != tf.uint8:
                content = tf.bitcast(tf.reshape(content, [-1, *spec.shape, spec.dtype.size]), spec.dtype)
            features[name] = tf.reshape(content, [-1, *spec.shape])
        seed = tf.cast(seed, tf.int32)
        batch = self._preprocess(features, seed, seed=seed)
        if self._makes_one_of_each:
            return batch
        message = "preprocess_fn must make one example of each, and drops or adds some"
        numbers = [tf.shape(tensor)[0] for tensor in tf.nest.flatten(batch)]
        with tf.control_dependencies([tf.debugging.assert_equal(n, tf.size(indices), message) for n in numbers]):
            return tf.nest.map_structure(tf.identity, batch)

    def gather(self, indices: np.ndarray) -> np.ndarray:
        """Reads examples of all clients by their places in the file, outside any graph.

        Args:
          indices: Integer `[n]`, from 0 to the number of all examples: client 0's, then client 1's, ...

        Returns:
          uint8 `[n, record_bytes]`: one example a row, for `batch`.
        """
        shape = (int(self._offsets[-1]), self.record_bytes)
        return np.memmap(self.directory / client_files.EXAMPLES, np.uint8, "r", shape=shape)[indices]

    def load(self, client_id: int) -> dict[str, np.ndarray]:
        """Returns the stored examples of one client as arrays `[n_k, ...]`, outside any graph."""
        (client_id,) = self.check_client_ids([client_id])
        begin, end = self._offsets[client_id : client_id + 2]
        dtype = np.dtype([(name, spec.dtype.as_numpy_dtype, spec.shape) for name, spec in self.element_spec.items()])
        path = self.directory / client_files.EXAMPLES
        records = np.fromfile(path, dtype, count=end - begin, offset=begin * dtype.itemsize)
        return {name: records[name] for name in self.element_spec}


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
      key: What the client files depend on (partition, seed, a version of the rules, ...), as JSON values. Its "name"
        starts the name of the directory, and its "checksums" are of the files that the data come from, by name.
      build_clients: Returns the clients, as for `write_client_dataset`. Not called when the cache has them.
      preprocess_fn: As for `ClientDataset`.
      num_clients: As for `write_client_dataset`.

    Raises:
      ValueError: As `write_client_dataset`; or if the key has no checksums.
      OSError: If the cache cannot be written.
    """
    if not key.get("checksums"):
        raise ValueError(
            "the key has no 'checksums' of the files that the data come from, by which other data are told from these: "
            "add them, or take ClientDataset.from_arrays for data in memory"
        )
    content = json.dumps({**key, "format": client_files.FORMAT_VERSION}, sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()
    cache_dir = pathlib.Path(cache_dir)
    directory = cache_dir / f"{key['name']}-{digest[:16]}"
    remove_left(cache_dir, client_files.PREPARING)
    if os.path.lexists(directory):
        with contextlib.suppress(client_files.DamagedFilesError):
            return ClientDataset(directory, preprocess_fn)
        with locked(cache_dir):
            if os.path.lexists(directory):  # Another program may have found it damaged, too.
                try:
                    return ClientDataset(directory, preprocess_fn)
                except client_files.DamagedFilesError as e:
                    print(f"{e}; preparing it anew", file=sys.stderr)
                    client_files.remove_client_dataset(directory)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with scratch_directory(cache_dir, client_files.PREPARING) as scratch:
            temporary = scratch / "client_dataset"
            temporary.mkdir()
            client_files.write_files(temporary, build_clients(), num_clients)
            try:
                temporary.rename(directory)
            except OSError:
                if not directory.exists():  # Otherwise another run has finished the same work first.
                    raise
    except OSError as e:
        raise OSError(f"the client files could not be written to {cache_dir}: {e.strerror or e}") from e
    return ClientDataset(directory, preprocess_fn)


def _as_they_are(example: Mapping[str, tf.Tensor]) -> Mapping[str, tf.Tensor]:
    return example


def _with_model_columns(clients: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Yields the clients, after a look at the first one's columns."""
    for k, client in enumerate(clients):
        if k == 0 and isinstance(client, Mapping) and not {"x", "y"} <= client.keys() <= {*columns.PARTS_OF_A_BATCH}:
            raise ValueError(
                "preprocess_fn is missing: without it the columns are 'x', 'y' and, if need be, 'sample_weight'; "
                f"here they are {columns.listed(client)}"
            )
        yield client


def _check_preprocess_fn(preprocess_fn: PreprocessFn) -> None:
    if not callable(preprocess_fn):
        raise columns.wrong_type("preprocess_fn", preprocess_fn, "a function from a batch of examples to (x, y)")


def _trace(preprocess_fn: PreprocessFn, element_spec: Mapping[str, tf.TensorSpec]) -> TracedFunction:
    """Traces preprocess_fn as a function of features and a seed that returns a batch as a tuple."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [p for p in inspect.signature(preprocess_fn).parameters.values() if p.kind in positional]
    takes_seed = len([p for p in parameters if p.default is p.empty]) > 1

    def preprocess(features, seed):
        batch = preprocess_fn(features, seed) if takes_seed else preprocess_fn(features)
        if columns.has_named_parts(batch):
            batch = batch._asdict()
        if isinstance(batch, Mapping) and {"x", "y"} <= batch.keys() <= {*columns.PARTS_OF_A_BATCH}:
            batch = tuple(batch[name] for name in columns.PARTS_OF_A_BATCH if name in batch)
        if not isinstance(batch, (tuple, list)) or not 2 <= len(batch) <= 3:
            raise ValueError(
                f"it must return (x, y) or (x, y, sample_weight), or a mapping of these, but got {batch!r}"
            )
        for tensor in tf.nest.flatten(batch):
            if isinstance(tensor, (tf.RaggedTensor, tf.SparseTensor)):
                raise ValueError(f"it returns a {type(tensor).__name__}: make a tensor of it, as with its to_tensor()")
            if tf.convert_to_tensor(tensor).shape.rank == 0:
                raise ValueError(f"it must return tensors [batch, ...], not {tensor!r}")
        return tuple(batch)

    features = collections.OrderedDict(
        (name, tf.TensorSpec([None, *spec.shape], spec.dtype)) for name, spec in element_spec.items()
    )
    return TracedFunction("preprocess_fn", preprocess, [features, tf.TensorSpec([2], tf.int32)])
