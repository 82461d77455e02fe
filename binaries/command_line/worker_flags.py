"""The flags that say which workers run the computations."""

from absl import flags

from binaries.command_line.number import real
from binaries.experiment.workers import LONGEST_TIMEOUT, Workers

_DEFAULT = Workers()

_WORKERS = flags.DEFINE_list(
    "workers", [], "Workers that run already, on this machine or others: where binaries.worker says that they listen."
)
_WORKER_TIMEOUT = flags.DEFINE(
    real(0, LONGEST_TIMEOUT),
    "worker_timeout",
    _DEFAULT.timeout,
    "Seconds after which the program ends if none of the --workers can be reached.",
)
_CONFINED = flags.DEFINE_boolean(
    "confined",
    _DEFAULT.confined,
    "Whether nobody else can reach the worker that the program starts; by default where the kernel allows it.",
)


def chosen() -> Workers:
    """Returns the workers that are meant.

    Raises:
      ValueError: If a flag is out of range, or of no use.
    """
    if _WORKER_TIMEOUT.present and not _WORKERS.value:
        raise ValueError(f"--worker_timeout={_WORKER_TIMEOUT.value:g} needs --workers: give that, or leave it out")
    return Workers(tuple(_WORKERS.value), _WORKER_TIMEOUT.value, _CONFINED.value)
