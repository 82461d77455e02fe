import json

import pytest

from tff_fedavg.learning_curve import Target
from tff_fedavg.run_directory import RunDirectory


def start(path, settings, checksums=None):
    RunDirectory(path).start(settings, checksums or {}, Target(0.9))


def read_config(path):
    return json.loads((path / "config.json").read_text())


def test_started_run_has_its_settings_data_and_versions(tmp_path):
    start(tmp_path / "a" / "b", {"seed": 0, "clients": None}, {"file": "abc"})
    config = read_config(tmp_path / "a" / "b")
    assert config["settings"] == {"seed": 0, "clients": None}
    assert config["data_checksums"] == {"file": "abc"}
    assert config["versions"]["tensorflow-federated"] == "0.87.0"


def test_settings_are_those_of_the_last_start(tmp_path):
    start(tmp_path, {"seed": 0, "rounds": 5})
    start(tmp_path, {"seed": 0, "rounds": 9})
    assert read_config(tmp_path)["settings"] == {"seed": 0, "rounds": 9}


def test_other_data_are_refused_by_the_file_that_differs(tmp_path):
    for _ in range(2):
        start(tmp_path, {}, {"a": "1", "b": "2"})
    with pytest.raises(ValueError, match="holds a run on other data: b differs"):
        start(tmp_path, {}, {"a": "1", "b": "3"})
    assert read_config(tmp_path)["data_checksums"] == {"a": "1", "b": "2"}


def test_run_that_did_not_start_leaves_the_directory_free(tmp_path):
    RunDirectory(tmp_path)
    start(tmp_path, {"seed": 1})


def test_directory_in_use_is_refused(tmp_path):
    first = RunDirectory(tmp_path)
    with pytest.raises(ValueError, match="is in use by another run"):
        RunDirectory(tmp_path)
    assert first.path == tmp_path


def test_directory_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file/run cannot be written: Not a directory"):
        RunDirectory(tmp_path / "file" / "run")


@pytest.mark.parametrize("content", ["", "{}", "{", "[]", '{"settings": 1}'])
def test_damaged_configuration_is_refused_and_kept(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="config.json is damaged"):
        RunDirectory(tmp_path)
    assert (tmp_path / "config.json").read_text() == content
