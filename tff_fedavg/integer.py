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
    if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} is {value!r}; it must be an integer")
    if not lowest <= operator.index(value) <= highest:
        raise ValueError(f"{name} is {value}; it must be from {lowest:,} to {highest:,}")
    return operator.index(value)
