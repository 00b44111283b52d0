"""What a simulated client costs beyond its training: loading, saving, folding, the server's step.

Real rounds with local training left out, in processor time a client and round: medians of five rounds, for models of
several sizes and for methods without and with local parts. Beside each stands its floor, measured between the rounds
and so on the same machine in the same state: the memory traffic of the shared parts that no client can do without.
What is kept at the sites (Ditto: a whole model, in files) is in the cost, not in the floor.

With several numbers of clients it shows what grows with them: neither the cost of one nor the memory of all should.
Every row has a process of its own.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.arguments import positive
from benchmarks.overhead.processes import memory
from common.config import parse
from common.images import PixelImages, Split
from fedloge.federation import assemble
from server import rounds
from server.fleet import LocalFleet

ABOUT = "a simulated client beyond its training, beside its floor"
EXAMPLE = "--models mlp --methods fedavg --clients 20 512 2000"
SMALL: Mapping[str, object] = {"models": ["resnet8"], "methods": ["fedavg"], "clients": [20]}
MODELS = ("mlp", "resnet8", "resnet18")
METHODS = ("fedavg", "fedloge", "ditto")
ROUNDS = 5
IMAGES = 4  # that a client has: nobody trains with them
CLASSES = tuple("0123456789")


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="(%(default)s)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="(%(default)s)")
    parser.add_argument("--clients", nargs="+", type=positive, default=[20], help="in a round (%(default)s)")


def measure(models: Sequence[str], methods: Sequence[str], clients: Sequence[int]) -> dict[str, Any]:
    rows = []
    for model in models:
        for method in methods:
            for many in clients:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
                    rows.append(alone.submit(cost, model, method, many).result())
    return {"rows": rows}


def table(record: Mapping[str, Any]) -> str:
    line = (
        "{model:10} {method:8} {megabytes:7.1f} MB shared  {clients:5} clients  {ms_per_client:8.2f} ms a client and "
        "round, {ratio:5.1f} times the floor of {floor_ms:.2f} ms  {more_megabytes:6.0f} MB of memory"
    )
    return "\n".join(line.format(**row) for row in record["rows"])


def ratios(record: Mapping[str, Any]) -> dict[str, float]:
    return {
        f"{row['model']} {row['method']} {row['clients']}: floor / cost": round(
            row["floor_ms"] / row["ms_per_client"], 4
        )
        for row in record["rows"]
    }


def cost(model: str, method: str, clients: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    config = parse(
        {
            "method": {"name": method},
            "model": {"name": model},
            "partition": {"kind": "iid", "clients": clients},
            "federation": {"rounds": ROUNDS + 1},
        }
    )
    before = memory(os.getpid())["now"]
    data = mock.patch("fedloge.federation.sources.load", return_value=images(clients))
    training = mock.patch("client.participant.train", return_value={})
    with tempfile.TemporaryDirectory() as folder, data, training:
        federation = assemble(config, Path(folder))
        state = config.method.init(federation.net, federation.task)
        names = [(part, name) for part in config.method.shared & state.parts.keys() for name in state.parts[part]]
        shared = sum(state.parts[part][name].nbytes for part, name in names)
        live = federation.net.parts()
        trained = [live[part][name] for part, name in names]
        total = [torch.zeros_like(t) for t in trained]
        fleet = LocalFleet({name: site.handle for name, site in federation.sites.items()})
        seconds, least = [], []
        for _ in range(ROUNDS + 1):
            began = time.process_time()
            report = rounds.one_round(
                fleet, config.method, state, federation.net, config.federation, config.seed, rounds.Hooks()
            )
            seconds.append(time.process_time() - began)
            state = report.state
            sent = [state.parts[part][name] for part, name in names]
            began = time.process_time()
            for _ in range(clients):
                move(sent, trained, total)
            least.append(time.process_time() - began)
        used = memory(os.getpid())["peak"] - before
    # the first round also makes the local parts' initial values
    per_client, floor = (1000 * statistics.median(s[1:]) / clients for s in (seconds, least))
    return {
        "model": model,
        "method": method,
        "clients": clients,
        "megabytes": shared / 1e6,
        "ms_per_client": round(per_client, 3),
        "floor_ms": round(floor, 3),
        "ratio": round(per_client / floor, 2),
        "more_megabytes": round(used, 1),
    }


def images(clients: int) -> Split:
    """As large as the digits, and enough for all."""
    labels = torch.arange(IMAGES * clients) % len(CLASSES)
    pixels = torch.zeros(len(labels), 8, 8, 1, dtype=torch.uint8)
    made = PixelImages(pixels, labels, CLASSES, mean=(0.3,), std=(0.4,))
    return Split(made, made.take(torch.arange(len(CLASSES))))


@torch.no_grad()
def move(sent: list[Tensor], trained: list[Tensor], total: list[Tensor]) -> None:
    """What one client costs at least: each tensor is loaded into the net, read to be checked, and added up."""
    for t, values in zip(trained, sent, strict=True):
        t.copy_(values)
    for t in trained:
        t.sum()
    for t, sums in zip(trained, total, strict=True):
        sums.add_(t, alpha=2)
