import concurrent.futures
import contextlib
import multiprocessing
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import warnings

import numpy as np
import psutil
import pytest
import tensorflow as tf
import tensorflow_federated as tff
from conftest import own_worker

from tff_fedavg import build_fed_avg, build_fed_eval, default_context, local_worker, runtime, worker_process
from tff_fedavg import worker as worker_module

PROGRAM = """
import os, sys, threading, time
import psutil
from tff_fedavg import local_worker
from test_runtime import build_busy_clients

busy_clients = build_busy_clients()

def worker():
    return next(p for p in psutil.Process().children(recursive=True) if p.name() == "worker_binary")

with local_worker():
    busy_clients([0.0])
    print(worker().pid, flush=True)
    sys.stdin.readline()
    {ending}
"""


def build_busy_clients():
    """Builds a computation whose clients each keep a core busy for the seconds they are given, or fail below 0.

    It returns how often they looked at the clock: once at least, also where the time was over at the first look.
    """

    @tff.tensorflow.computation(np.float32)
    def busy(seconds):
        end = tf.timestamp() + tf.cast(seconds, tf.float64)
        with tf.control_dependencies([tf.debugging.assert_non_negative(seconds)]):
            return tf.while_loop(lambda _: tf.timestamp() < end, lambda i: i + 1, [tf.constant(1.0)])[0]

    @tff.federated_computation(tff.FederatedType(np.float32, tff.CLIENTS))
    def busy_clients(seconds):
        return tff.federated_sum(tff.federated_map(busy, seconds))

    return busy_clients


def start(ending):
    """Starts a program; returns it, and its worker's process, when the worker has computed something."""
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(ending=textwrap.indent(ending, "    ").strip())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=os.path.dirname(__file__),
    )
    line = program.stdout.readline()
    assert line, program.stderr.read()
    worker = psutil.Process(int(line))
    program.stdin.write("go\n")
    program.stdin.flush()
    return program, worker


def test_worker_is_gone_when_the_program_ends_by_itself():
    program, worker = start("time.sleep(1)")
    # Returns when stdout is closed: a worker that held it open would block `program | cat` like this call.
    program.communicate(timeout=20)
    worker.wait(timeout=5)


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_worker_is_gone_after_a_signal_in_the_middle_of_a_computation(signal_number):
    program, worker = start("busy_clients([60.0, 60.0])")
    time.sleep(1)
    program.send_signal(signal_number)
    program.communicate(timeout=5)
    worker.wait(timeout=5)


def test_workers_that_die_between_and_in_computations_are_replaced_without_end():
    busy_clients = build_busy_clients()
    with local_worker():
        busy_clients([0.0])
        for _ in range(5):
            own_worker().kill()
            busy_clients([0.0])
        threading.Timer(1, lambda: own_worker().kill()).start()
        assert busy_clients([3.0, 3.0]) > 0


