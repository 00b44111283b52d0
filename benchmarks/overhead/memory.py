"""Peak memory of every process of a federation, by the number of sites. The ServerApp's must not grow with them."""

import argparse
from collections.abc import Mapping
from typing import Any

from benchmarks.arguments import positive
from benchmarks.figures import aim
from benchmarks.overhead.federation import MODELS
from benchmarks.overhead.measure import memory as measure

__all__ = ["measure"]

ABOUT = "memory of the server, by the number of sites"
EXAMPLE = "--sites 4 12"
SMALL: Mapping[str, object] = {}  # bytes, not a ratio of two speeds


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=MODELS, default="large", help="(%(default)s)")
    parser.add_argument("--rounds", type=positive, default=4, help="rounds that count (%(default)s)")
    parser.add_argument("--sites", type=positive, nargs="+", default=[4, 12], help="to compare (%(default)s)")


def table(record: Mapping[str, Any]) -> str:
    lines = [f"{record['model']}: {record['megabytes']} MB; peak megabytes"]
    for row in record["rows"]:
        peaks = ", ".join(f"{name} {megabytes}" for name, megabytes in row["peak_megabytes"].items())
        lines.append(f"  {row['sites']:3} sites: {peaks}")
    more = record["more_in_models"]
    return "\n".join([*lines, f"  more for the most sites: {more} models ({aim(more, 'at most 1')})"])


def ratios(record: Mapping[str, Any]) -> dict[str, float]:
    del record
    return {}
