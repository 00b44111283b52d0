"""Whether anything has become slower: `python -m benchmarks check`, or `make bench-check`.

Runs the small form of every benchmark that has one and compares its ratios (this project against what it is measured
against, on the same machine, in turns) with those of the newest record in benchmarks/records/check/. One that has
fallen by more than 30 % fails the check; seconds are never compared. A benchmark that seems to have become slower is
measured once more, and the better of the two counts.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

from benchmarks.figures import by_date, free
from benchmarks.machine import machine
from benchmarks.registry import NAMES, benchmark
from common import files
from common.errors import UserError

ABOUT = "the small form of all of them: fails if a ratio has fallen"
EXAMPLE = "--record"
PLACE = Path(__file__).parent / "records" / "check"
FALL = 0.3
Ratios = dict[str, dict[str, float]]  # of every benchmark


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--record", action="store_true", help="write what is measured, to compare with from now on")
    parser.add_argument("--records", type=Path, metavar="FOLDER", default=PLACE, help="where they are (%(default)s)")


def run(record: bool, records: Path, as_json: bool) -> int:
    """The exit code: 1 if something has become slower."""
    before = None if record else newest(records)
    load = os.getloadavg()
    now = {name: measured(name) for name in NAMES if benchmark(name).SMALL}
    slower = {} if before is None else fallen(before, now)
    for name in slower:
        say(f"{name} seems to be slower: once more")
        now[name] = {ratio: max(now[name][ratio], again) for ratio, again in measured(name).items()}
    slower = {} if before is None else fallen(before, now)
    found = {"benchmark": "check", "ratios": now, "load_before": load, "environment": machine()}
    if record:
        path = free(records, time.strftime("%Y-%m-%d"))
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, json.dumps(found, indent=1) + "\n")
        say(f"written to {path}")
    print(json.dumps({**found, "slower": slower}) if as_json else shown(now, before))
    for lines in slower.values():
        print(*lines, sep="\n", file=sys.stderr)
    return int(bool(slower))


def newest(records: Path) -> Ratios:
    for path in by_date(list(records.glob("*.json"))):
        ratios: Ratios = json.loads(path.read_text(encoding="utf-8"))["ratios"]
        return ratios
    raise UserError(f"{records}: there is nothing to compare with: make a record with --record")


def measured(name: str) -> dict[str, float]:
    began, chosen = time.monotonic(), benchmark(name)
    ratios = chosen.ratios(chosen.measure(**chosen.SMALL))
    say(f"{name}: {time.monotonic() - began:.0f} s")
    return ratios


def fallen(then: Ratios, now: Ratios) -> dict[str, list[str]]:
    """What to say of every benchmark that has become slower. What only one of the two has is not compared: a ratio can
    be of an instruction that this processor does not have."""
    found: dict[str, list[str]] = {}
    for name, ratios in now.items():
        for ratio, after in ratios.items():
            before = then.get(name, {}).get(ratio)
            if before is not None and after < (1 - FALL) * before:
                found.setdefault(name, []).append(f"fedloge: {name}: {ratio} was {before:.2f}, is {after:.2f}")
    return found


def shown(now: Ratios, then: Ratios | None) -> str:
    lines = []
    for name, ratios in now.items():
        for ratio, value in ratios.items():
            before = (then or {}).get(name, {}).get(ratio)
            lines.append(f"{name:10}{ratio:32}{value:9.2f}" + (f"   was {before:.2f}" if before is not None else ""))
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
