"""The CIFAR-10 task: reading the files, the distortions and the whitening against NumPy, and a little training."""

import bz2
import gzip
import hashlib
import io
import lzma
import tarfile
import tracemalloc

import numpy as np
import pytest
import tensorflow as tf
from conftest import NO_SEED

import tff_fedavg
from tasks import build_task, cifar10
from tff_fedavg.learning_curve import Target

_NAMES = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
_COMPRESS = {".tar": bytes, ".tar.gz": gzip.compress, ".tar.xz": lzma.compress, ".tar.bz2": bz2.compress}


@pytest.fixture
def contents(monkeypatch):
    """Six files of 40 records each, by name: a label, and an image of noise over a colour of the label's own."""
    monkeypatch.setattr(cifar10, "_RECORDS_PER_FILE", 40)
    rng = np.random.default_rng(0)
    colours = rng.integers(128, size=[10, 3, 1, 1])
    files = {}
    for name in _NAMES:
        labels = rng.integers(10, size=40)
        planes = colours[labels] + rng.integers(128, size=[40, 3, 32, 32])
        files[name] = np.concatenate([labels[:, np.newaxis], planes.reshape(40, -1)], axis=1).astype(np.uint8).tobytes()
    return files


def tar(contents):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def write_directory(data_dir, contents):
    directory = data_dir / "cifar-10-batches-bin"
    directory.mkdir(parents=True)
    for name, content in contents.items():
        (directory / name).write_bytes(content)


def build(tmp_path, data_dir=None, clients=4, partition="iid"):
    return build_task(
        "cifar_cnn",
        data="cifar10",
        data_dir=data_dir or tmp_path,
        cache_dir=tmp_path / "cache",
        partition=partition,
        clients=clients,
        seed=0,
    )


def all_examples(dataset):
    clients = [dataset.load(k) for k in range(dataset.num_clients)]
    return np.concatenate([c["image"] for c in clients]), np.concatenate([c["label"] for c in clients])


def records(images, labels):
    """The records of CIFAR-10's files: the label, then the red, the green and the blue plane."""
    return [bytes([label]) + image.transpose(2, 0, 1).tobytes() for image, label in zip(images, labels, strict=True)]


# Files.


@pytest.mark.parametrize("suffix", [*_COMPRESS, "directory"])
@pytest.mark.parametrize("subdirectory", [".", "cifar10"])
def test_every_form_of_the_files_is_read(tmp_path, contents, suffix, subdirectory):
    data_dir = tmp_path / subdirectory
    if suffix == "directory":
        write_directory(data_dir, contents)
    else:
        data_dir.mkdir(exist_ok=True)
        content = _COMPRESS[suffix](tar({"readme.html": b"not needed", **contents}))
        (data_dir / f"cifar-10-binary{suffix}").write_bytes(content)
    task = build(tmp_path)
    assert task.train.num_examples.tolist() == [50] * 4
    assert b"".join(records(*all_examples(task.test))) == contents["test_batch.bin"]
    train = b"".join(contents[name] for name in _NAMES[:5])
    assert sorted(records(*all_examples(task.train))) == sorted(train[i : i + 3073] for i in range(0, len(train), 3073))
    names = _NAMES if suffix == "directory" else [f"cifar-10-binary{suffix}"]
    assert list(task.checksums) == names


def _cut(content, share=0.5):
    return content[: int(len(content) * share)]


def _flip_a_bit(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        *((suffix, _cut) for suffix in _COMPRESS),
        *((suffix, _flip_a_bit) for suffix in (".tar.gz", ".tar.xz", ".tar.bz2")),
        *((suffix, lambda content: b"<html>Not found</html>" * 100) for suffix in _COMPRESS),
        (".tar.gz", lambda content: content[:-4]),
        (".tar.gz", lambda content: b""),
    ],
)
def test_damaged_archives_are_named(tmp_path, contents, suffix, damage):
    path = tmp_path / f"cifar-10-binary{suffix}"
    path.write_bytes(damage(_COMPRESS[suffix](tar(contents))))
    with pytest.raises(ValueError, match=f"^{path} is damaged, or not what its name says .*: replace it$"):
        build(tmp_path)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("missing", ["data_batch_3.bin", "test_batch.bin"])
