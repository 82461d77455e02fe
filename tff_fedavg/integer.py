"""Arguments that are integers: of Python's type, or of any of NumPy's."""

import operator
from typing import Any

import numpy as np

INT32_MAX = 2**31 - 1  # In which rounds, steps and examples are counted.


def as_integer(name: str, value: Any, lowest: int = 1, highest: int = INT32_MAX) -> int:
    """Returns an integer argument, of whatever type, as an int.

    Args:
      name: Its name, for errors.
      value: The argument.
      lowest: The lowest that it may be.
      highest: The highest that it may be.

    Raises:
      TypeError: If it is no integer.
      ValueError: If it is out of range.
    """
    try:
        if isinstance(value, (bool, np.bool_)):  # An integer to Python.
            raise TypeError("it is a bool")
        integer = operator.index(value)
    except TypeError as e:
        raise TypeError(f"{name} is {_shown(value)}; it must be an integer") from e
    if not lowest <= integer <= highest:
        raise ValueError(f"{name} is {integer}; it must be from {lowest:,} to {highest:,}")
    return integer


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 and "\n" not in shown else f"a {type(value).__name__}"
