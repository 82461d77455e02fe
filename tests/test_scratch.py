import pathlib
import subprocess
import sys

import pytest

from tff_fedavg.scratch import scratch_directory

ROOT = pathlib.Path(__file__).parent.parent
KILLED = """
import os, signal, sys
from tff_fedavg.scratch import scratch_directory
with scratch_directory(sys.argv[1]) as directory:
    (directory / "file").write_text("content")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_directory_is_its_owners_and_gone_in_the_end(tmp_path):
    with pytest.raises(KeyboardInterrupt), scratch_directory(tmp_path) as directory:
        assert directory.stat().st_mode & 0o777 == 0o700
        (directory / "file").write_text("content")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_program_left_goes_and_what_is_in_use_or_not_ours_stays(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT)
    (left,) = tmp_path.iterdir()
    assert (left / "file").exists()
    (tmp_path / "tff_fedavg-file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "tff_fedavg-link").symlink_to(tmp_path / "other")
    (tmp_path / "tff_fedavg-0.1.0").mkdir()
    (tmp_path / "tff_fedavg-0.1.0" / "thesis").write_text("content")
    with scratch_directory(tmp_path) as first, scratch_directory(tmp_path) as second:
        assert first.is_dir() and second.is_dir() and first != second
        assert not left.exists()
    stays = ["other", "tff_fedavg-0.1.0", "tff_fedavg-file", "tff_fedavg-link"]
    assert sorted(path.name for path in tmp_path.iterdir()) == stays
    assert (tmp_path / "tff_fedavg-0.1.0" / "thesis").read_text() == "content"
