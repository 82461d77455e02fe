"""Seconds of a round, CPU seconds and memory: this project beside TFF's own FedAvg, loops without TFF, and its peers.

    make benchmark ARGS=--data_dir=DIR
    python -m benchmarks.round_time --data_dir=DIR
    python -m benchmarks.round_time --tasks=mnist_2nn,mnist_cnn --repeats=15
    python -m benchmarks.round_time --quick

Every task is measured in a process of its own: the rounds of 10 clients (E = 1; B as in `_BATCH_SIZES`), in which the
systems of `benchmarks.systems` take turns, so that a machine that is slow for a while is slow for all of them; the
evaluation of the whole test set; and for `mnist_2nn` rounds of 1 to 1,000 clients and the start of a program. A turn is
two rounds, of which the second is timed. Times are medians after two rounds to warm up. The memory is the largest that
the worker of a system, or the program, has had.

All systems do the same work: the program fails where the update of a weight has another norm than this project's with
the same kind of LSTM. The peers (PyTorch, FedJAX, Flower) are programs of their own, in `peers/`; one that is not
installed is left out.
"""

import collections
import concurrent.futures
import contextlib
import csv
import dataclasses
import functools
import multiprocessing
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

from absl import flags, logging

import tasks
from binaries.command_line import data_flags, program, signals
from binaries.command_line.number import integer
from tff_fedavg import picture
from tff_fedavg.replacement import replacement

_TASKS = flags.DEFINE_list(
    "tasks", ["mnist_2nn", "mnist_cnn", "shakespeare_lstm", "stackoverflow_lstm", "cifar_cnn"], "The tasks to measure."
)
_REPEATS = flags.DEFINE(integer(1, 1_000_000), "repeats", 5, "Timed rounds of each system.")
_QUICK = flags.DEFINE_bool("quick", False, "Embedded data, 2 clients, one round: only shows that all of it runs.")
_OUTPUT = flags.DEFINE_string("output", None, "A CSV file for the figures; a picture of the same name goes beside it.")
_PEERS_DIR = flags.DEFINE_string("peers_dir", ".venv-peers", "Where the peers are installed.")

flags.adopt_module_key_flags(data_flags)

_BATCH_SIZES = {"cifar_cnn": 50, "stackoverflow_lstm": 8}
_DEFAULT_BATCH_SIZE = 10
_WORKER = "worker_binary"
_OWN = "tff_fedavg"
_PEERS = {"pytorch": "PyTorch", "fedjax": "FedJAX", "flower": "Flower, PyTorch"}
_LARGEST_DEVIATION = 0.02
# Beside this project's own.
_DRAWN = ("build_weighted_fed_avg, default", "no TFF, a core for a client", "tff_fedavg, Keras LSTM", *_PEERS.values())
# The task whose rounds show what TFF itself costs, since its SGD takes the least time.
_SMALLEST_TASK = "mnist_2nn"
_SMALL_CLIENTS = 1000

