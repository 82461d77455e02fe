"""A TFF worker as this program sees it: it is sent computations, and it is noticed when it dies or hangs."""

import asyncio
import collections
import concurrent.futures
import contextlib
import functools
import os
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable
from typing import Any

import grpc
import tensorflow as tf
import tensorflow_federated as tff

from tff_fedavg.scratch import PREFIX, scratch_directory
from tff_fedavg.worker_process import MAX_SOCKET_BYTES, WorkerProcess, processor_seconds, tell

_MAX_LOSSES_PER_COMPUTATION = 3
_MAX_CONNECTS = 10  # In one computation, to a process that runs: TFF waits twice as long before each.
_SECONDS_TO_GET_READY = 60.0
_SECONDS_TO_CONNECT = 2.0
_SECONDS_BETWEEN_LOOKS = 10.0
_SECONDS_TO_ANSWER = 20.0
# Without computing anything, which a client may do that waits for its files; longer where computations take long.
_SECONDS_IDLE = 60.0
_SECONDS_UNSEEN = 3600.0  # The same, where it cannot be seen whether it computes.
_IDLE_TIMES_LONGEST = 3.0
_IDLE_SHARE = 0.01  # Of a core. What is left is the worker's answers to the question how much it has computed.
# TFF's executors for so many different numbers of clients are kept; a new one takes some 50 ms of a 2NN's round.
_EXECUTORS_KEPT = 10
_CARDINALITY_OF_READS = 1_000_003  # Of no computation: what it is for has threads of its own in the worker.
_MAX_MESSAGE_BYTES = 2**31 - 1  # The largest that protocol buffers and the worker take.
_CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.client_idle_timeout_ms", _MAX_MESSAGE_BYTES),  # The largest number is for never.
    ("grpc.enable_http_proxy", 0),  # Of http_proxy and the like, for which gRPC takes this machine for another one.
]


class ComputationError(RuntimeError):
    """TensorFlow could not run a computation in the worker, such as for a label out of range or a missing file."""


class WorkerLostError(Exception):
    """A worker died, hangs or cannot be reached. What it was to compute is lost, and can be computed by another."""


