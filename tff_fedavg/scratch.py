"""Directories for what a program needs only while it runs; those of a program that was killed go with the next one."""

import contextlib
import fcntl
import glob
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator

PREFIX = "tff_fedavg-"
# What tells a directory that was made here from one of the user's whose name starts so.
_MARK = ".scratch_directory_of_tff_fedavg"
_RANDOM = re.compile("[a-z0-9_]{8}")  # What `tempfile` makes the end of a name of.


@contextlib.contextmanager
def scratch_directory(parent: str | os.PathLike[str] | None = None, prefix: str = PREFIX) -> Iterator[pathlib.Path]:
    """Makes a directory that only its owner can enter, and removes it at the end.

    Args:
      parent: Where it is made; by default the system's directory for temporary files.
      prefix: The start of its name. Directories that were made here, whose name starts so, and whose program has
        ended, are removed.

    Raises:
      OSError: If it cannot be made.
    """
    parent = pathlib.Path(parent or tempfile.gettempdir())
    remove_left(parent, prefix)
    directory, lock = None, None
    while directory is None or not directory.exists():  # It is another's to remove until it is locked.
        if lock is not None:
            os.close(lock)
        directory = pathlib.Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        lock = _lock(directory)
    try:
        (directory / _MARK).touch()
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


@contextlib.contextmanager
def locked(directory: pathlib.Path) -> Iterator[None]:
    """Keeps other programs that do the same in a directory waiting, where the file system has locks."""
    lock = _lock(directory)
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _lock(directory: pathlib.Path) -> int | None:
    """Returns a descriptor that holds the lock of a directory; None if the directory is gone."""
    try:
        lock = os.open(directory, os.O_RDONLY)
    except FileNotFoundError:
        return None
    with contextlib.suppress(OSError):  # Of file systems that have no locks.
        fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def remove_left(parent: pathlib.Path, prefix: str) -> None:
    """Removes the directories that killed programs of this user have left: those whose lock nobody holds."""
    for path in parent.glob(f"{glob.escape(prefix)}*"):
        try:
            directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # Another user's, or gone already.
            continue
        try:
            if os.fstat(directory).st_uid == os.getuid():
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if (path / _MARK).exists():
                    shutil.rmtree(path, ignore_errors=True)
                elif _RANDOM.fullmatch(path.name.removeprefix(prefix)):
                    path.rmdir()  # If it is empty, its program was killed before it could leave the mark.
        except OSError:  # In use; or there are no locks there, by which one could tell.
            pass
        finally:
            os.close(directory)
