"""What a peer of `benchmarks.round_time` is given, and how it answers. Knows nothing of the project but this file."""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

Batch = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Work:
    """A round of FedAvg with E = 1: each client starts from the weights, and makes a step of SGD with each batch.

    Attributes:
      task: Whose model it is: "mnist_2nn", "mnist_cnn", "shakespeare_lstm", "stackoverflow_lstm" or "cifar_cnn".
      weights: The initial weights, in the order and the layout of Keras.
      clients: The examples of each client, in the order in which they are used: x and y `[n, ...]`.
      batch_size: B; the last batch of a client has what is left.
      learning_rate: That of the clients; the server adds the average of their updates, weighted by n.
      padding: The label that fills up a text, and does not count; None if y is one label an example.
      unroll: What the loss of a text, the sum over its labels, is divided by.
    """

    task: str
    weights: Sequence[np.ndarray]
    clients: Sequence[Batch]
    batch_size: int
    learning_rate: float
    padding: int | None
    unroll: int | None

    def save(self, path: str) -> None:
        numbers = {"batch_size": self.batch_size, "learning_rate": self.learning_rate}
        if self.padding is not None:
            numbers |= {"padding": self.padding, "unroll": self.unroll}
        arrays = {f"weight_{i}": w for i, w in enumerate(self.weights)}
        for k, (x, y) in enumerate(self.clients):
            arrays |= {f"x_{k}": x, f"y_{k}": y}
        np.savez(path, task=self.task, **numbers, **arrays)

    @classmethod
    def load(cls, path: str) -> "Work":
        with np.load(path) as file:
            arrays = dict(file)

        def sequence(name):
            return [arrays[f"{name}_{i}"] for i in range(sum(key.startswith(f"{name}_") for key in arrays))]

        numbers = {
            name: arrays[name].item() if name in arrays else None
            for name in ("task", "batch_size", "learning_rate", "padding", "unroll")
        }
        return cls(weights=sequence("weight"), clients=list(zip(sequence("x"), sequence("y"))), **numbers)

    def batches(self, client: int) -> list[Batch]:
        """Returns the minibatches of a client; those of texts are cut to their longest."""
        x, y = self.clients[client]
        batches = []
        for start in range(0, len(x), self.batch_size):
            batch = x[start : start + self.batch_size], y[start : start + self.batch_size]
            if self.padding is not None:
                time = 1 + np.flatnonzero((batch[1] != self.padding).any(axis=0))[-1]
                batch = batch[0][:, :time], batch[1][:, :time]
            batches.append(batch)
        return batches


def serve(run_round: Callable[[], Iterable[Any]], initial_weights: Sequence[Any]) -> None:
    """Runs a round, which returns the new weights, for each line of stdin.

    Prints a line when it is ready, and for each round one at its end, and one with the norms of the update of each
    weight.
    """
    with contextlib.suppress(BrokenPipeError):  # Whoever reads it has ended.
        _tell("ready")
        for _ in sys.stdin:
            weights = run_round()
            _tell("done")
            _tell(json.dumps([float(np.linalg.norm(w - w_0)) for w, w_0 in zip(weights, initial_weights)]))


def _tell(line):
    os.write(sys.stdout.fileno(), f"{line}\n".encode())  # Leaves nothing in a buffer, whose end would fail again.
