"""The TFF simulation runtime: workers run the federated computations, a large or shared one in subrounds.

TFF's own local context starts a worker too, but leaves it running after SIGTERM, SIGKILL and often after a normal end,
and lets every user of the machine have it run what they like. Here the kernel ends the worker with the program, however
that ends, and nobody else reaches it: see `confined_worker.py`.
"""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import os
import pathlib
import queue
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grpc
import tensorflow_federated as tff

from tff_fedavg import default_context, subrounds
from tff_fedavg.integer import as_integer
from tff_fedavg.worker import ComputationError, LocalWorker, RemoteWorker, Worker, WorkerLostError
from tff_fedavg.worker_process import check_address, tell

__all__ = ["ComputationError", "local_worker", "remote_workers"]

_SECONDS_TO_REACH = 10.0
_SECONDS_BETWEEN_TRIES = 0.5
_MAX_LOSSES_PER_COMPUTATION = 3
_UNREACHED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)
_GONE = "cannot be reached any more"
# Slow and fast workers even out where each gets several shares of a round, if those are not too small.
_SUBROUNDS_PER_WORKER = 4
_CLIENTS_PER_SHARE = 4


@contextlib.contextmanager
def local_worker(*, confined: bool | None = None, clients_per_subround: int | None = None) -> Iterator[None]:
    """Starts a worker on this machine, which runs the computations of this thread within the `with` statement.

    The worker runs as many clients at once as there are cores, each on one core. To be entered in the main thread: the
    kernel ends the worker together with the thread that started it.

    Args:
      confined: Whether only the owner of this program can reach the worker. Otherwise it listens on a port, where other
        users of the machine can have it do in the owner's name what they like. By default it is confined where the
        kernel allows it, and a line on stderr says so where not.
      clients_per_subround: How many TFF clients' results are in the worker's memory at once, of a computation that adds
        them up. By default as many as take about a gigabyte.

    Raises:
      TypeError: If clients_per_subround is no integer.
      ValueError: If it is less than 1.
      RuntimeError: If the worker does not start, or the kernel does not let it be confined where that is asked for.
        From a computation, if it died or hung, and did so again when the computation was repeated.
      ComputationError: From a computation that TensorFlow could not run. The worker stays usable.
    """
    worker = LocalWorker(confined)
    with contextlib.closing(worker):
        worker.start()
        with _run_in([worker], clients_per_subround, timeout=0.0):
            yield


@contextlib.contextmanager
def remote_workers(
    addresses: Sequence[str], *, timeout: float = 600.0, clients_per_subround: int | None = None
) -> Iterator[None]:
    """Has workers that run already do the computations of this thread within the `with` statement.

    They share the clients of each computation. Whoever is lost, dead, hung or out of reach, is told, the others do its
    part, and it is used again when it is back. The clients' files have to be at the same path on each machine.

    Args:
      addresses: Where `binaries.worker` says that they listen: `unix:PATH` or `HOST:PORT`.
      timeout: Seconds after which a computation ends if no worker can be reached.
      clients_per_subround: As for `local_worker`.

    Raises:
      TypeError: If clients_per_subround is no integer.
      ValueError: If it is less than 1, an address is none, or one is given twice. From a computation, if a worker has
        other client files than this program.
      RuntimeError: If a worker cannot be reached. From a computation, if none could be for so long.
      ComputationError: As from `local_worker`.
    """
    addresses = [check_address(address) for address in addresses]
    if not addresses or len(set(addresses)) < len(addresses):
        raise ValueError(f"addresses is {addresses}: give those of one or more workers, each once")
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(contextlib.closing(RemoteWorker(address))) for address in addresses]
        until = time.monotonic() + _SECONDS_TO_REACH
        for worker in workers:
            while not worker.reach():
                if time.monotonic() > until:
                    raise RuntimeError(f"{worker.name} cannot be reached: start binaries.worker there, or leave it out")
                time.sleep(0.05)
        stack.enter_context(_run_in(workers, clients_per_subround, timeout))
        yield


def num_shares(num_clients: int) -> int:
    """Returns into how many shares to divide the clients of a round, each for one core, of the runtime in use."""
    context = tff.framework.get_context_stack().current
    if isinstance(context, _Context):
        return context.num_shares(num_clients)
    return _num_shares(num_clients, len(os.sched_getaffinity(0)))


