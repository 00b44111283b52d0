"""A federation whose backbones travel as changes: over messages as in the simulation, through retries and losses."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from client.member import Member
from client.refusal import Refusal
from common import codec, parts
from common.codec import PART
from common.config import Config, parse
from common.deployment import Deployment, ImagesConfig
from common.messages import LACKS, Order, Reply, class_digest
from common.methods.method import ServerState
from common.net import build
from common.parts import Tensors
from common.wire import VERSION, Card, decode_order, encode_reply
from fedloge import shares
from fedloge.simulate import simulate
from server import checkpoint, rounds
from server.broadcast import Broadcast
from server.fleet import LocalFleet
from server.flower_orders import Orders, Traffic
from tests.wire.test_wire import alike, by_objects

ROUNDS = 3
SITES = ("site-000", "site-001", "site-002")
CLASSES = tuple("0123456789")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def experiment(wire: str, method: str = "fedloge", **policy: Any) -> Config:
    return parse(
        {
            "seed": 4,
            "method": {"name": method},
            "data": {"largest": 40, "imbalance": 0.2, "augment": "crop"},
            "partition": {"clients": len(SITES), "alpha": 0.5},
            "model": {"name": "cnn", "width": 16},
            "frame": {"norm": 1.0, "sparsity": 0.3},
            "train": {"epochs": 1, "batch": 16, "lr": 0.1},
            "federation": {"rounds": ROUNDS, "fold": "name", "quorum": 1.0, "wire": wire, **policy},
            "evaluation": {"every": 3, "last": 1},
        }
    )


@dataclass(frozen=True)
class Paper:
    name: str
    fingerprint: str = "ab" * 32
    classes: tuple[str, ...] = CLASSES


@dataclass
class Study:
    """Members of an experiment's shares behind messages, as the server's own `Orders` makes and reads them."""

    config: Config
    images: ImagesConfig
    folder: Path
    made: dict[str, Member] = field(default_factory=dict)
    traffic: Traffic = field(default_factory=dict)
    sent: list[tuple[str, int, bool]] = field(default_factory=list)  # to whom, round, whether as a change

    def __post_init__(self) -> None:
        self.serve()

    def serve(self) -> None:
        """A server that has just been started."""
        self.orders = Orders(self.wish.settings(), self.config.federation.wire, self.traffic.update)

    @property
    def wish(self) -> Deployment:
        return Deployment(self.config, self.images)

    def member(self, name: str) -> Member:
        if name not in self.made:
            test = self.folder / f"{name}-test.npz"
            self.made[name] = Member(
                Paper(name), self.folder / f"{name}.npz", self.folder / "states" / name, test=test, device="cpu"
            )
        return self.made[name]

    def residual(self, name: str) -> Path:
        [folder] = (self.folder / "states" / name / "store").glob("*/residual")
        return folder

    def card(self, name: str) -> Card:
        site = self.member(name)
        return Card(name, VERSION, class_digest(CLASSES), site.examples, site.holds, reference=site.reference)

    def ask(self, name: str, order: Order) -> Reply:
        [content] = self.orders.encoded(order, {1: self.card(name)}).values()
        self.orders.note("down", order, {name: content})
        got = decode_order(by_objects(content))
        self.sent.append((name, order.round, bool(got.order.base)))
        reply = self.member(name).answer(got.order, got.settings, got.fixed_digest, got.wire)
        content = by_objects(encode_reply(reply, got.wire))
        self.orders.note("up", order, {name: content})
        return self.orders.read(content, name, order)

    def start(self) -> ServerState:
        task = self.wish.task
        return self.config.method.init(build(self.config.method, task), task)

    def order(self, state: ServerState) -> Order:
        return rounds.make_order(self.config.method, state, state.round + 1, train=True, judge=False)

    def run(self, state: ServerState, until: int = ROUNDS) -> ServerState:
        def handler(name: str) -> Callable[[Order], Reply]:
            return lambda order: self.ask(name, order)

        fleet = LocalFleet({name: handler(name) for name in SITES})
        method, policy = self.config.method, replace(self.config.federation, rounds=until)
        return rounds.run(fleet, method, state, build(method, self.wish.task), policy, 4, rounds.Hooks())


def study(folder: Path, wire: str, method: str = "fedloge", **policy: Any) -> Study:
    config = experiment(wire, method, **policy)
    names, images = shares.write(config, folder)
    assert tuple(names) == SITES
    return Study(config, images, folder)


@pytest.mark.parametrize(("wire", "method"), [("bf16", "fedloge"), ("int8", "fedloge"), ("topk", "fedavg")])
def test_messages_and_simulation_end_in_the_same_bits(tmp_path: Path, wire: str, method: str) -> None:
    real = study(tmp_path / "real", wire, method)
    state = real.run(real.start())
    simulate(real.config, tmp_path / "simulated", lambda _: None)
    found = checkpoint.latest(tmp_path / "simulated" / "checkpoints")
    assert found is not None
    assert alike(found.state.parts, state.parts)
    simulate(experiment("fp32", method), tmp_path / "exact", lambda _: None)
    exact = checkpoint.latest(tmp_path / "exact" / "checkpoints")
    assert exact is not None
    assert not alike(exact.state.parts, state.parts)
    assert distance(exact.state.parts, state.parts) < {"bf16": 0.1, "int8": 0.1, "topk": 0.7}[wire]


def distance(a: dict[str, Tensors], b: dict[str, Tensors]) -> float:
    """Between two backbones, by the size of the first."""
    gaps = torch.cat([(a[PART][name] - b[PART][name]).reshape(-1) for name in a[PART]])
    return float(gaps.norm() / torch.cat([t.reshape(-1) for t in a[PART].values()]).norm())
