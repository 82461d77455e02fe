"""Columns: the examples of a client as arrays that client files can hold, from whatever has them in memory.

A column has one row for each example. An error says which client and which column it is about, and what to do.
"""

import numbers
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

import tff_fedavg.default_context  # noqa: F401
from tff_fedavg.partition import natural

# Those that TensorFlow makes of bytes again, in the graph.
_DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
)
_HINTS = {
    "text": "encode text as integer ids, for example with np.unique(column, return_inverse=True)",
    "M": "store times as numbers, for example column.astype('datetime64[s]').astype(np.int64)",
    "m": "store durations as numbers, for example column / np.timedelta64(1, 's')",
    "V": "make each field a column of its own",
    "f": "convert it, for example with column.astype(np.float64)",
    "c": "convert it, for example with column.astype(np.complex128)",
    "O": "make it an array of numbers, with no value missing and examples of one shape",
}

# Of a batch, or an element, that is a tuple.
PARTS_OF_A_BATCH = ("x", "y", "sample_weight")

_READ_AT_ONCE = 1024


def to_arrays(columns: Mapping[str, Any], owner: str) -> dict[str, np.ndarray | None]:
    """Returns columns as arrays `[n, ...]` of the same n.

    Args:
      columns: Mapping from name to an array, a list or tuple, an eager tensor, or whatever else `np.asarray` takes.
      owner: Whose columns they are, such as "client 3"; errors start with it.

    Returns:
      The arrays, by name; None for an empty list, which has no dtype and fits any other.

    Raises:
      TypeError: If `columns` is not a mapping from strings.
      ValueError: If there is no column, or a column cannot be stored, or they are of different lengths.
    """
    if not isinstance(columns, Mapping):
        raise wrong_type(owner, columns, "a mapping from the names of columns to arrays")
    if not columns:
        raise ValueError(f"{owner} has no columns: give it at least one; without examples, for example np.zeros([0])")
    for name in columns:
        if not isinstance(name, str) or not name:
            raise TypeError(f"{owner} has a column named {name!r}: the name of a column is a string")
    arrays = {name: _to_array(column, f"{owner}, column {name!r},") for name, column in columns.items()}
    lengths = {name: 0 if array is None else len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name!r} {length}" for name, length in lengths.items())
        raise ValueError(f"{owner} has columns of different lengths ({listed}): each needs one row for each example")
    return arrays


def _to_array(column: Any, where: str) -> np.ndarray | None:
    if isinstance(column, (list, tuple)) and not column:
        return None
    if np.ma.is_masked(column):
        raise ValueError(f"{where} has masked values: fill them in, or leave their examples out")
    try:
        array = np.asarray(column)
    except Exception as e:  # Of a foreign type, anything.
        reason = "its examples differ in shape: pad them to one" if isinstance(column, (list, tuple)) else str(e)
        raise ValueError(f"{where} is a {_name_of_type(column)} that is no array: {' '.join(reason.split())}") from e
    if array.dtype.name not in _DTYPES:
        values = array.flat if array.dtype.hasobject else ()
        is_text = array.dtype.kind in "SU" or any(isinstance(value, (str, bytes)) for value in values)
        raise ValueError(
            f"{where} is a {_name_of_type(column)} of dtype {array.dtype}, which cannot be stored: "
            f"{_HINTS['text' if is_text else array.dtype.kind]}"
        )
    if array.ndim == 0:
        raise ValueError(f"{where} is a single value, {array}: a column has one row for each example")
    if 0 in array.shape[1:]:
        raise ValueError(f"{where} has the shape {list(array.shape)}: an example needs at least one number")
    return array


def split_by_client(columns: Mapping[str, Any], client_column: str) -> Iterator[dict[str, np.ndarray]]:
    """Yields the columns of each client of a table: the rows with the same value in one column, in sorted order.

    Args:
      columns: As for `to_arrays`, the whole table.
      client_column: Name of the column that says whose an example is, left out of what is yielded. Its values can be
        strings, or anything else that can be sorted.

    Raises:
      ValueError: As `to_arrays`; or if there is no such column, or it does not name one client for each example.
    """
    if client_column not in columns:
        raise ValueError(f"client_column is {client_column!r}, but the columns are {listed(columns)}")
    arrays = to_arrays({name: column for name, column in columns.items() if name != client_column}, "the table")
    num_examples = max(0 if array is None else len(array) for array in arrays.values())
    owners = _owners(columns[client_column], client_column)
    if owners.shape != (num_examples,):
        shape = list(owners.shape)
        raise ValueError(f"column {client_column!r} has the shape {shape}, but there are {num_examples} examples")
    try:
        if np.any(owners != owners):
            raise TypeError("some are missing")
        clients = natural(owners) if num_examples else []
    except TypeError as e:
        raise ValueError(f"column {client_column!r} has values that cannot be sorted ({e}): make them strings") from e
    for indices in clients:
        yield {name: array[indices] for name, array in arrays.items()}


