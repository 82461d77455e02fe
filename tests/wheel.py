"""The wheel, and both ways in which docs/install.md has it installed. It takes minutes, and 5 GB of disk space."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent
UV = shutil.which(os.environ.get("UV", ".uv/bin/uv"))
PACKAGES = ("binaries", "tasks", "tff_fedavg")


def run(command, directory):
    """Runs commands of the page in a directory; returns what they print."""
    path = os.pathsep.join([os.path.dirname(os.path.abspath(UV)), os.path.dirname(sys.executable), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path}
    result = subprocess.run(
        ["bash", "-ec", command], cwd=directory, env=environment, capture_output=True, text=True, timeout=1800
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def blocks():
    """The blocks of commands of the page."""
    return re.findall(r"(?m)(?:^    .*\n)+", (ROOT / "docs/install.md").read_text())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    directory = tmp_path_factory.mktemp("built") / "dist"
    result = subprocess.run([UV, "build", "--out-dir", directory], cwd=ROOT, capture_output=True, text=True)
    if re.search("error sending request|Failed to fetch", result.stderr):
        pytest.skip("there is no network")
    assert result.returncode == 0, result.stderr
    (path,) = directory.glob("*.whl")
    return path


def test_it_has_all_of_the_three_packages_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    tracked = subprocess.run(["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True, check=True)
    assert names == set(tracked.stdout.splitlines())


@pytest.mark.parametrize("block", [block for block in blocks() if "pip install" in block], ids=["uv", "pip"])
def test_it_is_installed_as_the_page_says_and_trains(wheel, tmp_path, block):
    (tmp_path / "dist").symlink_to(wheel.parent)
    (tmp_path / "requirements.lock").symlink_to(ROOT / "requirements.lock")
    run(block, tmp_path)
    (train,) = [block for block in blocks() if "tff-fedavg train" in block]
    assert run(f"{train.strip()} --rounds=1", tmp_path).splitlines()[-1].startswith("1 rounds, best accuracy ")
    assert "mnist_cnn-iid" in run("environment/bin/tff-fedavg reproduce --list", tmp_path)
    where = "environment/bin/python -c 'import tff_fedavg; print(tff_fedavg.__file__)'"
    assert run(where, tmp_path).startswith(f"{tmp_path}/environment/")
    shutil.rmtree(tmp_path / "environment")
