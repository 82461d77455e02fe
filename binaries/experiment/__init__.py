"""One experiment of the paper: a task trained with an algorithm."""

from binaries.experiment.record import Experiment

__all__ = ["Experiment"]
