"""Tasks of one's own: found by name, called with what they take, checked; and the one in the documentation."""

import dataclasses
import os
import pathlib
import re
import sys
import traceback

import numpy as np
import pytest
import tensorflow as tf
from test_tasks import ROOT

import tasks
import tff_fedavg
from binaries.experiment import Experiment
from tff_fedavg.run_directory import RunDirectory, check_data

TASK = """
import numpy as np
import tasks
from tff_fedavg import ClientDataset

DATASET = ClientDataset.from_arrays([{"x": np.zeros([3, 2], np.float32), "y": np.zeros(3, np.float32)}])

def make(**more):
    return tasks.Task("mine", DATASET, DATASET, lambda: None, "mse", {"mae": "mae"}, **more)
"""


@pytest.fixture
def write(tmp_path):
    def write(code, name="my_task.py"):
        (tmp_path / name).write_text(TASK + code)
        return str(tmp_path / name)

    return write


def test_a_task_is_built_by_a_file_or_its_function(write):
    path = write("def build(): return make()\ndef other(): return make(target=tasks.Target(1.0, 'mae', True))")
    assert tasks.build_task(path).target is None
    assert tasks.build_task(f"{path}:build").name == "mine"
    assert tasks.build_task(f"{path}:other").target == tasks.Target(1.0, metric="mae", lower_is_better=True)


def test_a_task_is_built_by_the_function_of_a_module(write, tmp_path, monkeypatch):
    (tmp_path / "my_package").mkdir()
    write("def build(): return make()", "my_package/my_task.py")
    monkeypatch.syspath_prepend(tmp_path)
    assert isinstance(tasks.build_task("my_package.my_task:build"), tasks.Task)


