"""outcome.json of a run in the results: what came of it, and what its table of numbers was then.

A file that is not what was written is told on stderr, once, and its run counts as not run: the rest is not held up.
"""

import datetime
import hashlib
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from tff_fedavg import run_directory
from tff_fedavg.json_record import read_record, write_record
from tff_fedavg.regular_file import open_regular

_OUTCOME_JSON = "outcome.json"
_TABLE = "table"

_told = set()


def write_outcome(directory: pathlib.Path, outcome: Mapping[str, Any], table: str) -> None:
    """Writes outcome.json, with the date.

    Args:
      directory: The run directory.
      outcome: The fields, as JSON values.
      table: Name of the file with the numbers, in the directory.

    Raises:
      OSError: If it cannot be written.
    """
    content = (directory / table).read_bytes()
    fingerprint = {"name": table, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write_record(directory / _OUTCOME_JSON, {"date": datetime.date.today().isoformat(), **outcome, _TABLE: fingerprint})


def read_outcome(directory: pathlib.Path) -> Mapping[str, Any] | None:
    """Returns outcome.json of a run directory; None if there is none, or it or its table is not what was written."""
    return _read(directory)[0]


def read_table(directory: pathlib.Path) -> bytes | None:
    """Returns the table of numbers as it was when outcome.json was written; None where `read_outcome` is."""
    return _read(directory)[1]


def read_metrics(directory: pathlib.Path) -> list[dict[str, float]]:
    """Returns the rows of metrics.csv of a run directory; none if it is not what was written."""
    try:
        return run_directory.read_metrics(directory)
    except ValueError as e:
        _tell(str(e))
        return []


def _read(directory: pathlib.Path) -> tuple[Mapping[str, Any] | None, bytes | None]:
    path = directory / _OUTCOME_JSON
    try:
        outcome = read_record(path)
        # Without its configuration nothing tells what the outcome is of. Figure 1 has none: its name says all.
        if run_directory.read_config(directory) is None and outcome[_TABLE]["name"] == run_directory.METRICS_CSV:
            raise ValueError(f"{directory} has an {_OUTCOME_JSON}, but no configuration")
        with open_regular(directory / outcome[_TABLE]["name"]) as file:
            table = file.read(outcome[_TABLE]["bytes"])  # What follows was written when the run went on.
        if hashlib.sha256(table).hexdigest() != outcome[_TABLE]["sha256"]:
            raise ValueError(f"{file.name} is not what {_OUTCOME_JSON} was written for")
        return outcome, table
    except (FileNotFoundError, NotADirectoryError):
        if path.exists():
            _tell(f"{path} has no table of numbers beside it")
    except (OSError, ValueError) as e:
        _tell(str(e))
    except (KeyError, TypeError) as e:
        _tell(f"{path} is damaged: {e!r}")
    return None, None


def _tell(message: str) -> None:
    if message not in _told:
        _told.add(message)
        print(f"{message}: left out", file=sys.stderr)