@pytest.mark.parametrize("in_archive", [True, False])
def test_a_missing_file_is_named(tmp_path, contents, missing, in_archive):
    del contents[missing]
    if in_archive:
        (tmp_path / "cifar-10-binary.tar").write_bytes(tar(contents))
    else:
        write_directory(tmp_path, contents)
    with pytest.raises(ValueError, match=f"not the binary version of CIFAR-10, or damaged: it lacks {missing}"):
        build(tmp_path)


@pytest.mark.parametrize("name", ["data_batch_2.bin", "test_batch.bin"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1], "it has 122919 bytes instead of 122920, which is 40 records of 3073"),
        (lambda content: content[:-3073], "it has 119847 bytes"),
        (lambda content: content + b"\0", "it has 122921 bytes"),
        (lambda content: b"", "it has 0 bytes"),
        (lambda content: content[: 7 * 3073] + b"\x0a" + content[7 * 3073 + 1 :], None),
    ],
    ids=["cut", "one record less", "longer", "empty", "label"],
)
def test_damaged_files_are_named(tmp_path, contents, name, damage, message):
    contents[name] = damage(contents[name])
    write_directory(tmp_path, contents)
    message = "has the label 10 at position 7: take 0 to 9" if message is None else f"is .*damaged: {message}"
    with pytest.raises(ValueError, match=f"{name} {message}"):
        build(tmp_path)
    assert list((tmp_path / "cache").iterdir()) == []


_ZEROS = 300_000_000


