"""What is written down of processes and folders, and whether it is flat.

Flat: the straight line nearest to the second half of the figures rises by no more than an allowance. Of a process only
the figures count that were taken since it was started last; one that was started in the second half is not judged.
"""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROC = Path("/proc")
RULES = {  # what the line may rise by in the second half: at least so much, and so much of the mean
    "resident": (2.0, 0.03),  # megabytes of memory
    "own": (2.0, 0.03),  # megabytes of these that come from no file, whatever others do with the files
    "handles": (2.0, 0.0),
    "threads": (2.0, 0.0),
}
A_ROUND = {  # bytes that a folder may grow by in a round: the events, which every checkpoint has as well, and the log
    "run": 3_000.0,
    "checkpoints": 3_000.0,
    "state of site-000": 1_000.0,
}
FEWEST = 10  # figures in the second half, to judge by


@dataclass
class Series:
    """Figures of one thing, each with the second it was taken at."""

    of: str
    what: str
    at: list[float] = field(default_factory=list)
    figures: list[float] = field(default_factory=list)

    def add(self, at: float, figure: float) -> None:
        self.at.append(round(at, 1))
        self.figures.append(figure)


class Watch:
    def __init__(self) -> None:
        self._began = time.monotonic()
        self.series: dict[tuple[str, str], Series] = {}
        self.rounds = Series("the federation", "rounds")
        self.sites = Series("the federation", "sites")
        self._pids: dict[str, int] = {}
        self._since: dict[str, float] = {}  # when a process was seen first

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def look(self, processes: Mapping[str, int], folders: Mapping[str, Path], rounds: int, sites: int) -> None:
        now = self.seconds
        self.rounds.add(now, rounds)
        self.sites.add(now, sites)
        for name, pid in processes.items():
            if self._pids.get(name) != pid:
                self._pids[name], self._since[name] = pid, now
            with suppress(OSError, ValueError):  # it has just ended
                for what, figure in of_process(pid).items():
                    self._of(name, what).add(now, figure)
        for name, folder in folders.items():
            self._of(name, "bytes").add(now, size(folder))

    def verdicts(self) -> list[dict[str, Any]]:
        """One of every series; `flat` is None where it cannot be said."""
        half = self.rounds.at[-1] / 2
        done = line(*later(self.rounds, half))[0]
        return [verdict(series, half, self._since.get(series.of, 0.0), done) for series in self.series.values()]

    def _of(self, name: str, what: str) -> Series:
        return self.series.setdefault((name, what), Series(name, what))


def verdict(series: Series, half: float, since: float, rounds: float) -> dict[str, Any]:
    """`rounds`: how many there were in the second half."""
    at, figures = later(series, half)
    found = {"of": series.of, "what": series.what, "last": series.figures[-1]}
    if since > half or len(figures) < FEWEST:
        return {**found, "flat": None}
    rise, mean = line(at, figures)
    least, share = RULES.get(series.what, (A_ROUND.get(series.of, 0.0) * rounds, 0.0))
    allowed = max(least, share * mean)
    return {**found, "rise": round(rise, 3), "allowed": round(allowed, 3), "flat": rise <= allowed}


def later(series: Series, half: float) -> tuple[list[float], list[float]]:
    pairs = [(at, figure) for at, figure in zip(series.at, series.figures, strict=True) if at >= half]
    return [at for at, _ in pairs], [figure for _, figure in pairs]


def line(at: Sequence[float], figures: Sequence[float]) -> tuple[float, float]:
    """By how much the straight line nearest to the figures rises from first to last, and their mean."""
    mean_at, mean = math.fsum(at) / len(at), math.fsum(figures) / len(figures)
    spread = math.fsum((one - mean_at) ** 2 for one in at)
    if not spread:
        return 0.0, mean
    slope = math.fsum((one - mean_at) * (figure - mean) for one, figure in zip(at, figures, strict=True)) / spread
    return slope * (at[-1] - at[0]), mean


def of_process(pid: int) -> dict[str, float]:
    place = PROC / str(pid)
    _, *lines = (place / "smaps_rollup").read_text().splitlines()
    kilobytes = {line.split()[0]: int(line.split()[1]) for line in lines}
    return {
        "resident": round(kilobytes["Rss:"] * 1024 / 1e6, 2),
        "own": round(kilobytes["Anonymous:"] * 1024 / 1e6, 2),
        "handles": len(list((place / "fd").iterdir())),
        "threads": len(list((place / "task").iterdir())),
    }


def size(folder: Path) -> int:
    """Bytes of all files but logs, which are bounded by what writes them."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # written anew meanwhile
            if path.is_file() and not path.name.partition(".log")[1]:
                total += path.stat().st_size
    return total
