"""The TFF simulation runtime: a worker process that runs the federated computations, and its life and death.

TFF's own local context starts the same worker, but leaves it running after SIGTERM, SIGKILL and often after a normal
end. Here the kernel ends the worker with the program, however that ends.
"""

import atexit
import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import grpc
import portpicker
import tensorflow_federated as tff

# Has the kernel end the worker with the program, and becomes the worker. Not a `preexec_fn`, which is not safe beside
# the threads of gRPC, and makes that print warnings. 1 is PR_SET_PDEATHSIG of <linux/prctl.h>.
_BECOME_WORKER = f"""
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, {signal.SIGKILL:d})
os.execv(sys.argv[1], sys.argv[1:])
"""
_MAX_WORKER_STARTS = 3
_MAX_MESSAGE_BYTES = 2**31 - 1  # The largest that protocol buffers and the worker take.


@contextlib.contextmanager
def local_worker() -> Iterator[None]:
    """Starts a worker on this machine, which runs the computations of this thread within the `with` statement.

    The worker runs as many clients at once as there are cores, each on one core. To be entered in the main thread: the
    kernel ends the worker together with the thread that started it.

    Raises:
      RuntimeError: In a computation, if the worker died, and died again when the round was repeated.
    """
    worker = _Worker()

    def executor_stack(cardinalities):
        executor = tff.framework.RemoteExecutor(worker.connect())
        executor.set_cardinalities({tff.CLIENTS: 0, **cardinalities})
        return executor

    context = tff.framework.SyncExecutionContext(
        tff.framework.ResourceManagingExecutorFactory(executor_stack),
        compiler_fn=tff.backends.native.desugar_and_transform_to_native,
        transform_args=tff.tensorflow.transform_args,
        transform_result=tff.tensorflow.transform_result,
    )
    with contextlib.closing(worker):
        worker.connect()
        with tff.framework.get_context_stack().install(context):
            yield


@atexit.register
def _replace_default_context() -> None:
    """Frees TFF's default context, which prints an AttributeError when that is left to the end of the interpreter."""
    factory = tff.framework.ResourceManagingExecutorFactory(lambda cardinalities: None)
    tff.framework.set_default_context(tff.framework.AsyncExecutionContext(factory))


class _Worker:
    """The worker process, started again when it has died."""

    def __init__(self):
        self._process = None
        self._stub = None
        self._starts = 0
        self._closed = False

    def connect(self) -> tff.framework.RemoteExecutorGrpcStub:
        """Returns a stub for the running worker. TFF calls it again for the same round when the worker died in it."""
        if self._closed:
            raise RuntimeError("the TFF worker was stopped")
        if self._process is None or self._process.poll() is not None:
            if self._starts == _MAX_WORKER_STARTS:
                raise RuntimeError(
                    f"the TFF worker died {self._starts} times, last with exit status {self._process.returncode}; "
                    "it may have run out of memory"
                )
            self._starts += 1
            self._start()
        return self._stub

    def close(self):
        self._closed = True
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _start(self):
        port = portpicker.pick_unused_port()
        binary = pathlib.Path(tff.__file__).parent / "data" / "worker_binary"
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-I", "-S", "-c", _BECOME_WORKER),
                *(binary, f"--port={port}", f"--max_concurrent_computation_calls={len(os.sched_getaffinity(0))}"),
            ],
            # Clients run in parallel already: more threads inside each of them cost 20 to 50 % of the speed.
            env={"TF_NUM_INTRAOP_THREADS": "1", **os.environ},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in the terminal is for the program, which then ends the worker.
        )
        channel = grpc.insecure_channel(
            f"localhost:{port}",
            options=[
                ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
                ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
            ],
        )
        self._stub = tff.framework.RemoteExecutorGrpcStub(channel)
        while not self._stub.is_ready:
            if self._process.poll() is not None:
                raise RuntimeError(f"the TFF worker did not start: exit status {self._process.returncode}")
            time.sleep(0.05)
