import gzip
import hashlib
import struct
import tracemalloc
import zipfile

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
    with pytest.raises(ValueError, match=f"^{path} is damaged, or not what its name says .*: replace it$"):
        build(tmp_path, data_dir, clients=5)


def test_labels_and_images_of_different_counts_are_refused(tmp_path, data_dir):
    (data_dir / f"{_NAMES[1]}.gz").write_bytes(gzip.compress(idx(np.zeros(49))))
    with pytest.raises(ValueError, match=f"{_NAMES[0]}.gz has 50 images, but there are 49 labels"):
        build(tmp_path, data_dir, clients=5)


def test_missing_idx_file_is_named(tmp_path, data_dir):
    (data_dir / f"{_NAMES[2]}.gz").unlink()
    with pytest.raises(ValueError, match=f"some of the IDX files of MNIST, and lacks {_NAMES[2]}"):
        build(tmp_path, data_dir, clients=5)


# What cannot be right, in either form of the files.


def arrays():
    """Four good arrays by their names in mnist.npz, in the order of the IDX files."""
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(256, size=[50, 28, 28], dtype=np.uint8),
        "y_train": rng.integers(10, size=50, dtype=np.uint8),
        "x_test": rng.integers(256, size=[20, 28, 28], dtype=np.uint8),
        "y_test": rng.integers(10, size=20, dtype=np.uint8),
    }


_CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def write(directory, arrays, form):
    """Writes arrays as they are; returns their places in error messages."""
    directory.mkdir()
    if form == "npz":
        np.savez(directory / "mnist.npz", **arrays)
        return {name: f"{directory}/mnist.npz, {name}," for name in arrays}
    for name, array in zip(_NAMES, arrays.values()):
        header = struct.pack(f">HBB{array.ndim}i", 0, _CODES[array.dtype.str[1:]], array.ndim, *array.shape)
        (directory / name).write_bytes(header + array.astype(array.dtype.newbyteorder(">")).tobytes())
    return {name: directory / file for name, file in zip(arrays, _NAMES)}


def error(tmp_path, data_dir, **settings):
    """Returns the error: it is a line, comes before there are client files, and leaves the data as they are."""
    before = {path: path.read_bytes() for path in data_dir.iterdir()}
    with pytest.raises(ValueError) as info:
        build(tmp_path, data_dir, **{"clients": 5, **settings})
    assert "\n" not in str(info.value)
    assert list((tmp_path / "cache").iterdir()) == []
    assert {path: path.read_bytes() for path in data_dir.iterdir()} == before
    return str(info.value)


def with_value(name, dtype, place, value):
    def change(arrays):
        arrays[name] = arrays[name].astype(dtype)
        arrays[name][place] = value

    return change


def exchanged(*pairs):
    def change(arrays):
        arrays.update({a: arrays[b] for a, b in pairs} | {b: arrays[a] for a, b in pairs})

    return change


def cut(name, *slices):
    def change(arrays):
        arrays[name] = arrays[name][slices]

    return change


def cut_both(part):
    def change(arrays):
        arrays.update({f"{kind}_{part}": arrays[f"{kind}_{part}"][:0] for kind in "xy"})

    return change


@pytest.mark.parametrize("form", ["idx", "npz"])
@pytest.mark.parametrize(
    ("change", "at", "message"),
    [
        (with_value("y_train", "u1", 17, 10), "y_train", "has the label 10 at position 17: take 0 to 9"),
        (with_value("y_test", "u1", 19, 255), "y_test", "has the label 255 at position 19: take 0 to 9"),
        (with_value("y_train", "i4", 3, -1), "y_train", "has the label -1 at position 3: take 0 to 9"),
        (with_value("y_test", "i4", 0, 10), "y_test", "has the label 10 at position 0: take 0 to 9"),
        (with_value("y_test", "i4", 0, 256), "y_test", "has the label 256 at position 0: take 0 to 9"),
        (with_value("x_train", "i4", (7, 0, 3), 256), "x_train", "has the pixel 256 at position 7: take 0 to 255"),
        (with_value("x_test", "i4", (7, 27, 27), -1), "x_test", "has the pixel -1 at position 7: take 0 to 255"),
        (with_value("x_train", "f4", 0, 0), "x_train", "has values of the type float32; unsigned bytes are wanted"),
        (with_value("y_test", "f8", 0, 0), "y_test", "has values of the type float64; unsigned bytes are wanted"),
        (exchanged(("x_train", "y_train")), "x_train", r"has an array [50] instead of [n, 28, 28]: it is another file"),
        (exchanged(("x_test", "y_test")), "x_test", r"has an array [20] instead of [n, 28, 28]: it is another file"),
        (
            exchanged(("x_train", "x_test"), ("y_train", "y_test")),
            "y_test",
            "has 50 digits to test, {y_train} only 20 to train: they are swapped, it seems",
        ),
        (exchanged(("y_train", "y_test")), "x_train", "has 50 images, but there are 20 labels for them"),
        (cut("y_test", slice(19)), "x_test", "has 20 images, but there are 19 labels for them"),
        (cut_both("test"), "x_test", "has no digits"),
        (cut_both("train"), "x_train", "has no digits"),
        (
            cut("x_train", slice(None), slice(27)),
            "x_train",
            "has an array [50, 27, 28] instead of [n, 28, 28]: it is another file",
        ),
        (
            cut("x_train", slice(None), 0),
            "x_train",
            "has an array [50, 28] instead of [n, 28, 28]: it is another file",
        ),
    ],
)
def test_what_cannot_be_mnist_is_refused_with_the_place_and_the_reason(tmp_path, form, change, at, message):
    changed = arrays()
    change(changed)
    places = write(tmp_path / "data", changed, form)
    found = error(tmp_path, tmp_path / "data")
    if form == "npz" and str(places[at]) not in found:  # Of a header: in brackets.
        assert found.startswith(f"{tmp_path}/data/mnist.npz is damaged, or not MNIST as Keras has it ({at} {message}")
    else:
        assert found == f"{places[at]} {message.format(**places)}"


