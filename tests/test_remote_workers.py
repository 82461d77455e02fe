"""Rounds in several workers: the same as in one, whatever happens to them. With real processes."""

import asyncio
import contextlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pytest
import tensorflow as tf
import tensorflow_federated as tff
from conftest import ROOT, own_worker
from numpy_model import max_difference
from programs import run_at_once, run_program
from tensorflow.python.data.experimental.ops import testing
from test_subrounds import CLIENTS, build, run_rounds

from tff_fedavg import build_client_eval, build_fed_eval, local_worker, remote_workers, runtime
from tff_fedavg import worker as worker_module
from tff_fedavg.client_files import write_client_dataset
from tff_fedavg.worker import WorkerLostError


class WorkerProgram:
    """`binaries.worker`, which listens at an address."""

    def __init__(self, address, *within):
        self.address, self._within = address, within
        self.start()

    def start(self):
        command = [*self._within, sys.executable, "-m", "binaries.worker", f"--address={self.address}"]
        self._program = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self._program.stdout.readline().startswith(f"listening at {self.address}")

    @property
    def process(self):
        children = psutil.Process(self._program.pid).children(recursive=True)
        return next(p for p in children if p.name() == "worker_binary")

    def kill(self):
        self._program.kill()
        self._program.communicate()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self._program.terminate()
        self._program.communicate(timeout=10)


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("workers")
    # The second has no network but for its socket.
    with (
        WorkerProgram(f"unix:{directory}/0") as first,
        WorkerProgram(f"unix:{directory}/1", "unshare", "--user", "--map-root-user", "--net") as second,
    ):
        yield [first, second]


@pytest.fixture
def addresses(programs):
    return [program.address for program in programs]


@pytest.fixture
def impatient(monkeypatch):
    """Hung workers are noticed in seconds."""
    monkeypatch.setattr(worker_module, "_SECONDS_BETWEEN_LOOKS", 0.5)
    monkeypatch.setattr(worker_module, "_SECONDS_TO_ANSWER", 1.0)


def sleeping_clients():
    """Builds the sum of numbers, one a client, each of which waits for so many seconds; in a worker one at a time."""

    @tff.tensorflow.computation(np.float32)
    def wait(seconds):
        dataset = tf.data.Dataset.from_tensors(seconds).apply(testing.sleep(tf.cast(seconds * 1e6, tf.int64)))
        return dataset.reduce(0.0, lambda x, y: x + y)

    @tff.federated_computation(tff.FederatedType(np.float32, tff.CLIENTS))
    def sum_of_seconds(seconds):
        return tff.federated_sum(tff.federated_map(wait, seconds))

    return sum_of_seconds


@pytest.mark.parametrize("aggregator", ["mean", "robust"])
def test_rounds_in_two_workers_are_those_of_one_and_have_the_same_bits_again(
    worker, addresses, model, client_dataset, aggregator
):
    process = build(model, client_dataset, aggregator)
    expected, _ = run_rounds(process)
    runs = []
    for _ in range(2):
        with remote_workers(addresses):
            runs.append(tf.nest.flatten(run_rounds(process)[0]))
    assert max_difference(runs[0], tf.nest.flatten(expected)) < 1e-6
    assert max_difference(*runs) == 0


def test_evaluations_in_two_workers_are_those_of_one(worker, addresses, model, client_dataset):
    weights = tff.learning.models.ModelWeights(*model.initial_weights)
    fed_eval, client_eval = build_fed_eval(model, client_dataset), build_client_eval(model, client_dataset)
    expected, expected_of_each = fed_eval(weights, CLIENTS), client_eval(weights, CLIENTS)
    with remote_workers(addresses):
        assert fed_eval(weights, CLIENTS) == pytest.approx(expected, rel=1e-6)
        assert client_eval(weights, CLIENTS) == expected_of_each


def test_remote_workers_are_entered_in_a_running_event_loop_as_in_a_notebook(addresses, model, client_dataset):
    weights = tff.learning.models.ModelWeights(*model.initial_weights)

    async def cell():
        with remote_workers(addresses):
            return build_fed_eval(model, client_dataset)(weights, CLIENTS)

    assert asyncio.run(cell())["loss"] > 0


def test_workers_work_at_the_same_time(addresses):
    sum_of_seconds = sleeping_clients()
    seconds = [0.5] * 16
    with remote_workers(addresses):
        sum_of_seconds([0.0] * 16)
        started = time.monotonic()
        assert sum_of_seconds(seconds) == 8
        assert time.monotonic() - started < 7


def run_disturbed(disturb, addresses):
    """Yields the result of a computation of two seconds, disturbed after a half, then those of short ones."""
    sum_of_seconds = sleeping_clients()
    with remote_workers(addresses, timeout=20):
        sum_of_seconds([0.0] * 16)
        threading.Timer(0.5, disturb).start()
        yield sum_of_seconds([0.25] * 16)
        while True:
            yield sum_of_seconds([0.1] * 4)


