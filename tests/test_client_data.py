import concurrent.futures
import json

import numpy as np
import pytest
import tensorflow as tf
from conftest import NO_SEED

from tff_fedavg.client_data import ClientDataset, prepare_client_dataset, write_client_dataset


def identity(example, seed):
    return example["x"], example["y"]


def read_in_graph(dataset, client_id):
    @tf.function
    def read(k):
        records = dataset.read(k)
        return dataset.batch(records, tf.range(tf.shape(records)[0]), NO_SEED)

    return [t.numpy() for t in read(tf.constant(client_id))]


def test_every_client_is_read_in_the_graph_as_it_was_written(client_arrays, client_dataset):
    assert client_dataset.num_clients == 6
    assert client_dataset.num_examples.tolist() == [7, 1, 0, 20, 10, 12]
    for k, arrays in enumerate(client_arrays):
        x, y = read_in_graph(client_dataset, k)
        np.testing.assert_array_equal(x, arrays["x"])
        np.testing.assert_array_equal(y, arrays["y"])
        np.testing.assert_array_equal(client_dataset.load(k)["x"], arrays["x"])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64, np.float32])
def test_features_of_any_dtype_and_shape_survive(tmp_path, dtype):
    x = np.arange(60).reshape(5, 3, 4).astype(dtype)
    write_client_dataset(tmp_path, [{"x": x, "y": x[:, 0, 0]}])
    dataset = ClientDataset(tmp_path, identity)
    assert [s.dtype for s in dataset.batch_spec] == [dtype, dtype]
    assert dataset.batch_spec[0].shape.as_list() == [None, 3, 4]
    read_x, read_y = read_in_graph(dataset, 0)
    np.testing.assert_array_equal(read_x, x)
    np.testing.assert_array_equal(read_y, x[:, 0, 0])


def test_batch_gathers_the_rows_asked_for(client_arrays, client_dataset):
    x, y = client_dataset.batch(client_dataset.read(tf.constant(3)), tf.constant([19, 0, 5]), NO_SEED)
    np.testing.assert_array_equal(x, client_arrays[3]["x"][[19, 0, 5]])
    np.testing.assert_array_equal(y, client_arrays[3]["y"][[19, 0, 5]])


@pytest.mark.parametrize("client_id", [-1, 6])
def test_a_client_that_does_not_exist_is_refused(client_dataset, client_id):
    with pytest.raises(tf.errors.InvalidArgumentError, match="There is no client"):
        read_in_graph(client_dataset, client_id)


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


def test_a_directory_that_is_no_client_dataset_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a client dataset"):
        ClientDataset(tmp_path, identity)


def test_clients_whose_features_disagree_are_refused(tmp_path):
    good = {"x": np.zeros([2, 3]), "y": np.zeros(2)}
    for bad in ({"x": np.zeros([2, 4]), "y": np.zeros(2)}, {"x": np.zeros([2, 3]), "y": np.zeros(3)}):
        with pytest.raises(ValueError, match="client 1 has the features"):
            write_client_dataset(tmp_path, [good, bad])
    with pytest.raises(ValueError, match="at least one client"):
        write_client_dataset(tmp_path, [])


def prepare(cache_dir, arrays, seed=0, calls=None):
    def build():
        if calls is not None:
            calls.append(seed)
        return iter(arrays)

    return prepare_client_dataset(cache_dir, {"name": "toy", "seed": seed}, build, identity)


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


def test_preparation_that_fails_leaves_nothing_behind(tmp_path, client_arrays):
    def broken():
        yield client_arrays[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_client_dataset(tmp_path, {"name": "toy"}, broken, identity)
    assert list(tmp_path.iterdir()) == []


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
