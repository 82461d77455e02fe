"""What is known of a field of an experiment: what it is, what it takes, and its default."""

import dataclasses
import numbers
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is known of a field of `Experiment`, besides its name.

    Attributes:
      help: What it is, and its default where that is not a constant.
      default: The default. A mapping has it by algorithm, None where there is none; a function gets the experiment, of
        which the fields above are known.
      takes: The smallest and the largest number, or the texts to choose from.
      above: Whether it must be more than the smallest number.
      below: Whether it must be less than the largest.
      needs: Name of a field above, and those of its values with which this one can be chosen: any but None where none
        is named. With others this one has its default.
      may_differ: Whether a run may go on with another value: it says when to stop or look, or in which order to sum up.
      kind: Its type without None, which the annotation of the field says: str, bool, int or float.
    """

    help: str
    default: Any | Mapping[str, Any] | Callable[[Any], Any] = None
    takes: tuple[Any, ...] = ()
    above: bool = False
    below: bool = False
    needs: tuple[str | None, ...] = ()
    may_differ: bool = False
    kind: type = str

    @property
    def constant_default(self) -> Any:
        """The default if it is a constant, else None."""
        return None if callable(self.default) or isinstance(self.default, Mapping) else self.default

    def default_for(self, experiment: Any) -> Any:
        """Returns the default in this experiment."""
        if isinstance(self.default, Mapping):
            return self.default.get(experiment.algorithm)
        return self.default(experiment) if callable(self.default) else self.default

    @property
    def range(self) -> str:
        """What it takes, in words."""
        if self.kind is bool:
            return "true or false"
        if self.kind is str:
            return f"one of {', '.join(self.takes)}" if self.takes else "a name"
        low, high = (f"{bound:,}" if self.kind is int else f"{bound:g}" for bound in self.takes)
        number = "an integer" if self.kind is int else "a number"
        if self.above:
            return f"{number} above {low}, at most {high}"
        return f"{number} from {low} to {'below ' * self.below}{high}"

    def allows(self, value: Any) -> bool:
        """Whether a value is in the range; NaN and infinities are in none."""
        if self.kind in (bool, str):
            return isinstance(value, self.kind) and (not self.takes or value in self.takes)
        number = numbers.Integral if self.kind is int else numbers.Real
        if not isinstance(value, number) or isinstance(value, bool):
            return False
        low, high = self.takes
        return low <= value <= high and not (self.above and value == low) and not (self.below and value == high)

    def lacking(self, experiment: Any) -> str:
        """Returns what it needs and the experiment lacks, as a flag; empty if nothing."""
        if not self.needs:
            return ""
        name, *values = self.needs
        found = getattr(experiment, name)
        if found in values or (not values and found is not None):
            return ""
        return f"--{name}={' or '.join(filter(None, values))}" if values else f"--{name}"


def field(help: str, default: Any = None, **more: Any) -> Any:
    """Returns a field of `Experiment`. Args: As the attributes of `Setting`, but for the kind."""
    setting = Setting(help, default, **more)
    return dataclasses.field(default=setting.constant_default, metadata={"setting": setting})