@pytest.mark.parametrize("form", ["idx", "npz"])
@pytest.mark.parametrize("dtype", ["u1", "i4"])
def test_good_digits_are_taken_as_they_are(tmp_path, form, dtype):
    good = arrays()
    write(tmp_path / "data", {name: array.astype(dtype) for name, array in good.items()}, form)
    task = build(tmp_path, tmp_path / "data", clients=5)
    images, labels = all_examples(task.test)
    assert images.dtype == labels.dtype == np.uint8
    np.testing.assert_array_equal(images, good["x_test"])
    np.testing.assert_array_equal(labels, good["y_test"])
    assert len(list((tmp_path / "data").iterdir())) == (1 if form == "npz" else 4)


@pytest.mark.parametrize(("dtype", "name"), [("i1", "int8"), ("i2", "int16"), ("f4", "float32"), ("f8", "float64")])
def test_idx_files_of_another_type_are_told_which(tmp_path, dtype, name):
    places = write(tmp_path / "data", arrays() | {"y_train": np.zeros(50, dtype)}, "idx")
    assert error(tmp_path, tmp_path / "data") == (
        f"{places['y_train']} has values of the type {name}; unsigned bytes are wanted"
    )


@pytest.mark.parametrize("header", [b"\0\0\x0a\x01" + b"\0" * 4, b"\0\1\x08\x01" + b"\0" * 4])
def test_what_no_idx_file_starts_with_is_told(tmp_path, header):
    places = write(tmp_path / "data", arrays(), "idx")
    places["y_train"].write_bytes(header)
    assert f"{places['y_train']} is not an IDX file: it starts with 00 0" in error(tmp_path, tmp_path / "data")


def rows_of(labels, writers):
    """QMNIST's rows of these digits."""
    rows = np.zeros([len(labels), 8], np.int32)
    rows[:, 0], rows[:, 2] = labels, writers
    return rows


def write_writers(data_dir, rows):
    path = data_dir / "qmnist-train-labels-idx2-int"
    path.write_bytes(struct.pack(">HBB2i", 0, 0x0C, 2, *rows.shape) + rows.astype(">i4").tobytes())
    return path


def test_each_writer_is_a_client(tmp_path):
    good = arrays()
    write(tmp_path / "data", good, "npz")
    writers = np.random.default_rng(1).permutation(np.repeat([1000, 7, 30], [5, 40, 5]))
    write_writers(tmp_path / "data", rows_of(good["y_train"], writers))
    train = build(tmp_path, tmp_path / "data", partition="writer").train
    assert train.num_examples.tolist() == [40, 5, 5]
    np.testing.assert_array_equal(train.load(2)["label"], good["y_train"][writers == 1000])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:49], "has 49 rows; it needs one for each of 50 digits"),
        (lambda rows: rows[:, :3], r"has an array [50, 3] instead of [n, 8]: it is another file"),
        (
            lambda rows: np.roll(rows, 1, axis=0),
            "is of other digits: {count} of 50 differ, the first at position {first}, where it has {a} and not {b}",
        ),
    ],
)
def test_writers_of_other_digits_are_refused(tmp_path, change, message):
    good = arrays()
    write(tmp_path / "data", good, "idx")
    rows = change(rows_of(good["y_train"], np.arange(50)))
    path = write_writers(tmp_path / "data", rows)
    differ = np.flatnonzero(rows[:, 0] != good["y_train"][: len(rows)])
    first = differ[0] if len(differ) else 0
    values = dict(count=len(differ), first=first, a=rows[first, 0], b=good["y_train"][first])
    found = error(tmp_path, tmp_path / "data", partition="writer", clients=None)
    assert found == f"{path} {message.format(**values)}"


