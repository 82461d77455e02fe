import multiprocessing
import os
import signal
import tracemalloc
import zlib

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from conftest import identity, read_in_graph

from tff_fedavg.client_data import ClientDataset
from tff_fedavg.client_files import DamagedFilesError, write_client_dataset
from tff_fedavg.json_record import read_record, write_record

DTYPES = [
    *(np.bool_, np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64),
    *(np.float16, tf.bfloat16.as_numpy_dtype, np.float32, np.float64, np.complex64, np.complex128),
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_features_of_any_dtype_and_shape_survive(tmp_path, dtype):
    x = np.random.default_rng(0).integers(-100, 100, [5, 3, 4]).astype(dtype)
    write_client_dataset(tmp_path, [{"x": x, "y": x[:, 0, 0]}])
    dataset = ClientDataset(tmp_path, identity)
    assert [s.dtype for s in dataset.batch_spec] == [dtype, dtype]
    assert dataset.batch_spec[0].shape.as_list() == [None, 3, 4]
    read_x, read_y = read_in_graph(dataset, 0)
    np.testing.assert_array_equal(read_x, x)
    np.testing.assert_array_equal(read_y, x[:, 0, 0])
    np.testing.assert_array_equal(dataset.load(0)["x"], x)


@pytest.mark.parametrize("dtype", [">i2", ">u4", ">i8", ">f4", ">f8", ">c8"])
def test_big_endian_arrays_have_the_same_values_in_the_graph(tmp_path, dtype):
    x = np.arange(6).reshape(3, 2).astype(dtype)
    write_client_dataset(tmp_path, [{"x": x, "y": np.asfortranarray(x)[:, ::-1]}])
    read_x, read_y = read_in_graph(ClientDataset(tmp_path, identity), 0)
    assert read_x.tolist() == x.tolist()
    assert read_y.tolist() == x[:, ::-1].tolist()


@pytest.mark.parametrize(
    ("column", "dtype", "values"),
    [
        ([1, 2], "int64", [1, 2]),
        ((1, 2.5), "float64", [1, 2.5]),
        ([True, False], "bool", [True, False]),
        ([2**63], "uint64", [2**63]),
        (range(2), "int64", [0, 1]),
        ([np.float32([1, 2]), np.float32([3, 4])], "float32", [[1, 2], [3, 4]]),
        (tf.constant([[1], [2]]), "int32", [[1], [2]]),
        ([tf.constant([1.0]), tf.constant([2.0])], "float32", [[1], [2]]),
        (tf.Variable([1.0, 2.0]), "float32", [1, 2]),
        (tf.constant([1, 2], tf.bfloat16), "bfloat16", [1, 2]),
        (pd.Series([1, 2], index=[7, 8], dtype="int16"), "int16", [1, 2]),
    ],
)
def test_whatever_numpy_makes_an_array_of_is_a_column(tmp_path, column, dtype, values):
    write_client_dataset(tmp_path, [{"x": column, "y": column}])
    dataset = ClientDataset(tmp_path, identity)
    assert dataset.element_spec["x"].dtype.name == dtype
    assert dataset.load(0)["x"].tolist() == values


def test_a_client_is_written_in_pieces_that_take_little_memory(tmp_path):
    x = np.arange(12_500_000, dtype=np.int64).reshape(100, -1)  # 100 MB, in pieces of 17.
    tracemalloc.start()
    write_client_dataset(tmp_path, [{"x": x, "y": np.arange(100)}])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 45_000_000
    loaded = ClientDataset(tmp_path, lambda examples: (examples["x"], examples["y"])).load(0)
    np.testing.assert_array_equal(loaded["x"], x)
    np.testing.assert_array_equal(loaded["y"], np.arange(100))


def test_an_empty_list_takes_the_dtype_and_shape_of_the_other_clients(tmp_path):
    examples = {"x": np.ones([2, 3], np.float32), "y": [1, 2]}
    write_client_dataset(tmp_path, [{"x": [], "y": ()}, examples, {"y": [], "x": np.zeros([0, 3], np.float32)}])
    dataset = ClientDataset(tmp_path, identity)
    assert dataset.num_examples.tolist() == [0, 2, 0]
    assert list(dataset.element_spec.values()) == [tf.TensorSpec([3], tf.float32), tf.TensorSpec([], tf.int64)]
    assert read_in_graph(dataset, 0)[0].shape == (0, 3)


def test_clients_may_have_their_columns_in_another_order(tmp_path):
    write_client_dataset(tmp_path, [{"x": [1], "y": [2.0]}, {"y": [4.0], "x": [3]}])
    assert ClientDataset(tmp_path, identity).load(1) == {"x": [3], "y": [4.0]}


GOOD = {"x": np.zeros([2, 3], np.float32), "y": np.zeros(2, np.int32)}
TEXT = r"which cannot be stored: encode text as integer ids, for example with np.unique\(column, return_inverse=True\)"


@pytest.mark.parametrize(
    ("first", "second"), [([1.5], [2]), ([1.5], np.float32([2])), ([1.5], [[2.5]]), ([2], [1.5]), ([], [1.5])]
)
def test_clients_of_several_dtypes_or_shapes_are_refused_whatever_comes_first(tmp_path, first, second):
    """NumPy takes float64 for None, which an empty list has."""
    clients = [{"x": first}, {"x": second}]
    if first:
        with pytest.raises(ValueError, match="^client 1, column 'x', has examples of .*: all need the same"):
            write_client_dataset(tmp_path, clients)
    else:
        write_client_dataset(tmp_path, clients)
        assert ClientDataset(tmp_path, lambda e: (e["x"], e["x"])).load(1)["x"] == second


@pytest.mark.parametrize(
    ("client", "message"),
    [
        (dict(GOOD, y=["a", "b"]), f"^client 1, column 'y', is a list of dtype <U1, {TEXT}"),
        (dict(GOOD, y=np.array([b"a", b"b"])), rf"^client 1, column 'y', is a ndarray of dtype \|S1, {TEXT}"),
        (dict(GOOD, y=np.array(["a", None], object)), f"of dtype object, {TEXT}"),
        (dict(GOOD, y=[1, "b"]), TEXT),
        (dict(GOOD, y=tf.constant(["a", "b"])), TEXT),
        (dict(GOOD, y=pd.Series(["a", "b"])), f"is a Series of dtype object, {TEXT}"),
        (dict(GOOD, y="ab"), TEXT),
        (dict(GOOD, y=[1, None]), "of dtype object, .*: make it an array of numbers, with no value missing"),
        (dict(GOOD, y=[2**70, 0]), "make it an array of numbers"),
        (dict(GOOD, y={1, 2}), "is a set of dtype object, .*: make it an array of numbers"),
        (dict(GOOD, y=tf.ragged.constant([[1], [2, 3]])), "make it an array of numbers, .* examples of one shape"),
        (dict(GOOD, y=np.array(["2020-01-01", "NaT"], "M8[D]")), "store times as numbers"),
        (dict(GOOD, y=np.array([1, 2], "m8[s]")), "store durations as numbers"),
        (dict(GOOD, y=np.zeros(2, np.longdouble)), r"column.astype\(np.float64\)"),
        (dict(GOOD, y=np.zeros(2, np.clongdouble)), r"column.astype\(np.complex128\)"),
        (dict(GOOD, y=np.zeros(2, "i4,f4")), "make each field a column of its own"),
        (dict(GOOD, y=np.ma.array([1, 2], mask=[0, 1])), "has masked values"),
        (
            dict(GOOD, y=[[1, 2], [3]]),
            "^client 1, column 'y', is a list that is no array: its examples differ in shape",
        ),
        (dict(GOOD, y=[np.zeros([2, 3]), np.zeros([2, 4])]), "its examples differ in shape"),
        (dict(GOOD, y=3), "^client 1, column 'y', is a single value, 3: a column has one row for each example"),
        (dict(GOOD, y=tf.constant(3.0)), "is a single value, 3.0"),
        (dict(GOOD, y=[[], []]), r"has the shape \[2, 0\]: an example needs at least one number"),
        (dict(GOOD, y=np.zeros(3, np.int32)), r"^client 1 has columns of different lengths \('x' 2, 'y' 3\)"),
        (dict(GOOD, y=[]), "columns of different lengths"),
        ({}, "^client 1 has no columns"),
        ({"x": GOOD["x"]}, "^client 1 has the columns 'x', but those before it have 'x', 'y': all need the same"),
        ({"x": GOOD["x"], "z": GOOD["y"]}, "^client 1 has the columns 'x', 'z', but"),
        (
            dict(GOOD, x=np.zeros([2, 4], np.float32)),
            r"^client 1, column 'x', has examples of float32 \[4\], but those before it have float32 \[3\]",
        ),
        (dict(GOOD, x=np.zeros([2, 3])), r"has examples of float64 \[3\], but those before it have float32 \[3\]"),
    ],
)
def test_a_client_that_cannot_be_stored_is_refused_in_a_line_and_no_files_are_left(tmp_path, client, message):
    with pytest.raises(ValueError, match=message) as error:
        write_client_dataset(tmp_path, [GOOD, client])
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("client", "message"),
    [
        (pd.DataFrame(GOOD["x"]), r"^client 1 is a DataFrame, but takes a mapping .*dict\(frame\)"),
        (tf.data.Dataset.from_tensor_slices(GOOD), "^client 1 is a tf.data.Dataset, .*from_client_data takes"),
        ((GOOD["x"], GOOD["y"]), "^client 1 is a tuple, but takes a mapping from the names of columns to arrays"),
        (None, "^client 1 is a NoneType"),
        ({0: GOOD["x"]}, "^client 1 has a column named 0: the name of a column is a string"),
        ({"": GOOD["x"]}, "^client 1 has a column named ''"),
    ],
)
def test_a_client_that_is_no_mapping_from_names_is_refused(tmp_path, client, message):
    with pytest.raises(TypeError, match=message):
        write_client_dataset(tmp_path, [GOOD, client])
    assert list(tmp_path.iterdir()) == []


