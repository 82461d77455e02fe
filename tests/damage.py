"""Files damaged in many ways, by a seeded generator, and what came of it."""

import collections
import contextlib
import os
import pathlib
import shutil
import signal
from collections.abc import Callable, Iterator

import numpy as np

_SECONDS = 20  # In which each case has to end.


class _HungError(BaseException):
    """A case has not ended. Not an `Exception`, which what is tested may take for its own."""


def damage(path: pathlib.Path, rng: np.random.Generator) -> str:
    """Damages a file in one way; returns which, for the message of a test that fails."""
    kinds = [*_OF_BYTES, "missing", "FIFO", "directory", "device"]
    kind = kinds[rng.integers(len(kinds))]
    content = path.read_bytes()
    if kind in _OF_BYTES:
        path.write_bytes(_OF_BYTES[kind](content, rng))
        return kind
    path.unlink()
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    return kind


def _place(content, rng):
    return int(rng.integers(max(len(content), 1)))


def _flip(content, rng):
    content, i = bytearray(content or b"\0"), _place(content, rng)
    content[i] ^= 1 << rng.integers(8)
    return bytes(content)


def _replace_digit(content, rng):
    """Another number in a text: what is hardest to see."""
    places = [i for i, byte in enumerate(content) if chr(byte).isdigit()]
    if not places:
        return _flip(content, rng)
    content = bytearray(content)
    content[places[rng.integers(len(places))]] = ord(str(rng.integers(10)))
    return bytes(content)


def _delete(content, rng):
    i = _place(content, rng)
    return content[:i] + content[i + int(rng.integers(1, 100)) :]


def _repeat(content, rng):
    i = _place(content, rng)
    return content[:i] + content[max(i - int(rng.integers(1, 100)), 0) :]


def _delete_line(content, rng):
    lines = content.splitlines(True)
    if lines:
        del lines[rng.integers(len(lines))]
    return b"".join(lines)


def _exchange(content, rng):
    i, j = sorted((_place(content, rng), _place(content, rng)))
    k = (i + j) // 2
    return content[:i] + content[k:j] + content[i:k] + content[j:]


_OF_BYTES = {
    "flipped": _flip,
    "another digit": _replace_digit,
    "cut": lambda content, rng: content[: _place(content, rng)],
    "cut in front": lambda content, rng: content[_place(content, rng) :],
    "deleted": _delete,
    "repeated": _repeat,
    "line deleted": _delete_line,
    "exchanged": _exchange,
    "longer": lambda content, rng: content + rng.bytes(rng.integers(1, 100)),
    "empty": lambda content, rng: b"",
    "noise": lambda content, rng: rng.bytes(len(content)),
    "text": lambda content, rng: b'{"a": [1, null, "' + b"x" * int(rng.integers(100)) + b'"]}',
}


class Cases:
    """Cases of damage. Each ends right, rebuilt and told, or refused with one line that names the file.

    Attributes:
      counts: How many ended how.
    """

    def __init__(self, tmp_path: pathlib.Path, original: pathlib.Path, num_cases: int, seed: int):
        self._original = original
        self._directory = tmp_path / "damaged"
        self._num_cases = num_cases
        self._seed = seed
        self.counts = collections.Counter()

    def run(
        self,
        files: list[str],
        read: Callable[[pathlib.Path, list[str]], bool],
        *,
        names: Callable[[str], str] = lambda file: file,
    ) -> None:
        """Runs them.

        Args:
          files: Those that are damaged, one in each case, relative to the original directory.
          read: Reads a damaged copy of the original directory; appends to the list what the user is told. Returns
            whether what it has read is right.
          names: What a line about a file has to contain.
        """
        wrong = []
        for case in range(self._num_cases):
            rng = np.random.default_rng([self._seed, case])
            shutil.rmtree(self._directory, ignore_errors=True)
            shutil.copytree(self._original, self._directory)
            file = files[rng.integers(len(files))]
            what = f"case {case}: {file} {damage(self._directory / file, rng)}"
            told = []
            try:
                with _alarm():
                    is_right = read(self._directory, told)
            except _HungError:
                self.counts["hung"] += 1
                wrong.append(f"{what}: hung")
                continue
            except (ValueError, OSError) as e:
                self.counts["told in one line"] += 1
                told = [str(e)]
            except Exception as e:
                self.counts["traceback"] += 1
                wrong.append(f"{what}: {e!r}")
                continue
            else:
                self.counts["right" if not told else "rebuilt and told"] += 1
                if not is_right:
                    self.counts["wrong" if told else "silently wrong"] += 1
                    wrong.append(f"{what}: wrong, told {told}")
                    continue
            if told and not all("\n" not in line for line in told):
                wrong.append(f"{what}: more than a line: {told}")
            if told and not any(names(file) in line for line in told):
                wrong.append(f"{what}: not named in {told}")
        print(f"{self._num_cases} cases of {', '.join(files)}: {dict(self.counts)}")
        assert not wrong, "\n".join(wrong)


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def ring(*_):
        raise _HungError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, _SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
