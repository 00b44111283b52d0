"""`python -m benchmarks.soak [--minutes M] [--out OUT]`."""

import argparse
import io
import json
import os
import shutil
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import benchmarks.soak
from benchmarks.machine import machine
from benchmarks.soak import plot
from benchmarks.soak.churn import Churn
from benchmarks.soak.watch import A_ROUND, RULES, Watch
from common import files
from fedloge.table import aligned

TICK = 0.2  # seconds between two looks whether something is due
GUESTS = "guest-"


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="benchmarks.soak", description=benchmarks.soak.__doc__, formatter_class=raw)
    parser.add_argument("--minutes", type=float, default=5.0, metavar="M", help="how long (%(default)s)")
    parser.add_argument("--every", type=float, metavar="S", help="seconds between two looks (default: 300 in all)")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"), metavar="OUT", help="files (%(default)s)")
    options = parser.parse_args()
    record, curves = soak(60 * options.minutes, options.every or max(60 * options.minutes / 300, 1.0))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for ending, text in ((".json", json.dumps(record) + "\n"), (".svg", curves)):
        files.write(options.out.with_name(options.out.name + ending), text)
    print(table(record))
    return int(not record["flat"])


def soak(seconds: float, every: float) -> tuple[dict[str, Any], str]:
    """The record, and its curves. The folder stays only when something failed, for its logs."""
    folder = Path(tempfile.mkdtemp(prefix="fedloge-soak-"))
    began, load = time.strftime("%Y-%m-%d %H:%M"), os.getloadavg()
    with (
        redirect_stdout(io.StringIO()),
        Churn(folder / "arena") as place,
    ):  # it prints its logs, which are in the folder
        place.begin()
        watch, due = Watch(), 0.0
        while watch.seconds < seconds:
            if watch.seconds >= due:
                place.look(watch)
                due += every
            place.turn()
            ended = place.over()
            assert not ended, f"{', '.join(ended)} ended: see {folder}"
            time.sleep(TICK)
        place.end()
    shutil.rmtree(folder)
    return judged(watch, {"date": began, "changes": place.changes, "load_before": load, "environment": machine()})


def judged(watch: Watch, about: dict[str, Any]) -> tuple[dict[str, Any], str]:
    verdicts = watch.verdicts()
    shown = [one for (of, _), one in watch.series.items() if not of.startswith(GUESTS)]
    rounds, took = int(watch.rounds.figures[-1]), watch.rounds.at[-1]
    record = {
        "benchmark": "soak",
        **about,
        "minutes": round(took / 60, 1),
        "rounds": rounds,
        "rule": {"second half rises by at most (least, share of the mean)": RULES, "bytes a round": A_ROUND},
        "flat": all(one["flat"] is not False for one in verdicts),
        "verdicts": [one for one in verdicts if not one["of"].startswith(GUESTS)],
        "series": [asdict(one) for one in (*shown, watch.rounds, watch.sites)],
    }
    title = f"{rounds} rounds in {took / 60:.0f} minutes, {about['date']}"
    return record, plot.drawn([*shown, watch.rounds, watch.sites], title)


def table(record: dict[str, Any]) -> str:
    rows = [("", "", "last", "rise", "allowed", "")]
    for one in record["verdicts"]:
        said = {True: "flat", False: "GROWS", None: "not judged"}[one["flat"]]
        figures = [f"{one[key]:.1f}" if key in one else "" for key in ("last", "rise", "allowed")]
        rows.append((one["of"], one["what"], *figures, said))
    changes = ", ".join(f"{times} {what}" for what, times in record["changes"].items())
    return f"{record['rounds']} rounds in {record['minutes']} minutes; sites: {changes}\n{aligned(rows)}"


if __name__ == "__main__":
    sys.exit(main())
