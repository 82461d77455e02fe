"""The command `tff-fedavg`, which starts the programs."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from test_program import PROGRAMS

COMMAND = pathlib.Path(sys.executable).parent / "tff-fedavg"


def run(*arguments, **kwargs):
    result = subprocess.run([COMMAND, *arguments], capture_output=True, text=True, timeout=60, **kwargs)
    return result.returncode, result.stdout, result.stderr


def test_help_has_a_line_for_each_program_and_is_quick():
    started = time.monotonic()
    status, output, errors = run("-h")
    assert time.monotonic() - started < 1
    assert (status, errors) == (0, "")
    programs = output.split("\n\n")[-1].splitlines()
    assert {line.split()[0] for line in programs} == set(PROGRAMS)
    assert all(len(line.split()) > 2 and len(line) < 80 for line in programs)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_command_is_the_program_with_its_own_flags(name):
    with_m = subprocess.run([sys.executable, "-m", f"binaries.{name}", "-h"], capture_output=True, text=True)
    assert run(name, "-h") == (0, with_m.stdout, "")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "tff-fedavg: COMMAND is missing: see tff-fedavg -h"),
        (["trian"], "tff-fedavg: unknown command trian: did you mean train?"),
        (["--task=mnist_2nn"], "tff-fedavg: unknown command --task=mnist_2nn: see tff-fedavg -h"),
        (["train", "--lr=0.1"], "train: unknown flag --lr: did you mean --learning_rate?"),
    ],
)
def test_errors_are_one_line(arguments, told):
    assert run(*arguments) == (2, "", f"{told}\n")


def test_version_is_that_of_the_programs():
    assert run("--version") == run("train", "--version")


def test_a_directory_of_the_users_does_not_take_the_place_of_a_package(tmp_path):
    for name in ("tasks", "binaries"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('not this one')")
    assert run("train", "--version", cwd=tmp_path)[0] == 0


def test_a_task_of_ones_own_is_found_in_the_current_directory_as_module_and_as_file(tmp_path):
    (tmp_path / "my_tasks").mkdir()
    (tmp_path / "my_tasks" / "broken.py").write_text("def build():\n    return 'no task'\n")
    for task in ("my_tasks.broken:build", "my_tasks/broken.py"):
        told = run("train", f"--task={task}", "--learning_rate=0.1", cwd=tmp_path)[2].splitlines()[-1]
        assert told == f"train: {task} returns a str; it has to return a tasks.Task"


def test_ctrl_c_while_a_program_is_being_loaded_is_no_traceback(tmp_path):
    (tmp_path / "absl.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)")
    started = subprocess.Popen(
        ["env", "--default-signal=INT", COMMAND, "train"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert started.stdout.readline() == "ready\n", started.stderr.read()
    started.send_signal(signal.SIGINT)
    assert started.communicate(timeout=5) == ("", "")
    assert started.returncode == -signal.SIGINT


def test_help_that_nobody_reads_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    started = subprocess.run([COMMAND, "-h"], stdout=writer, stderr=subprocess.PIPE, timeout=5)
    os.close(writer)
    assert (started.returncode, started.stderr) == (-signal.SIGPIPE, b"")
