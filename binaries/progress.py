"""Progress of a run on the terminal: a bar, or plain lines where stdout is no terminal."""

import sys
import time

import tqdm

from tff_fedavg.training import Progress

_SECONDS_BETWEEN_LINES = 5.0


class ProgressPrinter:
    """Shows round, accuracy, seconds per round and the time that is left. A context manager."""

    def __init__(self, first_round: int, total_rounds: int):
        self._total_rounds = total_rounds
        self._start = time.monotonic()
        self._first_round = first_round
        self._printed_at = -_SECONDS_BETWEEN_LINES
        self._accuracy = None
        self._bar = None
        if sys.stdout.isatty():
            self._bar = tqdm.tqdm(
                initial=first_round,
                total=total_rounds,
                file=sys.stdout,
                dynamic_ncols=True,
                bar_format="round {n_fmt}/{total_fmt} |{bar}| {postfix}{rate_inv_fmt}, {remaining} left",
                unit="round",
            )

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        if self._bar is not None:
            self._bar.close()

    def update(self, progress: Progress) -> None:
        """Shows a round."""
        self._accuracy = progress.metrics.get("evaluation/accuracy", self._accuracy)
        accuracy = (
            "" if self._accuracy is None else f"accuracy {self._accuracy:.4f} (best {progress.best_accuracy:.4f})"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(accuracy, refresh=False)
            self._bar.update(progress.round_number - self._bar.n)
            return
        now = time.monotonic()
        if now - self._printed_at < _SECONDS_BETWEEN_LINES and progress.round_number < self._total_rounds:
            return
        self._printed_at = now
        done = progress.round_number - self._first_round
        line = f"round {progress.round_number}/{self._total_rounds}  {accuracy}"
        if done:
            seconds = (now - self._start) / done
            left = seconds * (self._total_rounds - progress.round_number)
            line += f"  {seconds:.3g} s/round  {tqdm.tqdm.format_interval(left)} left"
        print(line, flush=True)
