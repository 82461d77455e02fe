"""The TFF simulation runtime: a worker process that runs the federated computations, and its life and death.

TFF's own local context starts the same worker, but leaves it running after SIGTERM, SIGKILL and often after a normal
end, and lets every user of the machine have it run what they like. Here the kernel ends the worker with the program,
however that ends, and nobody else reaches it: see `confined_worker.py`.
"""

import asyncio
import atexit
import collections
import concurrent.futures
import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import portpicker
import tensorflow_federated as tff

from tff_fedavg import confined_worker

# Becomes the worker where it cannot be confined. Not a `preexec_fn`, which is not safe beside the threads of gRPC, and
# makes that print warnings.
_BECOME_WORKER = """
import os, runpy, sys
runpy.run_path(sys.argv[1])["end_with"](int(sys.argv[2]))
os.execv(sys.argv[3], sys.argv[3:])
"""
_BINARY = pathlib.Path(tff.__file__).parent / "data" / "worker_binary"
_MAX_STARTS_PER_CALL = 3
_SECONDS_TO_GET_READY = 60.0
_KEPT_LINES = 5
_MAX_MESSAGE_BYTES = 2**31 - 1  # The largest that protocol buffers and the worker take.
_CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.client_idle_timeout_ms", _MAX_MESSAGE_BYTES),  # The largest number is for never.
    ("grpc.enable_http_proxy", 0),  # Of http_proxy and the like, for which gRPC takes this machine for another one.
]


class ComputationError(RuntimeError):
    """TensorFlow could not run a computation in the worker, such as for a label out of range or a missing file."""


@contextlib.contextmanager
def local_worker(*, confined: bool | None = None) -> Iterator[None]:
    """Starts a worker on this machine, which runs the computations of this thread within the `with` statement.

    The worker runs as many clients at once as there are cores, each on one core. To be entered in the main thread: the
    kernel ends the worker together with the thread that started it.

    Args:
      confined: Whether only the owner of this program can reach the worker. Otherwise it listens on a port, where other
        users of the machine can have it do in the owner's name what they like. By default it is confined where the
        kernel allows it, and a line on stderr says so where not.

    Raises:
      RuntimeError: If the worker does not start, or the kernel does not let it be confined where that is asked for.
        From a computation, if it died, and died again when the computation was repeated.
      ComputationError: From a computation that TensorFlow could not run. The worker stays usable.
    """
    worker = _Worker(confined)
    context = _Context(worker)
    # The worker ends first: what still runs in the context ends with it.
    with contextlib.closing(context), contextlib.closing(worker):
        worker.connect()
        with tff.framework.get_context_stack().install(context):
            yield


@atexit.register
def _replace_default_context() -> None:
    """Frees TFF's default context, which prints an AttributeError when that is left to the end of the interpreter."""
    factory = tff.framework.ResourceManagingExecutorFactory(lambda cardinalities: None)
    tff.framework.set_default_context(tff.framework.AsyncExecutionContext(factory))


class _Context(tff.framework.SyncContext):
    """As `tff.framework.SyncExecutionContext`, which never closes its event loop, for a worker that may die."""

    def __init__(self, worker: "_Worker"):
        def executor_stack(cardinalities):
            executor = tff.framework.RemoteExecutor(worker.connect())
            executor.set_cardinalities({tff.CLIENTS: 0, **cardinalities})
            return executor

        self._worker = worker
        self._context = tff.framework.AsyncExecutionContext(
            tff.framework.ResourceManagingExecutorFactory(executor_stack),
            compiler_fn=tff.backends.native.desugar_and_transform_to_native,
            transform_args=tff.tensorflow.transform_args,
            transform_result=tff.tensorflow.transform_result,
        )
        # In a thread of its own, since in a notebook the main thread has an event loop that runs already.
        self._runner = asyncio.Runner()
        self._thread = concurrent.futures.ThreadPoolExecutor(1)

    def invoke(self, comp: Any, arg: Any) -> Any:
        self._worker.starts = 0
        try:
            return self._thread.submit(self._runner.run, self._context.invoke(comp, arg)).result()
        except grpc.RpcError as e:
            # What follows is the names of nodes, and all of it once more.
            message = e.details().splitlines()[0].removeprefix("Failed to run computation: ")
            raise ComputationError(message) from None

    def close(self) -> None:
        self._thread.submit(self._runner.close).result()
        self._thread.shutdown()