def test_lists_that_are_empty_in_all_clients_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"column 'x' is an empty list in every client, .* np.zeros\(\[0\], np.float32"
    ):
        write_client_dataset(tmp_path, [{"x": []}, {"x": []}])


def test_files_that_are_there_are_not_written_over(tmp_path):
    write_client_dataset(tmp_path, [GOOD])
    with pytest.raises(ValueError, match="has client files of other examples: remove them"):
        write_client_dataset(tmp_path, [GOOD, GOOD])
    assert ClientDataset(tmp_path, identity).num_clients == 1
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "examples.bin").write_text("of somebody else")
    with pytest.raises(ValueError, match="other/examples.bin is in the way of client files: remove it"):
        write_client_dataset(tmp_path / "other", [GOOD])
    assert [path.read_text() for path in (tmp_path / "other").iterdir()] == ["of somebody else"]


def test_files_are_there_as_a_whole_however_the_program_ends_and_whoever_writes_them_too(tmp_path):
    """One program is killed while it writes; then another has finished the same when this one comes to an end."""

    def clients():
        yield {"x": [1.0], "y": [2]}
        os.kill(os.getpid(), signal.SIGKILL)

    killed = multiprocessing.get_context("fork").Process(target=lambda: write_client_dataset(tmp_path, clients()))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".preparing-")] == []

    def slowly():
        yield {"x": [1.0], "y": [2]}
        if not (tmp_path / "manifest.json").exists():
            write_client_dataset(tmp_path, [{"x": [1.0], "y": [2]}])

    assert ClientDataset.from_arrays(slowly(), directory=tmp_path).num_clients == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["examples.bin", "manifest.json", "offsets.bin"]


