"""The metrics of a run for TensorBoard.

Not written by TFF's `TensorBoardReleaseManager`, each number of which stays in TensorFlow's memory: 19 kB a round.
"""

import os
import pathlib
import socket
import time
from collections.abc import Mapping

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter


class EventLog:
    """An event file, which begins with the training and ends with it. A context manager."""

    def __init__(self, directory: str | os.PathLike[str]):
        """Makes the file.

        Args:
          directory: Where it is, beside those of the run's earlier starts.

        Raises:
          OSError: If it cannot be written.
        """
        directory = pathlib.Path(directory)
        directory.mkdir(exist_ok=True)
        # Unbuffered, so that each round can be seen.
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._file = RecordWriter(open(directory / name, "xb", buffering=0))
        self._file.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self._file.close()

    def append(self, round_number: int, metrics: Mapping[str, float]) -> None:
        """Appends the metrics of a round.

        Raises:
          OSError: If the file cannot be written.
        """
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()])
        event = Event(wall_time=time.time(), step=round_number, summary=summary)
        self._file.write(event.SerializeToString())
