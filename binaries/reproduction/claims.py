"""What the paper concludes from Tables 1, 2 and 4 and from Figure 1, as comparisons of numbers.

They are made of the paper's own numbers, where each has to come out as the claim says, and of the measured ones.
"""

import dataclasses
import enum
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from binaries.reproduction import published
from binaries.reproduction.published import Row

_APART = 1.25  # Rounds of the paper's that differ by less are in no order: its own repeats of a cell do.


class Claim(enum.Enum):
    """A claim, and where the paper makes it."""

    SAME_START = "The mean of two models with the same initial values has a lower loss than both", "Figure 1"
    OTHER_START = "The mean of two models with different ones has a higher loss than both", "Figure 1"
    SMALL_BATCHES = "More clients than one a round save more rounds at B = 10 than at B = ∞", "Table 1"
    MORE_CLIENTS = "At B = 10 they save more on non-IID data than on IID data", "Table 1"
    LOCAL_UPDATES = "On IID data FedAvg takes fewer rounds than FedSGD", "Tables 2, 4"
    PATHOLOGICAL = "On pathological data its best E and B do, too", "Tables 2, 4"
    DIGITS = "Of digits FedAvg saves more rounds on IID data", "Tables 2, 4"
    PLAYS = "Of plays it saves more by role", "Table 2"
    ROLES = "By role FedAvg takes fewer rounds than on IID lines of the same plays", "Table 2"
    ORDER = "Of two E and B whose rounds differ by a quarter or more in the paper the same takes fewer", "Tables 2, 4"


# Whether a comparison comes out as the claim says, by what is compared.
Comparisons = Mapping[str, bool]


def check(
    rounds: Mapping[Row, float],
    unreached: Mapping[Row, float],
    mixtures: Mapping[str, Sequence[tuple[float, float]]],
) -> dict[Claim, Comparisons]:
    """Makes those comparisons of all claims for which there are numbers.

    Args:
      rounds: Rounds to the target, of the rows that reached it.
      unreached: Rounds without the target, of rows that did not reach it; they tell nothing of a speed-up.
      mixtures: theta and the loss of the mixture, by initialisation (`figure_1.PANELS`).
    """
    found = {claim: {} for claim in Claim}
    for claim, start, sign in ((Claim.SAME_START, "shared", 1), (Claim.OTHER_START, "independent", -1)):
        if mixtures.get(start):
            mean, *parents = np.interp([0.5, 0, 1], *np.array(mixtures[start]).T)
            found[claim][start] = all(sign * mean < sign * parent for parent in parents)
    speedups = published.speedups(rounds)

    def compare(claim: Claim, row: Row, **other: object) -> None:
        """Claims that a row has a larger speed-up than the one with another B or partition."""
        setting = dataclasses.replace(row.cell, algorithm="", **other)
        for o, speedup in speedups.items():
            if o.table == row.table and dataclasses.replace(o.cell, algorithm="") == setting:
                found[claim][row.cell.name] = speedups[row] > speedup

    for row, speedup in speedups.items():
        cell = row.cell
        if row.table == 1 and cell.B == 10 and cell.C:
            compare(Claim.SMALL_BATCHES, row, B=None)
            if cell.partition == "pathological":
                compare(Claim.MORE_CLIENTS, row, partition="iid")
        if row.table in (2, 4) and cell.algorithm == "fedavg":
            if cell.partition == "iid":
                found[Claim.LOCAL_UPDATES][cell.name] = speedup > 1
                compare(Claim.DIGITS, row, partition="pathological")
            if cell.partition == "pathological":
                best = found[Claim.PATHOLOGICAL].get(cell.task, False)
                found[Claim.PATHOLOGICAL][cell.task] = best or speedup > 1
            if cell.partition == "role":
                compare(Claim.PLAYS, row, partition="iid")
    at_least = {**unreached, **rounds}
    at_most = {**dict.fromkeys(unreached, np.inf), **rounds}
    for first, second in itertools.permutations([row for row in at_least if row.table in (2, 4)], 2):
        is_before = at_most[first] < at_least[second]
        if not is_before and at_least[first] < at_most[second]:
            continue  # One was stopped too early to tell.
        of_lines = dataclasses.replace(first.cell, partition="iid")
        if (first.cell.partition, first.cell.algorithm) == ("role", "fedavg") and second.cell == of_lines:
            found[Claim.ROLES][first.cell.name] = is_before
        if first.column == second.column and _APART * first.rounds <= second.rounds:
            found[Claim.ORDER][f"{first.cell.name} before {second.cell.label}"] = is_before
    return found
