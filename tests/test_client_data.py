import collections
import concurrent.futures
import json
import shutil
import sqlite3
import subprocess
import sys
import threading

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
import tensorflow_federated as tff
from conftest import NO_SEED, ROOT, identity, read_in_graph
from test_client_files import GOOD, TEXT

from tff_fedavg import build_fed_avg, client_files, functional_model_from_keras
from tff_fedavg.client_data import ClientDataset, prepare_client_dataset
from tff_fedavg.client_files import write_client_dataset
from tff_fedavg.runtime import ComputationError
from tff_fedavg.scratch import scratch_directory


def test_every_client_is_read_in_the_graph_as_it_was_written(client_arrays, client_dataset):
    assert client_dataset.num_clients == 6
    assert client_dataset.num_examples.tolist() == [7, 1, 0, 20, 10, 12]
    for k, arrays in enumerate(client_arrays):
        x, y = read_in_graph(client_dataset, k)
        np.testing.assert_array_equal(x, arrays["x"])
        np.testing.assert_array_equal(y, arrays["y"])
        np.testing.assert_array_equal(client_dataset.load(k)["x"], arrays["x"])


def test_batch_gathers_the_rows_asked_for(client_arrays, client_dataset):
    x, y = client_dataset.batch(client_dataset.read(tf.constant(3)), tf.constant([19, 0, 5]), NO_SEED)
    np.testing.assert_array_equal(x, client_arrays[3]["x"][[19, 0, 5]])
    np.testing.assert_array_equal(y, client_arrays[3]["y"][[19, 0, 5]])


@pytest.mark.parametrize("client_id", [-1, 6])
def test_a_client_that_does_not_exist_is_refused(client_dataset, client_id):
    with pytest.raises(tf.errors.InvalidArgumentError, match="There is no client"):
        read_in_graph(client_dataset, client_id)


def prepare(cache_dir, arrays, seed=0, calls=None, checksums=None):
    def build():
        if calls is not None:
            calls.append(seed)
        return iter(arrays)

    key = {"name": "toy", "checksums": checksums or {"toy.csv": "0"}, "seed": seed}
    return prepare_client_dataset(cache_dir, key, build, identity)


def test_prepared_files_are_used_again_and_keyed_by_all_they_depend_on(tmp_path, client_arrays):
    calls = []
    first = prepare(tmp_path, client_arrays, 0, calls)
    again = prepare(tmp_path, client_arrays, 0, calls)
    other = prepare(tmp_path, client_arrays, 1, calls)
    assert calls == [0, 1]
    assert first.directory == again.directory != other.directory


def test_damaged_cache_is_prepared_anew_and_said_so(tmp_path, client_arrays, capsys):
    directory = prepare(tmp_path, client_arrays).directory
    (directory / "examples.bin").write_bytes(b"damaged")
    dataset = prepare(tmp_path, client_arrays)
    assert "preparing it anew" in capsys.readouterr().err
    np.testing.assert_array_equal(dataset.load(3)["x"], client_arrays[3]["x"])


def test_a_cache_in_which_another_file_is_in_the_way_is_refused_and_the_file_kept(tmp_path, client_arrays):
    directory = prepare(tmp_path, client_arrays).directory
    (directory / "examples.bin").write_bytes(b"damaged")
    (directory / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=f"^{directory} is in the way of client files: remove it"):
        prepare(tmp_path, client_arrays)
    assert [path.name for path in directory.iterdir()] == ["notes.txt"]
    (directory / "notes.txt").unlink()
    assert prepare(tmp_path, client_arrays).num_clients == 6


