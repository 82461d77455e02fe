"""The flags that say what an experiment is: one for each field of `Experiment`."""

from typing import Any

from absl import flags

from binaries.experiment.record import SETTINGS

_DEFINE = {
    str: flags.DEFINE_string,
    bool: flags.DEFINE_boolean,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
}


def define(*names: str) -> None:
    """Defines the flags of these fields; without names, of all. `Experiment` checks what they get."""
    for name in names or SETTINGS:
        setting = SETTINGS[name]
        takes = f" Takes {setting.range}." if setting.takes else ""
        _DEFINE[setting.kind](name, setting.constant_default, setting.help + takes)


def given() -> dict[str, Any]:
    """Returns the values of those flags that were given, by name."""
    defined = [name for name in SETTINGS if name in flags.FLAGS]
    return {name: flags.FLAGS[name].value for name in defined if flags.FLAGS[name].present}
