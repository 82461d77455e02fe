"""The style of all pictures: one width, to be read at that of a README, and lines that all readers can tell apart."""

import itertools
import os
from typing import TYPE_CHECKING

from tff_fedavg.replacement import replacement

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Those of Okabe and Ito (2008), which colour-blind readers can tell apart, without the yellow, which is pale on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# A line and a marker for each of more curves than there are colours: `(colour, line, marker)`.
STYLES = tuple((color, *line) for line, color in itertools.product(zip(("-", "--", ":", "-."), "os^v"), COLORS))

# At 800 pixels the text of 10 points is 14 pixels high.
_WIDTH = 8.0
_DPI = 150


def new_figure(height: float = 4.5) -> "Figure":
    """Returns an empty figure of the common width; its height is in inches."""
    import matplotlib.figure  # Takes a second to import.

    return matplotlib.figure.Figure(figsize=(_WIDTH, height), layout="constrained")


def save(figure: "Figure", path: str | os.PathLike[str]) -> None:
    """Writes a figure as PNG; the file is replaced in one step."""
    with replacement(path) as temporary:
        figure.savefig(temporary, format="png", dpi=_DPI)