@pytest.mark.parametrize(
    ("preprocess_fn", "message"),
    [
        (lambda e: (e["x"][e["y"] < 1], e["y"][e["y"] < 1]), r"makes \d+ examples of 50; it must make one of each"),
        (lambda e: (tf.reshape(e["x"], [-1, 2]), e["y"]), "makes 100 examples of 50; it must make one of each"),
        (
            lambda e: (tf.gather(e["x"], 50 + tf.cast(e["y"], tf.int32)), e["y"]),
            "fails with the first 50 examples: InvalidArgumentError: ",
        ),
    ],
)
def test_a_preprocess_fn_that_drops_or_adds_examples_or_fails_with_them_is_refused(
    tmp_path, client_arrays, preprocess_fn, message
):
    write_client_dataset(tmp_path, client_arrays)
    with pytest.raises(ValueError, match=f"^preprocess_fn {message}") as error:
        ClientDataset(tmp_path, preprocess_fn)
    assert "\n" not in str(error.value)


def test_a_preprocess_fn_that_drops_examples_further_on_fails_with_the_client(worker):
    """What is tried are the first ones, of which it drops none."""
    x, y = np.zeros([60, 4], np.float32), np.zeros(60, np.int32)
    kept = np.arange(60) < 58
    arrays = [{"x": x, "y": y, "kept": np.ones(60, bool)}] * 2 + [{"x": x, "y": y, "kept": kept}]
    dataset = ClientDataset.from_arrays(arrays, lambda e: (e["x"][e["kept"]], e["y"][e["kept"]]))
    assert dataset._makes_one_of_each is False
    process = build_fed_avg(
        functional_model_from_keras(
            tf.keras.Sequential([tf.keras.layers.InputLayer([4]), tf.keras.layers.Dense(3)]),
            tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            dataset.batch_spec,
        ),
        dataset,
        epochs=1,
        batch_size=20,
        learning_rate=0.1,
    )
    state = process.initialize()
    assert process.next(state, [0, 1]).metrics["client_work"]["train"]["num_examples"] == 120
    with pytest.raises(ComputationError, match="^client 2 of .*preprocess_fn must make one example of each, and drops"):
        process.next(state, [0, 1, 2])


def test_many_data_sets_are_opened_without_a_warning_of_tensorflow(tmp_path, client_arrays, monkeypatch):
    write_client_dataset(tmp_path, client_arrays)
    told = []
    monkeypatch.setattr(tf.get_logger(), "warning", lambda *args: told.append(args))
    for _ in range(8):
        ClientDataset(tmp_path, identity)
    assert told == []


def test_a_preprocess_fn_that_does_not_fit_leaves_the_cache_as_it_is(tmp_path, client_arrays, capsys):
    calls = []
    prepare(tmp_path, client_arrays, calls=calls)
    key = {"name": "toy", "checksums": {"toy.csv": "0"}, "seed": 0}
    with pytest.raises(ValueError, match="preprocess_fn"):
        prepare_client_dataset(tmp_path, key, lambda: [], lambda example: example["x"])
    prepare(tmp_path, client_arrays, calls=calls)
    assert len(calls) == 1
    assert capsys.readouterr().err == ""


def test_other_data_under_the_same_key_are_told_by_their_checksums_and_a_key_without_them_is_refused(
    tmp_path, client_arrays
):
    assert prepare(tmp_path, client_arrays, checksums={"toy.csv": "1"}).num_clients == 6
    assert prepare(tmp_path, client_arrays[:3], checksums={"toy.csv": "2"}).num_clients == 3
    with pytest.raises(ValueError, match="the key has no 'checksums' of the files"):
        prepare_client_dataset(tmp_path, {"name": "toy"}, lambda: client_arrays, identity)


