"""JSON files that tell whether they are what was written: each has a checksum of the rest of it."""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

from tff_fedavg.regular_file import read_regular
from tff_fedavg.replacement import replacement

_CHECKSUM = "checksum"


def write_record(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Writes JSON values by name, with their checksum; replaces the file in one step.

    Raises:
      OSError: If the file cannot be written.
    """
    with replacement(path) as temporary:
        temporary.write_text(json.dumps({**content, _CHECKSUM: _sha256(content)}, indent=2) + "\n")


def read_record(path: str | os.PathLike[str], *, needs_checksum: bool = True) -> dict[str, Any]:
    """Reads what `write_record` has written.

    Args:
      path: The file.
      needs_checksum: Whether a file without a checksum is refused; else it is taken as it is.

    Raises:
      FileNotFoundError: If there is none.
      ValueError: If the file cannot be read, or is not what was written.
    """
    written = read_regular(path)
    if written is None:
        raise FileNotFoundError(f"there is no {path}")
    try:
        content = json.loads(written)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is damaged: {e}") from e
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it is no JSON object")
    checksum = content.pop(_CHECKSUM, None)
    if checksum is None and needs_checksum:
        raise ValueError(f"{path} has no checksum: it is damaged, or was written by an earlier version")
    if checksum not in (None, _sha256(content)):
        raise ValueError(f"{path} is damaged, or was changed: its checksum is that of another content")
    return content


def _sha256(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
