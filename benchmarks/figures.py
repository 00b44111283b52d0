"""How measured values are summed up, judged and found again."""

import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def spread(values: Sequence[float]) -> dict[str, Any]:
    rounded = [round(value, 4) for value in values]
    return {"median": round(statistics.median(values), 4), "least": min(rounded), "most": max(rounded), "all": rounded}


def aim(value: float, wanted: str) -> str:
    """Whether `value` is what was set out for, which is "at least X" or "at most X"."""
    bound = float(wanted.rpartition(" ")[2])
    met = value >= bound if wanted.startswith("at least") else value <= bound
    return f"aim: {wanted}, {'met' if met else 'NOT MET'}"


def by_date(paths: Sequence[Path]) -> list[Path]:
    """Records, newest first: their names end in the date and, from the second of a day on, its number."""
    found = {path: re.search(r"(\d{4}-\d\d-\d\d)(?:-(\d+))?$", path.stem) for path in paths}
    known = [(m[1], int(m[2] or 1), path) for path, m in found.items() if m]
    return [path for *_, path in sorted(known, reverse=True)]


def free(folder: Path, date: str) -> Path:
    """A name for another record of that day."""
    number = 1
    while (path := folder / (f"{date}-{number}.json" if number > 1 else f"{date}.json")).exists():
        number += 1
    return path
