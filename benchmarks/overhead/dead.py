"""Memory of the SuperLink over many rounds while one site is dead: what is kept for it must not pile up."""

import argparse
from collections.abc import Mapping
from typing import Any

from benchmarks.arguments import positive
from benchmarks.figures import aim
from benchmarks.overhead.federation import MODELS
from benchmarks.overhead.measure import dead as measure

__all__ = ["measure"]

ABOUT = "memory of the server while a site stays dead"
EXAMPLE = "--rounds 100"
SMALL: Mapping[str, object] = {}  # bytes, not a ratio of two speeds


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=MODELS, default="medium", help="(%(default)s)")
    parser.add_argument("--sites", type=positive, default=4, help="number of sites (%(default)s)")
    parser.add_argument("--rounds", type=positive, default=100, help="rounds that count (%(default)s)")


def table(record: Mapping[str, Any]) -> str:
    now = record["superlink_megabytes"]
    return (
        f"{record['model']}: {record['megabytes']} MB; the SuperLink in {record['rounds_without_the_dead']} rounds "
        f"without the dead site:\n  {now['first']} MB at first, {now['last']} MB at last: "
        f"{record['more_in_models']} models more ({aim(record['more_in_models'], 'at most 0')})"
    )


def ratios(record: Mapping[str, Any]) -> dict[str, float]:
    del record
    return {}
