import json
import os

import pytest

from tff_fedavg.json_record import read_record, write_record

CONTENT = {"rounds": 3, "rate": 0.1, "name": "a", "target": None, "rates": [1e-3, 2.5], "settings": {"seed": 0}}


@pytest.fixture
def path(tmp_path):
    write_record(tmp_path / "record.json", CONTENT)
    return tmp_path / "record.json"


def test_a_record_is_read_as_it_was_written_and_in_other_words(path):
    assert read_record(path) == CONTENT
    path.write_text(json.dumps(dict(reversed(json.loads(path.read_text()).items()))))
    assert read_record(path) == CONTENT


def test_each_changed_value_is_seen(path):
    written = path.read_text()
    for old, new in (("3", "4"), ("0.1", "0.2"), ('"a"', '"b"'), ("null", "1"), ("2.5", "2.0"), ("seed", "sead")):
        path.write_text(written.replace(old, new, 1))
        with pytest.raises(ValueError, match=f"^{path} is damaged, or was changed: its checksum"):
            read_record(path)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", "null", pytest.param("[" * 100_000, id="nested"), '{"a": 1} x', "\0\1\2"],
)
def test_what_is_no_record_is_one_line_that_names_the_file(path, content):
    path.write_text(content)
    with pytest.raises(ValueError, match=f"^{path} is damaged: ") as error:
        read_record(path)
    assert "\n" not in str(error.value)


def test_a_record_without_a_checksum_is_taken_only_where_it_needs_none(path):
    path.write_text('{"rounds": 3}')
    with pytest.raises(ValueError, match=f"^{path} has no checksum"):
        read_record(path)
    assert read_record(path, needs_checksum=False) == {"rounds": 3}


def test_a_missing_record_is_missing_and_a_fifo_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_record(tmp_path / "missing.json")
    os.mkfifo(tmp_path / "fifo.json")
    with pytest.raises(ValueError, match="fifo.json is a FIFO, not a regular file"):
        read_record(tmp_path / "fifo.json")
