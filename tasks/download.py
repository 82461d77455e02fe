"""Downloads of data sets: a file is there whole or not at all, and takes the place of no other."""

import http.client
import lzma
import os
import pathlib
import shutil
import sys
import urllib.request

import tqdm

from tasks.files import sha256
from tff_fedavg.scratch import scratch_directory

_HEADERS = {"User-Agent": "tff_fedavg"}
_SCRATCH_PREFIX = ".tff_fedavg-download-"
# Without an answer, or without a byte.
_TIMEOUT_SECONDS = 10
_CHUNK_BYTES = 1 << 20


def download(url: str, path: pathlib.Path, checksum: str | None = None) -> None:
    """Downloads a file, unpacked if its URL ends with .lzma. A file that is there in the end stays as it is.

    Args:
      url: Where it is.
      path: Where it goes. Its directory is made if need be.
      checksum: Its SHA-256, in hexadecimal, where it is known.

    Raises:
      OSError: If it cannot be had. Nothing is left of it then; but if it has another checksum, it is kept under a name
        that the error tells.
    """
    request = urllib.request.Request(url, headers=_HEADERS)
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:
            path.parent.mkdir(parents=True, exist_ok=True)  # Not before there is something to put there.
            with scratch_directory(path.parent, _SCRATCH_PREFIX) as scratch:
                temporary = scratch / path.name
                _save(response, url, temporary)
                found = sha256(temporary)
                if checksum not in (None, found):
                    aside = path.with_name(f"{path.name}-{found[:16]}")
                    _put(temporary, aside)
                    raise OSError(
                        f"what came from {url} has another SHA-256 than it should have: it is kept as {aside}"
                    )
                _put(temporary, path)
    except (EOFError, http.client.HTTPException, lzma.LZMAError) as e:
        raise OSError(f"what came from {url} is not whole: {e}") from e


def _save(response: http.client.HTTPResponse, url: str, path: pathlib.Path) -> None:
    print(f"downloading {url}", file=sys.stderr)
    with open(path, "xb") as file, tqdm.tqdm.wrapattr(response, "read", response.length, disable=None) as stream:
        shutil.copyfileobj(lzma.open(stream) if url.endswith(".lzma") else stream, file, _CHUNK_BYTES)
    if response.length:  # What is left of it, if its length is known.
        raise EOFError(f"the last {response.length} bytes are missing")


def _put(temporary: pathlib.Path, path: pathlib.Path) -> None:
    """Gives a file its name, unless there is a file of this name: of another program that was faster."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:  # A file system without links.
        if not os.path.lexists(path):
            temporary.rename(path)