def test_preparation_that_fails_leaves_nothing_behind(tmp_path, client_arrays):
    def broken():
        yield client_arrays[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_client_dataset(tmp_path, {"name": "toy", "checksums": {"toy.csv": "0"}}, broken, identity)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_preparation_left_goes_with_the_next(tmp_path, client_arrays):
    with scratch_directory(tmp_path, ".preparing-") as running:
        killed = shutil.copytree(running, tmp_path / ".preparing-killed")
    (killed / "client_dataset").mkdir()
    directory = prepare(tmp_path, client_arrays).directory
    assert list(tmp_path.iterdir()) == [directory]


def test_programs_that_find_the_same_damage_at_once_all_get_the_files_made_anew(tmp_path, client_arrays, monkeypatch):
    directory = prepare(tmp_path, client_arrays).directory
    found = threading.Barrier(2)
    check = client_files.Manifest.read.__func__
    looks = iter([found.wait, found.wait])

    def read(cls, directory):
        try:
            return check(cls, directory)
        finally:
            next(looks, lambda: None)()  # Each has looked before one removes anything.

    for _ in range(5):
        (directory / "examples.bin").write_bytes(b"damaged")
        looks = iter([found.wait, found.wait])
        monkeypatch.setattr(client_files.Manifest, "read", classmethod(read))
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            datasets = list(pool.map(lambda _: prepare(tmp_path, client_arrays), range(2)))
        assert [dataset.num_examples.sum() for dataset in datasets] == [50, 50]


def test_runs_that_prepare_the_same_at_once_all_get_it(tmp_path, client_arrays):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        datasets = list(pool.map(lambda _: prepare(tmp_path, client_arrays), range(16)))
    assert len({d.directory for d in datasets}) == 1
    assert [p.name for p in tmp_path.iterdir()] == [datasets[0].directory.name]
    assert json.loads((datasets[0].directory / "manifest.json").read_text())["num_examples"] == 50


def test_a_cache_that_cannot_be_written_is_named(tmp_path, client_arrays):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="client files could not be written to .*file"):
        prepare(tmp_path / "file", client_arrays)


USERS = np.array(["eve", "adam", "eve", "bob", "eve"])
TABLE = {"x": np.arange(10.0).reshape(5, 2), "y": [1, 2, 3, 4, 5], "user": USERS}


@pytest.mark.parametrize(
    "users",
    [
        USERS,
        USERS.tolist(),
        USERS.astype(bytes),
        USERS.astype(object),
        tf.constant(USERS),
        pd.Series(USERS),
        [2, 0, 2, 1, 2],
        np.array([2.5, -1, 2.5, 0, 2.5]),
        np.array(["2020-03-01", "2020-01-01", "2020-03-01", "2020-02-01", "2020-03-01"], "M8[D]"),
    ],
)
def test_a_table_is_divided_among_the_values_of_its_client_column_in_sorted_order(users):
    dataset = ClientDataset.from_arrays(dict(TABLE, user=users), client_column="user")
    assert list(dataset.element_spec) == ["x", "y"]
    assert dataset.num_examples.tolist() == [1, 1, 3]
    assert [dataset.load(k)["y"].tolist() for k in range(3)] == [[2], [4], [1, 3, 5]]
    x, y = read_in_graph(dataset, 2)
    np.testing.assert_array_equal(x, TABLE["x"][[0, 2, 4]])
    assert y.tolist() == [1, 3, 5]


def test_a_data_frame_is_a_table_by_its_columns():
    frame = pd.DataFrame({"x": [1.0, 2.0], "y": [3, 4], "user": ["b", "a"]})
    assert ClientDataset.from_arrays(dict(frame), client_column="user").load(0) == {"x": [2.0], "y": [4]}


@pytest.mark.parametrize("kind", [list, tuple, iter])
def test_a_list_of_clients_is_kept_where_it_should_be(tmp_path, client_arrays, kind):
    dataset = ClientDataset.from_arrays(kind(client_arrays), identity, directory=tmp_path / "new" / "clients")
    assert dataset.directory == tmp_path / "new" / "clients"
    again = ClientDataset(tmp_path / "new" / "clients", identity)
    for k, arrays in enumerate(client_arrays):
        np.testing.assert_array_equal(again.load(k)["x"], arrays["x"])


@pytest.mark.parametrize("names", [("x", "y"), ("y", "sample_weight", "x")])
def test_columns_named_for_the_model_go_to_it_as_they_are(names):
    clients = [{name: np.float32([i, 10 * i]) for i, name in enumerate(names)}]
    values = read_in_graph(ClientDataset.from_arrays(clients), 0)
    in_order = [name for name in ("x", "y", "sample_weight") if name in names]
    np.testing.assert_array_equal(values, [clients[0][name] for name in in_order])


