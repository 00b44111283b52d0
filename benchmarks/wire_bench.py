"""Bytes, processor time and accuracy of every `federation.wire`.

Two sites train a few steps a round on pictures of noise, and every order and reply becomes the message that Flower
would be given; its bytes count as they are, settings and all. Bytes are a site's in a round, both ways, once it has
the fixed parts and a first model, which travels exactly on every wire but bf16. Processor time is that of one thread:
at the server for one order that all sites share and for one reply, at a site for one of each. Accuracies are not
measured here: they are those of the records of the family `wire`, and of the same experiment with fp32.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.arguments import positive
from benchmarks.records import RECORDS
from client.changes import Reference, Residual
from client.participant import Participant
from client.store import Store
from common.codec import PART, WIRES, Wire
from common.config import Config, parse
from common.deployment import Deployment, ImagesConfig
from common.images import PixelImages
from common.messages import Order, Reply
from common.net import build
from common.wire import Card, decode_order, encode_reply, weight
from server import rounds
from server.fleet import LocalFleet
from server.flower_orders import Orders

ABOUT = "bytes, processor time and accuracy of every federation.wire"
EXAMPLE = "--models resnet8 resnet18 --steps 4"
SMALL: Mapping[str, object] = {"models": ["resnet8"], "steps": 2}
AIMS = {"bf16": 0.51, "int8": 0.27}  # of the bytes of fp32
ROUNDS = 4  # the first is another: everybody gets the whole model
SITES = ("one", "two")
CLASSES = tuple("0123456789")
BATCH = 8
EXACT = ("cpu-scale", "fedloge-norm1")  # the records with fp32
SEEDS = (1, 2, 3)
ERRORS = 2.0  # standard errors of a difference that noise explains


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", default=["resnet8", "resnet18"], help="(%(default)s)")
    parser.add_argument("--steps", type=positive, default=4, help="of training a round (%(default)s)")


def measure(models: Sequence[str], steps: int) -> dict[str, Any]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = {model: {wire: _measured(model, wire, steps) for wire in WIRES} for model in models}
    finally:
        torch.set_num_threads(before)
    for by_wire in found.values():
        for figures in by_wire.values():
            whole = by_wire["fp32"]["bytes"]
            figures["of_fp32"] = {way: round(figures["bytes"][way] / whole[way], 4) for way in ("down", "up", "both")}
    return {"models": found, "aims": AIMS, "accuracy": accuracy(RECORDS)}


def _measured(model: str, wire: Wire, steps: int) -> dict[str, Any]:
    table = {
        "model": {"name": model},
        "method": {"name": "fedloge"},
        "frame": {"norm": 1.0},
        "train": {"epochs": 1, "batch": BATCH},
        "federation": {"rounds": ROUNDS, "quorum": 1.0, "wire": wire},
    }
    with tempfile.TemporaryDirectory(prefix="fedloge-wire-") as folder:
        return _Study(parse(table), steps, Path(folder)).figures()


@dataclass
class _Site:
    participant: Participant
    residual: Residual
    reference: Reference = field(default_factory=Reference)
    fixed: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    holds: str = ""


class _Study:
    """Sites in this process, behind the messages of a real federation."""

    def __init__(self, config: Config, steps: int, folder: Path) -> None:
        self._config = config
        self._wire: Wire = config.federation.wire
        plan = Deployment(config, ImagesConfig(CLASSES, size=32, channels=3))
        self._orders = Orders(plan.settings(), self._wire)
        self._net = build(config.method, plan.task)
        self._state = config.method.init(self._net, plan.task)
        rng = torch.Generator().manual_seed(0)
        size = steps * BATCH
        labels = torch.arange(len(SITES) * size) % len(CLASSES)
        pictures = torch.randint(0, 256, (len(CLASSES), 32, 32, 3), generator=rng)
        noise = torch.randint(0, 256, (len(labels), 32, 32, 3), generator=rng)
        pixels = (0.5 * pictures[labels] + 0.5 * noise).to(torch.uint8)
        images = PixelImages(pixels, labels, CLASSES, mean=(0.5,) * 3, std=(0.25,) * 3, augment="crop-flip")
        self._sites = {}
        for place, name in enumerate(SITES):
            index = torch.arange(place * size, (place + 1) * size)
            counts = torch.bincount(labels[index], minlength=len(CLASSES))
            participant = Participant(
                name, plan.task, config.method, self._net, images, index, counts, Store(folder / name), _cpu()
            )
            residual = Residual(
                Store(folder / name / "residual", durable=False), self._wire, config.federation.topk, "this one"
            )
            self._sites[name] = _Site(participant, residual)
        self._bytes: dict[str, list[int]] = {"down": [], "up": []}
        self._seconds: dict[str, list[float]] = {}

    def figures(self) -> dict[str, Any]:
        fleet = LocalFleet({name: self._handler(name) for name in SITES})
        config = self._config
        rounds.run(fleet, config.method, self._state, self._net, config.federation, config.seed, rounds.Hooks())
        each = len(SITES)
        ways = {way: round(statistics.mean(sizes[each:])) for way, sizes in self._bytes.items()}
        return {
            "bytes": {**ways, "both": sum(ways.values())},
            "first_round": {way: round(statistics.mean(sizes[:each])) for way, sizes in self._bytes.items()},
            "processor_seconds": {
                what: round(statistics.median(took[each:] or took), 4) for what, took in self._seconds.items()
            },
        }

    def _handler(self, name: str) -> Callable[[Order], Reply]:
        return lambda order: self._ask(self._sites[name], order)

    def _ask(self, site: _Site, order: Order) -> Reply:
        card = Card(site.participant.name, "", "", 1, site.holds, reference=site.reference.name)
        # the first site's is the one that everybody shares
        with self._timed("encode order" if site.participant.name == SITES[0] else ""):
            [content] = self._orders.encoded(order, {1: card}).values()
        self._bytes["down"].append(weight(content))
        with self._timed("decode order"):
            got = decode_order(content)
            taken = site.reference.take(got.order)
        site.fixed = {**site.fixed, **taken.fixed}
        site.holds = got.fixed_digest
        received = Order(taken.round, taken.model, taken.shared, site.fixed)
        reply = site.participant.handle(received)
        with self._timed("encode reply"):
            reply = site.residual.code(reply, received.shared[PART])
            content = encode_reply(reply, got.wire)
        self._bytes["up"].append(weight(content))
        with self._timed("decode reply"):
            return self._orders.read(content, site.participant.name, order)

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        began = time.process_time()
        yield
        if what:
            self._seconds.setdefault(what, []).append(time.process_time() - began)


def _cpu() -> torch.device:
    return torch.device("cpu")


def accuracy(folder: Path) -> dict[str, Any]:
    """Of every wire with records: the method's own generic and personal model, mean and deviation over seeds, and the
    difference to fp32 beside what noise would explain."""
    family, exact = EXACT
    found = {"fp32": _top1(folder / family, exact)}
    found |= {wire: _top1(folder / "wire", wire) for wire in WIRES if wire != "fp32"}
    rows: dict[str, Any] = {}
    for wire, by_seed in found.items():
        for kind in by_seed:
            mine, theirs = list(by_seed[kind].values()), list(found["fp32"].get(kind, {}).values())
            row: dict[str, Any] = {"seeds": sorted(by_seed[kind]), "top1": _summary(mine)}
            if wire != "fp32" and len(mine) > 1 and len(theirs) > 1:
                row["difference"] = round(statistics.mean(mine) - statistics.mean(theirs), 4)
                errors = [statistics.variance(values) / len(values) for values in (mine, theirs)]
                row["noise"] = round(ERRORS * sum(errors) ** 0.5, 4)
            rows.setdefault(wire, {})[kind] = row
    return rows


def _top1(family: Path, row: str) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for seed in SEEDS:
        path = family / f"{row}-s{seed}" / "metrics.json"
        if path.exists():
            metrics = json.loads(path.read_text(encoding="utf-8"))
            for kind in ("generic", "personal"):
                found.setdefault(kind, {})[seed] = next(iter(metrics[kind].values()))["top1"]
    return found


def _summary(values: Sequence[float]) -> dict[str, float]:
    mean = {"mean": round(statistics.mean(values), 4)}
    return {**mean, "deviation": round(statistics.stdev(values), 4)} if len(values) > 1 else mean


def table(record: Mapping[str, Any]) -> str:
    lines = []
    for model, by_wire in record["models"].items():
        lines += [f"{model}: bytes of a site in a round, and of fp32's; processor time of one thread", ""]
        lines.append(
            f"{'':6}{'down':>12}{'up':>12}{'of fp32':>9}{'aim':>7}   server: order, reply   site: order, reply"
        )
        for wire, figures in by_wire.items():
            aim = f"{record['aims'][wire]:.2f}" if wire in record["aims"] else ""
            took = [
                f"{1e3 * figures['processor_seconds'][what]:.1f}"
                for what in ("encode order", "decode reply", "decode order", "encode reply")
            ]
            lines.append(
                f"{wire:6}{figures['bytes']['down']:12,}{figures['bytes']['up']:12,}"
                f"{figures['of_fp32']['both']:9.4f}{aim:>7}{took[0]:>13}, {took[1]:>5} ms{took[2]:>12}, {took[3]:>5} ms"
            )
        lines.append("")
    lines.append(
        f"accuracy in percent, mean and deviation over seeds; noise is {ERRORS:g} standard errors of a difference"
    )
    for wire, kinds in record["accuracy"].items():
        for kind, row in kinds.items():
            text = f"{wire:6}{kind:10}{100 * row['top1']['mean']:6.2f}"
            text += f" ± {100 * row['top1']['deviation']:.2f}" if "deviation" in row["top1"] else ""
            text += f"  seeds {', '.join(map(str, row['seeds']))}"
            if "difference" in row:
                text += f"  difference {100 * row['difference']:+.2f}, noise {100 * row['noise']:.2f}"
            lines.append(text)
    if not set(record["accuracy"]) - {"fp32"}:
        lines.append("(no records of the family wire: python -m benchmarks.family wire --data FOLDER)")
    return "\n".join(lines)


def ratios(record: Mapping[str, Any]) -> dict[str, float]:
    return {
        f"{model}: bytes of fp32 to {wire}": round(1 / figures["of_fp32"]["both"], 4)
        for model, by_wire in record["models"].items()
        for wire, figures in by_wire.items()
        if wire != "fp32"
    }
