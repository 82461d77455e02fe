"""What the paper has published: the rows of Tables 1 to 4, and the curves of its figures.

- tables.json: a line for each number of the tables (Section 3, Table 4 in the appendix). `rounds` is null where the
  paper prints a dash.
- curves.json: figure, panel, curve, points. Figures 1, 4, 5, 9 and 10 are the vertices of the vector graphics, without
  those where a curve is clipped; Figures 3 and 8 the markers that can be told apart in the bitmaps; Figures 2 and 7
  some ends of curves, read by eye.
- explanations.json: why a measured number differs from the paper's, by the name of the cell, or what there is in the
  place of a figure that was not run, by "figure N"; written by hand.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence

_DIRECTORY = pathlib.Path(__file__).parent

# Figure's curves by panel and label; points are (x, y).
Curves = Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]


@dataclasses.dataclass(frozen=True)
class Cell:
    """A setting of the paper, up to the learning rate.

    Attributes:
      task: Name of the task.
      partition: Name of its partition.
      algorithm: "fedavg", "fedsgd" or "sgd".
      C: Fraction of clients in a round; 0 is one client. None for sgd.
      E: Local epochs. None for sgd.
      B: Local minibatch size, or that of sgd; None is B = inf.
    """

    task: str
    partition: str
    algorithm: str
    C: float | None
    E: int | None
    B: int | None

    @property
    def name(self) -> str:
        """Such as "mnist_2nn-iid-C0.1-E1-B10"."""
        setting = "sgd" if self.algorithm == "sgd" else f"C{self.C:.3g}-E{self.E}"
        return f"{self.task}-{self.partition}-{setting}-B{self.B or 'inf'}"

    @property
    def label(self) -> str:
        """E and B, such as "E=1 B=10"."""
        return " ".join([f"E={self.E}"] * (self.E is not None) + [f"B={self.B or 'inf'}"])


@dataclasses.dataclass(frozen=True)
class Row:
    """A number of a table.

    Attributes:
      table: 1 to 4.
      cell: The setting.
      target: The target test accuracy.
      rounds: Rounds to the target; None where the paper prints a dash.
    """

    table: int
    cell: Cell
    target: float
    rounds: int | None

    @property
    def column(self) -> tuple:
        """What rows with the same baseline share; in Table 1 that is the row with C = 0 and the same B."""
        return self.table, self.cell.task, self.cell.partition, self.target, self.cell.B if self.table == 1 else None


@functools.cache
def rows() -> tuple[Row, ...]:
    """Returns the numbers of all tables, in the paper's order."""
    fields = [field.name for field in dataclasses.fields(Cell)]
    return tuple(
        Row(row["table"], Cell(*(row[name] for name in fields)), row["target"], row["rounds"])
        for row in json.loads((_DIRECTORY / "tables.json").read_text("utf-8"))
    )


def speedups(rounds: Mapping[Row, float]) -> dict[Row, float]:
    """Returns the speed-ups over the first row of a column, as the paper counts them, where that row has rounds.

    Args:
      rounds: Rounds to the target, the paper's or measured ones, of the rows that reached it.
    """
    first = {row.column: row for row in reversed(rows())}
    baselines = {row: first[row.column] for row in rounds}
    return {row: rounds[baselines[row]] / n for row, n in rounds.items() if baselines[row] in rounds}


@functools.cache
def curves(figure: int) -> Curves:
    """Returns the published curves of a figure; empty where there are none."""
    return json.loads((_DIRECTORY / "curves.json").read_text("utf-8")).get(str(figure), {})


@functools.cache
def explanations() -> Mapping[str, str]:
    """Returns, by the name of a cell, why what was measured differs; by "figure N", what there is in its place."""
    return json.loads((_DIRECTORY / "explanations.json").read_text("utf-8"))