def _bomb(contents, place):
    """Returns a tar archive, in pieces, with many zeros in this place."""
    zeros = (bytes(1_000_000) for _ in range(_ZEROS // 1_000_000))
    good = tar(contents)
    if place == "after the end":
        return [good, *zeros]
    member = tarfile.TarInfo({"record file": "data_batch_1.bin", "other file": "readme.html"}.get(place, "header"))
    member.size = _ZEROS
    member.type = tarfile.XHDTYPE if place == "extended header" else tarfile.REGTYPE
    return [member.tobuf(), *zeros, bytes(-_ZEROS % 512), good]


@pytest.mark.parametrize(
    ("place", "suffix", "message"),
    [
        (
            "record file",
            ".tar.gz",
            "data_batch_1.bin is cut short or damaged: it has 300000000 bytes instead",
        ),
        ("other file", ".tar.gz", "it has more than 100000000 bytes"),
        ("extended header", ".tar.gz", "it has more than 100000000 bytes"),
        *(("after the end", suffix, "it has more than 100000000 bytes") for suffix in (*_COMPRESS,)),
    ],
)
def test_archives_that_unpack_to_too_much_are_not_unpacked(tmp_path, contents, monkeypatch, place, suffix, message):
    monkeypatch.setattr(cifar10, "_MAX_ARCHIVE_BYTES", 100_000_000)
    opened = {".tar": open, ".tar.gz": gzip.open, ".tar.xz": lzma.open, ".tar.bz2": bz2.open}[suffix]
    options = {".tar.gz": {"compresslevel": 1}, ".tar.xz": {"preset": 0}}.get(suffix, {})
    path = tmp_path / f"cifar-10-binary{suffix}"
    with opened(path, "wb", **options) as file:
        file.writelines(_bomb(contents, place))
    tracemalloc.start()
    with pytest.raises(ValueError, match=message) as error:
        build(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert peak < (250_000_000 if place == "extended header" else 20_000_000)


def test_more_clients_than_images_are_refused(tmp_path, contents):
    write_directory(tmp_path, contents)
    with pytest.raises(ValueError, match="201 clients need 201 pieces of data, but there are 200 examples"):
        build(tmp_path, clients=201)


def test_another_partition_is_refused(tmp_path):
    with pytest.raises(ValueError, match="partition=pathological: cifar_cnn takes iid"):
        build(tmp_path, partition="pathological")


# What the model sees.


def test_a_distorted_image_is_a_flipped_crop_of_other_brightness_and_contrast():
    """Finds out by hand what was drawn for each of 200 images, and that the draws are independent of each other."""
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=[200, 32, 32, 3], dtype=np.uint8)
    seeds = rng.integers(2**32, size=[200, 2])
    outputs = tf.map_fn(lambda x: cifar10.distort(*x), (images, seeds), fn_output_signature=tf.float32).numpy()

    places = [(top, left, flip) for top in range(9) for left in range(9) for flip in (1, -1)]
    draws = []
    for image, output in zip(images.astype(np.float64), outputs):
        crops = np.stack([image[top : top + 24, left : left + 24][:, ::flip] for top, left, flip in places])
        contrasts = output - output.mean(axis=(0, 1))
        best = np.argmax(crops.reshape(len(places), -1) @ contrasts.ravel())  # They correlate with the right crop only.
        means = crops[best].mean(axis=(0, 1))
        factor = np.linalg.norm(contrasts) / np.linalg.norm(crops[best] - means)
        delta = (output - crops[best]).mean()
        np.testing.assert_allclose(output, (crops[best] - means) * factor + means + delta, atol=1e-2)
        draws.append([*places[best], delta, factor])

    tops, lefts, flips, deltas, factors = np.transpose(draws)
    assert set(tops) == set(lefts) == set(range(9))
    assert 0.4 < (flips == 1).mean() < 0.6
    assert -63 <= deltas.min() < -60 and 60 < deltas.max() < 63
    assert 0.2 <= factors.min() < 0.25 and 1.75 < factors.max() < 1.8
    assert np.abs(np.corrcoef(np.transpose(draws)) - np.eye(5)).max() < 0.25


def whitened(images):
    axes = (1, 2, 3)
    images = images.astype(np.float64)
    return (images - images.mean(axes, keepdims=True)) / images.std(axes, keepdims=True)


@pytest.fixture
def task(tmp_path, contents):
    write_directory(tmp_path, contents)
    return build(tmp_path)


def batch(dataset, seed, indices=(0, 1, 2)):
    return [t.numpy() for t in dataset.batch(dataset.read(tf.constant(0)), tf.constant(indices), tf.constant(seed))]


def test_training_images_are_whitened_and_distorted_by_the_seed_each_on_its_own(task):
    x, y = batch(task.train, seed=[1, 2])
    assert x.shape == (3, 24, 24, 3)
    np.testing.assert_array_equal(y, task.train.load(0)["label"][:3])
    np.testing.assert_allclose(x, whitened(x), atol=1e-4)
    np.testing.assert_array_equal(x, batch(task.train, seed=[1, 2])[0])
    assert np.all(np.abs(x - batch(task.train, seed=[1, 3])[0]).max(axis=(1, 2, 3)) > 0.1)
    first, second = batch(task.train, seed=[1, 2], indices=(0, 0))[0]
    assert np.abs(first - second).max() > 0.1


def test_test_images_are_the_whitened_centre(task):
    x, y = batch(task.test, seed=[1, 2])
    stored = task.test.load(0)
    np.testing.assert_allclose(x, whitened(stored["image"][:3, 4:28, 4:28]), atol=1e-5)
    np.testing.assert_array_equal(y, stored["label"][:3])


def test_an_image_of_one_colour_is_whitened_to_zeros(tmp_path, contents):
    contents["test_batch.bin"] = bytes(40 * 3073)
    write_directory(tmp_path, contents)
    x, _ = batch(build(tmp_path).test, seed=NO_SEED, indices=[0])
    np.testing.assert_array_equal(x, np.zeros([1, 24, 24, 3]))


def test_fed_avg_learns_from_distorted_images(worker, task):
    model = task.build_model(seed=0)
    process = tff_fedavg.build_fed_avg(model, task.train, epochs=5, batch_size=25, learning_rate=0.05)
    evaluate = tff_fedavg.build_fed_eval(model, task.test)
    state = process.initialize()
    before = evaluate(state.global_model_weights, [0])
    # From where the convolutions start, near zero, it takes hundreds of steps until there is something to see.
    weights = tf.nest.map_structure(lambda w: 500 * w if w.ndim == 4 else w, state.global_model_weights)
    state = state._replace(global_model_weights=weights)
    for _ in range(3):
        state, _ = process.next(state, [0, 1])
    after = evaluate(state.global_model_weights, [0])
    assert before["loss"] == pytest.approx(np.log(10), abs=0.05)
    assert after["loss"] < 1.5
    assert after["accuracy"] > 0.5


def test_full_cifar10_is_the_public_one_in_100_clients_of_500(tmp_path, full_data_dir):
    task = build(tmp_path, full_data_dir, clients=None)
    assert task.train.num_examples.tolist() == [500] * 100
    assert np.bincount(all_examples(task.train)[1]).tolist() == [5000] * 10
    # SHA-256 of test_batch.bin, as published; the test set keeps its order.
    digest = hashlib.sha256(b"".join(records(*all_examples(task.test)))).hexdigest()
    assert digest == "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b"
    assert task.target == Target(0.8)
