"""The flags that say what an experiment is: one for each field of `Experiment`."""

from typing import Any

from absl import flags

from binaries.command_line.number import Number
from binaries.experiment.record import SETTINGS


def define(*names: str) -> None:
    """Defines the flags of these fields; without names, of all. `Experiment` checks whether they go together."""
    for name in names or SETTINGS:
        setting = SETTINGS[name]
        if setting.kind in (int, float):
            flags.DEFINE(Number(setting), name, setting.constant_default, setting.help)
        elif setting.kind is bool:
            flags.DEFINE_boolean(name, setting.constant_default, setting.help)
        else:
            takes = f" Takes {setting.range}." if setting.takes else ""
            flags.DEFINE_string(name, setting.constant_default, setting.help + takes)


def given() -> dict[str, Any]:
    """Returns the values of those flags that were given, by name."""
    defined = [name for name in SETTINGS if name in flags.FLAGS]
    return {name: flags.FLAGS[name].value for name in defined if flags.FLAGS[name].present}