def test_a_file_is_read_anew_and_hides_no_module(write, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    for name in ("one", "two"):
        path = write(f"def build(): return tasks.Task(**{{**vars(make()), 'name': {name!r}}})", "mnist.py")
        os.utime(path, (1, 1))
        assert tasks.build_task(path).name == name
    assert tasks.build_task("mnist_2nn", data="embedded").name == "mnist_2nn"


def test_a_file_may_have_dataclasses(write):
    code = "import dataclasses\n@dataclasses.dataclass\nclass A:\n    b: 'int' = 1\n"
    assert tasks.build_task(write(f"{code}def build(): return make(checksums=vars(A()))")).checksums == {"b": 1}


SEEN = "def build({}):\n    return make(checksums={{'seen': '', **{{k: str(v) for k, v in locals().items()}}}})"


@pytest.mark.parametrize(
    ("parameters", "settings", "seen"),
    [
        ("", {}, {}),
        ("seed", {"seed": 3}, {"seed": "3"}),
        ("", {"seed": 3}, {}),
        ("clients, data", {}, {"clients": "None", "data": "None"}),
        ("clients=7, data='d', data_dir='here'", {}, {"clients": "7", "data": "d", "data_dir": "here"}),
        ("*, clients=7, partition", {"clients": 2, "partition": "p"}, {"clients": "2", "partition": "p"}),
        ("data_dir, cache_dir=1", {"data_dir": "/a", "cache_dir": "/b"}, {"data_dir": "/a", "cache_dir": "/b"}),
        ("dirichlet_alpha", {"dirichlet_alpha": 2}, {"dirichlet_alpha": "2.0"}),
        ("mine=5", {}, {"mine": "5"}),
        ("**more", {"seed": 1, "data": "embedded"}, {"more": "{'data': 'embedded', 'seed': 1}"}),
    ],
)
def test_it_is_called_with_the_arguments_that_it_declares(write, parameters, settings, seen):
    assert tasks.build_task(write(SEEN.format(parameters)), **settings).checksums == {"seen": "", **seen}


@pytest.mark.parametrize(
    ("parameters", "settings", "seen"),
    [
        (
            "partition, dirichlet_alpha=0.1",
            {"partition": "dirichlet"},
            {"partition": "dirichlet", "dirichlet_alpha": "0.1"},
        ),
        ("partition", {"partition": "dirichlet"}, {"partition": "dirichlet"}),
        ("dirichlet_alpha", {"dirichlet_alpha": 0.5}, {"dirichlet_alpha": "0.5"}),
    ],
)
def test_an_experiment_gives_it_no_argument_that_was_not_given(write, parameters, settings, seen):
    experiment = Experiment(task=write(SEEN.format(parameters)), learning_rate=0.1, **settings)
    assert experiment.build_task().checksums == {"seen": "", **seen}


def test_places_that_are_none_are_the_usual_ones_and_a_file_may_be_a_path(write):
    path = pathlib.Path(write(SEEN.format("data_dir, cache_dir")))
    found = tasks.build_task(path, data_dir=None, cache_dir=None).checksums
    assert found == {
        "seen": "",
        "data_dir": os.path.expanduser(tasks.DATA_DIR),
        "cache_dir": os.path.expanduser(tasks.CACHE_DIR),
    }


def test_a_file_imports_those_beside_it(write, tmp_path, monkeypatch):
    (tmp_path / "helpers_of_my_task.py").write_text("NAME = 'helped'")
    monkeypatch.setattr(sys, "path", list(sys.path))
    code = "import helpers_of_my_task\ndef build(): return dataclasses.replace(make(), name=helpers_of_my_task.NAME)"
    assert tasks.build_task(write(f"import dataclasses\n{code}")).name == "helped"


def test_a_task_that_changes_the_working_directory_changes_it_for_itself(write, tmp_path, capsys):
    before = os.getcwd()
    path = write("import os; os.chdir(os.path.dirname(__file__))\ndef build(): print(os.getcwd()); return make()")
    tasks.build_task(path)
    assert capsys.readouterr().out == f"{tmp_path}\n"
    assert os.getcwd() == before


def test_a_run_on_other_examples_is_not_gone_on_with(write, tmp_path):
    code = "def build():\n    data = ClientDataset.from_arrays([{{'x': [[1.0, {}]], 'y': [0.0]}}])\n"
    code += "    return dataclasses.replace(make(), train=data, test=DATASET)"
    same, other = (tasks.build_task(write(f"import dataclasses\n{code.format(x)}")).checksums for x in (2.0, 3.0))
    again = tasks.build_task(write(f"import dataclasses\n{code.format(2.0)}")).checksums
    assert (same["train"], same["test"]) == (again["train"], again["test"])
    assert same["train"] != other["train"] and same["test"] == other["test"]
    RunDirectory(tmp_path / "run").start({}, same, tasks.Target(None))
    check_data(tmp_path / "run", again)
    with pytest.raises(ValueError, match="holds a run on other data: train differs"):
        check_data(tmp_path / "run", other)
    RunDirectory(tmp_path / "earlier").start({}, {}, tasks.Target(None))  # Of a version that kept none.
    check_data(tmp_path / "earlier", other)


@pytest.mark.parametrize(
    ("code", "settings", "message"),
    [
        ("def build(seed): pass", {"clients": 3}, "clients=3, but NAME does not take it: it takes seed"),
        ("def build(): pass", {"partition": "iid"}, "partition=iid, but NAME does not take it: it takes none"),
        ("def build(seed): pass", {"data_dir": "x"}, "data_dir=x, but NAME does not take it"),
        (
            "def build(mine): pass",
            {},
            r"NAME cannot be called \(missing a required argument: 'mine'\); it can take data, ",
        ),
        ("def build(seed, /): pass", {}, r"NAME cannot be called \('seed' parameter is positional only"),
        ("def build(): return DATASET", {}, "NAME returns a ClientDataset; it has to return a tasks.Task"),
        ("def build(): make()", {}, "NAME returns a NoneType; it has to return a tasks.Task"),
        ("def other(): pass", {}, "task=NAME: NAME has no function build"),
        ("build = make()", {}, "task=NAME: NAME has no function build"),
        (
            "def build(): return make(target=tasks.Target(0.9))",
            {},
            "NAME returns a task with a target for 'accuracy'; its metrics are loss, mae",
        ),
        ("def build(): pass", {"dirichlet_alpha": -1}, "dirichlet_alpha=-1: it must be a number above 0"),
    ],
)
def test_what_does_not_fit_is_an_error_of_a_line(write, code, settings, message):
    path = write(code)
    with pytest.raises(ValueError, match="^" + message.replace("NAME", re.escape(path))) as error:
        tasks.build_task(path, **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such/file.py", "^task=no/such/file.py: there is no file no/such/file.py"),
        ("no/such/file.py:build", "^task=no/such/file.py:build: there is no file no/such/file.py"),
        ("no_package:build", "^task=no_package:build: there is no module no_package on Python's path"),
        ("tasks.no_module:build", ": there is no module tasks.no_module on Python's path"),
        ("tasks.mnist.no_module:build", ": there is no module tasks.mnist.no_module on Python's path"),
        ("tasks.mnist:no_function", "^task=tasks.mnist:no_function: tasks.mnist has no function no_function"),
        ("my_task", "^task=my_task: take one of mnist_2nn, .*, or your own as module:function or file.py:function"),
        (":build", "^task=:build: take one of"),
        (".tasks:build", "^task=.tasks:build: take one of"),
        ("", "^task=: take one of"),
    ],
)
def test_a_name_of_nothing_is_an_error_of_a_line(name, message):
    with pytest.raises(ValueError, match=message):
        tasks.build_task(name)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import no_such_module\ndef build(): return make()", ModuleNotFoundError),
        ("def build(): return {}['key']", KeyError),
        ("def build(): raise ValueError('mine')", ValueError),
        ("def build(): return make(target=0.9)", TypeError),
    ],
)
def test_what_its_own_code_raises_says_where(write, code, error):
    path = write(code)
    with pytest.raises(error) as raised:
        tasks.build_task(path)
    assert any(frame.filename == path for frame in traceback.extract_tb(raised.value.__traceback__))


