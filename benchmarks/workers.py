"""How rounds get faster with more workers, all of them on this machine, and where that ends.

    python -m benchmarks.workers --output=results/workers.csv
    python -m benchmarks.workers --quick

A round of clients that sleep, so that a machine of two cores does not hide what eight workers do, but get and send the
weights of a model; its time by the number of workers, beside a model of it on paper. Then rounds of the CNN in one and
two workers of a core each, and in two of which one is stopped half of the time. Medians after a round to warm up.
"""

import contextlib
import csv
import functools
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import flags

from binaries.command_line import program
from tff_fedavg import picture
from tff_fedavg.replacement import replacement

_OUTPUT = flags.DEFINE_string("output", None, "A CSV file for the figures; a picture of the same name goes beside it.")
_QUICK = flags.DEFINE_bool("quick", False, "Few workers and short sleeps: only shows that all of it runs.")

_REPEATS = 2
_WEIGHTS = {"2NN": 199_210, "CNN": 1_663_370}
_SLEEPERS, _SECONDS = 64, 0.25
_SUBROUNDS = 4  # Of each worker.
_CNN_CLIENTS, _CNN_EPOCHS = 40, 20  # Of 40 digits.


def main() -> None:
    import numpy as np

    rows = []
    sleepers, seconds = (8, 0.05) if _QUICK.value else (_SLEEPERS, _SECONDS)
    for name, size in _WEIGHTS.items():
        for number in (1, 2) if _QUICK.value else (1, 2, 4, 8):
            with _workers(number):
                round_of_sleepers = _build_sleepers(size)
                found = _median(functools.partial(round_of_sleepers, np.zeros(size, np.float32), [seconds] * sleepers))
            rows.append(("sleep", name, number, round(found, 3)))
            print(*rows[-1], flush=True)
    if not _QUICK.value:
        rows += _measure_training()
    if _OUTPUT.value:
        path = pathlib.Path(_OUTPUT.value)
        with replacement(path) as temporary, open(temporary, "w", newline="") as file:
            csv.writer(file).writerows([("clients", "model", "workers", "seconds"), *rows])
        if not _QUICK.value:
            _plot(rows, path.with_suffix(".png"))


@contextlib.contextmanager
def _workers(number: int, cores: Sequence[int] | None = None, half_time: bool = False) -> Iterator[None]:
    """Starts workers; each on one of the cores, if these are given, the last one half of the time, if asked for."""
    import psutil

    import tff_fedavg

    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        addresses = [f"unix:{directory}/{i}" for i in range(number)]
        for i, address in enumerate(addresses):
            command = [sys.executable, "-m", "binaries.worker", f"--address={address}"]
            if cores is not None:
                command = ["taskset", "-c", str(cores[i]), *command]
            started = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            stack.callback(started.terminate)
            started.stdout.readline()
        if half_time:
            children = psutil.Process(started.pid).children(recursive=True)
            worker = next(child for child in children if child.name() == "worker_binary")
            stack.enter_context(_stopped_half_of_the_time(worker.pid))
        with tff_fedavg.remote_workers(addresses):
            yield


@contextlib.contextmanager
def _stopped_half_of_the_time(pid: int) -> Iterator[None]:
    end = threading.Event()

    def alternate():
        while not end.wait(0.05):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.05)
            os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=alternate)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def _build_sleepers(size: int) -> Any:
    """Builds a round with weights of this size, which each client gets, and returns after some seconds."""
    import numpy as np
    import tensorflow as tf
    import tensorflow_federated as tff
    from tensorflow.python.data.experimental.ops import testing

    weights_type = tff.TensorType(np.float32, [size])

    @tff.tensorflow.computation(weights_type, np.float32)
    def wait(weights, seconds):
        dataset = tf.data.Dataset.from_tensors(seconds).apply(testing.sleep(tf.cast(seconds * 1e6, tf.int64)))
        return weights + dataset.reduce(0.0, lambda x, y: x + y)

    @tff.federated_computation(tff.FederatedType(weights_type, tff.SERVER), tff.FederatedType(np.float32, tff.CLIENTS))
    def run(weights, seconds):
        return tff.federated_sum(tff.federated_map(wait, (tff.federated_broadcast(weights), seconds)))

    return run