def test_the_others_do_what_a_worker_that_died_was_to_do_and_it_is_used_again(programs, addresses, capfd):
    rounds = run_disturbed(programs[1].kill, addresses)
    assert next(rounds) == 4
    name = f"worker {addresses[1]}"
    assert f"{name} cannot be reached any more: others do its part" in capfd.readouterr().err
    programs[1].start()
    until = time.monotonic() + 20
    told = ""
    while "is back" not in told and time.monotonic() < until:
        assert next(rounds) == pytest.approx(0.4)
        told += capfd.readouterr().err
    assert told == f"{name} is back\n"
    rounds.close()


def test_the_others_do_what_a_worker_that_hangs_was_to_do(impatient, programs, addresses, capfd):
    process = programs[0].process
    rounds = run_disturbed(lambda: process.send_signal(signal.SIGSTOP), addresses)
    assert next(rounds) == 4
    assert f"worker {addresses[0]} has not answered for 1 s: others do its part" in capfd.readouterr().err
    process.send_signal(signal.SIGCONT)
    rounds.close()


def test_a_socket_may_have_any_name(tmp_path):
    """In an address gRPC takes % for the start of a code."""
    with WorkerProgram(f"unix:{tmp_path}/%41 ä") as program, remote_workers([program.address], timeout=20):
        assert build_sum()([1, 2]) == 3


def test_a_worker_that_the_kernel_ended_is_used_when_its_program_has_started_it_again(programs, addresses):
    process = build_sum()
    with remote_workers(addresses[:1], timeout=20):
        assert process([1, 2]) == 3
        programs[0].process.kill()
        assert process([1, 2, 3]) == 6


def test_a_computation_that_kills_its_workers_ends(impatient, tmp_path, monkeypatch):
    """A client that fills its worker's memory, for instance. The program starts the worker again each time."""
    monkeypatch.setattr(runtime, "_SECONDS_BETWEEN_TRIES", 0.1)
    program = WorkerProgram(f"unix:{tmp_path}/0")
    end = threading.Event()

    def keep_killing():
        killed = None
        while not end.wait(0.05):
            with contextlib.suppress(psutil.Error, StopIteration):
                process = program.process
                if process != killed and time.time() - process.create_time() > 3:  # It computes.
                    process.kill()
                    killed = process

    with remote_workers([program.address], timeout=20):
        sum_of_seconds = sleeping_clients()
        sum_of_seconds([0.0])
        thread = threading.Thread(target=keep_killing)
        thread.start()
        try:
            with pytest.raises(
                RuntimeError, match=f"^3 workers were lost with the same computation, last worker {program.address}"
            ):
                sum_of_seconds([30.0])
        finally:
            end.set()
            thread.join()
    program.kill()


def build_sum():
    @tff.federated_computation(tff.FederatedType(np.int32, tff.CLIENTS))
    def total(values):
        return tff.federated_sum(values)

    return total


def test_when_all_are_gone_for_too_long_the_computation_ends(tmp_path):
    program = WorkerProgram(f"unix:{tmp_path}/0")
    total = build_sum()
    with remote_workers([program.address], timeout=1):
        assert total([1, 2]) == 3
        program.kill()
        with pytest.raises(RuntimeError, match="^no worker could be reached for 1 s$"):
            total([1, 2])


class FakeWorker:
    """Computes 7, but is lost with the first computations; takes some time to be reached and to read a file."""

    cores = 1

    def __init__(self, name, losses, *, is_back=True):
        self.name = name
        self.asked = threading.Event()
        self.has_read = []
        self._losses = losses
        self._is_back = is_back

    def compute(self, comp, arg):
        self._losses -= 1
        if self._losses >= 0:
            raise WorkerLostError("died")
        return 7

    def reach(self):
        time.sleep(0.3)
        return self._is_back

    def read_text(self, path):
        self.asked.set()
        time.sleep(0.3)
        self.has_read.append(path)
        return path.read_text()

    def close(self):
        pass


def test_a_worker_that_comes_back_while_files_are_required_is_used_with_all_of_them(tmp_path):
    paths = [tmp_path / "train", tmp_path / "test"]
    for path in paths:
        path.write_text("files")
    worker = FakeWorker("worker", losses=1)
    with contextlib.closing(runtime._Queue([worker], timeout=5)) as workers:
        workers.require(paths[0])
        worker.asked.clear()
        result = workers.submit(None, None)
        assert worker.asked.wait(5)  # For the first, since it is back.
        workers.require(paths[1])
        assert result.result(timeout=5) == 7
        assert worker.has_read[-1] == paths[1]


def test_files_are_required_of_the_others_where_a_worker_is_gone(tmp_path):
    path = tmp_path / "train"
    path.write_text("files")
    gone, other = FakeWorker("gone", losses=1, is_back=False), FakeWorker("other", losses=0)

    def read_text(path):
        raise ValueError("Channel closed!")

    gone.read_text = read_text
    with contextlib.closing(runtime._Queue([gone, other], timeout=5)) as workers:
        workers.require(path)
        assert other.has_read == [path]
        assert [workers.submit(None, None).result(timeout=5) for _ in range(2)] == [7, 7]


