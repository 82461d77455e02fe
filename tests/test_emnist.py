"""The EMNIST task, against TFF's own loader on small files in its schema, and on real digits by writer."""

import collections
import gzip
import os
import sqlite3

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff
from conftest import NO_SEED

import tasks
from tasks import tff_sqlite
from tff_fedavg import build_fed_avg, build_fed_eval

_SPLITS = ("digits_only_train", "digits_only_test", "all_train", "all_test")


def _build(tmp_path, data_dir="nowhere", data="digits", partition="writer", *, clients=None, name="emnist_2nn", seed=0):
    return tasks.build_task(
        name,
        data=data,
        data_dir=data_dir,
        cache_dir=tmp_path / "cache",
        partition=partition,
        clients=clients,
        seed=seed,
    )


def _write_sqlite(directory, rows):
    """Writes rows of split, writer, pixels and label in TFF's schema."""
    path = directory / "emnist_all.sqlite"
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE examples (split_name TEXT, client_id TEXT, serialized_example_proto BLOB)")
    database.execute("CREATE TABLE client_metadata (client_id TEXT, split_name TEXT, num_examples INTEGER)")
    for split, writer, pixels, label in rows:
        features = {
            "pixels": tf.train.Feature(float_list=tf.train.FloatList(value=np.ravel(pixels))),
            "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
        }
        example = tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()
        database.execute("INSERT INTO examples VALUES (?, ?, ?)", (split, writer, example))
    counts = collections.Counter((writer, split) for split, writer, _, _ in rows)
    database.executemany("INSERT INTO client_metadata VALUES (?, ?, ?)", [(*key, n) for key, n in counts.items()])
    database.commit()
    database.close()
    return path


def _random_rows(split, num_rows, num_classes, num_writers=7):
    """Pixels in steps of 1/255; the writers take turns, and their names are not in the order of their first turns."""
    rng = np.random.default_rng(num_rows)
    pixels = (rng.integers(256, size=[num_rows, 28, 28]) / 255).astype(np.float32)
    labels = rng.permutation(np.arange(num_rows) % num_classes)
    return [(split, f"f{3 * i % num_writers:04d}", pixels[i], labels[i]) for i in range(num_rows)]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A directory with TFF's file, of 400 + 1,100 random digits and 124 + 70 characters of 62 classes."""
    directory = tmp_path_factory.mktemp("data")
    counts = ((400, 10), (1100, 10), (124, 62), (70, 62))
    rows = [_random_rows(split, *count) for split, count in zip(_SPLITS, counts, strict=True)]
    _write_sqlite(directory, sum(rows, []))
    return directory


def _batches(dataset):
    """Returns the x and y of each client, as the model gets them."""
    ids = range(dataset.num_clients)
    return [dataset.batch(dataset.read(tf.constant(k)), tf.range(dataset.num_examples[k]), NO_SEED) for k in ids]


def _examples_of_tff(client_data):
    """Returns the pixels and labels of each of TFF's clients."""
    for client_id in client_data.client_ids:
        examples = list(client_data.create_tf_dataset_for_client(client_id).as_numpy_iterator())
        yield np.stack([e["pixels"] for e in examples]), np.stack([e["label"] for e in examples])


def _images(dataset):
    """Returns all images and labels, each as bytes, in sorted order."""
    clients = [dataset.load(k) for k in range(dataset.num_clients)]
    return sorted((i.tobytes(), int(j)) for c in clients for i, j in zip(c["image"], c["label"], strict=True))


# Pixels.


def test_the_model_gets_minus_a_half_for_paper_and_a_half_for_ink(tmp_path):
    pixels = np.ones([28, 28])
    pixels[3:5, 7] = 0.0
    pixels[9, 9] = 0.2
    _write_sqlite(tmp_path, [(split, "a", pixels, 4) for split in _SPLITS])
    ((x, y),) = _batches(_build(tmp_path, tmp_path).train)
    expected = np.full([28, 28], -0.5)
    expected[3:5, 7] = 0.5
    expected[9, 9] = 0.3
    np.testing.assert_allclose(x, [expected], atol=1e-7)
    assert (x.dtype, y.dtype, y.numpy().tolist()) == (tf.float32, tf.int32, [4])


@pytest.mark.parametrize("data", ["digits", "all"])
def test_examples_by_writer_are_those_that_tff_loads_inverted(tmp_path, data_dir, data):
    task = _build(tmp_path, data_dir, data)
    train, test = tff.simulation.datasets.emnist.load_data(only_digits=data == "digits", cache_dir=str(data_dir))
    assert task.train.num_clients == 7
    for (x, y), (pixels, labels) in zip(_batches(task.train), _examples_of_tff(train), strict=True):
        np.testing.assert_allclose(x, 0.5 - pixels, atol=1e-6)
        np.testing.assert_array_equal(y, labels)
    x, y = map(np.concatenate, zip(*_batches(task.test), strict=True))
    pixels, labels = map(np.concatenate, zip(*_examples_of_tff(test), strict=True))
    np.testing.assert_allclose(x, 0.5 - pixels, atol=1e-6)
    np.testing.assert_array_equal(y, labels)