def _measure_training() -> list[tuple]:
    import tasks
    import tff_fedavg
    from tff_fedavg import runtime

    cores = sorted(os.sched_getaffinity(0))
    task = tasks.build_task("mnist_cnn", data="embedded", partition="iid", seed=0)
    process = tff_fedavg.build_fed_avg(
        task.build_model(seed=0), task.train, epochs=_CNN_EPOCHS, batch_size=10, learning_rate=0.1
    )
    rows = []
    measured = {
        "train": (1, False, _SUBROUNDS),
        "train ": (2, False, _SUBROUNDS),
        "train, one at half speed": (2, True, _SUBROUNDS),
        "train, one at half speed, one subround each": (2, True, 1),
    }
    for name, (number, half_time, subrounds) in measured.items():
        runtime._SUBROUNDS_PER_WORKER = subrounds
        with _workers(number, cores, half_time):
            state = process.initialize()
            found = _median(functools.partial(process.next, state, range(_CNN_CLIENTS)))
        rows.append((name.strip(), "CNN", number, round(found, 3)))
        print(*rows[-1], flush=True)
    return rows


def _median(run: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(1 + (1 if _QUICK.value else _REPEATS)):
        start = time.monotonic()
        run()
        seconds.append(time.monotonic() - start)
    return statistics.median(seconds[1:])


def _subrounds(number: int) -> int:
    """Returns the number of subrounds of the sleepers, as the runtime cuts them."""
    if number == 1:
        return 0
    return number * max(1, min(_SUBROUNDS, _SLEEPERS // (len(os.sched_getaffinity(0)) * number)))


def _moved_bytes(name: str, number: int) -> int:
    """Returns the bytes of a round: for each subround the weights, its sum, and three sums to merge it."""
    return 5 * 4 * _WEIGHTS[name] * _subrounds(number)


def _bytes_per_second(rows: list[tuple]) -> float:
    """Returns what the program moves, from the time that the rounds take besides the sleep."""
    shared = [(name, number, seconds) for kind, name, number, seconds in rows if kind == "sleep" and number > 1]
    besides = sum(seconds - _SLEEPERS * _SECONDS / number for _, number, seconds in shared)
    return sum(_moved_bytes(name, number) for name, number, _ in shared) / besides


def _plot(rows: list[tuple], path: pathlib.Path) -> None:
    import numpy as np

    rate = _bytes_per_second(rows)
    print(f"{rate / 1e6:.0f} MB a second through the program")
    figure = picture.new_figure()
    axes = figure.subplots()
    on_paper = np.array([1, 2, 4, 8, 16, 32, 64])
    for name, color in zip(_WEIGHTS, picture.COLORS):
        numbers, seconds = zip(*(row[2:] for row in rows if row[:2] == ("sleep", name)))
        axes.plot(numbers, [seconds[0] / s for s in seconds], "o", color=color, label=f"weights of the {name}")
        expected = [_SLEEPERS * _SECONDS / n + _moved_bytes(name, n) / rate for n in on_paper]
        axes.plot(on_paper, expected[0] / np.array(expected), color=color)
    axes.plot(on_paper, on_paper, color="grey", linestyle=":", label="as many as workers")
    axes.set(xlabel="workers", ylabel="times as fast as one", xscale="log", yscale="log")
    axes.set(xticks=on_paper, xticklabels=on_paper, yticks=on_paper, yticklabels=on_paper)
    axes.set_title(f"Rounds of {_SLEEPERS} clients that sleep {_SECONDS} s: measured (dots), on paper (lines)")
    figure.legend(loc="outside lower center", ncols=3)
    axes.grid(alpha=0.3)
    picture.save(figure, path)


if __name__ == "__main__":
    program.run("workers", main)
