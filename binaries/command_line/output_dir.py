"""The directory that a program leaves its files in."""

import errno
import os
import pathlib


def make_output_dir(given: str) -> pathlib.Path:
    """Makes it, if need be, before there is anything to write.

    Raises:
      OSError: If nothing can be written there.
    """
    directory = pathlib.Path(os.path.expanduser(given))
    directory.mkdir(parents=True, exist_ok=True)
    if not os.access(directory, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(directory))
    return directory
