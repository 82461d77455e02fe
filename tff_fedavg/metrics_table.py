"""metrics.csv of a run: a row per round, or per some updates of SGD; a column per metric.

Not written by TFF's `CSVFileReleaseManager`, which reads and writes the whole table in every round.
"""

import csv
import io
import os
import pathlib
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tff_fedavg.regular_file import read_regular
from tff_fedavg.replacement import replacement

ROUND_FIELD = "round_num"

# The cells of a row by column, as texts.
_Row = Mapping[str, str]


def read_metrics(path: str | os.PathLike[str], *, saved: bytes = b"", last_round: int = -1) -> list[dict[str, float]]:
    """Reads the rows of a run's metrics.csv, without the cells that are empty. Without a file there are none.

    Args:
      path: The file.
      saved: What was its content when a state was saved.
      last_round: The round of that state, up to which the two have to agree.

    Raises:
      ValueError: If the file cannot be read, is damaged, or does not agree.
    """
    content = read_regular(path) or b""
    try:
        rows = _rows(content)
    except ValueError as e:
        raise ValueError(f"{path} is damaged: {e}") from e
    written = _rows_up_to(saved, last_round)
    if rows[: len(written)] != written:
        raise ValueError(f"{path} is not what was written up to round {last_round}: the run mends it when it goes on")
    numbers = []
    for i, row in enumerate(rows):
        try:
            numbers.append({name: float(value) for name, value in row.items()})
            if i and not numbers[i][ROUND_FIELD] > numbers[i - 1][ROUND_FIELD]:
                raise ValueError("its round is not after the one before it")
            int(numbers[i][ROUND_FIELD])
        except (ValueError, TypeError, AttributeError, KeyError, OverflowError) as e:
            raise ValueError(f"{path} is damaged: row {i + 1} is no row of numbers ({e})") from e
    return numbers


class MetricsTable:
    """The table of a run that goes on.

    Attributes:
      content: The bytes of the file.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Begins an empty table, which is not written yet.

        Args:
          path: The file.
        """
        self.content = bytearray()
        self._path = pathlib.Path(path)
        self._fields = []

    def restore(self, saved: bytes, last_round: int) -> str:
        """Makes the table what it was when a state was saved; the file is mended where it is another.

        Args:
          saved: `content` at that time; empty if no state was saved.
          last_round: The round of the state; -1 if there is none. Rows after it go, since their rounds are run again.

        Returns:
          What was wrong with the file, for the user; empty if nothing.

        Raises:
          ValueError: If there is something else in the place of the file.
          OSError: If the file cannot be written.
        """
        rows = _rows_up_to(saved, last_round)
        content = read_regular(self._path)
        found = None if content is None else _first_rows(content)
        wrong = ""
        if found is None:
            wrong = (
                f"{self._path} is missing: written anew up to round {last_round}, from the saved state" if rows else ""
            )
        elif found[: len(rows)] != rows or (not rows and len(found) > 1):
            aside = self._path.with_name(f"damaged_{time.time_ns()}_{self._path.name}")
            self._path.rename(aside)
            how = (
                f"is not what was written up to round {last_round}: written anew from the saved state"
                if rows
                else "has rounds of which no state is saved: they are run again"
            )
            wrong = f"{self._path} {how}; {aside.name} is what it was"
        self._write(rows)
        return wrong

    def append(self, round_number: int, metrics: Mapping[str, Any]) -> None:
        """Appends the row of a round; a metric that is new becomes a column.

        Raises:
          OSError: If the file cannot be written, or is gone.
        """
        row = {ROUND_FIELD: round_number, **metrics}
        if not row.keys() <= set(self._fields):
            self._write([*_rows(self.content), row])
            return
        line = _to_csv([row], self._fields)
        with open(os.open(self._path, os.O_WRONLY | os.O_APPEND), "wb") as file:
            file.write(line)
        self.content += line

    def _write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._fields = list(dict.fromkeys([ROUND_FIELD, *(name for row in rows for name in row)]))
        self.content = bytearray(_to_csv([dict(zip(self._fields, self._fields)), *rows], self._fields))
        with replacement(self._path) as temporary:
            temporary.write_bytes(self.content)


def _rows(content: bytes) -> list[_Row]:
    """Returns the rows, without the cells that are empty; a last one whose line has not been ended is none."""
    content = content[: content.rfind(b"\n") + 1]
    try:
        reader = csv.DictReader(io.StringIO(content.decode(), newline=""), strict=True)
        return [{name: value for name, value in row.items() if value} for row in reader]
    except csv.Error as e:
        raise ValueError(str(e)) from e


def _rows_up_to(content: bytes, last_round: int) -> list[_Row]:
    """Returns the rows of a table that is not damaged, up to a round."""
    return [row for row in _rows(content) if int(row[ROUND_FIELD]) <= last_round]


def _first_rows(content: bytes) -> list[_Row]:
    """Returns the rows of a file that may be damaged, none if it is no table."""
    try:
        return _rows(content)
    except ValueError:
        return []


def _to_csv(rows: Iterable[Mapping[str, Any]], fields: Sequence[str]) -> bytes:
    text = io.StringIO(newline="")
    csv.DictWriter(text, fields).writerows(rows)
    return text.getvalue().encode()
