"""Progress of a run on the terminal: a bar, or plain lines where stdout is no terminal that can show one."""

import os
import sys
import time
from typing import TYPE_CHECKING

import tqdm

from binaries.experiment.observer import Observer

if TYPE_CHECKING:
    from tff_fedavg.training import Progress

_SECONDS_BETWEEN_LINES = 5.0
_COLUMNS_OF_A_BAR = 30


class ProgressPrinter(Observer):
    """Shows round, accuracy (or what the target is about), seconds per round and the time left. A context manager."""

    def __init__(self, run_dir: str, total_rounds: int):
        self._run_dir = run_dir
        self._total_rounds = total_rounds
        self._first_round = 0
        self._started_at = self._printed_at = 0.0
        self._value = None
        self._bar = None

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        if self._bar is not None:
            self._bar.close()

    def warn(self, message: str) -> None:
        """Says what was wrong with a file of the run, or has changed in its task."""
        print(message, file=sys.stderr)

    def start(self, round_number: int) -> None:
        """Says where training goes on."""
        if round_number:
            print(f"going on after round {round_number} of the run in {self._run_dir}", flush=True)
        self._first_round = round_number
        self._started_at = time.monotonic()
        if _can_show_a_bar():
            self._bar = tqdm.tqdm(
                initial=round_number,
                total=self._total_rounds,
                file=sys.stdout,
                dynamic_ncols=True,
                # In a narrow terminal the end is cut off.
                bar_format="round {n_fmt}/{total_fmt}{postfix} |{bar}| {rate_inv_fmt}, {remaining} left",
                unit="round",
            )

    def update(self, progress: "Progress") -> None:
        """Shows a round."""
        self._value = progress.metrics.get(progress.target.field, self._value)
        shown = ""
        if self._value is not None:
            shown = f"{progress.target.metric} {self._value:.4f} (best {progress.best:.4f})"
        if left_out := progress.metrics.get("clients_left_out"):
            shown += f", {left_out} clients left out (no finite update)"
        if self._bar is not None:
            self._bar.set_postfix_str(shown, refresh=False)
            self._bar.update(progress.round_number - self._bar.n)
            return
        now = time.monotonic()
        if now - self._printed_at < _SECONDS_BETWEEN_LINES and progress.round_number < self._total_rounds:
            return
        self._printed_at = now
        line = f"round {progress.round_number}/{self._total_rounds}  {shown}"
        if done := progress.round_number - self._first_round:
            seconds = (now - self._started_at) / done
            left = seconds * (self._total_rounds - progress.round_number)
            line += f"  {seconds:.3g} s/round, {tqdm.tqdm.format_interval(left)} left"
        print(line, flush=True)


def _can_show_a_bar() -> bool:
    if not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
        return False
    return os.get_terminal_size(sys.stdout.fileno()).columns >= _COLUMNS_OF_A_BAR