class Worker:
    """What workers have in common.

    Attributes:
      name: What it is called in what the user is told.
      cores: How many clients it runs at once.
    """

    name: str
    cores: int

    def __init__(self):
        self._channel = self._stub = self._reading_stub = None
        self._longest = 0.0
        self._is_closed = False
        self._executors = _ExecutorFactory(self._connect)
        self._context = tff.framework.AsyncExecutionContext(
            self._executors,
            compiler_fn=_compile,
            transform_args=tff.tensorflow.transform_args,
            transform_result=tff.tensorflow.transform_result,
        )
        # A thread of its own: TFF's stub blocks the event loop, and in a notebook one runs in the main thread already.
        self._runner = asyncio.Runner()
        self._thread = concurrent.futures.ThreadPoolExecutor(1)

    def compute(self, comp: tff.Computation, arg: Any) -> Any:
        """Runs a computation.

        Raises:
          ComputationError: If TensorFlow could not run it. The worker stays usable.
          WorkerLostError: If the worker died, hung or could not be reached.
          RuntimeError: If the worker is one of this program, and died or hung again and again.
        """
        started_at = looked_at = computed_at = time.monotonic()
        computed = None
        future = self._thread.submit(self._runner.run, self._context.invoke(comp, arg))
        while concurrent.futures.wait([future], _SECONDS_BETWEEN_LOOKS).not_done:
            waited, looked_at = time.monotonic() - looked_at, time.monotonic()
            if waited > 2 * _SECONDS_BETWEEN_LOOKS + _SECONDS_TO_ANSWER:
                computed_at = looked_at  # This program was stopped, as a batch system does, and so perhaps the worker.
            try:
                self._ask()
                seconds, now = self._computed_seconds(), time.monotonic()
            except (grpc.RpcError, ValueError) as e:  # A ValueError of a channel that is closed.
                if isinstance(e, grpc.RpcError) and e.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    self._end_hung(f"has not answered for {_SECONDS_TO_ANSWER:g} s")
                # Otherwise it is gone, which the computation notices too, and perhaps started again already.
                computed, computed_at = None, time.monotonic()
                continue
            idle = now - computed_at
            if seconds is None:
                if idle > max(_SECONDS_UNSEEN, _IDLE_TIMES_LONGEST * self._longest):
                    self._end_hung(f"has not done it for {idle:.0f} s")
                    computed_at = now
            elif computed is None or not 0 <= seconds - computed < _IDLE_SHARE * idle:
                computed, computed_at = seconds, now
            elif idle > max(_SECONDS_IDLE, _IDLE_TIMES_LONGEST * self._longest):
                self._end_hung(f"has computed nothing for {idle:.0f} s, as when a client waits for its files")
                computed, computed_at = None, now
        self._longest = max(self._longest, time.monotonic() - started_at)
        try:
            return future.result()
        except grpc.RpcError as e:
            # What follows is the names of nodes, and all of it once more.
            message = (e.details() or e.code().name).splitlines()[0].removeprefix("Failed to run computation: ")
            raise ComputationError(message) from None

    def read_text(self, path: str | os.PathLike[str]) -> str:
        """Reads a text file where the worker runs.

        Raises:
          grpc.RpcError: If there is none, or the worker does not answer.
          ValueError: If the worker was closed.
        """
        # In a thread, as above.
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            return thread.submit(asyncio.run, _read(self._reading_stub, os.fspath(path))).result()

    def give_up(self) -> None:
        """Ends what it computes, which nobody waits for any more, if it is one of this program. It stays usable."""

    def close(self) -> None:
        """Ends what this program has of it. What still computes ends with an error."""
        if self._is_closed:
            return
        self._is_closed = True
        self._disconnect()
        self._thread.submit(self._runner.close).result()
        self._thread.shutdown()

    def _connect(self) -> tff.framework.RemoteExecutorGrpcStub:
        """Returns a stub for the worker. TFF calls it again for the same computation when the worker was lost."""
        raise NotImplementedError

    def _end_hung(self, how: str) -> None:
        """Ends the computation that runs, since the worker hangs; tells the user how."""
        raise NotImplementedError

    def _open_channel(self, target: str) -> None:
        self._channel = grpc.insecure_channel(target, options=_CHANNEL_OPTIONS)
        # TFF's stub has gRPC watch the connection, in a thread that prints a traceback if it is closed meanwhile. Here
        # the worker is asked.
        self._channel.subscribe = lambda callback, try_to_connect=None: None
        self._stub = _Stub(self._channel)
        self._reading_stub = _Stub(grpc.intercept_channel(self._channel, _Deadline()))
        self._executors.clear()

    def _disconnect(self) -> None:
        if self._channel is not None:
            self._channel.close()

    def _ask(self) -> None:
        """Raises a `grpc.RpcError` if the worker does not answer. Nothing is computed for it."""
        executor = tff.framework.RemoteExecutor(self._reading_stub)
        executor.set_cardinalities({tff.CLIENTS: _CARDINALITY_OF_READS})
        executor.close()

    def _answers(self) -> bool:
        try:
            self._ask()
        except (grpc.RpcError, ValueError):
            return False
        return True

    def _computed_seconds(self) -> float | None:
        """Returns the processor time that the worker has taken; None if that cannot be seen."""
        raise NotImplementedError


