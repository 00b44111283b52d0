"""Wall clocks that can be set while a process runs, by Debian's libfaketime. What counts seconds goes on as ever."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from tests.chaos import disks

LIBRARIES = "/usr/lib/*/faketime/libfaketimeMT.so.1"
SLEEP = """# The library makes clock_nanosleep fail, by which Python sleeps.
import select
import time

time.sleep = lambda seconds: select.select([], [], [], seconds) and None
"""


@cache
def why_not() -> str:
    """Why no clock can be set here; empty where one can."""
    if not _library():
        return "Debian's libfaketime is not installed"
    return disks.why_not()  # of a killed process the library leaves files in /dev/shm: that must be a private one


class Clock:
    """Of the processes that are started with `words` before their command."""

    def __init__(self, folder: Path) -> None:
        """`folder` is a new one, for what it needs."""
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(SLEEP, encoding="utf-8")
        self._file = folder / "step"
        self.step(0)

    @property
    def words(self) -> Sequence[str]:
        settings = {
            "LD_PRELOAD": _library(),
            "FAKETIME_TIMESTAMP_FILE": self._file,
            "FAKETIME_NO_CACHE": 1,  # a step is seen at once
            "FAKETIME_DONT_FAKE_MONOTONIC": 1,
            "NO_FAKE_STAT": 1,
            "PYTHONPATH": self._file.parent,
        }
        return ["env", *(f"{key}={value}" for key, value in settings.items())]

    def step(self, seconds: int) -> None:
        """Show so much more than the time it is."""
        partial = self._file.with_suffix(".partial")
        partial.write_text(f"{seconds:+d}s\n", encoding="utf-8")
        partial.replace(self._file)


def _library() -> str:
    return next((str(path) for path in sorted(Path("/").glob(LIBRARIES[1:]))), "")
