import os
import pathlib
import socket

import pytest

from tff_fedavg.regular_file import check_regular, open_regular


def test_regular_files_and_links_to_them_are_opened(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        with open_regular(tmp_path / name) as file:
            assert file.read() == b"content"


def test_what_is_no_regular_file_is_refused_at_once_by_name(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("fifo")
    (tmp_path / "directory").mkdir()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        for path, kind in {
            tmp_path / "fifo": "a FIFO",
            tmp_path / "link": "a FIFO",
            tmp_path / "directory": "a directory",
            tmp_path / "socket": "a socket",
            pathlib.Path("/dev/zero"): "a device",
        }.items():
            with pytest.raises(OSError, match=f"^{path} is {kind}, not a regular file$"):
                open_regular(path)


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        check_regular(tmp_path / "missing")
