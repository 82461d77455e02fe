import json
import os

import pytest

import tff_fedavg
from tff_fedavg import run_directory
from tff_fedavg.learning_curve import Target
from tff_fedavg.run_directory import RunDirectory, check_data


def start(path, settings, checksums=None, after_round=0):
    RunDirectory(path).start(settings, checksums or {}, Target(0.9), after_round=after_round)


def read_config(path):
    return json.loads((path / "config.json").read_text())


def test_started_run_has_its_settings_data_and_versions(tmp_path):
    start(tmp_path / "a" / "b", {"seed": 0, "clients": None}, {"file": "abc"})
    config = read_config(tmp_path / "a" / "b")
    assert config["settings"] == {"seed": 0, "clients": None}
    assert config["data_checksums"] == {"file": "abc"}
    assert config["versions"]["tensorflow-federated"] == "0.87.0"
    assert config["versions"]["tff_fedavg"] == tff_fedavg.__version__


def test_what_a_run_began_with_stays_and_what_it_goes_on_with_is_kept_with_the_round(tmp_path):
    start(tmp_path, {"seed": 0, "rounds": 5, "eval_every": 1})
    start(tmp_path, {"seed": 0, "rounds": 9, "eval_every": 1}, after_round=5)
    start(tmp_path, {"seed": 0, "rounds": 9, "eval_every": 3}, after_round=7)
    start(tmp_path, {"seed": 0, "rounds": 9, "eval_every": 3}, after_round=8)
    config = run_directory.read_config(tmp_path)
    assert config["settings"] == {"seed": 0, "rounds": 5, "eval_every": 1}
    assert config["changes"] == [
        {"after_round": 5, "settings": {"rounds": 9}},
        {"after_round": 7, "settings": {"eval_every": 3}},
    ]
    assert run_directory.settings_of(config) == {"seed": 0, "rounds": 9, "eval_every": 3}
    # From an older state: the rounds from 7 on are run anew.
    start(tmp_path, {"seed": 0, "rounds": 9, "eval_every": 1}, after_round=6)
    assert run_directory.read_config(tmp_path)["changes"] == [{"after_round": 5, "settings": {"rounds": 9}}]
    start(tmp_path, {"seed": 0, "rounds": 3, "eval_every": 2}, after_round=0)
    config = run_directory.read_config(tmp_path)
    assert (config["settings"], config["changes"]) == ({"seed": 0, "rounds": 3, "eval_every": 2}, [])


def test_a_run_keeps_what_tells_it_from_others(tmp_path):
    directory = RunDirectory(tmp_path / "a")
    directory.start({}, {}, Target(None))
    run = directory.run
    del directory
    assert RunDirectory(tmp_path / "a").run == run != RunDirectory(tmp_path / "b").run


@pytest.mark.parametrize("left", ["metrics.csv", "states/round_3.npz"])
def test_a_run_without_its_configuration_is_refused(tmp_path, left):
    (tmp_path / left).parent.mkdir(exist_ok=True)
    (tmp_path / left).write_text("")
    with pytest.raises(ValueError, match="holds a run whose config.json is missing"):
        RunDirectory(tmp_path)


def test_a_fifo_in_the_place_of_a_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(ValueError, match="cannot be written: .*.lock is a FIFO"):
        RunDirectory(tmp_path)
    (tmp_path / ".lock").unlink()
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ValueError, match="config.json cannot be read: .* is a FIFO"):
        RunDirectory(tmp_path)


def test_other_data_are_refused_by_the_file_that_differs(tmp_path):
    for _ in range(2):
        start(tmp_path, {}, {"a": "1", "b": "2"})
    with pytest.raises(ValueError, match="holds a run on other data: b differs"):
        check_data(tmp_path, {"a": "1", "b": "3"})
    assert read_config(tmp_path)["data_checksums"] == {"a": "1", "b": "2"}


def test_run_that_did_not_start_leaves_the_directory_free(tmp_path):
    RunDirectory(tmp_path)
    start(tmp_path, {"seed": 1})


def test_directory_in_use_is_refused(tmp_path):
    first = RunDirectory(tmp_path)
    with pytest.raises(ValueError, match="is in use by another run"):
        RunDirectory(tmp_path)
    assert first.path == tmp_path
    first.close()
    RunDirectory(tmp_path)


def test_directory_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file/run cannot be written: Not a directory"):
        RunDirectory(tmp_path / "file" / "run")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "{",
        "[]",
        '{"settings": 1}',
        '{"settings": {}, "target": 1}',
        '{"settings": {}, "target": {"a": 1}}',
        '{"settings": {}, "changes": [{}]}',
    ],
)
def test_damaged_configuration_is_refused_and_kept(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="config.json is damaged"):
        RunDirectory(tmp_path)
    assert (tmp_path / "config.json").read_text() == content