@pytest.mark.parametrize("name", ["examples.bin", "offsets.bin"])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_damaged_files_are_found_when_opened(tmp_path, client_arrays, name, damage):
    write_client_dataset(tmp_path, client_arrays)
    path = tmp_path / name
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[:-1])
    elif damage == "flip":
        content[3] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        ClientDataset(tmp_path, identity)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"uint8"', '"int8"'),
        ('"y"', '"z"'),
        ('"num_clients": 6', '"num_clients": 5'),
        ('"shape": [\n        4\n      ]', '"shape": [\n        2, 2\n      ]'),
        ('"format_version": 2', '"format_version": 3'),
        ('"checksum"', '"check"'),
        ("{", ""),
    ],
)
def test_a_manifest_that_was_changed_is_not_believed(tmp_path, client_arrays, old, new):
    write_client_dataset(tmp_path, client_arrays)
    path = tmp_path / "manifest.json"
    written = path.read_text()
    assert old in written
    path.write_text(written.replace(old, new, 1))
    with pytest.raises(DamagedFilesError, match=f"^{path} ") as error:
        ClientDataset(tmp_path, identity)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_examples": 49}, "examples.bin is damaged: its size"),
        ({"num_clients": 5}, "offsets.bin is damaged: its size"),
        ({"crc32": {}}, "examples.bin is damaged: its size or checksum"),
        ({"features": [{"name": "x"}]}, "manifest.json is damaged: KeyError"),
        ({"features": None}, "manifest.json is damaged: TypeError"),
        ({"format_version": 1}, "manifest.json has format 1; this version reads 2"),
    ],
)
def test_a_manifest_that_does_not_fit_the_files_is_not_believed_though_its_checksum_is_right(
    tmp_path, client_arrays, changes, message
):
    write_client_dataset(tmp_path, client_arrays)
    path = tmp_path / "manifest.json"
    write_record(path, {**read_record(path), **changes})
    with pytest.raises(DamagedFilesError, match=message):
        ClientDataset(tmp_path, identity)


def test_offsets_that_do_not_divide_the_examples_are_refused_though_their_checksum_is_right(tmp_path, client_arrays):
    write_client_dataset(tmp_path, client_arrays)
    path = tmp_path / "manifest.json"
    for offsets in ([0, 7, 8, 8, 28, 38, 49], [1, 7, 8, 8, 28, 38, 50], [0, 8, 7, 8, 28, 38, 50]):
        content = np.asarray(offsets, "<i8").tobytes()
        (tmp_path / "offsets.bin").write_bytes(content)
        manifest = read_record(path)
        manifest["crc32"]["offsets.bin"] = zlib.crc32(content)
        write_record(path, manifest)
        with pytest.raises(DamagedFilesError, match="offsets.bin is damaged: it does not divide"):
            ClientDataset(tmp_path, identity)


@pytest.mark.parametrize("name", ["examples.bin", "offsets.bin", "manifest.json"])
def test_what_is_no_file_in_the_place_of_one_is_refused_at_once(tmp_path, client_arrays, name):
    write_client_dataset(tmp_path, client_arrays)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(DamagedFilesError, match=f"{name} .*is a FIFO"):
        ClientDataset(tmp_path, identity)


def test_a_directory_that_is_no_client_dataset_is_refused(tmp_path):
    with pytest.raises(DamagedFilesError, match="has no client files: its manifest.json is missing"):
        ClientDataset(tmp_path, identity)


def test_no_clients_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one client"):
        write_client_dataset(tmp_path, [])