class Computation(tff.framework.ConcreteComputation):
    """A computation of TFF's that warns if no worker of this module has been entered, and TFF's own computes.

    Raises:
      RuntimeError: When it is called, if there is none either, as in another thread.
    """

    def __init__(self, computation: tff.framework.ConcreteComputation):
        super().__init__(
            computation_proto=tff.framework.ConcreteComputation.get_proto(computation),
            context_stack=tff.framework.get_context_stack(),
            annotated_type=computation.type_signature,
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        context = tff.framework.get_context_stack().current
        if context is default_context.TFFS_OWN:
            warnings.warn(
                "no local_worker() or remote_workers() is entered: TFF's own worker computes, which takes longer, and "
                "whoever reaches this machine can reach it",
                stacklevel=2,
            )
        elif type(context).__name__ == "RuntimeErrorContext":
            raise RuntimeError("no worker is entered in this thread: enter local_worker() or remote_workers() in it")
        return self._compute(*args, **kwargs)

    def _compute(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


def require_client_files(manifest: pathlib.Path) -> None:
    """Makes sure that all workers of the runtime in use have the same client files as this program.

    Args:
      manifest: As of the `ClientDataset`.

    Raises:
      ValueError: If one has others, or none.
    """
    context = tff.framework.get_context_stack().current
    if isinstance(context, _Context):
        context.require_client_files(manifest)


@contextlib.contextmanager
def _run_in(workers: Sequence[Worker], clients_per_subround: int | None, timeout: float) -> Iterator[None]:
    if clients_per_subround is not None:
        clients_per_subround = as_integer("clients_per_subround", clients_per_subround)
    with contextlib.closing(_Context(workers, clients_per_subround, timeout)) as context:
        contexts = tff.framework.get_context_stack()._stack
        contexts.append(context)
        try:
            yield
        finally:
            contexts.remove(context)  # `install` takes the last one away, which may be that of a cell run again.


class _Context(tff.framework.SyncContext):
    """Runs computations in workers, in subrounds where there are several workers or much to hold in memory."""

    def __init__(self, workers: Sequence[Worker], clients_per_subround: int | None, timeout: float):
        self._workers = workers
        self._clients_per_subround = clients_per_subround
        self._queue = _Queue(workers, timeout)
        self._pid = os.getpid()

    def invoke(self, comp: Any, arg: Any) -> Any:
        if os.getpid() != self._pid:  # In a fork the threads are missing that would do it.
            raise RuntimeError("the worker was entered in another process: enter local_worker() in this one")
        number = self._num_subrounds(comp, arg)
        try:
            if number == 1:
                return self._queue.submit(comp, arg).result()
            return subrounds.invoke(comp, arg, number, self._queue.submit)
        except BaseException as e:
            self._queue.clear()  # Of the other subrounds.
            if not isinstance(e, Exception):  # As by Ctrl-C in a notebook, which goes on.
                for worker in self._workers:
                    worker.give_up()
            raise

    def num_shares(self, num_clients: int) -> int:
        cores = self._cores
        if len(self._workers) == 1:
            return _num_shares(num_clients, cores)
        return min(num_clients, cores * self._num_even_subrounds(num_clients // (_CLIENTS_PER_SHARE * cores)))

    def require_client_files(self, manifest: pathlib.Path) -> None:
        self._queue.require(manifest)

    def close(self) -> None:
        self._queue.close()

    def _num_subrounds(self, comp: Any, arg: Any) -> int:
        clients, cores = subrounds.num_clients(comp, arg), self._cores
        if not clients:
            return 1
        number = self._num_even_subrounds(clients // cores) if len(self._workers) > 1 else 1
        for_memory = subrounds.num_for_memory(comp, arg, self._clients_per_subround, cores)
        return min(clients, max(number, for_memory))

    def _num_even_subrounds(self, most: int) -> int:
        """Returns how many subrounds even out among the workers, at most so many if that is one for each or more."""
        per_worker = max(1, min(most // len(self._workers), _SUBROUNDS_PER_WORKER))
        return len(self._workers) * per_worker

    @property
    def _cores(self) -> int:
        """Of the worker that has most."""
        return max(worker.cores for worker in self._workers)


def _num_shares(num_clients: int, cores: int) -> int:
    # Powers of two, so that few numbers occur: the worker prepares anew for each.
    return min(cores, 1 << (num_clients - 1).bit_length())


@dataclasses.dataclass(order=True)
class _Job:
    rank: tuple[int, int]
    comp: Any = dataclasses.field(compare=False)
    arg: Any = dataclasses.field(compare=False)
    result: concurrent.futures.Future = dataclasses.field(compare=False, default_factory=concurrent.futures.Future)
    losses: int = dataclasses.field(compare=False, default=0)


_END = _Job((-1, 0), None, None)


class _Queue:
    """Computations wait here for the first worker that is free."""

    def __init__(self, workers: Sequence[Worker], timeout: float):
        self._workers = workers
        self._timeout = timeout
        self._jobs = queue.PriorityQueue()
        self._counter = itertools.count()
        self._lock = threading.Lock()  # Who comes back has all that is required.
        self._lost = {}  # When each worker that is lost was lost.
        self._required = {}  # The text of each file that all workers must have, by its path.
        self._closed = threading.Event()
        self._threads = [threading.Thread(target=self._serve, args=(worker,), daemon=True) for worker in workers]
        for thread in self._threads:
            thread.start()

    def submit(self, comp: Any, arg: Any, *, urgent: bool = False) -> concurrent.futures.Future:
        """Has a worker compute, an urgent computation before the others. Returns the result to come."""
        if self._closed.is_set():
            raise RuntimeError("this worker has been left: enter local_worker() or remote_workers() again")
        job = _Job((not urgent, next(self._counter)), comp, arg)
        self._jobs.put(job)
        return job.result

    def clear(self) -> None:
        """Forgets what waits."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._jobs.get_nowait()

    def require(self, path: pathlib.Path) -> None:
        """Makes sure that a text file is the same for all workers, now and when one comes back."""
        if path in self._required or isinstance(self._workers[0], LocalWorker):
            return
        required = {path: path.read_text()}
        with self._lock:
            for worker in self._workers:
                reason = "" if worker in self._lost else _lacks(worker, required)
                if reason not in ("", _GONE):  # The next computation notices who is gone.
                    raise ValueError(f"{worker.name} {reason}")
            self._required |= required

    def close(self) -> None:
        self._closed.set()
        for worker in self._workers:
            worker.close()
            self._jobs.put(_END)
        for thread in self._threads:
            thread.join()

    def _serve(self, worker: Worker) -> None:
        while (job := self._jobs.get()) is not _END:
            try:
                job.result.set_result(worker.compute(job.comp, job.arg))
            except WorkerLostError as e:
                job.losses += 1
                if job.losses < _MAX_LOSSES_PER_COMPUTATION:
                    self._jobs.put(job)
                else:  # It may be what kills them.
                    message = f"{job.losses} workers were lost with the same computation, last {worker.name}: it {e}"
                    job.result.set_exception(RuntimeError(message))
                if not self._wait_until_back(worker, str(e)):
                    return
            except Exception as e:
                job.result.set_exception(e)

    def _wait_until_back(self, worker: Worker, reason: str) -> bool:
        """Waits for a lost worker; returns whether it is back. Fails what waits when all are gone for too long."""
        tell(f"{worker.name} {reason}: others do its part, and it is used again when it is back")
        with self._lock:
            self._lost[worker] = time.monotonic()
        told = ""
        while not self._closed.wait(_SECONDS_BETWEEN_TRIES):
            if worker.reach():
                with self._lock:
                    lacks = _lacks(worker, self._required)
                    if not lacks:
                        del self._lost[worker]
                if not lacks:
                    tell(f"{worker.name} is back")
                    return True
                if lacks != told:
                    told = lacks
                    tell(f"{worker.name} {lacks}: it is not used")
            with self._lock:
                lost_at = list(self._lost.values())
            if len(lost_at) == len(self._workers) and time.monotonic() - max(lost_at) >= self._timeout:
                self._fail_what_waits()
        return False

    def _fail_what_waits(self) -> None:
        with contextlib.suppress(queue.Empty):
            while (job := self._jobs.get_nowait()) is not _END:  # That is this thread's own: it ends by `_closed`.
                job.result.set_exception(RuntimeError(f"no worker could be reached for {self._timeout:g} s"))


def _lacks(worker: Worker, required: Mapping[pathlib.Path, str]) -> str:
    """Returns which of the required files, by path, the worker has not, in words; empty if it has them all."""
    for path, text in required.items():
        try:
            found = worker.read_text(path)
        except (grpc.RpcError, ValueError) as e:
            if isinstance(e, ValueError) or e.code() in _UNREACHED:
                return _GONE
            return f"has no client files in {path.parent}: copy them there"
        if found.splitlines() != text.splitlines():
            return f"has other client files in {path.parent} than this program: copy them there"
    return ""
