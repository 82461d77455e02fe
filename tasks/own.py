"""Tasks of one's own: functions that build a `Task`, in any module or file, found by name.

What goes wrong in finding and calling one is an error of one line. What its own code raises is left as it is.
"""

import dataclasses
import importlib
import importlib.machinery
import importlib.util
import inspect
import os
import pathlib
import re
import sys
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from tasks.files import sha256

if TYPE_CHECKING:
    from tasks.task import Task

_MODULE_AND_FUNCTION = re.compile(r"\w+(\.\w+)*:\w+")
_FILE_AND_FUNCTION = re.compile(r"(.+\.py)(?::(\w+))?")
_DEFAULT_FUNCTION = "build"


def is_own(name: str) -> bool:
    """Whether a name is "package.module:function", "path/to/file.py:function" or "path/to/file.py"."""
    return any(form.fullmatch(name) for form in (_FILE_AND_FUNCTION, _MODULE_AND_FUNCTION))


def check_file(name: str) -> None:
    """Raises a `ValueError` if a name, as for `is_own`, is of a file that does not exist."""
    file = _FILE_AND_FUNCTION.fullmatch(name)
    if file and not pathlib.Path(file[1]).expanduser().is_file():
        raise ValueError(f"task={name}: there is no file {file[1]}")


def checksum(name: str) -> str | None:
    """Returns SHA-256 of the file that a task of one's own, which has been built, is in; None of another task."""
    if not is_own(name):
        return None
    file = _FILE_AND_FUNCTION.fullmatch(name)
    return sha256(pathlib.Path(file[1]).expanduser() if file else sys.modules[name.partition(":")[0]].__file__)


def build(name: str, arguments: Mapping[str, Any], given: Collection[str]) -> "Task":
    """Builds a task with the function of this name.

    Args:
      name: As for `is_own`.
      arguments: What the function can take, by name. It is called with what it declares; with an argument that is not
        in `given`, only where it has no default of its own.
      given: The arguments that were given, which it has to take, but for the seed: that is for the training, too.

    Raises:
      ValueError: If there is no such function, it does not take these arguments, or it does not return a `Task`.
    """
    from tasks.task import LOSS, Task  # Imports TensorFlow.

    function = _find(name)
    signature = inspect.signature(function)
    parameters = signature.parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    declared = [argument for argument in arguments if takes_any or argument in parameters]
    for argument in given:
        if argument not in (*declared, "seed"):
            takes = ", ".join(declared) or "none"
            raise ValueError(f"{argument}={arguments[argument]}, but {name} does not take it: it takes {takes}")
    required = [p.name for p in parameters.values() if p.default is p.empty]
    passed = {argument: arguments[argument] for argument in declared if argument in (*given, *required)}
    try:
        signature.bind(**passed)
    except TypeError as e:
        raise ValueError(f"{name} cannot be called ({e}); it can take {', '.join(arguments)}, by name") from e
    task = function(**passed)
    if not isinstance(task, Task):
        raise ValueError(f"{name} returns a {type(task).__name__}; it has to return a tasks.Task")
    if task.target is not None and task.target.metric not in (LOSS, *task.metrics):
        metrics = ", ".join((LOSS, *task.metrics))
        raise ValueError(f"{name} returns a task with a target for {task.target.metric!r}; its metrics are {metrics}")
    return task if task.checksums else dataclasses.replace(task, checksums=_checksums(task))


def _checksums(task: "Task") -> dict[str, str]:
    """Returns SHA-256 of what is said of all examples, for a run to go on with the same."""
    return {"train": sha256(task.train.manifest), "test": sha256(task.test.manifest)}


def _find(name: str) -> Callable[..., Any]:
    check_file(name)
    if file := _FILE_AND_FUNCTION.fullmatch(name):
        source, function = file[1], file[2] or _DEFAULT_FUNCTION
        module = _load(pathlib.Path(source).expanduser())
    else:
        source, _, function = name.partition(":")
        _look_in(os.getcwd())  # Of the installed command.
        try:
            module = importlib.import_module(source)
        except ModuleNotFoundError as e:
            if not f"{source}.".startswith(f"{e.name}."):  # It is there, and what it imports is not.
                raise
            raise ValueError(f"task={name}: there is no module {e.name} on Python's path") from e
    if not callable(getattr(module, function, None)):
        raise ValueError(f"task={name}: {source} has no function {function}")
    return getattr(module, function)


def _look_in(directory: str) -> None:
    """Has Python look for modules in a directory, too: last, so that they take no package's place."""
    if directory not in sys.path:
        sys.path.append(directory)


class _Source(importlib.machinery.SourceFileLoader):
    """Leaves bytecode alone: what is of an earlier text is taken for that of one of the same length and second."""

    def get_code(self, fullname: str):
        return self.source_to_code(self.get_data(self.path), self.path)


def _load(path: pathlib.Path):
    """Imports a file under a name that hides no other module."""
    name = f"own_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, loader=_Source(name, str(path)))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Where dataclasses look for it.
    _look_in(str(path.parent.absolute()))  # As where `python FILE` runs it.
    spec.loader.exec_module(module)
    return module
