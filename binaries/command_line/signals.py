"""The signals that end a program: soon, whatever it does, and with what there is to save saved.

The handler of a signal can only raise an exception where the program is, and a library may swallow that there: in an
`except:` around an import, or in a `__del__`, which TensorFlow has many of. So it is raised again each second, until it
gets through; but not in what cleans up after it, such as the saving of a state.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType

# The last is that of a terminal, or a connection by ssh, that is closed.
_ALL = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1  # From <linux/prctl.h>.
_SECONDS_BETWEEN_TRIES = 1.0
_SECONDS_TO_END = 9.0

_received = None
_received_at = 0.0


def catch() -> None:
    """Has these signals raise a `KeyboardInterrupt` (SIGINT) or a `SystemExit`, but for those that are ignored.

    After `_SECONDS_TO_END` the process ends, whatever it does.
    """
    for number in _ALL:
        if signal.getsignal(number) != signal.SIG_IGN:  # As nohup has it.
            signal.signal(number, _receive)
    signal.signal(signal.SIGALRM, _raise_again)
    sys.unraisablehook = _tell_unraisable


def release() -> None:
    """Has these signals end the process at once, from now on: there is nothing left to save, only Python's own end."""
    for number in _ALL:
        if signal.getsignal(number) == _receive:
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, lambda *_: os._exit(128 + _received))
    if _received is not None:
        signal.setitimer(signal.ITIMER_REAL, max(0.1, _received_at + _SECONDS_TO_END - time.monotonic()))


@contextlib.contextmanager
def postponed() -> Iterator[None]:
    """Has these signals wait for the end of the `with` statement; for a process that is started in it, for ever."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _ALL)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def end_with_parent() -> None:
    """Has the kernel send SIGTERM to this process when the thread that has started it ends, however that comes."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def received() -> int | None:
    """Returns the signal that ends this process; None as long as there was none."""
    return _received


def raise_received() -> None:
    """Raises the exception of the signal that ends this process, if there was one."""
    if _received is not None:
        raise KeyboardInterrupt if _received == signal.SIGINT else SystemExit(128 + _received)


def _receive(number: int, frame: FrameType | None) -> None:
    global _received, _received_at
    if _received is None:  # A second one must not disturb what the first has brought about.
        _received, _received_at = number, time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, _SECONDS_BETWEEN_TRIES, _SECONDS_BETWEEN_TRIES)
        raise_received()


def _raise_again(number: int, frame: FrameType | None) -> None:
    if time.monotonic() - _received_at > _SECONDS_TO_END:
        os._exit(128 + _received)
    if not _is_handled(sys.exc_info()[1]):
        raise_received()


def _is_handled(error: BaseException | None) -> bool:
    """Whether an error that is being handled is that of the signal, or has come up while that was handled."""
    while error is not None and not isinstance(error, (KeyboardInterrupt, SystemExit)):
        error = error.__context__
    return error is not None


def _tell_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    if _received is None:
        sys.__unraisablehook__(unraisable)
