"""Pictures of a federated data set, for programs and notebooks."""

import os
import textwrap
from collections.abc import Callable

import matplotlib.figure
import numpy as np
import tensorflow as tf

from tasks.task import Task
from tff_fedavg.replacement import replacement

_BINS = 40
_SHOWN_CLIENTS = 40
_SHOWN_LABELS = 40
_CLIENTS_SIDE_BY_SIDE = 5
_IMAGES_PER_CLIENT = 20
_IMAGES_PER_ROW = 4
_TEXTS_PER_CLIENT = 10
_TEXT_WIDTH = 42
_SKEWED = 20


def summary(task: Task) -> str:
    """Returns a line with the counts of clients and of examples."""
    n = task.train.num_examples
    return (
        f"{len(n)} clients with {n.sum()} examples: "
        f"{n.min()} to {n.max()}, median {np.median(n):g}, mean {n.mean():.1f}; {task.test.num_examples.sum()} to test"
    )


def kinds(task: Task) -> dict[str, Callable[[Task], matplotlib.figure.Figure]]:
    """Returns, by name, those of the functions below that can draw this task."""
    drawn = {"examples_per_client": examples_per_client}
    if task.label_names is not None:
        drawn["labels_per_client"] = labels_per_client
        x, y, *_ = task.train.batch_spec
        if y.shape.rank == 2 or (isinstance(x, tf.TensorSpec) and x.shape.rank in (3, 4)):
            drawn["clients"] = clients
    return drawn


def examples_per_client(task: Task) -> matplotlib.figure.Figure:
    """Draws how many clients have how many examples."""
    n = task.train.num_examples
    figure = matplotlib.figure.Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    low, high = max(n.min(), 1), n.max()
    if high > _SKEWED * low:
        axes.hist(n, np.geomspace(low, high + 1, _BINS + 1), color="tab:blue")
        axes.set_xscale("log")
    else:
        axes.hist(n, min(_BINS, high - low + 1), (low - 0.5, high + 0.5), color="tab:blue")
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.axvline(np.median(n), color="tab:red", label=f"median {np.median(n):g}")
    axes.axvline(n.mean(), color="tab:red", linestyle="--", label=f"mean {n.mean():.1f}")
    axes.set(xlabel="examples $n_k$ of a client", ylabel="clients", title=_title(task))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def labels_per_client(task: Task) -> matplotlib.figure.Figure:
    """Draws the share of each label in the examples of some clients; of many labels, those that they use most."""
    clients = _spread(task.train.num_clients, _SHOWN_CLIENTS)
    names = task.label_names()
    counts = np.stack([np.bincount(_labels(task, k), minlength=len(names)) for k in clients])
    counts[:, [not name for name in names]] = 0  # Padding is no label.
    most_used = np.argsort(-counts.sum(0), kind="stable")[:_SHOWN_LABELS]
    shown = sorted(label for label in most_used if names[label])
    shares = counts[:, shown] / np.maximum(counts.sum(1, keepdims=True), 1)
    figure = matplotlib.figure.Figure(figsize=(3 + 0.22 * len(shown), 7), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, aspect="auto", interpolation="nearest")
    axes.set_xticks(range(len(shown)), [_tick(names[label]) for label in shown], rotation=90 if len(shown) > 10 else 0)
    axes.set_yticks(range(len(clients)), clients, fontsize="x-small")
    axes.set(xlabel="label", ylabel="client", title=_title(task))
    figure.colorbar(image, label="share of the client's labels")
    return figure


def clients(task: Task) -> matplotlib.figure.Figure:
    """Draws the first examples of a few clients, side by side, as the model gets them in training."""
    columns = _spread(task.train.num_clients, _CLIENTS_SIDE_BY_SIDE)
    figure = matplotlib.figure.Figure(figsize=(3.2 * len(columns), 4.5), layout="constrained")
    figure.suptitle(_title(task))
    for axes, k in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns):
        axes.set_title(f"client {k}: {task.train.num_examples[k]} examples", fontsize="medium")
        axes.axis("off")
        x, y = _examples(task, k)
        if y.ndim == 1:
            axes.imshow(_mosaic(x[:_IMAGES_PER_CLIENT]), cmap="gray_r", interpolation="nearest")
        else:
            names = task.label_names()
            lines = ("".join(names[label] for label in row).strip() for row in y[:_TEXTS_PER_CLIENT])
            text = "\n".join(textwrap.shorten(line, _TEXT_WIDTH, placeholder="…") for line in lines)
            axes.text(0, 1, text, va="top", fontsize="small", parse_math=False)
    return figure


def save(figure: matplotlib.figure.Figure, path: str | os.PathLike[str]) -> None:
    """Writes a figure as PNG; the file is replaced in one step."""
    with replacement(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def _title(task: Task) -> str:
    return f"{task.name}: {task.train.num_clients} clients, {task.train.num_examples.sum()} examples"


def _spread(num_clients: int, most: int) -> list[int]:
    """Returns the ids of at most `most` clients, from the first to the last."""
    return sorted(set(np.linspace(0, num_clients - 1, most).round().astype(int).tolist()))


def _examples(task: Task, client_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the `(x, y)` that the model gets of a client."""
    records = task.train.read(tf.constant(client_id))
    x, y, *_ = task.train.batch(records, tf.range(tf.shape(records)[0]), tf.zeros([2], tf.int64))
    return x.numpy(), y.numpy()


def _labels(task: Task, client_id: int) -> np.ndarray:
    return _examples(task, client_id)[1].ravel()


def _mosaic(images: np.ndarray) -> np.ndarray:
    """Sets images `[n, height, width, ...]` in rows, each scaled to [0, 1] and with a margin."""
    shape = images.shape[1:]
    low, high = (f(images, axis=tuple(range(1, images.ndim)), keepdims=True) for f in (np.min, np.max))
    tiles = np.zeros([_IMAGES_PER_CLIENT, shape[0] + 2, shape[1] + 2, *shape[2:]])
    tiles[: len(images), 1:-1, 1:-1] = (images - low) / np.maximum(high - low, 1e-6)
    rows = tiles.reshape(-1, _IMAGES_PER_ROW, *tiles.shape[1:])
    return np.concatenate([np.concatenate(list(row), axis=1) for row in rows])


def _tick(name: str) -> str:
    return name.strip() or repr(name)[1:-1]
