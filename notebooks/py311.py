"""An IPython extension: the cells of a notebook run in the project's own environment, whatever Python its kernel has.

TensorFlow Federated has wheels for Python 3.11 only, and Colab's kernel, like most, is of another one. The first cell
of the notebooks loads this extension there. It makes the environment, unless there is one, starts a kernel of it, and
has all cells that come later run in that kernel. What the kernel says is passed on as it is: text, pictures, tables,
errors, help, completions, questions of `input()`. An interrupt goes to it, and its state is kept; it ends with the
notebook's own kernel. What does not work is what a front end would talk back to: ipywidgets.

A cell that starts with %%colab still runs in the notebook's own Python, such as for Colab's `google.colab.files`.

This file is run by the notebook's own kernel: Python 3.8 or later with IPython 7.34 or later, without any package of
the project.
"""

import atexit
import contextlib
import fcntl
import getpass
import os
import pathlib
import signal
import subprocess
import tempfile
import time

import jupyter_client
import zmq

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_SECONDS_TO_START = 120
_SECONDS_TO_END = 2  # Jupyter kills the notebook's own kernel after five.
_PUBLISHED = {"stream", "display_data", "execute_result", "update_display_data", "clear_output"}


def load_ipython_extension(shell):
    _make_environment()
    kernel = _Kernel(shell)

    def in_project(line, cell):
        kernel.run(cell)

    def send_to_project(lines):
        # Colab and VS Code have hidden cells, with which they look at the kernel that they know.
        request = shell.parent_header.get("content", {})
        if request.get("silent") or not request.get("store_history", True):
            return lines
        return lines[1:] if lines and lines[0].startswith("%%colab") else ["%%in_project\n", *lines]

    shell.register_magic_function(in_project, "cell")
    shell.input_transformers_cleanup.append(send_to_project)
    shell.kernel.do_complete = kernel.complete
    shell.kernel.do_inspect = kernel.inspect


def _make_environment():
    """Has `make` bring what is missing, once: other notebooks wait for it."""
    if not (_ROOT / ".venv/jupyter").exists():
        print(f"Python 3.11 and the project's packages, 2.5 GB, are brought into {_ROOT}: a minute or two.", flush=True)
    with open(_ROOT / "Makefile") as makefile:
        fcntl.flock(makefile, fcntl.LOCK_EX)
        make = subprocess.run(
            ["make", ".venv/jupyter"], cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    if make.returncode:
        raise RuntimeError(f"make .venv/jupyter, in {_ROOT}, failed:\n{make.stdout}")


class _Kernel:
    """A kernel of the project's environment, and the notebook's own shell, through which it meets the front end.

    The client that comes with jupyter_client is not used: in a kernel, whose event loop runs, it changes that loop, and
    an interrupt may have it lose a message.
    """

    def __init__(self, shell):
        self._shell = shell
        self._asks = False
        self._start()
        atexit.register(self._end)

    def _start(self):
        self._connection = jupyter_client.KernelManager()
        self._connection.write_connection_file()
        environment = {
            **os.environ,
            "PATH": f"{_ROOT}/.venv/bin:{os.environ['PATH']}",  # Of `!python`.
            "VIRTUAL_ENV": f"{_ROOT}/.venv",
            "JPY_PARENT_PID": str(os.getpid()),  # It ends when this process was killed.
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # Of a debugger that is not used, and that warns.
            "TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "3"),
        }
        environment.pop("PYTHONPATH", None)  # Of another Python.
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [f"{_ROOT}/.venv/bin/python", "-m", "ipykernel_launcher", "-f", self._connection.connection_file],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,  # Interrupts are passed on to it, and should come once.
        )
        identity = self._connection.session.bsession  # What it asks is for whom a request is from.
        self._requests = self._connection.connect_shell(identity=identity)
        self._questions = self._connection.connect_stdin(identity=identity)
        self._published = self._connection.connect_iopub()
        self._poller = zmq.Poller()
        for socket in (self._requests, self._questions, self._published):
            self._poller.register(socket, zmq.POLLIN)
        # What it publishes before it knows of this subscriber is lost.
        deadline = time.monotonic() + _SECONDS_TO_START
        while not self._published.poll(200):
            self._connection.session.send(self._requests, "kernel_info_request", {})
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._log.seek(0)
                raise RuntimeError(f"The kernel of {_ROOT}/.venv did not start:\n{self._log.read()}")

    def _end(self):
        self._connection.session.send(self._connection.connect_control(), "shutdown_request", {"restart": False})
        try:
            self._process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def run(self, cell):
        """Runs a cell; raises the error that it ended with."""
        with self._interrupts_passed_on():
            # The number of the cell, which tracebacks name. IPython 9 has the next one in its own execution_count.
            number = f"get_ipython().execution_count = {len(self._shell.user_ns['In']) - 1}"
            self._request("execute_request", {"code": number, "silent": True})
            may_ask = self._shell.parent_header.get("content", {}).get("allow_stdin", False)
            # With stop_on_error a cell that is sent soon after an interrupt would be dropped.
            reply = self._request(
                "execute_request", {"code": cell, "silent": False, "allow_stdin": may_ask, "stop_on_error": False}
            )
        for payload in reply.get("payload", []):  # Help, and such.
            self._shell.payload_manager.write_payload(payload)
        if reply["status"] == "error":
            raise _error(reply["ename"], reply["evalue"], reply["traceback"])

    def complete(self, code, cursor_pos):
        return self._request("complete_request", {"code": code, "cursor_pos": cursor_pos})

    def inspect(self, code, cursor_pos, detail_level=0, omit_sections=()):
        return self._request("inspect_request", {"code": code, "cursor_pos": cursor_pos, "detail_level": detail_level})

    def _request(self, kind, content):
        """Returns the content of the reply, when all that was published until then has been passed on."""
        session = self._connection.session
        request = session.send(self._requests, kind, content)["header"]["msg_id"]
        reply, ended = None, False
        while reply is None or not ended:
            sockets = dict(self._poller.poll(1000))
            if not sockets and self._process.poll() is not None:
                self._start()
                raise RuntimeError("The kernel died. It has been started anew: run the cells before this one again.")
            for socket in sockets:
                _, message = session.recv(socket)
                if message["parent_header"].get("msg_id") != request:
                    continue
                if socket is self._requests:
                    reply = message["content"]
                elif socket is self._questions:
                    self._ask(message["content"])
                elif message["msg_type"] == "status":
                    ended = message["content"]["execution_state"] == "idle"
                elif message["msg_type"] in _PUBLISHED:
                    self._publish(message)
        return reply

    def _publish(self, message):
        publisher = self._shell.display_pub
        publisher.session.send(
            publisher.pub_socket,
            message["msg_type"],
            message["content"],
            parent=publisher.parent_header,
            ident=publisher.topic,
        )

    def _ask(self, question):
        self._asks = True
        try:
            answer = (getpass.getpass if question["password"] else input)(question["prompt"])
        except KeyboardInterrupt:
            return
        finally:
            self._asks = False
        self._connection.session.send(self._questions, "input_reply", {"value": answer})

    @contextlib.contextmanager
    def _interrupts_passed_on(self):
        def pass_on(number, frame):
            self._process.send_signal(number)
            if self._asks:
                raise KeyboardInterrupt

        before = signal.signal(signal.SIGINT, pass_on)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def _error(name, message, traceback):
    """An exception that looks like the one in the other kernel: IPython shows the traceback that it is given."""
    return type(name, (Exception,), {"_render_traceback_": lambda self: traceback})(message)
