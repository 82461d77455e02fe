"""Files of data sets: finding and reading them."""

import gzip
import hashlib
import os
import pathlib
import zlib


def find_file(data_dir: str | os.PathLike[str], subdirectory: str, *names: str) -> pathlib.Path | None:
    """Returns the first of `names` that exists in `data_dir` or in its `subdirectory`, None if there is none."""
    for directory in (pathlib.Path(data_dir), pathlib.Path(data_dir) / subdirectory):
        for name in names:
            if (directory / name).exists():
                return directory / name
    return None


def read_file(path: pathlib.Path) -> bytes:
    """Returns the content of a file, decompressed if its name ends with .gz.

    Raises:
      ValueError: If the file cannot be read or decompressed.
    """
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as e:
        raise ValueError(f"{path} is damaged, or no gzip file: {e}") from e


def read_text(path: pathlib.Path) -> str:
    """Returns the content of a UTF-8 file, as `read_file`.

    Raises:
      ValueError: If the file cannot be read, decompressed or decoded.
    """
    try:
        return read_file(path).decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text: {e}") from e


def sha256(path: pathlib.Path) -> str:
    """Returns the SHA-256 of a file of any size, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
