"""The evaluation after a round, of the generic model and of every site's personal one, against the published way.

Three rungs: the transcription (benchmarks/step/reference.py: one pass over the global test with the frame's head, and
every site's own model over its own local test), and this project's in fp32 and in bf16: all generic and all personal
predictors from one pass of the backbone. It judges eight predictors where the transcription judges two. Processor time
on one thread; one process for each rung, in turns.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from benchmarks.arguments import positive
from benchmarks.step import reference, workers
from benchmarks.step.problem import CLASSES, OURS, federation
from common.images import PixelImages
from common.net import fresh
from fedloge.federation import judge

ABOUT = "the evaluation of all models, against a pass for each of them"
EXAMPLE = "--model resnet8 resnet18 --images 10000"
SMALL: Mapping[str, object] = {"model": ["resnet8"], "images": 1000, "clients": 10, "turns": 5}
MODELS = ("resnet8", "resnet20", "resnet18", "resnet34")
AIMS = {"fp32": 2.4, "bf16": 4.0}


def options(parser: argparse.ArgumentParser) -> None:
    default = ["resnet8", "resnet18"]
    parser.add_argument("--model", nargs="+", choices=MODELS, default=default, help="(%(default)s)")
    parser.add_argument("--images", type=positive, default=2000, help="of the global test, and of all local tests "
                        "together (%(default)s)")  # fmt: skip
    parser.add_argument("--clients", type=positive, default=40, help="sites with a personal model (%(default)s)")
    parser.add_argument("--turns", type=positive, default=3, help="evaluations of every rung that count (%(default)s)")


def measure(model: list[str], images: int, clients: int, turns: int) -> dict[str, Any]:
    rows = []
    for name in model:
        job = {"model": name, "images": images, "clients": clients}
        jobs = {rung: {"rung": rung, **job} for rung in (workers.REFERENCE, *OURS)}
        seconds = workers.alternated("benchmarks.step.judging", jobs, turns)
        rows.append({**job, **workers.compared(seconds, 2 * images)})
    return {"rows": rows, "native_bf16": workers.native_bf16()}


def table(record: Mapping[str, Any]) -> str:
    lines = []
    for row in record["rows"]:
        lines.append(f"{row['model']}: {row['clients']} sites, {row['images']} images, and as many at the sites")
        lines += workers.shown(row, AIMS)
    return "\n".join(lines)


def ratios(record: Mapping[str, Any]) -> dict[str, float]:
    return workers.steady(record)


@contextmanager
def prepared(rung: str, **job: Any) -> Iterator[Callable[[], object]]:
    """The evaluation of one rung, to be run again and again."""
    with federation(rung, **job) as (made, state):
        net, method = made.net, made.task.config.method
        heads = {name: fresh(method, made.task, net, ["local_head"], name) for name in made.sites}
        if rung != workers.REFERENCE:
            for name, site in made.sites.items():
                site.store.save(state.round, heads[name])
            yield lambda: judge(made, method, state)
            return
        images = made.test
        assert isinstance(images, PixelImages)
        pixels, labels = images.pixels.numpy(), images.labels.numpy()
        transform = reference.testing(images.mean, images.std)
        net.load(state.parts)

        def work() -> None:
            pictures = reference.Pictures(pixels, labels.tolist(), transform)
            generic = nn.Sequential(net["backbone"], net["frame"])
            reference.accuracy(generic, pictures, reference.GLOBAL_BATCH, CLASSES)
            for name, index in made.judged_on.items():
                net.load(heads[name])
                mine = reference.Pictures(pixels[index], labels[index].tolist(), transform)
                personal = nn.Sequential(net["backbone"], net["local_head"])
                reference.accuracy(personal, mine, reference.LOCAL_BATCH, CLASSES)

        yield work


if __name__ == "__main__":
    workers.serve(prepared)
