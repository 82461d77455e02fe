"""Who is told how a run goes."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tff_fedavg.training import Progress


class Observer:
    """Is told how the training goes; this one keeps it to itself. What one raises ends the run, after a save."""

    def start(self, round_number: int) -> None:
        """The training goes on after this round; 0 is a new run."""

    def update(self, progress: "Progress") -> None:
        """A round has been run."""

    def report_mended(self, message: str) -> None:
        """A file of the run was not what was written, and the run goes on without it, or with what it should be."""
