"""A line on standard error that says where a run is: a bar on a terminal, some lines in a log file."""

import sys
import time
from typing import Any, TextIO

WIDTH = 24
LINES = 30  # in a log file, for a whole run


class ProgressLine:
    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._first: tuple[int, float] | None = None

    def show(self, round: int, rounds: int, evaluation: dict[str, Any] | None) -> None:
        """`evaluation` is the newest one; its first predictors are the ones shown.

        Time left is known from the second round on: before the end of the first the data is read and the frame solved,
        which no other round costs again.
        """
        now = time.monotonic()
        if self._first is None:
            self._first = round, now
        if not (self._live or round == rounds or round * LINES // rounds > (round - 1) * LINES // rounds):
            return
        first, began = self._first
        done = WIDTH * round // rounds
        bar = "#" * done + "-" * (WIDTH - done)
        text = f"round {round}/{rounds} [{bar}]"
        if round > first:
            text += f" {_clock((now - began) / (round - first) * (rounds - round))} left"
        if evaluation is not None:
            for kind in ("generic", "personal"):
                for name, result in list(evaluation[kind].items())[:1]:
                    text += f"  {kind} ({name}) {100 * (result['top1'] or 0):.1f} %"
        if self._live:
            end = "\n" if round == rounds else ""
            self._stream.write(f"\r\x1b[K{text}{end}")
        else:
            self._stream.write(text + "\n")
        self._stream.flush()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