@pytest.mark.parametrize("clients_per_subround", [None, 1])
def test_what_was_interrupted_is_given_up_and_the_next_computation_does_not_wait_for_it(clients_per_subround):
    busy_clients = build_busy_clients()
    with local_worker(clients_per_subround=clients_per_subround):
        busy_clients([0.0, 0.0])
        interrupt = threading.Timer(0.5, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            busy_clients([30.0] * 10)
        started_at = time.monotonic()
        assert busy_clients([0.1, 0.1]) > 0
        assert time.monotonic() - started_at < 10


def test_subrounds_after_one_that_fails_are_given_up():
    busy_clients = build_busy_clients()
    with local_worker(clients_per_subround=1):
        busy_clients([0.1, 0.1])
        with pytest.raises(runtime.ComputationError, match="assertion failed"):
            busy_clients([-1.0] + [1.0] * 30)
        started_at = time.monotonic()
        assert busy_clients([0.1, 0.1]) > 0
        assert time.monotonic() - started_at < 10


def test_worker_that_keeps_dying_ends_the_computation_with_an_error(tmp_path):
    computes, ended = tmp_path / "computes", threading.Event()

    @tff.tensorflow.computation
    def never_ends():
        with tf.control_dependencies([tf.io.write_file(str(computes), "")]):
            return tf.while_loop(lambda _: True, lambda i: i + 1, [tf.constant(0.0)])[0]

    def keep_killing():
        while not ended.wait(0.05):
            if computes.exists():
                computes.unlink()
                own_worker().kill()

    message = "^the TFF worker was lost 3 times in one computation: last it ended by signal SIGKILL$"
    with local_worker():
        killer = threading.Thread(target=keep_killing)
        killer.start()
        try:
            with pytest.raises(RuntimeError, match=message):
                never_ends()
        finally:
            ended.set()
            killer.join()


@pytest.fixture
def impatient(monkeypatch):
    """Hung workers are noticed in seconds."""
    monkeypatch.setattr(worker_module, "_SECONDS_BETWEEN_LOOKS", 0.5)
    monkeypatch.setattr(worker_module, "_SECONDS_TO_ANSWER", 1.0)
    monkeypatch.setattr(worker_module, "_SECONDS_IDLE", 2.0)
    monkeypatch.setattr(worker_module, "_IDLE_SHARE", 0.1)  # Since it is asked so often.


def test_a_worker_that_is_stopped_is_noticed_told_and_replaced(impatient, capfd):
    busy_clients = build_busy_clients()
    with local_worker():
        busy_clients([0.0])
        stopped = own_worker()
        timer = threading.Timer(0.5, lambda: stopped.send_signal(signal.SIGSTOP))
        timer.start()
        assert busy_clients([2.0]) > 0
        assert own_worker() != stopped
        stopped.wait(timeout=5)
    told = capfd.readouterr().err
    assert told == "the TFF worker has not answered for 1 s: it is ended, and what it computed is computed again\n"


def test_a_program_that_is_stopped_with_its_worker_does_not_take_that_for_waiting(impatient, monkeypatch, capfd):
    monkeypatch.setattr(worker_module, "_IDLE_TIMES_LONGEST", 0.0)
    busy_clients = build_busy_clients()
    with local_worker():
        busy_clients([0.0])
        both = f"{os.getpid()} {own_worker().pid}"
        with subprocess.Popen(["sh", "-c", f"sleep 0.6; kill -STOP {both}; sleep 3; kill -CONT {both}"]):
            assert busy_clients([4.5]) > 0
    assert capfd.readouterr().err == ""


def test_a_client_that_waits_for_its_files_ends_the_computation_and_not_one_that_computes(
    impatient, monkeypatch, tmp_path, capfd
):
    monkeypatch.setattr(worker_module, "_IDLE_TIMES_LONGEST", 0.5)
    path = tmp_path / "examples"
    os.mkfifo(path)
    read = tff.tensorflow.computation(lambda: tf.strings.length(tf.io.read_file(str(path))))
    with local_worker():
        assert build_busy_clients()([3.0]) > 0
        with pytest.raises(
            RuntimeError, match=r"lost 3 times in one computation: last it has computed nothing for \d s"
        ):
            read()
        path.unlink()
        path.write_text("abc")
        assert read() == 3
    assert capfd.readouterr().err.count("computed nothing for") == 3


def test_nobody_else_reaches_the_worker_and_nothing_is_left_in_its_directory():
    """It has no port, and what it is reached by is gone from the file system when it is connected."""
    before = {(c.fd, c.laddr) for c in psutil.Process().connections(kind="all")}
    with local_worker():
        build_busy_clients()([0.0])
        worker = own_worker()
        network = pathlib.Path(f"/proc/{worker.pid}/ns/net").readlink()
        connections = [c for p in (worker, worker.parent()) for c in p.connections(kind="all")]
        connections += [c for c in psutil.Process().connections(kind="all") if (c.fd, c.laddr) not in before]
        ports = [c for c in connections if c.status == "LISTEN"]
        sockets = [c.laddr for c in connections if c.family == socket.AF_UNIX]
        left = [path for path in sockets if path and os.path.exists(path)]
    assert network != pathlib.Path("/proc/self/ns/net").readlink()
    assert ports == []
    assert sockets and not left


def test_proxies_of_the_environment_are_not_for_this_machine():
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "grpc_proxy", "all_proxy"), "http://127.0.0.1:9")
    program = """
import tensorflow_federated as tff
from tff_fedavg import local_worker

@tff.tensorflow.computation
def one():
    return 1

for confined in (True, False):
    with local_worker(confined=confined):
        print(one())
"""
    environment = {**os.environ, **proxies, "TF_CPP_MIN_LOG_LEVEL": "3"}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60
    )
    assert (result.stdout, result.stderr) == ("1\n1\n", "")


