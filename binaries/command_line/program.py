"""What the programs have in common: flags before TensorFlow, an error is one line, an end without noise."""

import gc
import os
import signal
import sys
from collections.abc import Callable

from absl import app, flags, logging

_FAILED = 2


def run(name: str, main: Callable[..., None], *, takes: str | None = None) -> None:
    """Parses the flags, calls `main`, and ends the process: with one line on stderr if something went wrong.

    TensorFlow is to be imported in `main` only: it reads its log level then, and bad flags are told at once.

    Args:
      name: Name of the program, which starts that line.
      main: Does the work. The text of a `ValueError`, `OSError`, `RuntimeError` or `KeyboardInterrupt` that it raises
        is for the user.
      takes: What the arguments are that are no flags, if there are to be any: `main` gets a list of them.
    """
    # Not `app.run`: below it Keras 2.14 makes no symbolic inputs when TensorFlow was not imported before.
    app.define_help_flags()
    try:
        arguments = flags.FLAGS(sys.argv)[1:]
        if arguments and not takes:
            raise ValueError(f"unknown argument {arguments[0]!r}: flags start with --")
        if takes and not arguments:
            raise ValueError(f"{takes} is missing")
        verbose = logging.get_verbosity() > logging.WARNING
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "0" if verbose else "3")  # The TFF worker inherits it.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        main(arguments) if takes else main()
    except KeyboardInterrupt as e:
        _fail(name, str(e) or "interrupted", 128 + signal.SIGINT)
    except (flags.Error, ValueError, OSError, RuntimeError) as e:
        if logging.get_verbosity() > logging.WARNING:
            raise
        _fail(name, first_line(e), _FAILED)
    finally:
        if "tensorflow_federated" in sys.modules:
            import tff_fedavg.runtime  # noqa: F401  It keeps TFF from printing an error at the exit.
        gc.freeze()  # Python's last collections would take a second or two on what TensorFlow has imported.


def first_line(error: Exception) -> str:
    """Returns the first line of an error's text, or its type where there is none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _fail(name: str, message: str, status: int) -> None:
    print(f"{name}: {message}", file=sys.stderr)
    sys.exit(status)