# What is measured, of which system; median seconds, CPU seconds, and megabytes; and by which part of it the norm of the
# update of a weight is not this project's, at most. None where it was not measured.
Row = collections.namedtuple("Row", "task measured system seconds cpu_seconds megabytes deviation", defaults=[None])


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to measure a task; goes to the process that does it.

    `directories` are those of `data_flags`, `peers` the Pythons of the peers that are installed, `numbers_of_clients`
    those of the smallest task's rounds, `test_parts` are evaluated (None: all).
    """

    task: str
    data: str
    directories: dict[str, str]
    peers: dict[str, pathlib.Path]
    clients: int
    repeats: int
    numbers_of_clients: tuple[int, ...]
    test_parts: int | None


def measure(settings: Settings) -> list[Row]:
    """Measures all about one task, in a process of its own."""
    signals.catch()  # For the workers to be ended.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.set_verbosity(logging.WARNING)
    import tff_fedavg

    with tff_fedavg.local_worker():
        task = _build_task(settings)
        rows = _measure_rounds(task, settings)
        rows += _measure_evaluation(task, settings)
        if settings.task == _SMALLEST_TASK:
            rows += _measure_numbers_of_clients(settings)
    if settings.task == _SMALLEST_TASK:
        rows.append(_measure_start(settings))
    return rows


def _build_task(settings, clients=None):
    entry = tasks.TASKS[settings.task]
    task = tasks.build_task(
        settings.task,
        data=settings.data,
        **settings.directories,
        partition=entry.partitions[0],
        clients=clients,
        seed=0,
    )
    # Augmentation would cost every system the same: the training examples are preprocessed like those of the test.
    train = type(task.train)(task.train.directory, task.test.preprocess_fn)
    return dataclasses.replace(task, train=train)


def _measure_rounds(task, settings):
    import psutil

    program_process = psutil.Process()
    own = program_process.children(recursive=True)
    try:
        rows = _time_rounds(_builders(task, settings), settings, program_process)
    finally:
        # TFF's own workers would outlive the program, and Flower would tell at length what it was disturbed in.
        for child in program_process.children(recursive=True):
            if child not in own:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
    memory = _peak_megabytes(program_process)
    return [*rows, Row(settings.task, "memory of the program", "", None, None, memory)]


def _builders(task, settings):
    """Returns by system a function that builds its round, and the system whose updates it has to make, too."""
    import tensorflow_federated as tff

    from benchmarks import systems

    arguments = {
        "clients": settings.clients,
        "batch_size": _BATCH_SIZES.get(settings.task, _DEFAULT_BATCH_SIZE),
    }

    def builder(build, keras_model_fn, weights, **more):
        return functools.partial(build, task, keras_model_fn, weights=weights, **arguments, **more)

    model = task.keras_model_fn, systems.initial_weights(task.keras_model_fn)
    default = {"loop_implementation": tff.learning.LoopImplementation.DATASET_REDUCE}
    iterator = {"loop_implementation": tff.learning.LoopImplementation.DATASET_ITERATOR}
    builders = {
        _OWN: builder(systems.tff_fedavg_round, *model),
        "build_weighted_fed_avg, default": builder(systems.tff_learning_round, *model, **default),
        "build_weighted_fed_avg, iterator": builder(systems.tff_learning_round, *model, **iterator),
        "no TFF, all cores for a client": builder(systems.bare_loop_round, *model, client_per_core=False),
        "no TFF, a core for a client": builder(systems.bare_loop_round, *model, client_per_core=True),
    }
    of_peers = _OWN
    if keras_model_fn := systems.lstm_model_fn(settings.task, systems.keras_peephole_lstm):
        name = "build_weighted_fed_avg, default, Keras peephole LSTM"
        builders[name] = builder(systems.tff_learning_round, keras_model_fn, model[1], **default)
        # That of the peers, too, which have no peepholes.
        keras_model_fn = systems.lstm_model_fn(settings.task, systems.keras_lstm)
        model = keras_model_fn, systems.initial_weights(keras_model_fn)
        of_peers = "tff_fedavg, Keras LSTM"
        builders[of_peers] = builder(systems.tff_fedavg_round, *model)
    references = dict.fromkeys(builders, _OWN) | {of_peers: of_peers}
    for name, python in settings.peers.items():
        builders[_PEERS[name]] = builder(systems.peer_round, *model, name=name, python=python)
        references[_PEERS[name]] = of_peers
    return {name: (build, references[name]) for name, build in builders.items()}


def _time_rounds(builders, settings, program_process):
    import numpy as np

    rounds, worker_of = {}, {}
    known = program_process.children(recursive=True)
    for name, (build, _) in builders.items():
        rounds[name] = build()
        # To warm up. TFF starts a worker of its own with the first round; some caches are warm after the second only.
        rounds[name]()(), rounds[name]()()
        new = [child for child in program_process.children(recursive=True) if child not in known]
        known += new
        if name.startswith((_OWN, "build_weighted_fed_avg")):
            worker_of[name] = next(child for child in new or known if child.name() == _WORKER)
    seconds, cpu_seconds = collections.defaultdict(list), collections.defaultdict(list)
    norms, deviations = {}, collections.defaultdict(list)
    for _ in range(settings.repeats):
        for name, run_round in rounds.items():
            run_round()()  # Not timed: after the others' turns its caches are cold, which in training they are not.
            start, cpu_start = time.monotonic(), _cpu_seconds(known)
            update_norms = run_round()
            seconds[name].append(time.monotonic() - start)
            cpu_seconds[name].append(_cpu_seconds(known) - cpu_start)
            norms[name] = np.array(update_norms())
            reference = builders[name][1]
            deviation = np.max(abs(norms[name] / norms[reference] - 1))
            if not deviation < _LARGEST_DEVIATION:
                raise RuntimeError(
                    f"{settings.task}: {name} does other work than {reference}: the norm of the update of a weight is "
                    f"another one by {deviation:.2g} of it"
                )
            deviations[name].append(float(deviation))
    return [
        Row(
            settings.task,
            f"round of {settings.clients} clients",
            name,
            statistics.median(seconds[name]),
            statistics.median(cpu_seconds[name]),
            _peak_megabytes(worker_of[name]) if name in worker_of else None,
            max(deviations[name]),
        )
        for name in rounds
    ]


def _measure_evaluation(task, settings):
    import tff_fedavg

    model = task.build_model(seed=0)
    fed_eval = tff_fedavg.build_fed_eval(model, task.test)
    process = tff_fedavg.build_fed_avg(model, task.train, epochs=1, batch_size=1, learning_rate=1.0)
    weights = process.initialize().global_model_weights
    parts = list(range(task.test.num_clients))[: settings.test_parts]
    seconds = _median_seconds(lambda: fed_eval(weights, parts), settings.repeats)
    return [Row(settings.task, f"evaluation on {task.test.num_examples.sum()} examples", _OWN, seconds, None, None)]


def _measure_numbers_of_clients(settings):
    from benchmarks import systems

    task = _build_task(settings, clients=_SMALL_CLIENTS)
    weights = systems.initial_weights(task.keras_model_fn)
    rows = []
    for clients in settings.numbers_of_clients:
        run_round = systems.tff_fedavg_round(
            task, task.keras_model_fn, weights=weights, clients=clients, batch_size=_DEFAULT_BATCH_SIZE
        )
        seconds = _median_seconds(run_round, settings.repeats)
        examples = task.train.num_examples[0]
        measured = f"round of {clients} clients of {examples} examples"
        rows.append(Row(settings.task, measured, _OWN, seconds, None, None))
    return rows


def _measure_start(settings):
    """The whole program for one round: import of TensorFlow, client files from the cache, first round, evaluation."""
    with tempfile.TemporaryDirectory() as run_dir:
        command = [
            *(sys.executable, "-m", "binaries.train", f"--task={settings.task}", f"--data={settings.data}"),
            *(f"--{name}={value}" for name, value in settings.directories.items()),
            *("--rounds=1", f"--run_dir={run_dir}"),
        ]
        start = time.monotonic()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - start
    return Row(settings.task, "start and first round of binaries.train", _OWN, seconds, None, None)


def _median_seconds(function, repeats):
    function(), function()  # To warm up.
    seconds = []
    for _ in range(repeats):
        start = time.monotonic()
        function()
        seconds.append(time.monotonic() - start)
    return statistics.median(seconds)


def _cpu_seconds(children):
    """CPU time of this program and its children."""
    import psutil

    seconds = time.process_time()
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):  # Flower's Ray ends some that are idle.
            seconds += sum(child.cpu_times()[:2])
    return seconds


def _peak_megabytes(process):
    """The largest resident memory that a process has had."""
    status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1e3


def _print(rows: list[Row]) -> None:
    ours = {}
    for row in rows:
        if row.system in (_OWN, ""):
            ours = {row.measured: row}
            print(f"\n{row.task}, {row.measured}")
        own = ours.get(row.measured, row)
        cells = [
            "" if value is None else f"{value:9.3f} {unit} {value / reference:6.2f}x"
            for value, reference, unit in (
                (row.seconds, own.seconds, "s"),
                (row.cpu_seconds, own.cpu_seconds, "CPU s"),
            )
        ]
        memory = "" if row.megabytes is None else f"{row.megabytes:7.0f} MB"
        deviation = "" if row.deviation is None else f"{row.deviation:8.0e}"
        print(f"  {row.system:54} {cells[0]:20} {cells[1]:24} {memory:10} {deviation}".rstrip(), flush=True)


def _write(rows: list[Row], path: pathlib.Path) -> None:
    with replacement(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        for row in rows:
            writer.writerow([f"{value:.4g}" if isinstance(value, float) else value for value in row])


def _plot(rows: list[Row], path: pathlib.Path) -> None:
    of_rounds = collections.defaultdict(dict)
    for row in rows:
        if row.deviation is not None:
            of_rounds[row.task][row.system] = row.seconds
    drawn = [name for name in _DRAWN if any(name in seconds for seconds in of_rounds.values())]
    figure = picture.new_figure()
    axes = figure.subplots()
    width = 0.8 / len(drawn)
    for i, (name, color) in enumerate(zip(drawn, picture.COLORS)):
        ratios = {place: s[name] / s[_OWN] for place, s in enumerate(of_rounds.values()) if name in s}
        places = [place - 0.4 + (i + 0.5) * width for place in ratios]
        axes.bar(places, ratios.values(), width, color=color, label=name)
    axes.axhline(1, color="black", linewidth=1)
    axes.set_xticks(range(len(of_rounds)), of_rounds)
    axes.set_ylabel(f"seconds of a round, those of {_OWN} = 1")
    axes.legend()
    picture.save(figure, path)


def _find_peers() -> dict[str, pathlib.Path]:
    """Returns the Pythons of the peers that are installed; tells which are not."""
    found = {}
    for name, called in _PEERS.items():
        # Not resolved: a virtual environment is known by this path.
        python = pathlib.Path(_PEERS_DIR.value).absolute() / name / "bin" / "python"
        if python.exists():
            found[name] = python
        else:
            print(f"{called} is left out: `make benchmark` installs it")
    return found


def main() -> None:
    all_settings = []
    peers = _find_peers()
    for name in _TASKS.value:
        if name not in tasks.TASKS:
            raise ValueError(f"--tasks has {name!r}; it takes {', '.join(sorted(tasks.TASKS))}")
        entry = tasks.TASKS[name]
        if _QUICK.value and entry.embedded is None:
            print(f"{name} is left out: no package comes with data for it")
            continue
        all_settings.append(
            Settings(
                task=name,
                data=entry.embedded if _QUICK.value else entry.data[0],
                directories=data_flags.directories(),
                peers=peers,
                clients=2 if _QUICK.value else 10,
                repeats=1 if _QUICK.value else _REPEATS.value,
                numbers_of_clients=(1, 2) if _QUICK.value else (1, 10, 100, 1000),
                test_parts=1 if _QUICK.value else None,
            )
        )
    rows = []
    for settings in all_settings:
        # A process for each task, for memory and the warmth of caches not to depend on the tasks before it.
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, context, initializer=signals.end_with_parent) as pool:
            try:
                of_task = pool.submit(measure, settings).result()
            except BaseException:  # Of Ctrl-C that process need not have heard, and it is waited for.
                for child in multiprocessing.active_children():
                    child.terminate()
                raise
        _print(of_task)
        rows += of_task
        if _OUTPUT.value:
            _write(rows, pathlib.Path(_OUTPUT.value))
            _plot(rows, pathlib.Path(_OUTPUT.value).with_suffix(".png"))


if __name__ == "__main__":
    program.run("round_time", main)