# In a user namespace of its own root may forbid what the kernel of a container, or a hardened one, forbids: another
# network namespace, or its use.
@pytest.mark.parametrize(
    ("refusal", "reason"),
    [
        ("echo 0 > /proc/sys/user/max_net_namespaces && exec", "No space left on device"),
        ("exec setpriv --bounding-set=-net_admin --inh-caps=-net_admin", "Operation not permitted"),
    ],
)
def test_a_kernel_that_refuses_is_told_once_and_refused_if_confinement_is_asked_for(refusal, reason):
    program = """
from tff_fedavg import local_worker
for _ in range(2):
    with local_worker():
        print("started")
try:
    with local_worker(confined=True):
        pass
except RuntimeError as e:
    print(e)
"""
    command = f'{refusal} "$0" -c "$1"'
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    arguments = ["unshare", "--user", "--map-root-user", "sh", "-c", command, sys.executable, program]
    result = subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=60)
    assert result.stdout == f"started\nstarted\nthe TFF worker cannot be confined: {reason}\n", result.stderr
    assert result.stderr.startswith(
        f"the kernel does not let the TFF worker be confined ({reason}): it listens on a port"
    )
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("confined", [True, False])
def test_what_a_worker_says_that_does_not_start_is_in_the_error(tmp_path, monkeypatch, confined):
    binary = tmp_path / "worker"
    binary.write_text("#!/bin/sh\necho 'error while loading shared libraries: libm.so.6' >&2\nexit 127\n")
    binary.chmod(0o755)
    monkeypatch.setattr(worker_process, "BINARY", binary)
    with pytest.raises(
        RuntimeError, match="did not start: it ended with exit status 127: error while loading shared lib"
    ):
        with local_worker(confined=confined):
            pass


def test_a_worker_that_does_not_get_ready_is_given_up(tmp_path, monkeypatch):
    binary = tmp_path / "worker"
    binary.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\necho waiting >&2\nexec sleep 60\n")
    binary.chmod(0o755)
    monkeypatch.setattr(worker_process, "BINARY", binary)
    monkeypatch.setattr(worker_module, "_SECONDS_TO_GET_READY", 1.0)
    with pytest.raises(RuntimeError, match="the TFF worker did not get ready in 1 s: waiting"):
        with local_worker():
            pass
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int((tmp_path / "pid").read_text())).wait(timeout=5)


def test_many_workers_in_one_program_leave_nothing_open():
    program = """
import psutil
import tensorflow_federated as tff
from tff_fedavg import local_worker

@tff.tensorflow.computation
def one():
    return 1

counts = []
for _ in range(8):
    with local_worker():
        one()
    process = psutil.Process()
    counts.append((process.num_fds(), process.num_threads(), len(process.children())))
files, threads, children = zip(*counts)
assert max(children) == 0, counts
# gRPC closes the last of a channel a moment later, sometimes, the first one too, and has a thread or two of its own.
# One that each use leaves makes these differ by five.
assert min(files[-3:]) <= min(files[:3]), counts
assert min(threads[-3:]) <= min(threads[:3]) + 2, counts
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_a_program_that_is_killed_as_it_starts_a_worker_leaves_none():
    program = """
import os, signal
from tff_fedavg.worker import LocalWorker
worker = LocalWorker(None)
worker._open_channel = lambda address: os.kill(os.getpid(), signal.SIGKILL)
for _ in range(3):
    if child := os.fork():
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    else:
        worker.start()