class LocalWorker(Worker):
    """A worker that this program starts, and starts again when it has died or hung."""

    name = "the TFF worker"

    def __init__(self, confined: bool | None):
        super().__init__()
        self.cores = len(os.sched_getaffinity(0))
        self._confined = confined
        self._process = None
        self._losses = self._connects = 0
        self._hung = ""
        self._is_given_up = False

    def start(self) -> None:
        """Starts it.

        Raises:
          RuntimeError: If it does not start, or the kernel does not let it be confined where that is asked for.
        """
        self._connect()

    def compute(self, comp, arg):
        self._losses = self._connects = 0
        self._is_given_up = False
        return super().compute(comp, arg)

    def give_up(self):
        self._is_given_up = True  # The next process is for the next computation.
        self._process.kill()

    def _connect(self):
        if self._is_closed or self._is_given_up:
            raise RuntimeError("the TFF worker was stopped")
        self._connects += 1
        if self._process is None:
            self._start()
        elif self._process.poll() is not None or self._connects > _MAX_CONNECTS:
            self._connects = 0
            self._disconnect()
            self._losses += 1
            if self._losses == _MAX_LOSSES_PER_COMPUTATION:
                end = self._hung or f"ended {self._process.end()}"
                raise RuntimeError(f"the TFF worker was lost {self._losses} times in one computation: last it {end}")
            self._start()
        return self._stub

    def _computed_seconds(self):
        return self._process.computed_seconds()

    def _end_hung(self, how):
        tell(f"the TFF worker {how}: it is ended, and what it computed is computed again")
        self._hung = how
        self._process.kill()

    def _start(self):
        self._hung = ""
        if self._confined is not False:
            self._start_process(confined=True)
            if not self._process.refused:
                return
            if self._confined:
                raise RuntimeError(f"the TFF worker cannot be confined: {self._process.said()}")
            _warn_once(self._process.said())
            self._confined = False
        self._start_process(confined=False)

    def _start_process(self, confined):
        with scratch_directory(_parent_of_socket()) as directory:  # Only its owner can enter it.
            address = f"unix:{directory}/socket"
            self._process = WorkerProcess(address, confined=confined)
            is_ready = self._process.listens(_SECONDS_TO_GET_READY)
            if is_ready:
                self._open_channel(f"unix:{urllib.parse.quote(str(directory))}/socket")
                # The name of the socket goes when it is connected to, and is not left behind however the program ends.
                is_ready = self._answers()
        if self._process.refused and confined:
            return
        if self._process.poll() is not None:
            raise RuntimeError(f"the TFF worker did not start: it ended {self._process.end()}")
        if not is_ready:
            said = filter(
                None, (f"the TFF worker did not get ready in {_SECONDS_TO_GET_READY:g} s", self._process.said())
            )
            raise RuntimeError(": ".join(said))

    def _disconnect(self):
        super()._disconnect()
        if self._process is not None:
            self._process.kill()


def _parent_of_socket() -> str:
    """Returns where temporary files go, or /tmp where a socket's path would be longer than the kernel takes."""
    parent = tempfile.gettempdir()
    is_short = len(os.fsencode(parent)) + len(f"/{PREFIX}12345678/socket") <= MAX_SOCKET_BYTES
    return parent if is_short else "/tmp"


class RemoteWorker(Worker):
    """A worker that `binaries.worker` has started, on this machine or another."""

    def __init__(self, address: str):
        super().__init__()
        self.name = f"worker {address}"
        self._address = address
        self._lost = ""
        self._is_connected = False
        self._is_seen = True
        self._open()

    def reach(self) -> bool:
        """Whether it can be reached and answers; to be asked again and again, since that takes some time."""
        if not self._answers():
            if time.monotonic() - self._opened_at > _SECONDS_TO_CONNECT and not self._is_closed:
                self._open()
            return False
        try:
            status = self.read_text("/proc/self/status")
        except (grpc.RpcError, ValueError):
            return False
        (cpus,) = (line.split()[1] for line in status.splitlines() if line.startswith("Cpus_allowed:"))
        self.cores = int(cpus.replace(",", ""), 16).bit_count()
        return True

    def compute(self, comp, arg):
        self._lost = ""
        self._is_connected = False
        self._is_seen = True
        try:
            return super().compute(comp, arg)
        except Exception as e:
            if not self._lost:
                raise
            if not self._is_closed:
                self._open()
            raise WorkerLostError(self._lost) from e  # Whatever it is, it comes from that.

    def _connect(self):
        if self._is_connected:  # It is not asked a second time what it has failed to do.
            self._lost = "cannot be reached any more"
            raise WorkerLostError(self._lost)
        self._is_connected = True
        return self._stub

    def _computed_seconds(self):
        if self._is_seen:
            try:
                return processor_seconds(self.read_text("/proc/self/stat"))
            except grpc.RpcError as e:
                if e.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                    raise
                # Clients can keep all of TensorFlow's threads for minutes, and more questions would only queue up.
                self._is_seen = False
        return None

    def _end_hung(self, how):
        self._lost = how
        self._disconnect()  # What still runs there ends with an error here.

    def _open(self):
        self._disconnect()
        is_path = self._address.startswith("unix:")  # In which gRPC takes % for the start of a code.
        self._open_channel(urllib.parse.quote(self._address, safe="/:") if is_path else self._address)
        self._opened_at = time.monotonic()