class _Worker:
    """The worker process, started again when it has died.

    Attributes:
      starts: How often it was started in the computation that runs.
    """

    def __init__(self, confined: bool | None):
        self.starts = 0
        self._confined = confined
        self._process = self._channel = self._stub = self._reader = None
        self._last_lines = collections.deque(maxlen=_KEPT_LINES)
        self._closed = False

    def connect(self) -> tff.framework.RemoteExecutorGrpcStub:
        """Returns a stub for the running worker. TFF calls it again for the same computation when the worker died."""
        if self._closed:
            raise RuntimeError("the TFF worker was stopped")
        if self._process is None or self._process.poll() is not None or not self._stub.is_ready:
            self._stop()
            if self.starts == _MAX_STARTS_PER_CALL:
                raise RuntimeError(f"the TFF worker died {self.starts} times in one computation, last {self._end()}")
            self.starts += 1
            self._start()
        return self._stub

    def close(self) -> None:
        self._closed = True
        self._stop()

    def _start(self):
        if self._confined is not False:
            try:
                self._start_confined()
                return
            except _RefusedError as e:
                if self._confined:
                    raise RuntimeError(f"the TFF worker cannot be confined: {e}") from e
                _warn_once(str(e))
                self._confined = False
        port = portpicker.pick_unused_port()
        self._run("-c", _BECOME_WORKER, confined_worker.__file__, str(os.getpid()), _BINARY, f"--port={port}")
        self._wait_for(f"localhost:{port}")

    def _start_confined(self):
        with tempfile.TemporaryDirectory(prefix="tff_fedavg-") as directory:  # Only its owner can enter it.
            path = os.path.join(directory, "socket")
            self._run(confined_worker.__file__, str(os.getpid()), path, _BINARY)
            # The name of the socket goes now, and is not left behind however the program ends.
            self._wait_for(f"unix:{path}")

    def _run(self, *program):
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-I", "-S", *program),
                f"--max_concurrent_computation_calls={len(os.sched_getaffinity(0))}",
            ],
            # Clients run in parallel already: more threads inside each of them cost 20 to 50 % of the speed.
            env={"TF_NUM_INTRAOP_THREADS": "1", **os.environ},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C in the terminal is for the program, which then ends the worker.
        )
        self._last_lines.clear()
        self._reader = threading.Thread(target=self._read_errors, args=(self._process.stderr,), daemon=True)
        self._reader.start()

    def _read_errors(self, stderr):
        is_wanted = os.environ.get("TF_CPP_MIN_LOG_LEVEL", "0") == "0"
        with stderr:
            for line in stderr:
                self._last_lines.append(line.strip())
                if is_wanted:
                    sys.stderr.write(line)

    def _wait_for(self, address):
        self._channel = grpc.insecure_channel(address, options=_CHANNEL_OPTIONS)
        self._stub = tff.framework.RemoteExecutorGrpcStub(self._channel)
        until = time.monotonic() + _SECONDS_TO_GET_READY
        while not self._stub.is_ready:
            if (status := self._process.poll()) is not None:
                self._reader.join()
                if status == confined_worker.REFUSED:
                    raise _RefusedError(" ".join(self._last_lines))
                raise RuntimeError(f"the TFF worker did not start: it ended {self._end()}")
            if time.monotonic() > until:
                raise RuntimeError(f"the TFF worker did not get ready in {_SECONDS_TO_GET_READY:g} s{self._said()}")
            time.sleep(0.02)

    def _stop(self):
        if self._channel is not None:
            self._channel.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._reader.join()

    def _end(self):
        """Returns how the worker ended, and what it said last."""
        self._reader.join()
        status = self._process.returncode
        how = f"by signal {signal.Signals(-status).name}" if status < 0 else f"with exit status {status}"
        memory = " (as when memory runs out)" if status == -signal.SIGKILL else ""
        return how + memory + self._said()

    def _said(self):
        return f": {' | '.join(self._last_lines)}" if self._last_lines else ""


class _RefusedError(Exception):
    """The kernel refuses the namespaces."""


def _warn_once(reason: str) -> None:
    global _has_warned
    if not _has_warned:
        _has_warned = True
        print(
            f"the kernel does not let the TFF worker be confined ({reason}): it listens on a port, which other users "
            "of this machine can reach",
            file=sys.stderr,
        )


_has_warned = False