def test_files_whose_check_was_interrupted_are_checked_again(tmp_path):
    path = tmp_path / "train"
    path.write_text("files")
    worker = FakeWorker("worker", losses=0)
    answers = iter([KeyboardInterrupt(), "other files"])

    def read_text(path):
        if isinstance(answer := next(answers), BaseException):
            raise answer
        return answer

    worker.read_text = read_text
    with contextlib.closing(runtime._Queue([worker], timeout=5)) as workers:
        with pytest.raises(KeyboardInterrupt):
            workers.require(path)
        with pytest.raises(ValueError, match="^worker has other client files in"):
            workers.require(path)


def test_an_end_while_all_are_lost_ends_all_threads(monkeypatch):
    raised = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    workers = [FakeWorker(name, losses=9, is_back=False) for name in "ab"]
    with contextlib.closing(runtime._Queue(workers, timeout=0)) as jobs:
        for _ in workers:
            jobs.submit(None, None)
        time.sleep(0.6)  # Both are lost, and asked whether they are back.
    assert raised == [] and not [thread for thread in jobs._threads if thread.is_alive()]


def test_a_worker_that_is_not_there_is_told_before_any_work(monkeypatch, addresses, tmp_path):
    monkeypatch.setattr(runtime, "_SECONDS_TO_REACH", 0.5)
    with pytest.raises(RuntimeError, match=f"worker unix:{tmp_path}/none cannot be reached: start binaries.worker"):
        with remote_workers([*addresses, f"unix:{tmp_path}/none"]):
            pass


@pytest.mark.parametrize("change", ["none", "other"])
def test_a_worker_without_the_same_client_files_is_named_before_any_work(
    addresses, model, client_arrays, client_dataset, tmp_path, change
):
    """In a mount namespace of its own it has another directory in the place of the client files."""
    here, there = str(client_dataset.directory), tmp_path / "there"
    there.mkdir()
    if change == "other":
        write_client_dataset(there, client_arrays[:3])
    mount = f'mount --bind {there} {here} && exec "$@"'
    within = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh")
    process = build(model, client_dataset)
    with WorkerProgram(f"unix:{tmp_path}/0", *within) as other, remote_workers([*addresses, other.address]):
        has = "has no client files" if change == "none" else "has other client files"
        with pytest.raises(ValueError, match=f"^worker {other.address} {has} in {here}"):
            process.next(process.initialize(), CLIENTS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "addresses is "),
        (["nowhere"], "nowhere: it is no address of a worker; give unix:PATH or HOST:PORT"),
        (["unix:/" + 107 * "a"], "the path of a socket may have 107 bytes; give a shorter one"),
        (["host:99999"], "host:99999: it is no port"),
        (["h:1", "h:1"], "each once"),
    ],
)
def test_addresses_that_are_none_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        with remote_workers(given):
            pass


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workers=nowhere"], "--workers=nowhere: it is no address of a worker; give unix:PATH or HOST:PORT"),
        (["--workers=a:1,a:1"], "--workers=a:1,a:1: a worker is given twice"),
        (["--worker_timeout=5"], "--worker_timeout=5 needs --workers: give that, or leave it out"),
        (["--workers=a:1", "--worker_timeout=nan"], "--worker_timeout=nan: take a number from 0 to 1e+06"),
        (["--workers=a:1", "--confined"], "--confined is of no use with --workers"),
    ],
)
@pytest.mark.parametrize("program", ["train", "reproduce"])
def test_flags_of_workers_are_checked_before_tensorflow_starts(program, flags, message):
    result = run_at_once(f"binaries.{program}", *flags)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"{program}: {message}") and result.stderr.count("\n") == 1


def test_a_run_goes_on_after_its_workers_were_gone(programs, addresses, tmp_path):
    """A program ends with one line and keeps its state; the same command goes on."""
    program = WorkerProgram(f"unix:{tmp_path}/0")
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "binaries.train", "--data=embedded", f"--run_dir={run_dir}", "--rounds=4000"]
    command += [f"--cache_dir={tmp_path}/cache", "--target_accuracy=1", "--worker_timeout=1"]
    trained = subprocess.Popen(
        [*command, f"--workers={program.address}"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics = run_dir / "metrics.csv"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 4):
        assert trained.poll() is None, trained.stderr.read()
        time.sleep(0.1)
    program.kill()
    _, errors = trained.communicate(timeout=60)
    assert trained.returncode == 2
    assert errors.splitlines()[-1] == "train: no worker could be reached for 1 s"
    rounds = len(metrics.read_text().splitlines()) - 2
    assert (run_dir / "states" / f"round_{rounds}.npz").is_file()
    command[-1:] = ["--worker_timeout=20", f"--workers={','.join(addresses)}", f"--rounds={rounds + 2}"]
    result = run_program(*command[2:])
    assert f"going on after round {rounds} of" in result.stdout, result.stderr
    shutil.rmtree(run_dir)


def test_a_local_worker_within_remote_ones_computes_for_itself(programs, addresses):
    @tff.tensorflow.computation
    def process_id():
        return tf.strings.split(tf.data.TextLineDataset("/proc/self/stat").get_single_element())[0]

    with remote_workers(addresses):
        with local_worker():
            assert int(process_id()) == own_worker().pid
        assert int(process_id()) in [program.process.pid for program in programs]
