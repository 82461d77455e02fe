"""Files that are opened only if they are regular: a FIFO in their place would keep the reader waiting for ever."""

import os
import stat
from typing import BinaryIO


def check_regular(path: str | os.PathLike[str]) -> None:
    """Checks that a path is of a regular file, or of a link to one.

    Raises:
      OSError: If it is a directory, a FIFO, a socket or a device, or there is nothing.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise OSError(f"{os.fspath(path)} is {_KINDS.get(stat.S_IFMT(mode), 'a device')}, not a regular file")


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a regular file for reading.

    Raises:
      OSError: As `check_regular`; or if the file cannot be read.
    """
    check_regular(path)
    return open(path, "rb")


def read_regular(path: str | os.PathLike[str]) -> bytes | None:
    """Returns the content of a regular file; None if there is nothing.

    Raises:
      ValueError: If it is something else, or cannot be read.
    """
    try:
        with open_regular(path) as file:
            return file.read()
    except FileNotFoundError:
        return None
    except OSError as e:
        raise ValueError(f"{path} cannot be read: {e.strerror or e}") from e


_KINDS = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
