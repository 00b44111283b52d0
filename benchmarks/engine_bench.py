"""Simulated training at the published size: steps one by one, recorded, and several sites at a time.

The images are noise, as many and as unevenly spread as CIFAR-10-LT's (40 sites by Dirichlet .5); rounds are whole, with
loading, folding and the server's step, without evaluation. Beside the images a second stands the share that their
arithmetic is of the largest matrix product this device does in that precision. It runs on a CPU too, for its own test.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.arguments import positive
from common.config import parse
from common.engine import Recorder
from common.longtail import profile
from common.sgd import arithmetic
from fedloge import lanes
from fedloge.federation import Federation, assemble
from server import rounds
from server.models import placed

ABOUT = "training on a GPU: recorded steps, several sites at a time"
EXAMPLE = "--model resnet18 --precisions tf32 bf16 --lanes 1 2 4 6"
SMALL: Mapping[str, object] = {}  # its ratios are those of a GPU
PRECISIONS = ("fp32", "tf32", "bf16")


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="resnet18", help="(%(default)s)")
    parser.add_argument("--classes", type=positive, default=10, help="(%(default)s)")
    parser.add_argument("--largest", type=positive, default=5000, help="images of the largest class (%(default)s)")
    parser.add_argument("--fraction", type=float, default=0.3, help="of the sites train in a round (%(default)s)")
    parser.add_argument("--batch", type=positive, default=8, help="images a step (%(default)s)")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["tf32", "bf16"], help="(%(default)s)")
    parser.add_argument("--lanes", nargs="+", type=positive, default=[1, 2, 4, 6], help="(%(default)s)")
    parser.add_argument("--rounds", type=positive, default=3, help="that count, after one that does not (%(default)s)")
    parser.add_argument("--device", default="auto", help="(%(default)s)")


def measure(
    model: str, classes: int, largest: int, fraction: float, batch: int, precisions: list[str], lanes: list[int],
    rounds: int, device: str,
) -> dict[str, Any]:  # fmt: skip
    rows: list[dict[str, Any]] = []
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "noise.npz"
        _noise(path, profile(largest, 0.01, classes))
        for precision in precisions:
            for many, graphs in ((1, False), *((many, True) for many in lanes)):
                table = {
                    "data": {"source": "npz", "path": str(path), "augment": "crop-flip", "test_share": 0.01},
                    "partition": {"clients": 40, "alpha": 0.5},
                    "model": {"name": model},
                    "train": {"batch": batch, "precision": precision},
                    "federation": {"fraction": fraction},
                    "run": {"device": device, "lanes": many},
                }
                federation = assemble(parse(table), Path(folder) / "run")
                with _recording(graphs):
                    found = _rounds(federation, rounds)
                rows.append({"precision": precision, "lanes": many, "recorded": graphs, **found})
            rows[-1]["ceiling_tflops"] = _ceiling(precision, federation)
            for row in rows:
                if row["precision"] == precision:
                    row["share"] = row["tflops"] / rows[-1]["ceiling_tflops"]
    return {"model": model, "batch": batch, "fraction": fraction, "rows": rows}


def table(record: Mapping[str, Any]) -> str:
    lines = [f"{record['model']}, batch {record['batch']}, {record['fraction']:.0%} of 40 sites a round"]
    for row in record["rows"]:
        how = f"{row['lanes']} lanes, recorded" if row["recorded"] else "steps one by one"
        lines.append(
            f"  {row['precision']}  {how:<18} {row['seconds']:7.2f} s a round  {row['images_per_second']:8.0f} images/s"
            f"  {row['tflops']:6.1f} TFLOP/s, {row['share']:.1%} of this device's largest product"
        )
    return "\n".join(lines)


def ratios(record: Mapping[str, Any]) -> dict[str, float]:
    first = {row["precision"]: row["seconds"] for row in record["rows"] if not row["recorded"]}
    return {
        f"{row['precision']} {row['lanes']} lanes": first[row["precision"]] / row["seconds"]
        for row in record["rows"]
        if row["recorded"]
    }


def _noise(path: Path, counts: list[int]) -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(len(counts)), counts)
    np.savez(path, images=rng.integers(0, 256, (len(labels), 32, 32, 3), np.uint8), labels=labels)


@contextmanager
def _recording(graphs: bool) -> Iterator[None]:
    """On a GPU: whether steps are recorded. What cannot be recorded there ends the measurement."""
    Recorder.failed = not graphs
    try:
        yield
        if graphs and Recorder.failed:
            raise SystemExit("a step could not be recorded: the log says why")
    finally:
        Recorder.failed = False


def _rounds(federation: Federation, many: int) -> dict[str, Any]:
    config = federation.task.config
    method, seconds, images = config.method, [], 0
    state = placed(method.init(federation.net, federation.task), federation.device)
    policy = replace(config.federation, quorum=1.0, deadline=1e9, wait=0.0)
    fleet = lanes.fleet(federation, 0)
    for _ in range(many + 1):
        began = time.monotonic()
        report = rounds.one_round(fleet, method, state, federation.net, policy, config.seed, rounds.Hooks())
        if federation.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - began)
        images = sum(len(federation.sites[name].train_index) for name in report.folded) * config.train.epochs
        state = replace(report.state, round=0)  # the same sites again
    rate = images / statistics.median(seconds[1:])
    return {
        "seconds": round(statistics.median(seconds[1:]), 3),
        "first_seconds": round(seconds[0], 3),
        "images_per_second": round(rate, 1),
        "tflops": round(rate * _flops(federation) / 1e12, 3),
    }


def _flops(federation: Federation) -> float:
    """Of one image, forwards and backwards."""
    task = federation.task
    backbone = task.backbone().to(federation.device)
    with FlopCounterMode(display=False) as counter:
        x = torch.zeros(2, task.channels, task.side, task.side, device=federation.device)
        backbone(x).sum().backward()
    return counter.get_total_flops() / 2


def _ceiling(precision: str, federation: Federation) -> float:
    """TFLOP/s of a large matrix product."""
    device, cuda = federation.device, federation.device.type == "cuda"
    side = 8192 if cuda else 512
    if cuda:
        arithmetic(federation.task.config.train)
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    seconds = []
    for _ in range(6):
        began = time.monotonic()
        for _ in range(10):
            a @ a
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - began)
    return round(10 * 2 * side**3 / min(seconds) / 1e12, 3)
