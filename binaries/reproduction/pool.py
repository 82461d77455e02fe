"""One long-lived process per core, each of which takes one job after another.

A run per core is faster than one run on all cores, where those that have finished a round's clients wait for the rest;
and TFF, which takes four seconds to import, is not imported for each of them.
"""

import contextlib
import dataclasses
import gc
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence

from binaries.command_line import signals
from binaries.command_line.program import OBJECTS_BETWEEN_COLLECTIONS, first_line

# TensorFlow and TFF keep some 30 MB of each run in memory: a process is replaced after so many of them.
_JOBS_PER_PROCESS = 20
_SECONDS_TO_SAVE = 6.0

# Does the work in a process of the pool. Is given a function that takes what there is to say of its progress, and
# returns what came of it.
Job = Callable[[Callable[[str], None]], str]


@dataclasses.dataclass(frozen=True)
class Ended:
    """A job that has ended.

    Attributes:
      name: Its name.
      outcome: What came of it, or why it failed: one line.
      failed: Whether it has raised an error, or its process died.
      refused: Whether it has failed for what it was given, which others may have been given, too.
    """

    name: str
    outcome: str
    failed: bool
    refused: bool


@dataclasses.dataclass
class _Process:
    process: multiprocessing.Process
    connection: multiprocessing.connection.Connection
    core: int
    jobs: int = 0
    name: str = ""
    message: str = ""


class Pool:
    """A context manager, at whose end every job that still runs gets SIGTERM and time to save its state.

    Args:
      jobs: How many run at once at most; by default one on each core that the program may use.
    """

    def __init__(self, jobs: int | None = None):
        self._free_cores = sorted(os.sched_getaffinity(0))[:jobs]
        self._idle = []
        self._running = {}  # By connection.
        with signals.postponed():
            multiprocessing.resource_tracker.ensure_running()  # Its start unblocks signals: not in `submit`.

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        _end([worker.process for worker in (*self._idle, *self._running.values())])

    @property
    def has_room(self) -> bool:
        """Whether a core has nothing to do."""
        return bool(self._idle or self._free_cores)

    @property
    def running(self) -> dict[str, str]:
        """The jobs that run, by name, with the last that they said."""
        return {worker.name: worker.message for worker in self._running.values()}

    def submit(self, name: str, job: Job) -> None:
        """Starts a job on an idle core. It is pickled: a function of a module, or a `functools.partial` of one."""
        # What Ctrl-C or a closed terminal sends to all its processes is for the program, which ends the others.
        with signals.postponed():
            worker = self._idle.pop() if self._idle else _start(self._free_cores.pop())
            if not worker.process.is_alive():  # Killed while it had nothing to do.
                worker = _start(worker.core)
            worker.jobs, worker.name, worker.message = worker.jobs + 1, name, "starting"
            self._running[worker.connection] = worker
        with contextlib.suppress(OSError):  # If it has just died, `wait` tells so.
            worker.connection.send(job)

    def wait(self, seconds: float) -> list[Ended]:
        """Waits until a job ends; returns those that have ended.

        Args:
          seconds: Waits so long at most.
        """
        ended = []
        until = time.monotonic() + seconds
        while not ended and (ready := multiprocessing.connection.wait(self._running, until - time.monotonic())):
            ended = [job for connection in ready if (job := self._receive(connection))]
        return ended

    def _receive(self, connection: multiprocessing.connection.Connection) -> Ended | None:
        """Takes a message of a job; returns what it says of its end."""
        worker = self._running[connection]
        try:
            kind, message = connection.recv()
        except (EOFError, OSError):
            worker.process.join()
            kind = "died"
            message = f"its process died with exit status {worker.process.exitcode}, maybe for lack of memory"
        if kind == "says":
            worker.message = message
            return None
        del self._running[connection]
        if kind != "died" and worker.jobs < _JOBS_PER_PROCESS:
            self._idle.append(worker)
        else:
            _end([worker.process])
            self._free_cores.append(worker.core)
        return Ended(worker.name, message, failed=kind != "ended", refused=kind == "refused")


def _start(core: int) -> _Process:
    context = multiprocessing.get_context("spawn")
    connection, other_end = context.Pipe()
    process = context.Process(target=_work, args=(other_end, core), daemon=True)
    process.start()
    other_end.close()  # So that the death of the process is the end of the file here.
    return _Process(process, connection, core)


def _end(processes: Sequence[multiprocessing.Process]) -> None:
    """Ends processes, each after it has saved the state of its job, if it does so in time."""
    for process in processes:
        process.terminate()
    until = time.monotonic() + _SECONDS_TO_SAVE
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
        process.kill()
        process.join()


def _work(connection: multiprocessing.connection.Connection, core: int) -> None:
    """Runs in a process of the pool."""
    os.sched_setaffinity(0, {core})
    gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS)
    signals.catch()
    signals.end_with_parent()
    if os.getppid() != multiprocessing.parent_process().pid:  # It was gone before.
        os._exit(1)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    try:
        _serve(connection)
    except BaseException:
        signals.release()
        if signals.received() is None:
            raise
        sys.exit()  # What the signal has broken off is no news.
    finally:
        gc.freeze()  # As in `program.run`.


def _serve(connection: multiprocessing.connection.Connection) -> None:
    while True:
        job = connection.recv()
        try:
            result = ("ended", job(lambda message: connection.send(("says", message))))
        except (ValueError, OSError, RuntimeError) as e:
            if signals.received() is not None:
                raise
            # A RuntimeError is of a worker that was lost, for lack of memory, say.
            result = ("failed" if isinstance(e, RuntimeError) else "refused", first_line(e))
        connection.send(result)
