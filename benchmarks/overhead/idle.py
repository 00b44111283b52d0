"""Processor cores the SuperLink and its helpers need while all sites wait, without and with a ServerApp that waits."""

import argparse
from collections.abc import Mapping
from typing import Any

from benchmarks.arguments import positive
from benchmarks.figures import aim
from benchmarks.overhead.measure import idle as measure

__all__ = ["measure"]

ABOUT = "processor time of the server while all sites wait"
EXAMPLE = "--sites 32 --seconds 60"
SMALL: Mapping[str, object] = {}  # of a machine, not a ratio


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sites", type=positive, default=32, help="number of sites (%(default)s)")
    parser.add_argument("--seconds", type=float, default=60.0, help="to measure for (%(default)s)")
    parser.add_argument("--settle", type=float, default=45.0, help="seconds to wait before that (%(default)s)")


def table(record: Mapping[str, Any]) -> str:
    lines = [f"{record['sites']} idle sites; processor cores in use"]
    for row in record["rows"]:
        cores = ", ".join(f"{name} {used}" for name, used in row["cores"].items())
        used = sum(row["cores"].values())
        judged = f" ({aim(used, 'at most 0.06')})" if record["sites"] == 32 else ""
        cores += f"; together {used:.3f}{judged}"
        lines.append(f"  {'a ServerApp waits' if row['serverapp'] else 'no run':18} {cores}")
    return "\n".join(lines)


def ratios(record: Mapping[str, Any]) -> dict[str, float]:
    del record
    return {}
