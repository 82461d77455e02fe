import gzip
import hashlib
import struct

import numpy as np
import pytest
import tensorflow as tf
from conftest import NO_SEED

from tasks import build_task
from tff_fedavg.learning_curve import Target

_NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def idx(array):
    return struct.pack(f">HBB{array.ndim}i", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def data_dir(tmp_path):
    """A directory with four IDX files of 50 + 20 random digits."""
    rng = np.random.default_rng(0)
    directory = tmp_path / "data"
    directory.mkdir()
    for name, shape in zip(_NAMES, ([50, 28, 28], [50], [20, 28, 28], [20])):
        high = 256 if len(shape) == 3 else 10
        (directory / f"{name}.gz").write_bytes(gzip.compress(idx(rng.integers(high, size=shape))))
    return directory


def build(tmp_path, data_dir="nowhere", data="mnist", partition="iid", clients=None, name="mnist_2nn"):
    return build_task(
        name,
        data=data,
        data_dir=data_dir,
        cache_dir=tmp_path / "cache",
        partition=partition,
        clients=clients,
        seed=0,
    )


def all_examples(dataset):
    clients = [dataset.load(k) for k in range(dataset.num_clients)]
    return np.concatenate([c["image"] for c in clients]), np.concatenate([c["label"] for c in clients])


def test_embedded_digits_are_4000_and_1000_with_equal_classes(tmp_path):
    task = build(tmp_path, data="mnist5k")
    assert task.train.num_examples.tolist() == [40] * 100
    for dataset, count in ((task.train, 400), (task.test, 100)):
        images, labels = all_examples(dataset)
        assert np.bincount(labels).tolist() == [count] * 10
        assert (images.min(), images.max()) == (0, 255)
    train, test = (set(map(bytes, all_examples(dataset)[0])) for dataset in (task.train, task.test))
    assert not train & test


def test_idx_files_with_and_without_gzip_and_in_a_subdirectory_are_read(tmp_path, data_dir):
    expected = all_examples(build(tmp_path, data_dir, clients=5).train)
    for path in list(data_dir.iterdir()):
        plain = data_dir / "mnist" / path.stem
        plain.parent.mkdir(exist_ok=True)
        plain.write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    images, labels = all_examples(build(tmp_path / "other", data_dir, clients=5).train)
    np.testing.assert_array_equal(images, expected[0])
    np.testing.assert_array_equal(labels, expected[1])


@pytest.mark.parametrize(("name", "lowest"), [("mnist_2nn", -0.5), ("mnist_cnn", -0.5), ("mnist_2nn_0_to_1", 0.0)])
def test_pixels_are_scaled_to_the_range_of_the_task(tmp_path, data_dir, name, lowest):
    dataset = build(tmp_path, data_dir, clients=5, name=name).train
    x, y = dataset.batch(dataset.read(tf.constant(2)), tf.range(10), NO_SEED)
    stored = dataset.load(2)
    np.testing.assert_allclose(x, stored["image"] / 255 + lowest, atol=1e-6)
    np.testing.assert_array_equal(y, stored["label"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-10], "cut short or damaged: it has .* its header asks for"),
        (lambda content: content + b"more", "cut short or damaged"),
        (lambda content: b"", "not an IDX file: it starts with nothing"),
        (lambda content: b"\x00\x00\x08", "not an IDX file"),
        (lambda content: content[:6], "cut short or damaged"),
        (lambda content: b"<html>" + content, "not an IDX file: it starts with 3c 68 74 6d"),
    ],
    ids=["cut", "longer", "empty", "no header", "cut header", "web page"],
)
@pytest.mark.parametrize("name", _NAMES[:2])
def test_damaged_idx_files_are_named(tmp_path, data_dir, damage, message, name):
    path = data_dir / f"{name}.gz"
    path.write_bytes(gzip.compress(damage(gzip.decompress(path.read_bytes()))))
    with pytest.raises(ValueError, match=f"{name}.gz is {message}"):
        build(tmp_path, data_dir, clients=5)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("damage", [lambda c: c[:-20], lambda c: c[:40] + b"\xff\xff" + c[42:], lambda c: c[2:]])
def test_damaged_gzip_files_are_named(tmp_path, data_dir, damage):
    path = data_dir / f"{_NAMES[0]}.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{path} is damaged, or no gzip file"):
        build(tmp_path, data_dir, clients=5)


