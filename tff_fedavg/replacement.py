"""Files that are whole or not there: written under another name, and renamed."""

import contextlib
import os
import pathlib
from collections.abc import Iterator


@contextlib.contextmanager
def replacement(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Gives the name under which a file is to be written, which takes the place of `path` at the end.

    After an exception in between, `path` is what it was, and nothing is left of the other.

    Raises:
      OSError: If the file cannot be renamed.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