# Damaged forms of mnist.npz.


class Malicious:
    def __reduce__(self):
        return pytest.fail, ("code of a file was run",)


_HEADER = "{{'descr': '|u1', 'fortran_order': False, 'shape': ({},)}}"


def _npy(header, values=b""):
    header = header.ljust(117).encode() + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + values


def _rewritten(path, changes, **options):
    """Writes mnist.npz anew with other bytes of some members."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()} | changes
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in members.items():
            if content is not None:
                archive.writestr(name, content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b""), "File is not a zip file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "File is not a zip file"),
        (lambda path: path.write_bytes(b"<html>404</html>"), "File is not a zip file"),
        (lambda path: path.write_bytes(path.read_bytes()[:20_000] + b"x" + path.read_bytes()[20_001:]), "Bad CRC-32"),
        (lambda path: _rewritten(path, {"y_test.npy": None}), "There is no item named 'y_test.npy'"),
        (lambda path: _rewritten(path, {"y_test.npy": b"no array"}), "magic string is not correct"),
        (lambda path: _rewritten(path, {"y_test.npy": _npy("{'descr'")}), ""),
        (
            lambda path: _rewritten(
                path, {"y_test.npy": _npy("{'descr': '|u1', 'fortran_order': False, 'shape': (-1,)}")}
            ),
            "",
        ),
        (
            lambda path: _rewritten(path, {"y_test.npy": _npy(_HEADER.format(1 << 60))}),
            f"y_test asks for {1 << 60} bytes",
        ),
        (lambda path: _rewritten(path, {}, compression=zipfile.ZIP_LZMA), "x_train is packed as NumPy does not pack"),
        (lambda path: np.savez(path, **arrays() | {"y_test": np.array([Malicious()] * 20)}), "the type object"),
    ],
)
def test_damaged_npz_files_are_named_and_kept(tmp_path, damage, message):
    write(tmp_path / "data", arrays(), "npz")
    path = tmp_path / "data" / "mnist.npz"
    damage(path)
    found = error(tmp_path, tmp_path / "data")
    assert found.startswith(f"{path} is damaged, or not MNIST as Keras has it (") and message in found


def test_packed_npz_files_are_read(tmp_path):
    (tmp_path / "data").mkdir()
    np.savez_compressed(tmp_path / "data" / "mnist.npz", **arrays())
    np.testing.assert_array_equal(
        all_examples(build(tmp_path, tmp_path / "data", clients=5).test)[0], arrays()["x_test"]
    )


# What unpacks to more than it should is not unpacked.

_ZEROS = 300_000_000


def bomb(start, file):
    """Writes a start and many zeros."""
    file.write(start)
    for _ in range(_ZEROS // 1_000_000):
        file.write(bytes(1_000_000))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ([50, 28, 28], "is cut short or damaged: it has more bytes of values, its header asks for 39200"),
        ([], "is not an IDX file"),
    ],
)
def test_an_idx_file_is_unpacked_as_far_as_its_header_asks(tmp_path, data_dir, shape, message):
    path = data_dir / f"{_NAMES[0]}.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        bomb(struct.pack(">HBB3i", 0, 8, 3, *shape) if shape else b"<html>", file)
    tracemalloc.start()
    found = error(tmp_path, data_dir)
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()
    assert found.startswith(f"{path} {message}")


def test_a_header_that_asks_for_too_much_is_refused(tmp_path, data_dir):
    path = data_dir / f"{_NAMES[0]}.gz"
    path.write_bytes(gzip.compress(struct.pack(">HBB3I", 0, 8, 3, 2**32 - 1, 28, 28)))
    assert f"{path} asks for {(2**32 - 1) * 784} bytes; more than {2**28} are not read" == error(tmp_path, data_dir)


@pytest.mark.parametrize("in_header", [True, False])
def test_an_array_of_an_npz_file_is_unpacked_as_far_as_its_header_asks(tmp_path, in_header):
    write(tmp_path / "data", arrays(), "npz")
    path = tmp_path / "data" / "mnist.npz"
    _rewritten(path, {"x_train.npy": None})
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("x_train.npy", "w", force_zip64=True) as file:
            if in_header:  # Which has a length of its own, of 4 bytes.
                bomb(b"\x93NUMPY\2\0" + struct.pack("<I", _ZEROS), file)
            else:
                bomb(_npy(_HEADER.format("50, 28, 28")), file)
    tracemalloc.start()
    found = error(tmp_path, tmp_path / "data")
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()
    assert ("more than 16384 bytes" if in_header else "x_train has more values than its header asks for") in found


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