def test_a_module_whose_own_import_fails_is_not_taken_for_missing(tmp_path, monkeypatch):
    (tmp_path / "imports_nothing.py").write_text("import no_such_module")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        tasks.build_task("imports_nothing:build")


@pytest.fixture(scope="module")
def task():
    return tasks.build_task(str(ROOT / "docs/examples/auto_mpg.py"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", None),
        ("train", []),
        ("test", {"x": np.zeros(3)}),
        ("keras_model_fn", tf.keras.Sequential()),
        ("keras_model_fn", None),
        ("loss", None),
        ("loss", tf.keras.losses.MeanSquaredError),
        ("metrics", ["mae"]),
        ("metrics", {1: "mae"}),
        ("target", 0.9),
        ("label_names", ["a", "b"]),
        ("checksums", None),
    ],
)
def test_a_task_is_checked_when_it_is_made(task, field, value):
    with pytest.raises(TypeError, match=f"^{field} of the task is .*; it must be ") as error:
        dataclasses.replace(task, **{field: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("field", ["train", "test"])
def test_a_task_without_examples_is_refused(task, field):
    nothing = tff_fedavg.ClientDataset.from_arrays([{"x": np.zeros([0, 9], np.float32), "y": np.zeros(0, np.float32)}])
    with pytest.raises(ValueError, match=f"^{field} of the task auto_mpg has no examples$"):
        dataclasses.replace(task, **{field: nothing})


@pytest.mark.parametrize("value", ["0.9", True, float("nan"), float("inf")])
def test_a_target_is_a_number(value):
    with pytest.raises(ValueError, match="the target is .*; it must be a number"):
        tasks.Target(value)


# Labels.


def classifier(train, test, *, loss="sparse_categorical_crossentropy", outputs=10):
    """A task with labels of clients, `[n]` or `[n, time]`, and a model with this many outputs."""

    def build_model():
        layers = tf.keras.layers
        return tf.keras.Sequential([layers.InputLayer([*np.shape(train[0])[1:], 3]), layers.Dense(outputs)])

    def dataset(clients):
        arrays = [{"x": np.zeros([*np.shape(y), 3], np.float32), "y": y} for y in clients]
        return tff_fedavg.ClientDataset.from_arrays(arrays)

    return tasks.Task("mine", dataset(train), dataset(test), build_model, loss, {})


def labels_with(label, place, n=20, dtype=np.int32):
    labels = np.arange(n, dtype=dtype) % 10
    labels[place] = label
    return labels


GOOD = np.arange(30, dtype=np.int32) % 10


@pytest.mark.parametrize(
    "loss",
    [
        "sparse_categorical_crossentropy",
        "SparseCategoricalCrossentropy",
        tf.keras.losses.sparse_categorical_crossentropy,
        tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    ],
)
@pytest.mark.parametrize("label", [10, -1, 2**31 - 1])
def test_a_label_that_the_model_has_no_output_for_is_named_with_its_client_and_place(loss, label, monkeypatch):
    task = classifier([GOOD, GOOD[:0], labels_with(label, 17), GOOD], [GOOD], loss=loss)
    message = (
        f"^client 2 of the training set has the label {label} at position 17, but the model has 10 outputs: take 0"
    )
    for chunk_bytes in (1 << 24, 1, 16 * 33):  # All at once, one by one, in parts across the clients.
        monkeypatch.setattr(tasks.labels, "_CHUNK_BYTES", chunk_bytes)
        with pytest.raises(ValueError, match=message) as error:
            task.build_model(seed=0)
        assert "\n" not in str(error.value)


def test_labels_that_are_floats_are_classes_too_and_nan_is_none():
    labels = labels_with(10, 17, dtype=np.float32)
    with pytest.raises(ValueError, match="^client 0 of the training set has the label 10.0 at position 17, "):
        classifier([labels], [labels]).build_model(seed=0)
    with pytest.raises(ValueError, match="^client 0 of the training set has the label nan at position 17, "):
        classifier([np.where(labels == 10, np.nan, labels)], [labels]).build_model(seed=0)
    classifier([GOOD.astype(np.float64)], [GOOD.astype(np.float64)]).build_model(seed=0)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_labels_of_the_test_set_are_looked_at_too(dtype):
    task = classifier([GOOD.astype(dtype)], [GOOD.astype(dtype), labels_with(11, 0, dtype=dtype)])
    with pytest.raises(ValueError, match="^client 1 of the test set has the label 11 at position 0, "):
        task.build_model(seed=0)


def test_a_sequence_of_labels_is_looked_at_as_a_whole():
    sequences = np.stack([GOOD[:7], GOOD[:7], labels_with(12, 6, n=7)])
    with pytest.raises(ValueError, match="^client 0 of the training set has the label 12 at position 2, "):
        classifier([sequences], [sequences[:2]]).build_model(seed=0)


def test_labels_are_looked_at_as_the_model_gets_them():
    """They are stored as 1 to 10."""
    arrays = [{"pixels": np.zeros([30, 3], np.float32), "digit": GOOD + 1}]

    def dataset(shift):
        return tff_fedavg.ClientDataset.from_arrays(arrays, lambda e: (e["pixels"], e["digit"] - shift))

    task = dataclasses.replace(classifier([GOOD], [GOOD]), train=dataset(1), test=dataset(1))
    task.build_model(seed=0)
    with pytest.raises(ValueError, match="has the label 10 at position 9, "):
        dataclasses.replace(task, test=dataset(0)).build_model(seed=0)


@pytest.mark.parametrize(
    ("loss", "outputs"),
    [
        (tf.keras.losses.SparseCategoricalCrossentropy(ignore_class=-1), 10),
        ("mean_squared_error", 1),
        (lambda y, outputs: tf.reduce_mean(outputs**2), 10),
    ],
)
def test_where_another_loss_takes_the_labels_they_are_left_alone(loss, outputs):
    classifier([labels_with(-1, 3)], [GOOD], loss=loss, outputs=outputs).build_model(seed=0)


def test_a_model_may_have_outputs_of_a_number_that_is_not_known_before():
    def build_model():
        last = tf.keras.layers.Lambda(
            lambda t: tf.reshape(t, [-1, tf.reduce_max(tf.constant([3, 10]) + tf.size(t[:0]))])
        )
        return tf.keras.Sequential([tf.keras.layers.InputLayer([3]), tf.keras.layers.Dense(10), last])

    assert build_model().output_shape == (None, None)
    dataclasses.replace(classifier([GOOD], [GOOD]), keras_model_fn=build_model).build_model(seed=0)


def test_documented_task_has_a_client_for_each_make_and_learns(worker, task):
    assert task.train.num_examples.sum() + task.test.num_examples.sum() == 392
    assert task.train.num_clients > 30
    model = task.build_model(seed=0)
    process = tff_fedavg.build_fed_avg(model, task.train, epochs=5, batch_size=10, learning_rate=0.003)
    evaluate = tff_fedavg.build_fed_eval(model, task.test)
    state = process.initialize()
    clients = [k for k in range(task.train.num_clients) if task.train.num_examples[k] > 10]
    for _ in range(5):
        state, _ = process.next(state, clients)
    errors = [evaluate(s.global_model_weights, [0])[task.target.metric] for s in (process.initialize(), state)]
    # Always the mean is 6.5 miles off.
    assert errors[1] < 4 < errors[0]


def test_documentation_shows_the_code_as_it_is():
    code = (ROOT / "docs/examples/auto_mpg.py").read_text()
    assert len(code.splitlines()) < 60
    assert f"```python\n{code}```" in (ROOT / "docs/own_task.md").read_text()
