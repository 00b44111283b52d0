"""Seconds a round beyond training: these nodes, Flower's own, and the floor of any system like these.

Resident nodes and the round loop of this project, against stock `flower-supernode` and Flower's own FedAvg, against a
bare gRPC stream of the same bytes. What runs and what is left out: benchmarks/overhead/__init__.py.
"""

import argparse
from collections.abc import Mapping
from typing import Any

from benchmarks.arguments import positive
from benchmarks.figures import aim
from benchmarks.overhead.federation import MODELS
from benchmarks.overhead.measure import overhead as measure

__all__ = ["measure"]

ABOUT = "rounds without training, against Flower's own nodes and bare gRPC"
EXAMPLE = "--sites 4 --rounds 6 --blocks 2"
SMALL: Mapping[str, object] = {}  # seconds by the clock, and a stock node mostly sleeps: it would compare machines
AIMS = {  # what the project set out for
    ("tiny", "stock / resident"): "at least 20",
    ("large", "stock / resident"): "at least 3.3",
    ("large", "resident / floor"): "at most 2.5",
    ("large", "resident bf16 / floor"): "at most 1.5",
}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sites", type=positive, default=4, help="number of sites (%(default)s)")
    parser.add_argument("--rounds", type=positive, default=6, help="rounds that count (%(default)s)")
    parser.add_argument("--blocks", type=positive, default=2, help="times that all are measured in turns (%(default)s)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["tiny", "large"], help="(%(default)s)")


def table(record: Mapping[str, Any]) -> str:
    lines = []
    for row in record["rows"]:
        lines.append(f"{row['model']}: {row['megabytes']} MB in {row['tensors']} tensors; seconds a round")
        for name, s in row["seconds"].items():
            lines.append(f"  {name:22}{s['median']:9.3f}   ({s['least']:.3f} to {s['most']:.3f})")
        for name, ratio in row["ratios"].items():
            wanted = AIMS.get((row["model"], name))
            lines.append(f"  {name:22}{ratio:9.2f}" + (f"   ({aim(ratio, wanted)})" if wanted else ""))
    return "\n".join(lines)


def ratios(record: Mapping[str, Any]) -> dict[str, float]:
    """How many times quicker than what, so that larger is better for all."""
    found = {}
    for row in record["rows"]:
        for name, ratio in row["ratios"].items():
            ours, by = name.split(" / ") if name.endswith("floor") else reversed(name.split(" / "))
            found[f"{row['model']}: {by} / {ours}"] = 1 / ratio if name.endswith("floor") else ratio
    return found
