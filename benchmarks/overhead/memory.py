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
EXAMPLE = "--sites 4 32"
SMALL: Mapping[str, object] = {}  # bytes, not a ratio of two speeds


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=MODELS, default="large", help="(%(default)s)")
    parser.add_argument("--rounds", type=positive, default=4, help="rounds that count (%(default)s)")
    parser.add_argument("--sites", type=positive, nargs="+", default=[4, 32], help="to compare (%(default)s)")


def table(record: Mapping[str, Any]) -> str:
    lines = [f"{record['model']}: {record['megabytes']} MB; peak megabytes"]
    for row in record["rows"]:
        peaks = ", ".join(f"{name} {megabytes}" for name, megabytes in row["peak_megabytes"].items())
        lines.append(f"  {row['sites']:3} sites: {peaks}")
    more = record["more_in_models"]
    lines.append(f"  more for the most sites: {more} models ({aim(more, 'at most 1')})")
    if "growth" in record:
        growth, above = record["growth"], record["models_above_empty"]
        judged = (
            f" ({aim(above, 'at most 3')})" if record["model"] == "huge" else ""
        )  # others are small beside the heap
        lines.append(f"  the ServerApp's, most sites to fewest: {growth} ({aim(growth, 'at most 1.1')})")
        lines.append(f"  above {record['empty_megabytes']} MB with a tiny model: {above} models{judged}")
    return "\n".join(lines)


def ratios(record: Mapping[str, Any]) -> dict[str, float]:
    del record
    return {}