def test_labels_and_images_of_different_counts_are_refused(tmp_path, data_dir):
    (data_dir / f"{_NAMES[1]}.gz").write_bytes(gzip.compress(idx(np.zeros(49))))
    with pytest.raises(ValueError, match=f"{_NAMES[0]}.gz has 50 images, but there are 49 labels"):
        build(tmp_path, data_dir, clients=5)


def test_missing_idx_file_is_named(tmp_path, data_dir):
    (data_dir / f"{_NAMES[2]}.gz").unlink()
    with pytest.raises(ValueError, match=f"some of the IDX files of MNIST, and lacks {_NAMES[2]}"):
        build(tmp_path, data_dir, clients=5)


def test_offline_without_mnist_says_what_to_put_where(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise Exception("URL fetch failure on mnist.npz: None -- Name or service not known")

    monkeypatch.setattr(tf.keras.utils, "get_file", no_network)
    monkeypatch.setattr("keras.src.datasets.mnist.get_file", no_network)
    with pytest.raises(ValueError, match="put its four IDX files .*train-images-idx3-ubyte.gz.*data=mnist5k"):
        build(tmp_path, tmp_path / "empty")
    assert list((tmp_path / "empty").iterdir()) == []


def test_file_that_keras_downloaded_is_used_again(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    path = data_dir / "mnist.npz"
    x_train, x_test = (rng.integers(256, size=[n, 28, 28], dtype=np.uint8) for n in (50, 20))
    y_train, y_test = (rng.integers(10, size=n, dtype=np.uint8) for n in (50, 20))
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    # Keras looks for the file, and for its checksum, which this one cannot have.
    monkeypatch.setattr("keras.src.datasets.mnist.get_file", lambda fname, **kwargs: str(fname))
    images, labels = all_examples(build(tmp_path, data_dir, clients=5).test)
    np.testing.assert_array_equal(images, x_test)
    np.testing.assert_array_equal(labels, y_test)


def test_more_shards_than_examples_are_refused(tmp_path):
    with pytest.raises(ValueError, match="2001 clients need 4002 pieces of data, but there are 4000 examples"):
        build(tmp_path, data="mnist5k", partition="pathological", clients=2001)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(data="mnist5k"), "partition=writer needs data=mnist"),
        (dict(), "needs qmnist-train-labels-idx2-int.gz of QMNIST in data_dir="),
    ],
)
def test_partition_by_writer_says_what_it_needs(tmp_path, data_dir, changes, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, data_dir, partition="writer", **changes)


def test_full_mnist_is_the_public_one_in_100_clients_of_600(tmp_path, full_data_dir):
    task = build(tmp_path, full_data_dir)
    assert task.train.num_examples.tolist() == [600] * 100
    images, labels = all_examples(task.test)
    # MD5s of the uncompressed IDX files, as published; the test set keeps their order.
    assert hashlib.md5(idx(images)).hexdigest().startswith("2646ac64")
    assert hashlib.md5(idx(labels)).hexdigest().startswith("27ae3e4e")
    assert np.bincount(all_examples(task.train)[1]).tolist() == [
        5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949,
    ]  # fmt: skip
    assert task.target == Target(0.97)


def test_pathological_mnist_gives_most_clients_two_labels_at_most(tmp_path, full_data_dir):
    train = build(tmp_path, full_data_dir, partition="pathological").train
    num_labels = np.array([len(set(train.load(k)["label"])) for k in range(100)])
    assert train.num_examples.tolist() == [600] * 100
    # 200 shards of 300 have 9 places where the label changes, so at least 91 clients see two labels at most.
    assert (num_labels <= 2).sum() >= 91
    assert num_labels.max() <= 4


def test_mnist_by_writer_has_539_writers_of_19_to_131_digits(tmp_path, full_data_dir):
    train = build(tmp_path, full_data_dir, partition="writer").train
    assert train.num_clients == 539
    assert (train.num_examples.min(), np.median(train.num_examples), train.num_examples.max()) == (19, 116, 131)


@pytest.mark.parametrize(
    ("partition", "spread"),
    [("unbalanced_iid", 5), ("unbalanced_pathological", 3)],  # The sum of two log-normal shards varies less.
)
def test_unbalanced_mnist_has_clients_of_very_different_sizes(tmp_path, full_data_dir, partition, spread):
    sizes = build(tmp_path, full_data_dir, partition=partition).train.num_examples
    assert (len(sizes), sizes.sum()) == (100, 60000)
    assert sizes.min() >= 1
    assert sizes.max() > spread * np.median(sizes) > spread * sizes.min()
