import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import psutil
import pytest
import tensorflow as tf
import tensorflow_federated as tff

from tff_fedavg import local_worker

PROGRAM = """
import os, sys, threading, time
import psutil
from tff_fedavg import local_worker
from test_runtime import build_busy_clients

busy_clients = build_busy_clients()

def worker():
    return next(p for p in psutil.Process().children() if p.name() == "worker_binary")

with local_worker():
    busy_clients([0.0])
    print(worker().pid, flush=True)
    sys.stdin.readline()
    {ending}
"""


def build_busy_clients():
    """Builds a computation whose clients each keep a core busy for the seconds they are given."""

    @tff.tensorflow.computation(np.float32)
    def busy(seconds):
        end = tf.timestamp() + tf.cast(seconds, tf.float64)
        return tf.while_loop(lambda _: tf.timestamp() < end, lambda i: i + 1, [tf.constant(0.0)])[0]

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


@pytest.mark.parametrize("ending", ["time.sleep(1)", "time.sleep(1); os._exit(0)"], ids=["normal", "os._exit"])
def test_worker_is_gone_when_the_program_ends_by_itself(ending):
    program, worker = start(ending)
    # Returns when stdout is closed: a worker that held it open would block `program | cat` like this call.
    program.communicate(timeout=20)
    worker.wait(timeout=5)


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_worker_is_gone_after_a_signal_in_the_middle_of_a_computation(signal_number):
    program, worker = start("busy_clients([60.0, 60.0])")
    time.sleep(1)
    program.send_signal(signal_number)
    program.communicate(timeout=5)
    worker.wait(timeout=5)


def test_worker_that_dies_between_or_in_computations_is_replaced():
    program, _ = start(
        """
worker().kill()
busy_clients([0.0])
threading.Timer(1, lambda: worker().kill()).start()
print(busy_clients([3.0, 3.0]) > 0, flush=True)
"""
    )
    output, errors = program.communicate(timeout=60)
    assert output == "True\n", errors


def test_worker_that_keeps_dying_ends_the_computation_with_an_error():
    program, _ = start(
        """
def keep_killing():
    while True:
        time.sleep(0.1)
        for process in psutil.Process().children():
            if time.time() - process.create_time() > 4:  # When it has started, and computes.
                process.kill()
threading.Thread(target=keep_killing, daemon=True).start()
try:
    busy_clients([60.0])
except RuntimeError as e:
    print(e, flush=True)
"""
    )
    output, errors = program.communicate(timeout=90)
    assert output.startswith("the TFF worker died 3 times, last with exit status -9"), errors


def test_one_worker_after_the_other_prints_nothing():
    program = """
import tensorflow_federated as tff
from tff_fedavg import local_worker

@tff.tensorflow.computation
def one():
    return 1

for _ in range(2):
    with local_worker():
        print(one())
"""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert (result.stdout, result.stderr) == ("1\n1\n", "")


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_clients_run_in_parallel_on_the_cores(worker):
    busy_clients = build_busy_clients()
    busy_clients([0.0, 0.0])
    started = time.monotonic()
    busy_clients([1.0, 1.0])
    assert time.monotonic() - started < 1.8


def test_worker_within_a_worker_leaves_the_outer_one_in_use(worker):
    busy_clients = build_busy_clients()
    outer = psutil.Process().children()
    with local_worker():
        busy_clients([0.0])
        assert len(psutil.Process().children()) == len(outer) + 1
    assert psutil.Process().children() == outer
    busy_clients([0.0])


def test_each_client_computes_in_one_thread(worker):
    (process,) = (p for p in psutil.Process().children() if p.name() == "worker_binary")
    assert process.environ()["TF_NUM_INTRAOP_THREADS"] == "1"


def test_error_in_a_client_is_raised_and_the_worker_stays_usable(worker, client_dataset):
    @tff.tensorflow.computation(np.int32)
    def read(client_id):
        return client_dataset.read(client_id)

    with pytest.raises(Exception, match="There is no client"):
        read(99)
    assert len(read(0)) == 7
