"""Flags that are numbers: what they do not take is refused with the range, and shown as it was typed."""

from typing import Any

from absl import flags

from binaries.experiment.setting import Setting


class Number(flags.ArgumentParser):
    """The parser of a flag, for `flags.DEFINE`.

    Args:
      setting: What the flag takes.
    """

    def __init__(self, setting: Setting):
        super().__init__()
        self._setting = setting
        self.syntactic_help = setting.range

    def parse(self, argument: Any) -> int | float:
        try:
            value = self._setting.kind(argument)
        except ValueError:
            value = None
        if not self._setting.allows(value):
            raise ValueError(f"take {self._setting.range}")
        return value

    def flag_type(self) -> str:
        return self._setting.kind.__name__


def integer(low: int, high: int) -> Number:
    """Returns the parser of integers from `low` to `high`."""
    return Number(Setting("", takes=(low, high), kind=int))


def real(low: float, high: float) -> Number:
    """Returns the parser of numbers from `low` to `high`."""
    return Number(Setting("", takes=(low, high), kind=float))