@pytest.mark.parametrize("names", [("x",), ("x", "label"), ("x", "y", "weight")])
def test_columns_of_other_names_need_a_preprocess_fn(tmp_path, names):
    clients = [dict.fromkeys(names, [1.0])]
    listed = ", ".join(map(repr, names))
    with pytest.raises(ValueError, match=f"preprocess_fn is missing: .*'sample_weight'; here they are {listed}$"):
        ClientDataset.from_arrays(clients, directory=tmp_path)
    with pytest.raises(ValueError):
        ClientDataset.from_arrays(clients, lambda example: example["x"], directory=tmp_path)
    assert list(tmp_path.iterdir()) == []
    ClientDataset.from_arrays(clients, lambda example, seed: (example["x"], example["x"]), directory=tmp_path)


def test_files_without_a_directory_are_there_until_the_program_ends(tmp_path):
    code = """if True:
        import gc, numpy as np, tff_fedavg
        dataset = tff_fedavg.ClientDataset.from_arrays([{"x": [1.0], "y": [2.0]}])
        directory = dataset.directory
        del dataset
        gc.collect()
        print(sorted(path.name for path in directory.glob("[!.]*")))
        print(directory)
    """
    environment = {"TMPDIR": str(tmp_path), "TF_CPP_MIN_LOG_LEVEL": "3"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    files, directory = result.stdout.splitlines()
    assert files == "['examples.bin', 'manifest.json', 'offsets.bin']"
    assert directory.startswith(str(tmp_path))
    assert list(tmp_path.glob("tff_fedavg-*")) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(clients=TABLE), "client_column is missing"),
        (dict(clients=[TABLE], client_column="user"), "client_column is 'user', but clients is divided already"),
        (dict(clients=TABLE, client_column="users"), "client_column is 'users', but the columns are 'x', 'y', 'user'"),
        (dict(clients={"user": USERS}, client_column="user"), "the table has no columns"),
        (dict(clients=dict(TABLE, y=["a"] * 5), client_column="user"), f"^the table, column 'y', .*{TEXT}"),
        (dict(clients=dict(TABLE, y=[1]), client_column="user"), "the table has columns of different lengths"),
        (
            dict(clients=dict(TABLE, user=USERS[:4]), client_column="user"),
            r"'user' has the shape \[4\], but .* 5 examples",
        ),
        (dict(clients=dict(TABLE, user=USERS[:, None]), client_column="user"), r"'user' has the shape \[5, 1\], but"),
        (
            dict(clients=dict(TABLE, user=["a", 1, "b", 2, None]), client_column="user"),
            r"'user' has values of several types \(NoneType, Number, str\): make all of them strings",
        ),
        (
            dict(clients=dict(TABLE, user=np.array(["a", 1, "b", 2, 3], object)), client_column="user"),
            "values that cannot be sorted",
        ),
        (dict(clients=dict(TABLE, user=["a", "a", np.nan, "b", "b"]), client_column="user"), "several types"),
        (
            dict(clients=dict(TABLE, user=np.ma.array(USERS, mask=[0, 0, 1, 0, 0])), client_column="user"),
            "column 'user' has masked values",
        ),
        (dict(clients=dict(TABLE, user=[1, 1, np.nan, 2, 2]), client_column="user"), "some are missing"),
        (dict(clients={"x": [], "y": [], "user": []}, client_column="user"), "needs at least one client"),
        (dict(clients=[]), "needs at least one client"),
    ],
)
def test_clients_that_cannot_be_told_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        ClientDataset.from_arrays(**arguments, directory=tmp_path)
    assert list(tmp_path.iterdir()) == []


CLIENT_DATA = tff.simulation.datasets.TestClientData(
    {
        "b": collections.OrderedDict(pixels=np.float32([[1, 2], [3, 4]]), label=[0, 1]),
        "a": collections.OrderedDict(pixels=np.float32([[5, 6]]), label=[2]),
    }
)