"""
    environment = {**os.environ, "STARTED_BY": f"{os.getpid()} {time.monotonic_ns()}"}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    time.sleep(1)
    assert not [p for p in psutil.process_iter() if is_started_with(p, environment)]


def is_started_with(process, environment):
    try:
        return process.environ().get("STARTED_BY") == environment["STARTED_BY"]
    except psutil.Error:  # It has ended, or is of another user.
        return False


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_clients_run_in_parallel_on_the_cores(worker):
    busy_clients = build_busy_clients()
    busy_clients([0.0, 0.0])
    seconds = []
    for _ in range(3):  # The best of three, since other tests use the cores too.
        started = time.monotonic()
        busy_clients([1.0, 1.0])
        seconds.append(time.monotonic() - started)
    assert min(seconds) < 1.8


def test_worker_within_a_worker_leaves_the_outer_one_in_use(worker):
    busy_clients = build_busy_clients()
    outer = psutil.Process().children()
    with local_worker():
        busy_clients([0.0])
        assert len(psutil.Process().children()) == len(outer) + 1
    assert psutil.Process().children() == outer
    busy_clients([0.0])


def test_the_worker_that_is_left_is_no_longer_used_and_the_one_entered_after_it_is(worker):
    """As where a notebook's cell that enters one is run again."""
    first, second = local_worker(), local_worker()
    first.__enter__()
    context = tff.framework.get_context_stack().current
    second.__enter__()
    busy_clients = build_busy_clients()
    first.__exit__(None, None, None)
    assert tff.framework.get_context_stack().current is not context
    assert busy_clients([0.0]) >= 1
    second.__exit__(None, None, None)
    with tff.framework.get_context_stack().install(context):
        with pytest.raises(RuntimeError, match="this worker has been left: enter local_worker.. or remote_workers"):
            busy_clients([0.0])
    assert busy_clients([0.0]) >= 1


def test_the_worker_is_told_to_compute_each_client_in_one_thread(worker):
    (process,) = (p for p in psutil.Process().children(recursive=True) if p.name() == "worker_binary")
    assert process.environ()["TF_NUM_INTRAOP_THREADS"] == "1"


def test_error_in_a_client_is_raised_and_the_worker_stays_usable(worker, client_dataset):
    @tff.tensorflow.computation(np.int32)
    def read(client_id):
        return client_dataset.read(client_id)

    with pytest.raises(Exception, match="There is no client"):
        read(99)
    assert len(read(0)) == 7


def test_a_forked_process_is_told_to_enter_a_worker_of_its_own(worker):
    compute = build_busy_clients()
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)

    def in_child():
        try:
            compute([0.0])
        except RuntimeError as e:
            sender.send(str(e))

    child = multiprocessing.get_context("fork").Process(target=in_child)
    child.start()
    told = receiver.poll(20) and receiver.recv()
    child.kill()
    child.join()
    assert told == "the worker was entered in another process: enter local_worker() in this one"
    assert compute([0.0]) > 0


@pytest.mark.parametrize("name", ["client_data", "functional_model", "runtime"])
def test_a_program_that_computes_nothing_ends_without_noise(name):
    result = subprocess.run([sys.executable, "-c", f"import tff_fedavg.{name}"], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_whoever_enters_no_worker_is_told(worker, client_dataset, model):
    process = build_fed_avg(model, client_dataset, epochs=1, batch_size=5, learning_rate=0.1)
    evaluate = build_fed_eval(model, client_dataset)
    message = r"no local_worker\(\) or remote_workers\(\) is entered: TFF's own worker"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Ahead of TFF's worker, which is not started.
        state = process.initialize()
        weights = process.get_model_weights(state)
        calls = [
            process.initialize,
            lambda: process.next(state, [0]),
            lambda: process.get_model_weights(state),
            lambda: process.set_model_weights(state, weights),
            lambda: evaluate(weights, [0]),
        ]
        for call in calls:
            with tff.framework.get_context_stack().install(default_context.TFFS_OWN):
                with pytest.raises(UserWarning, match=message):
                    call()
            with concurrent.futures.ThreadPoolExecutor(1) as other_thread:
                with pytest.raises(RuntimeError, match="no worker is entered in this thread"):
                    other_thread.submit(call).result()


def test_a_kernel_that_does_not_tell_of_memory_that_ran_out_is_no_error(monkeypatch):
    def missing(*args):
        raise FileNotFoundError(2, "No such file or directory", "/proc/vmstat")

    monkeypatch.setattr(pathlib.Path, "read_text", missing)
    assert worker_process._oom_kills() == 0


@pytest.mark.parametrize("name", ["a %41#b?", "long" * 30])
def test_a_directory_for_temporary_files_may_have_any_name(tmp_path, monkeypatch, name):
    directory = tmp_path / name
    directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    with local_worker():
        assert build_busy_clients()([0.1, 0.1]) > 0