def test_synthetic_is_what_tff_ships_to_train_and_to_test(tmp_path):
    task = _build(tmp_path, data="synthetic")
    assert task.train.num_examples.tolist() == [10, 10]
    for (x, y), (pixels, labels) in zip(
        _batches(task.train), _examples_of_tff(tff.simulation.datasets.emnist.get_synthetic()), strict=True
    ):
        # Its pixels come in steps of 1/9, the files have steps of 1/255.
        np.testing.assert_allclose(x, 0.5 - pixels, atol=0.5 / 255 + 1e-6)
        np.testing.assert_array_equal(y, labels)
    assert _images(task.test) == _images(task.train)


# Partitions and test set.


@pytest.mark.parametrize("partition", ["iid", "pathological", "unbalanced_iid", "unbalanced_pathological"])
def test_partitions_divide_the_training_examples_of_all_writers(tmp_path, data_dir, partition):
    writer, divided = (_build(tmp_path, data_dir, partition=p) for p in ("writer", partition))
    assert divided.train.num_clients == 100
    assert _images(divided.train) == _images(writer.train)
    assert divided.test.directory == writer.test.directory
    assert _build(tmp_path, data_dir, partition=partition, clients=9).train.num_clients == 9


def test_iid_clients_have_equal_shares(tmp_path, data_dir):
    train = _build(tmp_path, data_dir, partition="iid", clients=30).train
    assert sorted(train.num_examples) == [13] * 20 + [14] * 10


def test_most_pathological_clients_have_two_labels_at_most(tmp_path, data_dir):
    train = _build(tmp_path, data_dir, partition="pathological", clients=30).train
    # 400 = 40 * 7 + 20 * 6. Sixty shards have 9 places where the label changes.
    assert set(train.num_examples) <= {12, 13, 14}
    num_labels = np.array([len(set(train.load(k)["label"])) for k in range(30)])
    assert (num_labels <= 2).sum() >= 21


def test_unbalanced_clients_are_of_very_different_sizes(tmp_path, data_dir):
    sizes = _build(tmp_path, data_dir, partition="unbalanced_iid", clients=30).train.num_examples
    assert sizes.min() >= 1
    assert sizes.max() > 4 * np.median(sizes)


def test_the_test_set_is_cut_into_parts_of_1000(tmp_path, data_dir):
    assert _build(tmp_path, data_dir).test.num_examples.tolist() == [1000, 100]


def test_client_files_are_prepared_once_for_both_models_and_for_each_seed_of_iid(tmp_path, data_dir):
    names = ("emnist_2nn", "emnist_cnn")
    by_writer = {_build(tmp_path, data_dir, name=name, seed=s).train.directory for name in names for s in (0, 1)}
    assert len(by_writer) == 1
    by_seed = {_build(tmp_path, data_dir, partition="iid", seed=seed).train.directory for seed in (0, 1)}
    assert len(by_seed) == 2


@pytest.mark.parametrize(
    ("data", "name", "num_classes"),
    [("digits", "emnist_2nn", 10), ("all", "emnist_2nn", 62), ("all", "emnist_cnn", 62)],
)
def test_models_have_an_output_for_each_class_of_the_data(tmp_path, data_dir, data, name, num_classes):
    assert _build(tmp_path, data_dir, data, name=name).keras_model_fn().output_shape == (None, num_classes)


# Bad input: one line that says what is wrong.


def _error(tmp_path, *args, **settings):
    with pytest.raises(ValueError) as info:
        _build(tmp_path, *args, **settings)
    assert "\n" not in str(info.value)
    return str(info.value)


def _one_example_each(splits=_SPLITS, label=1):
    return [(split, "a", np.ones([28, 28]), label) for split in splits]


@pytest.mark.parametrize(
    ("data", "pixels", "label", "message"),
    [
        ("digits", np.ones(783), 0, "writer b has examples that are not 28x28 pixels and a label"),
        ("digits", np.ones(785), 0, "writer b has examples that are not 28x28 pixels and a label"),
        ("digits", np.full(784, 255.0), 0, "writer b has pixels that are not from 0 to 1"),
        ("digits", np.full(784, np.nan), 0, "writer b has pixels that are not from 0 to 1"),
        ("digits", np.ones(784), 10, "writer b has the labels 10 to 10 of 10 classes"),
        ("digits", np.ones(784), -1, "writer b has the labels -1 to -1 of 10 classes"),
        ("all", np.ones(784), 62, "writer b has the labels 62 to 62 of 62 classes"),
    ],
)
def test_examples_that_are_not_emnist_are_refused(tmp_path, data, pixels, label, message):
    split = "digits_only_train" if data == "digits" else "all_train"
    path = _write_sqlite(tmp_path, [*_one_example_each(), (split, "b", pixels, label)])
    assert _error(tmp_path, tmp_path, data) == f"{path} is damaged ({message}): remove it, and it is downloaded again"
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_garbled_example_is_refused(tmp_path):
    path = _write_sqlite(tmp_path, _one_example_each())
    database = sqlite3.connect(path)
    database.execute("UPDATE examples SET serialized_example_proto = x'ffff'")
    database.commit()
    database.close()
    assert f"{path} is damaged (writer a has examples that are not 28x28 pixels" in _error(tmp_path, tmp_path)


