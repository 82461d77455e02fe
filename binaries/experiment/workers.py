"""Which workers run the computations of a program."""

import dataclasses
from contextlib import AbstractContextManager

from tff_fedavg.worker_process import check_address

LONGEST_TIMEOUT = 1e6


@dataclasses.dataclass(frozen=True)
class Workers:
    """A worker of the program's own, or some that run already. Can be pickled.

    Attributes:
      addresses: Those that run already, as `binaries.worker` shows them; by default none.
      timeout: Seconds after which a computation ends if none of these can be reached.
      confined: Whether the program's own is confined, as for `tff_fedavg.local_worker`.

    Raises:
      ValueError: If one is out of range, or does not go with the others: a line that names the flag.
    """

    addresses: tuple[str, ...] = ()
    timeout: float = 600.0
    confined: bool | None = None

    def __post_init__(self):
        for address in self.addresses:
            try:
                check_address(address)
            except ValueError as e:
                raise ValueError(f"--workers={e}") from e
        if len(set(self.addresses)) < len(self.addresses):
            raise ValueError(f"--workers={','.join(self.addresses)}: a worker is given twice")
        if not 0 <= self.timeout <= LONGEST_TIMEOUT:
            raise ValueError(f"--worker_timeout={self.timeout}: take a number from 0 to {LONGEST_TIMEOUT:g}")
        if self.addresses and self.confined is not None:
            raise ValueError("--confined is of no use with --workers, which run already: give it to binaries.worker")

    def start(self, clients_per_subround: int | None = None) -> AbstractContextManager[None]:
        """Returns the context in which computations run there; see `tff_fedavg.local_worker`."""
        import tff_fedavg  # Imports TensorFlow.

        if self.addresses:
            return tff_fedavg.remote_workers(
                self.addresses, timeout=self.timeout, clients_per_subround=clients_per_subround
            )
        return tff_fedavg.local_worker(confined=self.confined, clients_per_subround=clients_per_subround)