def pixels_and_label(example, seed):
    return example["pixels"], example["label"]


def test_client_data_keep_the_names_of_their_elements_and_the_order_of_their_clients(tmp_path):
    dataset = ClientDataset.from_client_data(CLIENT_DATA, pixels_and_label, directory=tmp_path)
    assert CLIENT_DATA.client_ids == ["b", "a"]
    assert [dataset.load(k)["label"].tolist() for k in range(2)] == [[0, 1], [2]]
    x, y = read_in_graph(dataset, 0)
    assert (x.tolist(), y.tolist()) == ([[1, 2], [3, 4]], [0, 1])


def test_client_data_of_tuples_have_x_and_y():
    client_data = CLIENT_DATA.preprocess(lambda dataset: dataset.map(lambda e: (e["pixels"], e["label"])))
    x, y = read_in_graph(ClientDataset.from_client_data(client_data), 0)
    assert (x.tolist(), y.tolist()) == ([[1, 2], [3, 4]], [0, 1])


def test_client_data_in_files_of_any_length_are_read(tmp_path):
    """An empty client, and one with more examples than are read at once."""
    lengths = {"empty": 0, "short": 1, "long": 2500}
    for name, length in lengths.items():
        (tmp_path / name).write_text("\n".join(map(str, range(length))))

    def read(path):
        numbers = tf.data.TextLineDataset(path).map(lambda line: tf.strings.to_number(line, tf.int32))
        return numbers.map(lambda number: (number, 2 * number))

    client_data = tff.simulation.datasets.FilePerUserClientData({name: str(tmp_path / name) for name in lengths}, read)
    dataset = ClientDataset.from_client_data(client_data)
    assert dataset.num_examples.tolist() == [lengths[name] for name in client_data.client_ids]
    assert dataset.load(client_data.client_ids.index("long"))["y"].tolist() == list(range(0, 5000, 2))


def test_client_data_in_a_database_are_read_once_they_are_parsed(tmp_path):
    path = str(tmp_path / "data.sqlite")
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE examples (split_name TEXT, client_id TEXT, serialized_example_proto BLOB)")
        database.execute("CREATE TABLE client_metadata (client_id TEXT, split_name TEXT, num_examples INTEGER)")
        for client_id, value in (("a", 1), ("b", 2), ("b", 3)):
            feature = tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))
            example = tf.train.Example(features=tf.train.Features(feature={"x": feature})).SerializeToString()
            database.execute("INSERT INTO examples VALUES ('train', ?, ?)", [client_id, example])
            database.execute("INSERT INTO client_metadata VALUES (?, 'train', 1)", [client_id])
    client_data = tff.simulation.datasets.SqlClientData(path, "train")
    with pytest.raises(
        ValueError, match=r"client_data has elements TensorSpec.*: parse them with client_data.preprocess"
    ):
        ClientDataset.from_client_data(client_data)
    parse = {"x": tf.io.FixedLenFeature([], tf.int64)}
    parsed = client_data.preprocess(lambda data: data.map(lambda e: tf.io.parse_single_example(e, parse)))
    dataset = ClientDataset.from_client_data(parsed, lambda example, seed: (example["x"], example["x"]))
    assert [dataset.load(k)["x"].tolist() for k in range(2)] == [[1], [2, 3]]


