import numpy as np
import pytest
import tensorflow as tf
from programs import run_program

from tasks import pictures
from tasks.task import Task
from tff_fedavg import picture
from tff_fedavg.client_data import ClientDataset
from tff_fedavg.client_files import write_client_dataset

WORDS = ["", "to ", "be ", "or ", "not "]


def build_task(directory, clients, preprocess_fn, label_names):
    write_client_dataset(directory, clients)
    dataset = ClientDataset(directory, preprocess_fn)
    return Task("a_task", dataset, dataset, lambda: None, "mse", {}, label_names=lambda: label_names)


@pytest.fixture
def image_task(tmp_path):
    """Clients of 3, 0 and 30 images of 4x5 pixels, whose labels are 0, none, and 1 and 2."""
    rng = np.random.default_rng(0)
    labels = [np.zeros(3, np.uint8), np.zeros(0, np.uint8), np.array([1, 2, 2] * 10, np.uint8)]
    clients = [{"x": rng.random([len(y), 4, 5]).astype(np.float32), "y": y} for y in labels]
    return build_task(
        tmp_path, clients, lambda e, seed: (e["x"], tf.cast(e["y"], tf.int32)), ["zero", "one", "two", "three"]
    )


@pytest.fixture
def text_task(tmp_path):
    clients = [{"y": np.array([[1, 2, 0], [3, 4, 0]], np.uint8)}, {"y": np.array([[2, 2, 2]], np.uint8)}]
    return build_task(tmp_path, clients, lambda e, seed: (e["y"], e["y"]), WORDS)


def test_summary_counts_clients_and_examples(image_task):
    assert pictures.summary(image_task) == "3 clients with 33 examples: 0 to 30, median 3, mean 11.0; 33 to test"


@pytest.mark.parametrize("sizes", [[5] * 4, [1, 2, 2, 9], [0, 1, 10, 1000]])
def test_histogram_has_every_client_in_one_bar(tmp_path, sizes):
    clients = [{"y": np.zeros(n, np.uint8)} for n in sizes]
    task = build_task(tmp_path, clients, lambda e, seed: (e["y"], e["y"]), ["zero"])
    axes = pictures.examples_per_client(task).axes[0]
    not_empty = [n for n in sizes if n > 0] if axes.get_xscale() == "log" else sizes
    assert sum(bar.get_height() for bar in axes.patches) == len(not_empty)
    for bar in axes.patches:
        left, right = bar.get_x(), bar.get_x() + bar.get_width()
        assert bar.get_height() == sum(left <= n < right for n in not_empty)


def test_label_shares_are_those_of_the_clients(image_task):
    axes = pictures.labels_per_client(image_task).axes[0]
    shares = axes.images[0].get_array()
    np.testing.assert_allclose(shares, [[1, 0, 0, 0], [0, 0, 0, 0], [0, 1 / 3, 2 / 3, 0]])
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["zero", "one", "two", "three"]


def test_what_has_several_inputs_is_drawn_by_its_labels_and_several_labels_by_their_number(tmp_path):
    arrays = [{"x": np.zeros([n, 4, 5], np.float32), "y": np.zeros(n, np.uint8)} for n in (3, 2)]
    inputs = build_task(tmp_path / "x", arrays, lambda e, seed: ({"a": e["x"], "b": e["x"]}, e["y"]), ["zero", "one"])
    assert set(pictures.kinds(inputs)) == {"examples_per_client", "labels_per_client"}
    (image,) = pictures.labels_per_client(inputs).axes[0].images
    np.testing.assert_allclose(image.get_array(), [[1, 0], [1, 0]])
    labels = build_task(tmp_path / "y", arrays, lambda e, seed: (e["x"], {"a": e["y"], "b": e["y"]}), ["zero"])
    assert set(pictures.kinds(labels)) == {"examples_per_client"}


def test_padding_is_no_label(text_task):
    axes = pictures.labels_per_client(text_task).axes[0]
    shares = axes.images[0].get_array()
    np.testing.assert_allclose(shares, [[0.25, 0.25, 0.25, 0.25], [0, 1, 0, 0]])


def test_clients_are_drawn_with_their_images(image_task):
    small, empty, large = pictures.clients(image_task).axes
    assert [axes.get_title() for axes in (small, empty, large)] == [
        f"client {k}: {n} examples" for k, n in enumerate((3, 0, 30))
    ]
    x = image_task.train.load(0)["x"][1]
    tile = small.images[0].get_array()[1:5, 8:13]  # The second image, within its margin.
    np.testing.assert_allclose(tile, (x - x.min()) / (x.max() - x.min()), rtol=1e-5)
    assert np.count_nonzero(empty.images[0].get_array()) == 0


def test_clients_are_drawn_with_their_texts(text_task):
    texts = [axes.texts[0].get_text() for axes in pictures.clients(text_task).axes]
    assert texts == ["to be\nor not", "be be be"]


def test_what_has_no_glyph_is_escaped_as_a_label_and_left_out_of_texts(tmp_path, recwarn):
    names = ["a", "\x03", " ", "\n", "$"]
    clients = [{"y": np.array([[0, 2, 4, 1], [0, 3, 0, 1]], np.uint8)}]
    task = build_task(tmp_path, clients, lambda e, seed: (e["y"], e["y"]), names)
    labels, examples = pictures.labels_per_client(task), pictures.clients(task)
    assert [tick.get_text() for tick in labels.axes[0].get_xticklabels()] == ["a", "\\x03", "␣", "\\n", "$"]
    assert examples.axes[0].texts[0].get_text() == "a $\na a"
    for figure in (labels, examples):
        picture.save(figure, tmp_path / "picture.png")
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_program_leaves_three_pictures_and_says_where(tmp_path):
    flags = ["--data=embedded", "--partition=pathological"]
    flags += [f"--cache_dir={tmp_path}/cache", f"--output_dir={tmp_path}/pictures"]
    result = run_program("binaries.explore", *flags)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[1] == "100 clients with 4000 examples: 40 to 40, median 40, mean 40.0; 1000 to test"
    names = ("examples_per_client", "labels_per_client", "clients")
    assert lines[2:] == [f"{tmp_path}/pictures/{name}.png" for name in names]
    for path in lines[2:]:
        with open(path, "rb") as file:
            assert file.read(4) == b"\x89PNG"