def test_62_classes_have_labels_up_to_61(tmp_path):
    _write_sqlite(tmp_path, _one_example_each(label=61))
    assert _build(tmp_path, tmp_path, "all").train.load(0)["label"].tolist() == [61]


@pytest.mark.parametrize("missing", _SPLITS)
def test_a_missing_split_is_named(tmp_path, missing):
    _write_sqlite(tmp_path, _one_example_each([split for split in _SPLITS if split != missing]))
    data, other = ("digits", "all") if missing.startswith("digits") else ("all", "digits")
    assert f"it has no examples of the split {missing}" in _error(tmp_path, tmp_path, data)
    assert list((tmp_path / "cache").iterdir()) == []
    assert _build(tmp_path, tmp_path, other).train.num_clients == 1


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.999999])
def test_a_file_cut_short_is_refused(tmp_path, data_dir, kept):
    content = (data_dir / "emnist_all.sqlite").read_bytes()
    path = tmp_path / "emnist_all.sqlite"
    path.write_bytes(content[: int(len(content) * kept)])
    assert f"{path} is damaged" in _error(tmp_path, tmp_path)


def test_a_file_that_is_not_sqlite_is_refused(tmp_path):
    path = tmp_path / "emnist_all.sqlite"
    path.write_bytes(b"<html>404</html>" * 1000)
    assert f"{path} is damaged (file is not a database)" in _error(tmp_path, tmp_path)


def test_a_fifo_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "emnist_all.sqlite")
    with pytest.raises(ValueError, match="is a FIFO, not a regular file"):
        with tff_sqlite.open_database(tmp_path / "emnist_all.sqlite", splits=[]):
            pass


def test_more_clients_than_examples_are_refused(tmp_path, data_dir):
    assert "401 clients need 401 pieces of data, but there are 400 examples" in _error(
        tmp_path, data_dir, partition="iid", clients=401
    )


# Training, and real digits.


def test_fed_avg_learns_the_synthetic_digits(worker, tmp_path):
    task = _build(tmp_path, data="synthetic")
    model = task.build_model(seed=0)
    process = build_fed_avg(model, task.train, epochs=5, batch_size=10, learning_rate=0.1)
    evaluate = build_fed_eval(model, task.test)
    state = process.initialize()
    before = evaluate(state.global_model_weights, [0])
    for _ in range(10):
        state, _ = process.next(state, [0, 1])
    after = evaluate(state.global_model_weights, [0])
    assert before["accuracy"] < 0.5
    assert after["accuracy"] == 1.0
    assert after["loss"] < before["loss"] / 2


def _read_idx(path, header_bytes, dtype, shape):
    return np.frombuffer(gzip.decompress(path.read_bytes()), dtype, offset=header_bytes).reshape(shape)


def test_real_digits_by_their_writers_come_back_as_they_are_in_mnist(tmp_path, full_data_dir):
    images = _read_idx(full_data_dir / "mnist" / "train-images-idx3-ubyte.gz", 16, np.uint8, [-1, 28, 28])
    qmnist = _read_idx(full_data_dir / "qmnist" / "qmnist-train-labels-idx2-int.gz", 12, ">i4", [-1, 8])
    labels, writers = qmnist[:, 0], qmnist[:, 2]
    chosen = np.unique(writers)[:5]
    # TFF's way: the pixels inverted, and one in nine of a writer's digits for the test.
    rows, expected = [], []
    for writer in chosen:
        indices = np.flatnonzero(writers == writer)
        for split, part in (("train", np.arange(len(indices)) % 9 != 0), ("test", np.arange(len(indices)) % 9 == 0)):
            for i in indices[part]:
                rows.append((f"digits_only_{split}", f"f{writer:04d}", 1 - images[i] / np.float32(255), labels[i]))
        expected.append(indices[np.arange(len(indices)) % 9 != 0])
    _write_sqlite(tmp_path, rows)
    task = _build(tmp_path, tmp_path)
    assert task.train.num_clients == 5
    assert task.test.num_examples.sum() == len(rows) - sum(map(len, expected))
    for (x, y), indices in zip(_batches(task.train), expected, strict=True):
        np.testing.assert_allclose(x, images[indices] / 255 - 0.5, atol=1e-6)
        np.testing.assert_array_equal(y, labels[indices])
    # Paper takes most of a digit's picture, so most of what the model gets is -0.5.
    assert np.mean(np.concatenate([x for x, _ in _batches(task.train)]) == -0.5) > 0.7