@pytest.mark.parametrize(
    ("map_fn", "message"),
    [
        (lambda e: e["pixels"], "client_data has elements TensorSpec.*: map them with client_data.preprocess"),
        (lambda e: (e, e["label"]), "client_data has elements .*: map them"),
        (lambda e: (1, 2, 3, 4), "client_data has elements .*: map them"),
        (lambda e: {"x": tf.RaggedTensor.from_row_lengths(e["pixels"], [2])}, "client_data has elements .*: map them"),
        (
            lambda e: {"x": tf.range(e["label"])},
            "^the examples of client 'b' cannot be put together: Cannot .* If they are batches, leave out batch$",
        ),
        (lambda e: {"x": tf.as_string(e["label"])}, f"^client 0, column 'x', .*{TEXT}"),
    ],
)
def test_client_data_whose_elements_are_no_columns_are_refused(tmp_path, map_fn, message):
    client_data = CLIENT_DATA.preprocess(lambda dataset: dataset.map(map_fn))
    with pytest.raises(ValueError, match=message) as error:
        ClientDataset.from_client_data(client_data, identity, directory=tmp_path)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_client_data_without_end_are_refused():
    with pytest.raises(ValueError, match="client 'b' has examples without end: leave out `repeat`"):
        ClientDataset.from_client_data(CLIENT_DATA.preprocess(lambda dataset: dataset.repeat()), pixels_and_label)


DATASET = tf.data.Dataset.from_tensor_slices(GOOD)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ClientDataset(CLIENT_DATA, identity), "directory is a TestClientData, .*from_client_data takes it"),
        (
            lambda: ClientDataset(DATASET, identity),
            "directory is a tf.data.Dataset, .*from_client_data takes a ClientData",
        ),
        (
            lambda: ClientDataset(pd.DataFrame(), identity),
            r"directory is a DataFrame, .*from_arrays takes dict\(frame\)",
        ),
        (lambda: ClientDataset([GOOD], identity), "directory is a list, .*from_arrays takes"),
        (lambda: ClientDataset("here", None), "preprocess_fn is a NoneType, but takes a function"),
        (lambda: ClientDataset.from_arrays(CLIENT_DATA), "clients is a TestClientData, .*from_client_data takes it"),
        (lambda: ClientDataset.from_arrays(DATASET), "clients is a tf.data.Dataset, .*from_client_data takes a"),
        (lambda: ClientDataset.from_arrays(pd.DataFrame()), r"clients is a DataFrame, .* takes dict\(frame\)"),
        (
            lambda: ClientDataset.from_arrays("here"),
            r"clients is a str, .*ClientDataset\(directory, preprocess_fn\) opens",
        ),
        (
            lambda: ClientDataset.from_arrays(GOOD["x"]),
            "clients is a ndarray, but takes a list with the columns of each",
        ),
        (lambda: ClientDataset.from_arrays([GOOD], "here"), "preprocess_fn is a str, but takes a function"),
        (lambda: ClientDataset.from_client_data([GOOD]), "client_data is a list, .*from_arrays takes"),
        (lambda: ClientDataset.from_client_data("here"), "client_data is a str, "),
        (lambda: ClientDataset.from_client_data(DATASET), "client_data is a tf.data.Dataset, "),
    ],
)
def test_data_in_the_wrong_place_are_refused_with_what_takes_them(call, message):
    with pytest.raises(TypeError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "client_ids",
    [
        [0, 5],
        (0, 5),
        np.array([0, 5], np.uint8),
        [np.int64(0), np.int32(5)],
        range(0, 6, 5),
        tf.constant([0, 5]),
        [tf.constant(0), 5],
        iter([0, 5]),
        {0: "a", 5: "b"}.keys(),
    ],
)
def test_client_ids_are_any_integers(client_dataset, client_ids):
    checked = client_dataset.check_client_ids(client_ids)
    assert checked == [0, 5]
    assert {type(k) for k in checked} == {int}


@pytest.mark.parametrize("client_id", [-1, 6])
def test_examples_of_a_client_that_does_not_exist_are_refused(client_dataset, client_id):
    with pytest.raises(ValueError, match=rf"client_ids\[0\] is {client_id}; it must be from 0 to 5"):
        client_dataset.load(client_id)


