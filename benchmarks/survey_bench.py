"""What a survey of class statistics costs a site, against a round of its training.

One site trains a round and counts its images for the survey, in turns in one process; processor time on one thread.
What it sends is counted in numbers.
"""

import argparse
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from benchmarks.arguments import positive
from benchmarks.figures import aim, spread
from benchmarks.step.problem import CLASSES, federation
from common.messages import Order
from server.survey import centre

ABOUT = "what class statistics cost a site, against a round of its training"
EXAMPLE = "--models resnet8 resnet18 --images 215 --epochs 2"
SMALL: Mapping[str, object] = {"models": ["resnet8"], "images": 107, "epochs": 1, "batch": 8, "turns": 7}
MODELS = ("resnet8", "resnet20", "resnet18", "resnet34")
AIM = "at most 0.2"


def options(parser: argparse.ArgumentParser) -> None:
    default = ["resnet8", "resnet18"]
    parser.add_argument("--models", nargs="+", choices=MODELS, default=default, help="(%(default)s)")
    parser.add_argument("--images", type=positive, default=215, help="the site has (%(default)s)")
    parser.add_argument("--epochs", type=positive, default=2, help="of a round (%(default)s)")
    parser.add_argument("--batch", type=positive, default=8, help="images a step (%(default)s)")
    parser.add_argument("--turns", type=positive, default=5, help="rounds and surveys that count (%(default)s)")


def measure(models: list[str], images: int, epochs: int, batch: int, turns: int) -> dict[str, Any]:
    rows = []
    for model in models:
        with federation("fp32", model, images, clients=1, batch=batch, epochs=epochs) as (made, state):
            [site] = made.sites.values()
            method = made.task.config.method
            shared = {part: t for part, t in state.parts.items() if part in method.shared}
            order = Order(1, "", shared, {part: t for part, t in state.parts.items() if part in method.fixed})
            asked = replace(order, train=False, centre=centre(made.net, made.task, state))
            seconds: dict[str, list[float]] = {"round": [], "survey": []}
            for turn in range(turns + 1):
                for name, what in (("round", order), ("survey", asked)):
                    began = time.process_time()
                    reply = site.handle(what)
                    if turn:  # the first of each pays for the libraries' start
                        seconds[name].append(time.process_time() - began)
            dim = made.net.feature_dim
            rows.append(
                {
                    "model": model, "images": images, "epochs": epochs, "batch": batch,
                    "processor_seconds": {name: spread(took) for name, took in seconds.items()},
                    "of_a_round": round(statistics.median(seconds["survey"]) / statistics.median(seconds["round"]), 4),
                    "numbers": sum(t.numel() for t in reply.sums.values()),
                    "allowed": CLASSES + CLASSES * dim + dim**2,
                }
            )  # fmt: skip
    return {"rows": rows}


def table(record: Mapping[str, Any]) -> str:
    lines = []
    for row in record["rows"]:
        lines.append(f"{row['model']}, batch {row['batch']}: {row['epochs']} epochs of {row['images']} images")
        for name, s in row["processor_seconds"].items():
            lines.append(f"  {name:8}{s['median']:9.3f} s   ({s['least']:.3f} to {s['most']:.3f})")
        lines.append(f"  a survey is {row['of_a_round']:.3f} of a round   ({aim(row['of_a_round'], AIM)})")
        lines.append(f"  it sends {row['numbers']} numbers: C + C d + d^2 = {row['allowed']}")
    return "\n".join(lines)


def ratios(record: Mapping[str, Any]) -> dict[str, float]:
    return {f"{row['model']}: round / survey": round(1 / row["of_a_round"], 2) for row in record["rows"]}
