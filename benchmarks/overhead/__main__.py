"""`fedloge bench NAME`, or `python -m benchmarks.overhead NAME`: measure, print, and write a record if asked."""

import argparse
import importlib.metadata
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import benchmarks.overhead
from benchmarks.overhead import measure
from benchmarks.overhead.federation import MODELS
from common import files
from common.errors import UserError
from server.run_folder import environment

AIMS = {  # what the project set out for
    ("tiny", "stock / resident"): "at least 20",
    ("large", "stock / resident"): "at least 3.3",
    ("large", "resident / floor"): "at most 2.5",
    ("large", "resident bf16 / floor"): "at most 1.5",
}


def main() -> int:
    signal.signal(signal.SIGTERM, terminate)
    options = vars(parse())
    name, as_json, out = (options.pop(key) for key in ("name", "json", "out"))
    try:
        load = os.getloadavg()
        found = getattr(measure, name)(**options)
        record = {"benchmark": name, **found, "options": options, "load_before": load, "environment": machine()}
        if out:
            files.write(out, json.dumps(record, indent=1) + "\n")
        print(json.dumps(record) if as_json else TABLES[name](record))
    except UserError as error:
        print(f"fedloge: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nfedloge: stopped; nothing is kept of it", file=sys.stderr)
        return 1
    return 0


def parse() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="fedloge bench", description=benchmarks.overhead.__doc__, formatter_class=raw)
    names = parser.add_subparsers(dest="name", metavar="NAME", required=True)

    bench = verb(names, "overhead", "--sites 4 --rounds 6 --blocks 2", sites=4, rounds=6)
    bench.add_argument("--blocks", type=positive, default=2, help="times that all are measured in turns (%(default)s)")
    bench.add_argument("--models", nargs="+", choices=MODELS, default=["tiny", "large"], help="(%(default)s)")

    bench = verb(names, "memory", "--sites 4 12", model="large", rounds=4)
    bench.add_argument("--sites", type=positive, nargs="+", default=[4, 12], help="to compare (%(default)s)")

    bench = verb(names, "idle", "--sites 32 --seconds 60", sites=32)
    bench.add_argument("--seconds", type=float, default=60.0, help="to measure for (%(default)s)")
    bench.add_argument("--settle", type=float, default=45.0, help="seconds to wait before that (%(default)s)")

    verb(names, "dead", "--rounds 100", model="medium", sites=4, rounds=100)
    return parser.parse_args()


def verb(names: Any, name: str, example: str, **defaults: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = names.add_parser(name, epilog=f"example: fedloge bench {name} {example}")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the record to this file")
    if "model" in defaults:
        parser.add_argument("--model", choices=MODELS, default=defaults["model"], help="(%(default)s)")
    for key, what in (("sites", "number of sites"), ("rounds", "rounds that count")):
        if key in defaults:
            parser.add_argument(f"--{key}", type=positive, default=defaults[key], help=f"{what} (%(default)s)")
    return parser


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError
    return value


def machine() -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in ("flwr", "grpcio")}
    return {**environment(), **versions}


def overhead_table(record: dict[str, Any]) -> str:
    lines = []
    for row in record["rows"]:
        lines.append(f"{row['model']}: {row['megabytes']} MB in {row['tensors']} tensors; seconds a round")
        for name, s in row["seconds"].items():
            lines.append(f"  {name:22}{s['median']:9.3f}   ({s['least']:.3f} to {s['most']:.3f})")
        for name, ratio in row["ratios"].items():
            aim = AIMS.get((row["model"], name))
            lines.append(f"  {name:22}{ratio:9.2f}" + (f"   (aim: {aim})" if aim else ""))
    return "\n".join(lines)


def memory_table(record: dict[str, Any]) -> str:
    lines = [f"{record['model']}: {record['megabytes']} MB; peak megabytes"]
    for row in record["rows"]:
        peaks = ", ".join(f"{name} {megabytes}" for name, megabytes in row["peak_megabytes"].items())
        lines.append(f"  {row['sites']:3} sites: {peaks}")
    return "\n".join([*lines, f"  more for the most sites: {record['more_in_models']} models (aim: at most 1)"])


def idle_table(record: dict[str, Any]) -> str:
    lines = [f"{record['sites']} idle sites; processor cores in use (aim: at most 0.06 for 32 sites)"]
    for row in record["rows"]:
        cores = ", ".join(f"{name} {used}" for name, used in row["cores"].items())
        lines.append(f"  {'a ServerApp waits' if row['serverapp'] else 'no run':18} {cores}")
    return "\n".join(lines)


def dead_table(record: dict[str, Any]) -> str:
    now = record["superlink_megabytes"]
    return (
        f"{record['model']}: {record['megabytes']} MB; the SuperLink in {record['rounds_without_the_dead']} rounds "
        f"without the dead site:\n  {now['first']} MB at first, {now['last']} MB at last: "
        f"{record['more_in_models']} models more (aim: 0)"
    )


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "overhead": overhead_table,
    "memory": memory_table,
    "idle": idle_table,
    "dead": dead_table,
}


def terminate(signum: int, frame: FrameType | None) -> None:
    del signum, frame
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
