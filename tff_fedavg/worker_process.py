"""The process of a TFF worker: its start, its end, and what it says. To import it takes no TensorFlow, and no time."""

import collections
import contextlib
import importlib.util
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

from tff_fedavg import confined_worker

BINARY = pathlib.Path(importlib.util.find_spec("tensorflow_federated").origin).parent / "data" / "worker_binary"

MAX_SOCKET_BYTES = 107  # Of the path of a unix socket: `sun_path` in <linux/un.h>, without the zero at its end.

_KEPT_LINES = 5
_SECONDS_BETWEEN_LOOKS = 0.02
# A worker that the kernel cannot end yet, since it waits for a disk or a network, holds its stderr open.
_SECONDS_TO_READ = 1.0

_ENVIRONMENT = {
    # Clients run in parallel already: more threads inside each of them cost 20 to 50 % of the speed.
    "TF_NUM_INTRAOP_THREADS": "1",
    # The C library keeps what it has of the system: to give it back, and to ask again for the next copy of a model,
    # takes a fifth of what a round costs besides the training.
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "67108864",
}


def check_address(address: str) -> str:
    """Returns an address at which a worker can listen, with the whole path of a unix socket.

    Raises:
      ValueError: If it is neither `unix:PATH` nor `HOST:PORT`, or the path is too long.
    """
    if match := re.fullmatch("unix:(.+)", address):
        path = os.path.abspath(os.path.expanduser(match[1]))
        if len(os.fsencode(path)) > MAX_SOCKET_BYTES:
            raise ValueError(f"{address}: the path of a socket may have {MAX_SOCKET_BYTES} bytes; give a shorter one")
        return f"unix:{path}"
    match = re.fullmatch(r"[^:/\s]+:(\d{1,5})", address)
    if not match:
        raise ValueError(f"{address}: it is no address of a worker; give unix:PATH or HOST:PORT")
    if not 0 < int(match[1]) < 2**16:
        raise ValueError(f"{address}: it is no port; give HOST:PORT with one from 1 to 65535")
    return address


class WorkerProcess:
    """A worker, which listens when it answers, and ends with the thread that has started it.

    It runs as many clients at once as there are cores, each on one core.

    Args:
      address: Where it listens: `unix:PATH`, for its owner only, or `HOST:PORT`.
      confined: Whether it gets a network namespace of its own, so that it cannot be reached in any other way.

    Attributes:
      confined: As it was given.
    """

    def __init__(self, address: str, *, confined: bool):
        self.confined = confined
        self._oom_kills = _oom_kills()
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-I", "-S", confined_worker.__file__, str(os.getpid()), address, str(int(confined))),
                *(BINARY, f"--max_concurrent_computation_calls={len(os.sched_getaffinity(0))}"),
            ],
            env={**_ENVIRONMENT, **os.environ},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C in the terminal is for the program, which then ends the worker.
        )
        self._listening = threading.Event()
        self._pid = None
        self._last_lines = collections.deque(maxlen=_KEPT_LINES)
        self._reader = threading.Thread(target=self._read_errors, daemon=True)
        self._reader.start()

    @property
    def refused(self) -> bool:
        """Whether it has ended since the kernel does not let it be confined; `said` tells why."""
        return self.poll() == confined_worker.REFUSED

    def listens(self, timeout: float = math.inf) -> bool:
        """Waits until it listens, has ended, or the seconds are over; returns whether it has begun to listen."""
        until = time.monotonic() + timeout
        while not self._listening.wait(_SECONDS_BETWEEN_LOOKS) and self.poll() is None and time.monotonic() < until:
            pass
        return self._listening.is_set()

    def poll(self) -> int | None:
        """Returns its exit status, negative for a signal; None while it runs."""
        return self._process.poll()

    def computed_seconds(self) -> float | None:
        """Returns the processor time that the worker has taken; None if there is no worker, or none yet."""
        try:
            return processor_seconds(pathlib.Path(f"/proc/{self._pid}/stat").read_text())
        except OSError:
            return None

    def said(self) -> str:
        """Returns the last lines of what it wrote to stderr."""
        if self.poll() is not None:
            self._reader.join(_SECONDS_TO_READ)
        return " | ".join(self._last_lines.copy())

    def end(self) -> str:
        """Waits until it ends; returns how that was, and what it said last: "with exit status 1: ..."."""
        status = self._process.wait()
        if status == -signal.SIGKILL and _oom_kills() > self._oom_kills:
            how = "by the kernel, since memory ran out"
        elif status < 0:
            how = f"by signal {signal.Signals(-status).name}"
        else:
            how = f"with exit status {status}"
        return ": ".join(filter(None, (how, self.said())))

    def kill(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.wait()
        self._reader.join(_SECONDS_TO_READ)

    def _read_errors(self):
        is_wanted = os.environ.get("TF_CPP_MIN_LOG_LEVEL", "0") == "0"
        with self._process.stderr as stderr:
            for line in stderr:
                if line.startswith(f"{confined_worker.LISTENING} "):
                    self._pid = int(line.split()[1])
                    self._listening.set()
                    continue
                self._last_lines.append(line.strip())
                if is_wanted:
                    sys.stderr.write(line)


def processor_seconds(stat: str) -> float:
    """Returns the processor time of a process, from its file `stat` in /proc: utime and stime."""
    return sum(map(int, stat.rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")


def _oom_kills() -> int:
    """Returns how many processes of this machine the kernel has killed for want of memory; 0 where it does not tell."""
    try:
        lines = pathlib.Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


def tell(message: str) -> None:
    """Tells the user what happens to the workers, if somebody reads it."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)
