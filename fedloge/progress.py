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
        self._began = time.monotonic()
        self._first: int | None = None

    def show(self, round: int, rounds: int, evaluation: dict[str, Any] | None) -> None:
        """`evaluation` is the newest one; its first predictors are the ones shown."""
        if self._first is None:
            self._first = round - 1
        if not (self._live or round == rounds or round * LINES // rounds > (round - 1) * LINES // rounds):
            return
        elapsed = time.monotonic() - self._began
        left = elapsed / (round - self._first) * (rounds - round)
        done = WIDTH * round // rounds
        bar = "#" * done + "-" * (WIDTH - done)
        text = f"round {round}/{rounds} [{bar}] {_clock(left)} left"
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
