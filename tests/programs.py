"""Runs the programs of this repository as a user does, to their ends."""

import multiprocessing
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile

from conftest import ROOT

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tensorflow_federated", "matplotlib.pyplot"])


def run_alone(module, *flags, timeout=120, **kwargs):
    """Runs `python -m module`, for what a start promises, such as no noise."""
    command = [sys.executable, "-m", module, *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, **kwargs)


def run_at_once(module, *flags, **kwargs):
    """Does the same where no program gets far with TensorFlow, whose import takes seconds."""
    with tempfile.TemporaryDirectory() as directory:
        pathlib.Path(directory, "tensorflow.py").write_text("raise AssertionError('TensorFlow is imported')")
        return run_alone(module, *flags, env={**os.environ, "PYTHONPATH": directory}, **kwargs)


def run_program(module, *flags, timeout=120, before=None):
    """Runs it in a process with the imports of TensorFlow and TFF, which take half the time of a start.

    Before that `before` is called in it, a function of a module.
    """
    arguments = [module, *map(str, flags)]
    with tempfile.TemporaryDirectory() as directory:
        output, errors = (pathlib.Path(directory, name) for name in ("stdout", "stderr"))
        process = _processes.Process(target=_run, args=(before, arguments, output, errors))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(arguments, timeout, output.read_bytes(), errors.read_bytes())
        return subprocess.CompletedProcess(arguments, process.exitcode, output.read_text(), errors.read_text())


def _run(before, arguments, *outputs):
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(ROOT)
    if before:
        before()
    sys.argv = arguments
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