def _owners(column: Any, name: str) -> np.ndarray:
    """Returns a column of clients, in which NumPy has not made one client of two."""
    if np.ma.is_masked(column):
        raise ValueError(f"column {name!r} has masked values: fill them in, or leave their examples out")
    if not isinstance(column, (list, tuple)):
        return np.asarray(column)
    comparable = (str, bytes, numbers.Number)
    kinds = {next((kind for kind in comparable if isinstance(value, kind)), type(value)) for value in column}
    if len(kinds) > 1:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(f"column {name!r} has values of several types ({names}): make all of them strings")
    return np.fromiter(column, object, len(column))


def read_client_data(client_data: tff.simulation.datasets.ClientData) -> Iterator[dict[str, Any]]:
    """Yields the columns of each client of a `ClientData`, in the order of its `client_ids`.

    Of elements that are mappings the columns have the same names; the parts of tuples are "x", "y" and "sample_weight".

    Raises:
      ValueError: If the elements are neither, or the examples of a client differ in shape.
    """
    structure = client_data.element_type_structure
    names = _names_of_parts(structure)
    for client_id in client_data.client_ids:
        dataset = client_data.create_tf_dataset_for_client(client_id)
        if dataset.cardinality() == tf.data.INFINITE_CARDINALITY:
            raise ValueError(f"client {client_id!r} has examples without end: leave out `repeat`")
        try:
            batches = list(dataset.batch(_READ_AT_ONCE).as_numpy_iterator())
            # An empty list fits what the other clients have.
            columns = {
                name: np.concatenate([b[key] for b in batches]) if batches else [] for name, key in names.items()
            }
        except (tf.errors.InvalidArgumentError, ValueError) as e:
            reason = re.sub(r"{{.*?}} | \[Op:.*", "", str(getattr(e, "message", e)).split("\n")[0])
            raise ValueError(
                f"the examples of client {client_id!r} cannot be put together: {reason} If they are batches, leave out "
                "batch"
            ) from e
        yield columns


def _names_of_parts(structure: Any) -> dict[str, Any]:
    """Returns the key, in an element, of each column."""
    if isinstance(structure, Mapping):
        names = {name: name for name in structure}
    elif has_named_parts(structure):
        names = {name: structure._fields.index(name) for name in structure._fields}
    elif isinstance(structure, tuple) and len(structure) <= len(PARTS_OF_A_BATCH):
        names = {name: i for i, name in enumerate(PARTS_OF_A_BATCH[: len(structure)])}
    else:
        names = {}
    if not names or not all(isinstance(structure[key], tf.TensorSpec) for key in names.values()):
        is_serialized = isinstance(structure, tf.TensorSpec) and structure.dtype == tf.string
        raise ValueError(
            f"client_data has elements {structure}, but takes mappings from names to tensors, or tuples (x, y): "
            f"{'parse' if is_serialized else 'map'} them with client_data.preprocess(lambda dataset: dataset.map(...))"
        )
    shapes = [structure[key].shape for key in names.values()]
    if all(shape.rank and shape[0] is None for shape in shapes) and len({shape.rank for shape in shapes}) > 1:
        raise ValueError(
            f"client_data has elements {structure}, which are batches: leave out batch, or take them apart with "
            "client_data.preprocess(lambda dataset: dataset.unbatch())"
        )
    return names


def has_named_parts(value: Any) -> bool:
    """Whether a batch, or an element, is a named tuple with x and y, which may be in any order."""
    return {"x", "y"} <= set(getattr(value, "_fields", ()))


def wrong_type(argument: str, value: Any, takes: str) -> TypeError:
    """Returns the error for an argument of another type than it takes, which says what takes such a value."""
    name = _name_of_type(value)
    if isinstance(value, tff.simulation.datasets.ClientData):
        hint = "ClientDataset.from_client_data takes it"
    elif isinstance(value, tf.data.Dataset):
        hint = "ClientDataset.from_client_data takes a ClientData, which has a tf.data.Dataset for each client"
    elif type(value).__module__.split(".")[0] == "pandas":
        hint = "ClientDataset.from_arrays takes dict(frame), with client_column, or a list of such, one for each client"
    elif isinstance(value, (str, os.PathLike)):
        hint = "ClientDataset(directory, preprocess_fn) opens client files, and takes a path"
    else:
        hint = "ClientDataset.from_arrays takes [{'x': ..., 'y': ...}, ...], the columns of each client"
    return TypeError(f"{argument} is a {name}, but takes {takes}; {hint}")


def listed(names: Iterable[str]) -> str:
    """Returns names as a message has them."""
    return ", ".join(map(repr, names))


def _name_of_type(value: Any) -> str:
    # Datasets have private types.
    return "tf.data.Dataset" if isinstance(value, tf.data.Dataset) else type(value).__name__
