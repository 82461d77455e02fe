"""Pictures of a federated data set, for programs and notebooks."""

import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

from tasks.task import Task
from tff_fedavg import picture

_BINS = 40
_SHOWN_CLIENTS = 40
_SHOWN_LABELS = 40
_CLIENTS_WITH_EXAMPLES = 5
_IMAGES_PER_CLIENT = 20
_IMAGES_PER_ROW = 4
_TEXTS_PER_CLIENT = 5
_TEXT_WIDTH = 100
_SKEWED = 20


def summary(task: Task) -> str:
    """Returns a line with the counts of clients and of examples."""
    n = task.train.num_examples
    return (
        f"{len(n)} clients with {n.sum()} examples: "
        f"{n.min()} to {n.max()}, median {np.median(n):g}, mean {n.mean():.1f}; {task.test.num_examples.sum()} to test"
    )


def kinds(task: Task) -> dict[str, Callable[[Task], Figure]]:
    """Returns, by name, those of the functions below that can draw this task."""
    drawn = {"examples_per_client": examples_per_client}
    x, y, *_ = task.train.batch_spec
    if task.label_names is not None and isinstance(y, tf.TensorSpec):
        drawn["labels_per_client"] = labels_per_client
        if y.shape.rank == 2 or (isinstance(x, tf.TensorSpec) and x.shape.rank in (3, 4)):
            drawn["clients"] = clients
    return drawn


def examples_per_client(task: Task) -> Figure:
    """Draws how many clients have how many examples."""
    n = task.train.num_examples
    color, other_color, *_ = picture.COLORS
    figure = picture.new_figure()
    axes = figure.add_subplot()
    low, high = max(n.min(), 1), n.max()
    if high > _SKEWED * low:
        axes.hist(n, np.geomspace(low, high + 1, _BINS + 1), color=color)
        axes.set_xscale("log")
    else:
        axes.hist(n, min(_BINS, high - low + 1), range=(low - 0.5, high + 0.5), color=color)
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.axvline(np.median(n), color=other_color, label=f"median {np.median(n):g}")
    axes.axvline(n.mean(), color=other_color, linestyle="--", label=f"mean {n.mean():.1f}")
    axes.set(xlabel="examples $n_k$ of a client", ylabel="clients", title=_title("Examples per client", task))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def labels_per_client(task: Task) -> Figure:
    """Draws the share of each label in the examples of some clients; of many labels, those that they use most."""
    clients = _spread(task.train.num_clients, _SHOWN_CLIENTS)
    names = task.label_names()
    counts = np.stack([np.bincount(_examples(task, k)[1].ravel(), minlength=len(names)) for k in clients])
    counts[:, [not name for name in names]] = 0  # Padding is no label.
    most_used = np.argsort(-counts.sum(0), kind="stable")[:_SHOWN_LABELS]
    shown = sorted(label for label in most_used if names[label])
    shares = counts[:, shown] / np.maximum(counts.sum(1, keepdims=True), 1)
    figure = picture.new_figure(7)
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, aspect="auto", interpolation="nearest")
    ticks = [_tick(names[label]) for label in shown]
    axes.set_xticks(range(len(shown)), ticks, rotation=90 if len(shown) > 10 else 0, parse_math=False)
    axes.set_yticks(range(len(clients)), clients, fontsize="small")
    axes.set(xlabel="label", ylabel="client", title=_title("Labels per client", task))
    figure.colorbar(image, label="share of the client's labels")
    return figure


def clients(task: Task) -> Figure:
    """Draws the first examples of a few clients, as the model gets them in training."""
    columns = _spread(task.train.num_clients, _CLIENTS_WITH_EXAMPLES)
    are_images = task.train.batch_spec[1].shape.rank == 1
    figure = picture.new_figure(3.2 if are_images else 6)
    figure.suptitle(_title("First examples of some clients", task))
    # Texts are long: one client below another.
    shape = (1, len(columns)) if are_images else (len(columns), 1)
    for axes, k in zip(figure.subplots(*shape, squeeze=False).flat, columns):
        title = f"client {k}: {task.train.num_examples[k]} examples"
        axes.axis("off")
        x, y = _examples(task, k)
        if are_images:
            axes.set_title(title, fontsize="small")
            axes.imshow(_mosaic(x[:_IMAGES_PER_CLIENT].numpy()), cmap="gray_r", interpolation="nearest")
        else:
            axes.set_title(title, fontsize="medium", loc="left")
            names = task.label_names()
            lines = ("".join(names[label] for label in row) for row in y[:_TEXTS_PER_CLIENT])
            shown = ("".join(c if c.isprintable() else " " for c in line) for line in lines)
            text = "\n".join(textwrap.shorten(line, _TEXT_WIDTH, placeholder="…") for line in shown)
            axes.text(0, 1, text, va="top", fontsize="small", parse_math=False)
    return figure


def _title(shown: str, task: Task) -> str:
    return f"{shown}: {task.name}, {task.train.num_clients} clients, {task.train.num_examples.sum()} examples"


def _spread(num_clients: int, most: int) -> list[int]:
    """Returns the ids of at most `most` clients, from the first to the last."""
    return sorted(set(np.linspace(0, num_clients - 1, most).round().astype(int).tolist()))


def _examples(task: Task, client_id: int) -> tuple[Any, np.ndarray]:
    """Returns the `(x, y)` that the model gets of a client; x may be any nest of tensors."""
    records = task.train.read(tf.constant(client_id))
    x, y, *_ = task.train.batch(records, tf.range(tf.shape(records)[0]), tf.zeros([2], tf.int64))
    return x, y.numpy()


def _mosaic(images: np.ndarray) -> np.ndarray:
    """Sets images `[n, height, width, ...]` in rows, each scaled to [0, 1] and with a margin."""
    shape = images.shape[1:]
    low, high = (f(images, axis=tuple(range(1, images.ndim)), keepdims=True) for f in (np.min, np.max))
    tiles = np.zeros([_IMAGES_PER_CLIENT, shape[0] + 2, shape[1] + 2, *shape[2:]])
    tiles[: len(images), 1:-1, 1:-1] = (images - low) / np.maximum(high - low, 1e-6)
    rows = tiles.reshape(-1, _IMAGES_PER_ROW, *tiles.shape[1:])
    return np.concatenate([np.concatenate(list(row), axis=1) for row in rows])


def _tick(name: str) -> str:
    """Returns what is printed for a label: fonts have no glyphs for control characters, and a space is not seen."""
    name = name.strip(" ") or "␣"
    return name if name.isprintable() else repr(name)[1:-1]
