"""Time of a client and memory of the worker, by the number of clients in a round.

    python -m benchmarks.cohort --data_dir=DIR --output=results/cohort.csv
    python -m benchmarks.cohort --quick

Each number of clients is measured with a worker of its own: a round of at most 100 clients to warm up, then one, or the
median of three short ones. E = 1 and B = 10. The picture goes beside the CSV file.
"""

import csv
import pathlib
import statistics
import time

from absl import flags

import tasks
from binaries.command_line import data_flags, program
from tff_fedavg import picture
from tff_fedavg.replacement import replacement

_OUTPUT = flags.DEFINE_string("output", None, "A CSV file for the figures; a picture of the same name goes beside it.")
_QUICK = flags.DEFINE_bool("quick", False, "Embedded data, few clients: only shows that all of it runs.")

flags.adopt_module_key_flags(data_flags)

_WARM_UP_CLIENTS = 100
_FIELDS = ("task", "aggregator", "clients", "seconds", "megabytes")
# The mean adds up in the clients' graphs; another aggregator gets each update, some at a time.
_BOTH = ("mean", "robust")
# Task, partition, K, aggregators, and the numbers of clients in a round.
_MEASURED = (
    ("mnist_2nn", "iid", 10_000, _BOTH, (10, 100, 1_000, 10_000)),
    ("mnist_cnn", "iid", 1_000, _BOTH, (10, 100, 1_000)),
    ("shakespeare_lstm", "role", None, ("mean",), (10, 100, 1_146)),
)
_QUICK_MEASURED = (("mnist_2nn", "iid", 100, _BOTH, (10, 100)),)


def main() -> None:
    rows = []
    layout = "{:<18}" * (len(_FIELDS) + 1)
    print(layout.format(*_FIELDS, "ms a client"), flush=True)
    for task, partition, total, aggregators, numbers in _QUICK_MEASURED if _QUICK.value else _MEASURED:
        for aggregator in aggregators:
            for clients in numbers:
                rows.append((task, aggregator, clients, *_measure(task, partition, total, aggregator, clients)))
                print(layout.format(*rows[-1], f"{1000 * rows[-1][3] / clients:.3g}"), flush=True)
    if _OUTPUT.value:
        path = pathlib.Path(_OUTPUT.value)
        with replacement(path) as temporary, open(temporary, "w", newline="") as file:
            csv.writer(file).writerows([_FIELDS, *rows])
        _plot(rows, path.with_suffix(".png"))


def _measure(task_name: str, partition: str, total: int | None, aggregator: str, clients: int) -> tuple[float, int]:
    """Returns the seconds of a round, and the largest memory that its worker has had."""
    import psutil
    import tensorflow_federated as tff

    import tff_fedavg

    with tff_fedavg.local_worker():
        data = "embedded" if _QUICK.value else None
        task = tasks.build_task(
            task_name, data=data, **data_flags.directories(), partition=partition, clients=total, seed=0
        )
        process = tff_fedavg.build_fed_avg(
            task.build_model(seed=0),
            task.train,
            epochs=1,
            batch_size=10,
            learning_rate=tasks.TASKS[task_name].learning_rate,
            aggregator=tff.learning.robust_aggregator() if aggregator == "robust" else None,
        )
        state = process.initialize()
        process.next(state, range(min(clients, _WARM_UP_CLIENTS)))
        seconds = []
        for _ in range(3 if clients <= _WARM_UP_CLIENTS else 1):
            start = time.monotonic()
            process.next(state, range(clients))
            seconds.append(time.monotonic() - start)
        (worker,) = (p for p in psutil.Process().children(recursive=True) if p.name() == "worker_binary")
        status = pathlib.Path(f"/proc/{worker.pid}/status").read_text().splitlines()
        (peak,) = (int(line.split()[1]) for line in status if line.startswith("VmHWM:"))  # In kB.
    return round(statistics.median(seconds), 4), peak // 1000


def _plot(rows: list[tuple], path: pathlib.Path) -> None:
    figure = picture.new_figure()
    time_axes, memory_axes = figure.subplots(1, 2)
    colors = dict(zip(dict.fromkeys(row[0] for row in rows), picture.COLORS))
    for task, aggregator in dict.fromkeys(row[:2] for row in rows):
        clients, seconds, megabytes = zip(*(row[2:] for row in rows if row[:2] == (task, aggregator)))
        style = {"marker": "o", "color": colors[task], "linestyle": "-" if aggregator == "mean" else "--"}
        time_axes.plot(clients, [1000 * s / c for s, c in zip(seconds, clients)], **style)
        memory_axes.plot(clients, megabytes, label=f"{task}, {aggregator}", **style)
    figure.suptitle("Rounds of many clients, by what adds up their updates")
    time_axes.set(ylabel="milliseconds of a client")
    memory_axes.set(ylabel="largest memory of the worker, MB")
    for axes in (time_axes, memory_axes):
        axes.set(xlabel="clients in a round", xscale="log", yscale="log")
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3)
    picture.save(figure, path)


if __name__ == "__main__":
    program.run("cohort", main)
