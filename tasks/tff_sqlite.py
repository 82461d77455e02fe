"""The SQLite files of TFF's federated data sets: found or downloaded, and checked, which TFF does not do."""

import contextlib
import os
import pathlib
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from google.protobuf.message import DecodeError

from tasks.files import find_file


def find_or_download(
    data_dir: str | os.PathLike[str], subdirectory: str, name: str, load_data: Callable[..., Any], *, instead: str
) -> pathlib.Path:
    """Returns the path of a data set's file, after a download into `data_dir` where it is not there.

    Args:
      data_dir: The directory.
      subdirectory: Where in it the file may be, too.
      name: The file's name, such as "shakespeare.sqlite".
      load_data: TFF's function that downloads it into its `cache_dir`.
      instead: For the error: which data need no download.

    Raises:
      ValueError: If the file cannot be downloaded.
    """
    path = find_file(data_dir, subdirectory, name)
    if path is None:
        path = pathlib.Path(data_dir) / name
        try:
            load_data(cache_dir=str(data_dir))
        except Exception as e:  # TFF lets through what its download and SQLite raise.
            path.unlink(missing_ok=True)
            raise ValueError(
                f"{name} is not in data_dir={data_dir} and could not be downloaded ({e}): put it there, or use "
                f"{instead}, which needs no download"
            ) from e
    return path


@contextlib.contextmanager
def open_database(path: pathlib.Path, splits: Sequence[str]) -> Iterator[sqlite3.Connection]:
    """Opens a file for reading. What goes wrong with it, also while it is read, is raised as a `ValueError`.

    Args:
      path: The file.
      splits: The splits that it must have, such as "train".
    """
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
        raise ValueError(f"{path} is damaged ({reason}): remove it, and TFF downloads it again") from e
