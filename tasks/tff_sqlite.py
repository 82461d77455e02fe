"""The SQLite files of TFF's federated data sets, checked, which TFF does not do."""

import contextlib
import pathlib
import sqlite3
from collections.abc import Iterator, Sequence

from google.protobuf.message import DecodeError

from tasks.files import open_file


@contextlib.contextmanager
def open_database(path: pathlib.Path, splits: Sequence[str]) -> Iterator[sqlite3.Connection]:
    """Opens a file for reading. What goes wrong with it, also while it is read, is raised as a `ValueError`.

    Args:
      path: The file.
      splits: The splits that it must have, such as "train".
    """
    open_file(path).close()  # SQLite would wait for what comes out of a FIFO.
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            ((size,),) = database.execute("SELECT page_count * page_size FROM pragma_page_count, pragma_page_size")
            if size != path.stat().st_size:
                raise ValueError(f"it has {path.stat().st_size} bytes instead of {size}")
            for split in splits:
                query = "SELECT EXISTS (SELECT * FROM examples WHERE split_name = ?)"
                if database.execute(query, [split]).fetchone() == (0,):
                    raise ValueError(f"it has no examples of the split {split}")
            yield database
    except (sqlite3.Error, DecodeError, LookupError, ValueError) as e:
        reason = " ".join(str(e).split())
        raise ValueError(f"{path} is damaged ({reason}): remove it, and it is downloaded again") from e
