import json

import pytest

from tff_fedavg.run_directory import RunDirectory


def test_directory_is_made_with_its_settings_and_opened_again(tmp_path):
    for _ in range(2):
        directory = RunDirectory(tmp_path / "a" / "b", {"seed": 0, "clients": None}, may_differ=())
        config = json.loads((tmp_path / "a" / "b" / "config.json").read_text())
        assert config["settings"] == {"seed": 0, "clients": None}
        del directory


def test_other_settings_are_refused_by_name_unless_they_may_differ(tmp_path):
    RunDirectory(tmp_path, {"seed": 0, "rounds": 5}, may_differ=["rounds"])
    RunDirectory(tmp_path, {"seed": 0, "rounds": 9}, may_differ=["rounds"])
    with pytest.raises(ValueError, match="holds a run with seed=0, not 1"):
        RunDirectory(tmp_path, {"seed": 1, "rounds": 9}, may_differ=["rounds"])
    with pytest.raises(ValueError, match="holds a run with seed=0, not None"):
        RunDirectory(tmp_path, {"rounds": 9}, may_differ=["rounds"])


def test_directory_in_use_is_refused(tmp_path):
    first = RunDirectory(tmp_path, {}, may_differ=())
    with pytest.raises(ValueError, match="is in use by another run"):
        RunDirectory(tmp_path, {}, may_differ=())
    assert first.path == tmp_path


def test_directory_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file/run cannot be written: Not a directory"):
        RunDirectory(tmp_path / "file" / "run", {}, may_differ=())


@pytest.mark.parametrize("content", ["", "{}", "{"])
def test_damaged_configuration_is_refused_and_kept(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="config.json is damaged"):
        RunDirectory(tmp_path, {}, may_differ=())
    assert (tmp_path / "config.json").read_text() == content
