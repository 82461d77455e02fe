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

    def warn(self, message: str) -> None:
        """The run goes on, though a file of it was not what was written, or its task is not what it was."""
