"""Runs a worker on this machine for a program with `--workers`, here or on another machine, until it is ended.

    python -m binaries.worker
    python -m binaries.worker --address=unix:/run/me/worker.sock
    python -m binaries.worker --address=10.0.0.5:7000

A unix socket is its owner's only, and is reached from another machine by ssh, which can forward it:
`ssh -N -L HERE.sock:THERE.sock HOST`. Whoever reaches a HOST:PORT can run anything there: it is for networks where that
does not matter.
"""

import collections
import contextlib
import fcntl
import os
import pathlib
import time
from collections.abc import Iterator

from absl import flags

from binaries.command_line import program
from tff_fedavg.worker_process import WorkerProcess, check_address, tell

_MAX_DEATHS = 3
_SECONDS_OF_DEATHS = 60.0

_ADDRESS = flags.DEFINE_string(
    "address", None, "Where it listens: unix:PATH or HOST:PORT; by default a unix socket in a directory of yours."
)
_CONFINED = flags.DEFINE_boolean(
    "confined", None, "Whether it can be reached at --address only; by default where the kernel allows it."
)


def main() -> None:
    address = _address()
    with _reserved(address):
        _serve(address)


def _serve(address: str) -> None:
    process = _start(address)
    try:
        if not address.startswith("unix:"):
            tell(f"whoever reaches {address} can run anything as this user: it is for private networks")
        print(f"listening at {address}, {len(os.sched_getaffinity(0))} cores; end with Ctrl-C", flush=True)
        deaths = collections.deque(maxlen=_MAX_DEATHS)
        while True:
            end = process.end()
            deaths.append(time.monotonic())
            if len(deaths) == _MAX_DEATHS and deaths[-1] - deaths[0] < _SECONDS_OF_DEATHS:
                raise RuntimeError(f"the TFF worker ended {_MAX_DEATHS} times within a minute, last {end}")
            tell(f"the TFF worker is started again: it ended {end}")
            process = WorkerProcess(address, confined=process.confined)
    finally:
        process.kill()
        if address.startswith("unix:"):
            pathlib.Path(address.removeprefix("unix:")).unlink(missing_ok=True)


def _address() -> str:
    if _ADDRESS.value is None:
        directory = pathlib.Path(os.environ.get("XDG_RUNTIME_DIR") or "~/.cache").expanduser() / "tff_fedavg"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        return f"unix:{directory}/worker.sock"
    try:
        return check_address(_ADDRESS.value)
    except ValueError as e:
        raise ValueError(f"--address={e}") from e


@contextlib.contextmanager
def _reserved(address: str) -> Iterator[None]:
    """Keeps others from the path of a socket: until it listens, and between two workers, it seems to be dead."""
    with contextlib.ExitStack() as stack:
        if address.startswith("unix:"):
            with contextlib.suppress(OSError):  # Where there can be no file there is no socket either.
                lock = os.open(f"{address.removeprefix('unix:')}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
                stack.callback(os.close, lock)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as e:
                    raise RuntimeError(f"cannot listen at {address}: another worker does") from e
        yield


def _start(address: str) -> WorkerProcess:
    """Starts a worker; returns it when it listens."""
    process = WorkerProcess(address, confined=_CONFINED.value is not False)
    while not process.listens():
        if not process.refused:
            raise RuntimeError(f"the TFF worker did not start: it ended {process.end()}")
        if _CONFINED.value:
            raise RuntimeError(f"the TFF worker cannot be confined: {process.said()}")
        tell(
            f"the kernel does not let the TFF worker be confined ({process.said()}): it listens on another port too, "
            "where whoever reaches this machine can run anything as this user"
        )
        process = WorkerProcess(address, confined=False)
    return process


if __name__ == "__main__":
    program.run("worker", main)
