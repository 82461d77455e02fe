"""Directories for what a program needs only while it runs; those of a program that was killed go with the next one."""

import contextlib
import fcntl
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

PREFIX = "tff_fedavg-"
# A directory has this in front of its name until it is locked, so that nobody takes it for a left one.
_NEW = ".new-"


@contextlib.contextmanager
def scratch_directory(parent: str | os.PathLike[str] | None = None, prefix: str = PREFIX) -> Iterator[pathlib.Path]:
    """Makes a directory that only its owner can enter, and removes it at the end.

    Args:
      parent: Where it is made; by default the system's directory for temporary files.
      prefix: The start of its name. Directories of this user whose name starts so, and whose program has ended, are
        removed.

    Raises:
      OSError: If it cannot be made.
    """
    parent = pathlib.Path(parent or tempfile.gettempdir())
    for path in parent.glob(f"{prefix}*"):
        _remove_if_left(path)
    new = pathlib.Path(tempfile.mkdtemp(prefix=_NEW + prefix, dir=parent))
    lock = os.open(new, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        directory = new.rename(parent / new.name.removeprefix(_NEW))
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)
    finally:
        os.close(lock)


def _remove_if_left(path: pathlib.Path) -> None:
    """Removes a directory whose lock nobody holds."""
    try:
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # Another user's, or gone already.
        return
    try:
        if os.fstat(directory).st_uid == os.getuid():
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(directory)
