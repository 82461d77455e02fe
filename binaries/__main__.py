"""The programs as commands of one: `tff-fedavg train --rounds=9` is `python -m binaries.train --rounds=9`."""

import ast
import difflib
import os
import pathlib
import re
import signal
import sys

import tff_fedavg

_NAME = "tff-fedavg"
_HELP = f"""Federated Averaging on TensorFlow Federated.

  {_NAME} COMMAND FLAGS
  {_NAME} COMMAND -h

"""


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Without a traceback.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    command, *arguments = sys.argv[1:] or [""]
    programs = _programs()
    if command in programs:
        # With -P a directory of the user's that is called "tasks" does not take the place of the package.
        os.execv(sys.executable, [sys.executable, "-P", "-m", f"binaries.{command}", *arguments])
    elif command in ("-h", "--help"):
        print(_HELP + "\n".join(f"  {name:11}{_purpose(path)}" for name, path in programs.items()))
    elif command == "--version":
        print(f"tff_fedavg {tff_fedavg.__version__}")
    else:
        close = difflib.get_close_matches(command, programs, n=1)
        hint = f"did you mean {close[0]}?" if close else f"see {_NAME} -h"
        said = f"unknown command {command}" if command else "COMMAND is missing"
        print(f"{_NAME}: {said}: {hint}", file=sys.stderr)
        sys.exit(2)


def _programs() -> dict[str, pathlib.Path]:
    return {path.stem: path for path in sorted(pathlib.Path(__file__).parent.glob("[a-z]*.py"))}


def _purpose(path: pathlib.Path) -> str:
    """Returns how the program describes itself, up to the first comma or the like, without its import."""
    return re.split("[,;:.]", ast.get_docstring(ast.parse(path.read_text("utf-8"))), maxsplit=1)[0]


if __name__ == "__main__":
    main()
