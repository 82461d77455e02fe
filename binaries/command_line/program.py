"""What the programs have in common: flags before TensorFlow, an error is one line, an end without noise."""

import difflib
import gc
import itertools
import os
import re
import select
import signal
import sys
import tempfile
from collections.abc import Callable
from typing import TextIO

from absl import flags, logging

import tff_fedavg
from binaries.command_line import signals
from tff_fedavg.scratch import scratch_directory

_HELP = flags.DEFINE_boolean("help", False, "Shows what the program does, and its flags.", short_name="h")
_VERSION = flags.DEFINE_boolean("version", False, "Shows the version.")

_FAILED = 2
_OF_ALL = {"help", "version", "verbosity", "flagfile", "undefok"}
_FLAGS_OF_ALL = "--verbosity=1 shows TensorFlow's messages, and tracebacks; --flagfile=FILE reads flags from a file."
# Of new objects, for Python to look for garbage: with its own 700 that is a fifth of the import of TensorFlow and TFF.
OBJECTS_BETWEEN_COLLECTIONS = 10_000
# TensorFlow's lines before that of the error itself.
_PREAMBLE = re.compile(r"\s*$|Graph execution error:|Detected at |Node: |\s+File ")
# How messages begin that TensorFlow makes of what a model's own code raises: they, too, are of many lines.
_MODEL_CODE = re.compile("in user code:|Exception encountered when calling ")
# What absl and TensorFlow put into their messages.
_SAID_OTHERWISE = {
    r"^(flag |ERROR:: )": "",
    r"invalid literal for int\(\).*": "take an integer",
    r"\('Non-boolean argument .*": "take true or false",
    r"\{\{function_node .*?\}\} | \[Op:\w+\].*": "",
}
# The paper's symbols, and what they are elsewhere.
_OTHER_NAMES = {
    "C": "client_fraction",
    "E": "local_epochs",
    "B": "batch_size",
    "K": "clients",
    "eta": "learning_rate",
    "lr": "learning_rate",
}


def run(name: str, main: Callable[..., None], *, takes: str | None = None) -> None:
    """Parses the flags, calls `main`, and ends the process: with one line on stderr if something went wrong.

    TensorFlow is to be imported in `main` only: it reads its log level then, and bad flags are told at once. A signal
    raises an exception in `main`: see `signals.py`.

    Args:
      name: Name of the program, which starts that line.
      main: Does the work. The text of a `ValueError`, `OSError`, `RuntimeError` or `KeyboardInterrupt` that it raises
        is for the user.
      takes: What the arguments are that are no flags, if there are to be any: `main` gets a list of them.
    """
    gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS)
    _open_missing_streams()
    try:
        signals.catch()
        _run(main, takes)
        print(end="", flush=True)  # While an error of it is told.
        signals.raise_received()  # It may have been swallowed just now.
    except BaseException as e:
        signals.release()
        if (ending := _ending(e)) is None:
            raise
        status, message = ending
        _tell(f"{name}: {message}\n" if message else "")
        sys.exit(status)
    else:
        signals.release()
    finally:
        if "tensorflow_federated" in sys.modules:
            import tff_fedavg.default_context  # noqa: F401  It keeps TFF from printing an error at the exit.
        gc.freeze()  # Python's last collections would take a second or two on what TensorFlow has imported.


def first_line(error: BaseException) -> str:
    """Returns the first line that says what an error is, with flags as they are typed; its type where none does."""
    if isinstance(error, flags.UnrecognizedFlagError):
        return f"unknown flag --{error.flagname}: {_hint(error.flagname)}"
    line = next(itertools.filterfalse(_PREAMBLE.match, str(error).splitlines()), type(error).__name__)
    for pattern, said in _SAID_OTHERWISE.items():
        line = re.sub(pattern, said, line)
    return re.sub(rf"(?<![\w'/-])({'|'.join(_long_names())})=", r"--\1=", line)