class _ExecutorFactory(tff.framework.ExecutorFactory):
    """As `tff.framework.ResourceManagingExecutorFactory`, which leaves open what it keeps no more: the worker grows."""

    def __init__(self, connect: Callable[[], tff.framework.RemoteExecutorGrpcStub]):
        self._connect = connect
        self._executors = collections.OrderedDict()  # By number of clients, the newest last.

    def create_executor(self, cardinalities):
        clients = cardinalities.get(tff.CLIENTS, 0)
        if clients not in self._executors:
            if len(self._executors) == _EXECUTORS_KEPT:
                self._executors.popitem(last=False)[1].close()
            executor = tff.framework.RemoteExecutor(self._connect())
            executor.set_cardinalities({tff.CLIENTS: clients})
            self._executors[clients] = executor
        self._executors.move_to_end(clients)
        return self._executors[clients]

    def clean_up_executor(self, cardinalities):
        executor = self._executors.pop(cardinalities.get(tff.CLIENTS, 0), None)
        if executor is not None:
            executor.close()

    def clear(self) -> None:
        """Forgets all, of a worker that is there no more."""
        self._executors.clear()


class _Stub(tff.framework.RemoteExecutorGrpcStub):
    """For workers that may be gone: there is nothing to dispose of then."""

    def dispose(self, request):
        with contextlib.suppress(grpc.RpcError, ValueError):  # A ValueError of a channel that was closed.
            return super().dispose(request)

    def dispose_executor(self, request):
        with contextlib.suppress(grpc.RpcError, ValueError):
            return super().dispose_executor(request)


class _Deadline(grpc.UnaryUnaryClientInterceptor):
    def intercept_unary_unary(self, continuation, client_call_details, request):
        return continuation(client_call_details._replace(timeout=_SECONDS_TO_ANSWER), request)


_compile_lock = threading.Lock()
# A few, since they are large; the workers ask for the same ones.
_compile_once = functools.lru_cache(8)(tff.backends.native.desugar_and_transform_to_native)


def _compile(comp: tff.framework.ConcreteComputation) -> tff.framework.ConcreteComputation:
    """Compiles once for all workers, which ask for it at the same time."""
    with _compile_lock:
        return _compile_once(comp)


async def _read(stub: tff.framework.RemoteExecutorGrpcStub, path: str) -> str:
    @tff.tensorflow.computation
    def read():
        # Not `tf.io.read_file`, which takes the files of /proc for empty.
        return tf.data.TextLineDataset(path).reduce("", lambda text, line: tf.strings.join([text, line, "\n"]))

    executor = tff.framework.RemoteExecutor(stub)
    executor.set_cardinalities({tff.CLIENTS: _CARDINALITY_OF_READS})
    try:
        comp = _compile(read)
        text = await (await executor.create_call(await executor.create_value(comp, comp.type_signature))).compute()
    finally:
        executor.close()
    return text.decode()


def _warn_once(reason: str) -> None:
    global _has_warned
    if not _has_warned:
        _has_warned = True
        tell(
            f"the kernel does not let the TFF worker be confined ({reason}): it listens on a port, and whoever reaches "
            "this machine can run anything as this user"
        )


_has_warned = False
