"""Whatever happens to the files of the data, what is read is right, or refused in a line. As `test_damage.py`."""

import gzip
import io
import lzma
import tarfile

import numpy as np
import pytest
from damage import Cases
from test_mnist import arrays, write

import tasks
from tasks import cifar10, download, mnist_files, sources


@pytest.fixture
def run(request, tmp_path, monkeypatch):
    """Damages files in tmp_path / "original", which some function reads as arrays."""

    def urlopen(*args, **kwargs):
        raise OSError("no network")

    def run(read):
        def is_right(directory, told):
            return all(np.array_equal(a, b) for a, b in zip(read(directory), right, strict=True))

        right = read(tmp_path / "original")
        files = [path.name for path in (tmp_path / "original").iterdir()]
        cases = Cases(tmp_path, tmp_path / "original", request.config.getoption("damage_cases"), seed=0)
        cases.run(files, is_right, names=lambda file: "damaged")  # A missing file is told by its directory.

    monkeypatch.setattr(download.urllib.request, "urlopen", urlopen)
    return run


def _read_mnist(directory):
    return mnist_files.load_mnist(tasks.find_data("mnist_2nn", "mnist", "iid", directory))


def test_packed_idx_files(tmp_path, run):
    write(tmp_path / "original", arrays(), "idx")
    for path in list((tmp_path / "original").iterdir()):
        (tmp_path / "original" / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    run(_read_mnist)


@pytest.mark.parametrize("savez", [np.savez, np.savez_compressed])
def test_npz_files(tmp_path, run, savez):
    (tmp_path / "original").mkdir()
    savez(tmp_path / "original" / "mnist.npz", **arrays())
    run(_read_mnist)


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_archives(tmp_path, run, monkeypatch, suffix, compress):
    monkeypatch.setattr(cifar10, "_RECORDS_PER_FILE", 20)
    rng, content = np.random.default_rng(0), io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name in sources.CIFAR_FILES:
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = 20 * 3073
            archive.addfile(member, io.BytesIO(rng.integers(10, size=20 * 3073, dtype=np.uint8).tobytes()))
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / f"cifar-10-binary.tar{suffix}").write_bytes(compress(content.getvalue()))
    run(lambda directory: cifar10._load(tasks.find_data("cifar_cnn", "cifar10", "iid", directory)))