def _open_missing_streams() -> None:
    """Has a stream that is closed (`2>&-`) lead nowhere: else the next file that is opened takes its place.

    What the encoding of the others lacks is escaped in them.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
        elif mode == "w":
            getattr(sys, name).reconfigure(errors="backslashreplace")


def _run(main: Callable[..., None], takes: str | None) -> None:
    # Not `app.run`: below it Keras 2.14 makes no symbolic inputs when TensorFlow was not imported before.
    arguments = flags.FLAGS(sys.argv)[1:]
    if _HELP.value:
        of_program = flags.FLAGS.main_module_help().strip().partition("\n")[2]  # Without the name of the module.
        print(f"{sys.modules['__main__'].__doc__}\n{of_program}\n\n{_FLAGS_OF_ALL}")
        return
    if _VERSION.value:
        print(f"tff_fedavg {tff_fedavg.__version__}")
        return
    key_flags = flags.FLAGS.get_key_flags_for_module(sys.argv[0])
    for flag in key_flags:
        if flag.present and flag.value in ("", []):
            raise ValueError(f"--{flag.name}= is empty: give a value, or leave it out")
    taken = {flag.name for flag in key_flags} | _OF_ALL
    for name in flags.FLAGS:  # What absl and others define would have no effect.
        if flags.FLAGS[name].present and flags.FLAGS[name].name not in taken:
            raise flags.UnrecognizedFlagError(name)
    if arguments and not takes:
        raise ValueError(f"unknown argument {arguments[0]!r}: flags start with --")
    if takes and not arguments:
        raise ValueError(f"{takes} is missing")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "0" if _is_verbose() else "3")  # The TFF worker inherits it.
    # For what TensorFlow leaves when it is killed, too: it goes with the next program.
    with scratch_directory() as directory:
        os.environ["TMPDIR"] = tempfile.tempdir = str(directory)
        # Models and pictures are the same whatever is set for the user's own: keras.json has the order of axes and the
        # dtype. Pictures need neither a display nor a home.
        os.environ.update(KERAS_HOME=str(directory), MATPLOTLIBRC=os.devnull, MPLBACKEND="agg")
        if not os.access(os.path.expanduser("~"), os.W_OK):
            os.environ.setdefault("MPLCONFIGDIR", str(directory))
        main(arguments) if takes else main()


def _ending(error: BaseException) -> tuple[int, str] | None:
    """Returns the exit status and the line for an error; None if its traceback is to be seen."""
    if isinstance(error, KeyboardInterrupt) or signals.received() is not None:
        number = signals.received() or signal.SIGINT
        message = "interrupted" if number == signal.SIGINT else ""
        if str(error) and isinstance(error, (KeyboardInterrupt, OSError)):  # What the signal has broken off is no news.
            message = first_line(error)
        return 128 + number, message
    if isinstance(error, BrokenPipeError) and _nobody_reads(sys.stdout):
        return 128 + signal.SIGPIPE, ""
    if isinstance(error, SystemExit):  # It would pass for the end of the work.
        return _FAILED, "the program was ended from within, as by a sys.exit in the task's file"
    is_for_the_user = isinstance(error, (flags.Error, ValueError, OSError, RuntimeError)) or _is_tensorflows(error)
    if not is_for_the_user or _MODEL_CODE.match(str(error)) or _is_verbose():
        return None
    return _FAILED, first_line(error)


def _tell(line: str) -> None:
    for stream, text in ((sys.stdout, ""), (sys.stderr, line)):
        try:
            print(text, end="", file=stream, flush=True)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # For what Python writes once more at its end.


def _hint(name: str) -> str:
    close = difflib.get_close_matches(name, _long_names(), n=1, cutoff=0.5)
    meant = next((known for known in (_OTHER_NAMES.get(name), *close) if known in flags.FLAGS), None)
    return f"did you mean --{meant}?" if meant else "see --help"


def _long_names() -> list[str]:
    absls_own = flags.FLAGS.flags_by_module_dict()[logging.__name__]
    names = {name for name in flags.FLAGS if len(name) > 1} - {flag.name for flag in absls_own}
    return sorted(names | _OF_ALL)


def _is_verbose() -> bool:
    return logging.get_verbosity() > logging.WARNING


def _is_tensorflows(error: BaseException) -> bool:
    if "tensorflow" not in sys.modules:
        return False
    import tensorflow as tf

    return isinstance(error, tf.errors.OpError)


def _nobody_reads(pipe: TextIO) -> bool:
    """Whether the other end of a pipe is closed."""
    poll = select.poll()
    poll.register(pipe, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