@pytest.mark.parametrize(
    ("client_ids", "error", "message"),
    [
        ([0, 6], ValueError, r"client_ids\[1\] is 6; it must be from 0 to 5"),
        (np.array([-1]), ValueError, r"client_ids\[0\] is -1; it must be from 0 to 5"),
        ([2**40], ValueError, r"client_ids\[0\] is 1099511627776; it must"),
        ([], ValueError, "client_ids is empty"),
        ([True], TypeError, r"client_ids\[0\] is True; it must be an integer"),
        (np.array([True]), TypeError, r"client_ids\[0\] is True; it must be an integer"),
        (tf.constant([True]), TypeError, r"client_ids\[0\] is True; it must be an integer"),
        ([1.0], TypeError, r"client_ids\[0\] is 1.0; it must be an integer"),
        (np.array([1.0]), TypeError, r"client_ids\[0\] is 1.0; it must"),
        (tf.constant([1.0]), TypeError, r"client_ids\[0\] is 1.0; it must be an integer"),
        (["1"], TypeError, r"client_ids\[0\] is '1'; it must"),
        ([np.zeros([2, 2])], TypeError, r"client_ids\[0\] is a ndarray; it must be an integer"),
        ("12", TypeError, r"client_ids\[0\] is '1'; it must"),
        ([None], TypeError, r"client_ids\[0\] is None; it must"),
        (np.array([[1], [2]]), TypeError, r"client_ids\[0\] is array\(\[1\]\); it must"),
        (tf.constant([[1], [2]]), TypeError, r"client_ids\[0\] is .*; it must be an integer"),
        (3, TypeError, "client_ids is 3: it takes a list of integers"),
        (tf.constant(3), TypeError, "client_ids is .*: it takes a list of integers"),
        (None, TypeError, "client_ids is None"),
    ],
)
def test_other_client_ids_are_refused(client_dataset, client_ids, error, message):
    with pytest.raises(error, match=message) as raised:
        client_dataset.check_client_ids(client_ids)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("clients", [["a\0", "a"], [2**63 + 1, 2**63], [2**53 + 1, 2**53 + 0.0], [b"a\0", b"a"]])
def test_clients_that_numpy_would_make_one_of_are_two(clients):
    table = {"x": [1.0, 2.0], "y": [0, 1], "user": clients}
    assert ClientDataset.from_arrays(table, client_column="user").num_examples.tolist() == [1, 1]


Swapped = collections.namedtuple("Swapped", "y x")


def test_named_tuples_are_taken_by_their_names():
    data = tff.simulation.datasets.TestClientData({"a": {"pixels": np.ones([2, 3]), "digit": [7, 8]}})
    elements = data.preprocess(lambda dataset: dataset.map(lambda e: Swapped(y=e["digit"], x=e["pixels"])))
    arrays = {"pixels": np.ones([2, 3]), "digit": [7, 8]}
    for dataset in (
        ClientDataset.from_client_data(elements),
        ClientDataset.from_arrays([arrays], lambda e: Swapped(y=e["digit"], x=e["pixels"])),
    ):
        x, y = dataset.batch(dataset.read(tf.constant(0)), tf.range(2), NO_SEED)
        assert (x.shape, y.numpy().tolist()) == ([2, 3], [7, 8])


def test_client_data_whose_elements_are_batches_are_refused():
    data = tff.simulation.datasets.TestClientData({"a": {"pixels": np.ones([4, 3]), "digit": [7, 8, 7, 8]}})
    batches = data.preprocess(lambda d: d.map(lambda e: (e["pixels"], e["digit"])).batch(2))
    with pytest.raises(ValueError, match="which are batches: leave out batch, or take them apart"):
        ClientDataset.from_client_data(batches)
    whole = batches.preprocess(lambda dataset: dataset.unbatch())
    assert ClientDataset.from_client_data(whole).num_examples.tolist() == [4]


def test_a_directory_may_have_the_files_of_the_same_examples_already(tmp_path):
    for _ in range(2):
        assert ClientDataset.from_arrays([{"x": [1.0], "y": [2]}], directory=tmp_path).num_clients == 1
    for other in ([{"x": [1.5], "y": [2]}], [{"x": [1.0], "y": [2.0]}], [{"x": [1.0], "y": [2]}, {"x": [], "y": []}]):
        with pytest.raises(ValueError, match="has client files of other examples: remove them"):
            ClientDataset.from_arrays(other, directory=tmp_path)
