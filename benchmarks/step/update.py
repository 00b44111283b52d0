"""The local update of one site, against a literal transcription of the published one.

Three rungs: the transcription (benchmarks/step/reference.py), and a simulated site of this project in fp32 and in
bf16. All start from the same model on the same pictures. Processor time on one thread; one process for each rung, in
turns.
"""

import argparse
import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from benchmarks.arguments import positive
from benchmarks.step import reference, workers
from benchmarks.step.problem import OURS, federation
from common.images import PixelImages
from common.messages import Order

ABOUT = "the local update, against the published three-optimiser loop"
EXAMPLE = "--models resnet8 resnet18 --images 215 --epochs 5"
SMALL: Mapping[str, object] = {"models": ["resnet8"], "images": 107, "epochs": 1, "batch": 8, "turns": 9}
MODELS = ("resnet8", "resnet20", "resnet18", "resnet34")
AIMS = {"resnet8": {"fp32": 1.5, "bf16": 1.8}, "resnet18": {"fp32": 1.1, "bf16": 1.6}}


def options(parser: argparse.ArgumentParser) -> None:
    default = ["resnet8", "resnet18"]
    parser.add_argument("--models", nargs="+", choices=MODELS, default=default, help="(%(default)s)")
    parser.add_argument("--images", type=positive, default=107, help="the site has (%(default)s)")
    parser.add_argument("--epochs", type=positive, default=1, help="of an update (%(default)s)")
    parser.add_argument("--batch", type=positive, default=8, help="images a step (%(default)s)")
    parser.add_argument("--turns", type=positive, default=5, help="updates of every rung that count (%(default)s)")


def measure(models: list[str], images: int, epochs: int, batch: int, turns: int) -> dict[str, Any]:
    rows = []
    for model in models:
        job = {"model": model, "images": images, "epochs": epochs, "batch": batch}
        jobs = {rung: {"rung": rung, **job} for rung in (workers.REFERENCE, *OURS)}
        seconds = workers.alternated("benchmarks.step.update", jobs, turns)
        rows.append({**job, **workers.compared(seconds, images * epochs)})
    return {"rows": rows, "native_bf16": workers.native_bf16()}


def table(record: Mapping[str, Any]) -> str:
    lines = []
    for row in record["rows"]:
        lines.append(f"{row['model']}, batch {row['batch']}: {row['epochs']} epochs of {row['images']} images")
        lines += workers.shown(row, AIMS.get(row["model"], {}) if row["batch"] == 8 else {})
    return "\n".join(lines)


def ratios(record: Mapping[str, Any]) -> dict[str, float]:
    return workers.steady(record)


@contextmanager
def prepared(rung: str, **job: Any) -> Iterator[Callable[[], object]]:
    """The update of one rung, to be run again and again."""
    with federation(rung, clients=1, **job) as (made, state):
        [site] = made.sites.values()
        if rung != workers.REFERENCE:
            order = Order(1, "", {p: state.parts[p] for p in made.task.config.method.shared},
                          {p: state.parts[p] for p in made.task.config.method.fixed})  # fmt: skip
            yield lambda: site.handle(order)
            return
        images, train = made.images, made.task.config.train
        assert isinstance(images, PixelImages)
        pictures = reference.Pictures(
            images.pixels.numpy(), images.labels.tolist(), reference.training(images.mean, images.std)
        )
        made.net.load(state.parts)
        frame = state.parts["frame"]["weight"]
        local_head = made.net["local_head"]

        def work() -> None:
            modules = copy.deepcopy(made.net["backbone"]), copy.deepcopy(made.net["global_head"]), local_head
            optimisers = [torch.optim.SGD(m.parameters(), lr=train.lr, momentum=train.momentum) for m in modules]
            batches = DataLoader(pictures, batch_size=train.batch, shuffle=True)
            reference.local_update(modules, frame, batches, train.epochs, optimisers, [cross_entropy] * 3)

        yield work


if __name__ == "__main__":
    workers.serve(prepared)
