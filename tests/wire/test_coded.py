"""A federation whose backbones travel as changes: over messages as in the simulation, through retries and losses."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Error, Message, RecordDict

from client import app as site_app
from client.changes import Residual
from client.member import Member
from client.refusal import Refusal
from client.store import Store
from common import parts
from common.codec import PART, Wire
from common.config import Config, parse
from common.deployment import Deployment, ImagesConfig
from common.messages import LACKS, Order, Reply, class_digest
from common.methods.method import ServerState
from common.net import build
from common.parts import Tensors
from common.sgd import Diverged
from common.wire import TRAIN, VERSION, Card, decode_order, encode_order, encode_reply
from fedloge import shares
from fedloge.simulate import simulate
from server import checkpoint, rounds
from server.fleet import LocalFleet
from server.flower_fleet import FlowerFleet
from server.flower_orders import Orders, Traffic
from tests.serverappio import Node, SuperLink
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


# --- what is sent ----------------------------------------------------------------------------------------------------


def test_who_has_the_last_model_gets_the_change_and_who_has_not_the_whole(tmp_path: Path) -> None:
    real = study(tmp_path, "int8")
    state = real.run(real.start(), 2)
    whole = max(both["down"] for both in study_bytes(tmp_path / "exact"))
    assert all(both["down"] < 0.3 * whole and both["up"] < 0.3 * whole for both in real.traffic.values())
    del real.made["site-001"]  # it is started again
    real.run(state, 3)
    changes = {name: [changed for who, _, changed in real.sent if who == name] for name in SITES}
    assert changes == {
        "site-000": [False, True, True],
        "site-001": [False, True, False],
        "site-002": [False, True, True],
    }
    down = {name: both["down"] for name, both in real.traffic.items()}
    assert down["site-000"] < 0.3 * whole < 0.9 * whole < down["site-001"] < 1.01 * whole


def study_bytes(folder: Path) -> list[dict[str, int]]:
    """Of fp32, in the second round."""
    exact = study(folder, "fp32")
    exact.run(exact.start(), 2)
    return list(exact.traffic.values())


def test_a_site_that_is_started_again_and_a_server_that_is_give_the_bits_of_those_that_are_not(tmp_path: Path) -> None:
    """What is left to send is on the disk; and whether the whole is sent or the change makes no difference."""
    one, other = study(tmp_path / "one", "int8"), study(tmp_path / "other", "int8")
    state, again = one.run(one.start()), other.start()
    for round in range(1, ROUNDS + 1):
        again = other.run(again, round)
        other.made.clear()
    assert not any(changed for _, _, changed in other.sent)
    assert alike(again.parts, state.parts)


def test_a_round_that_is_tried_again_is_the_same_round(tmp_path: Path) -> None:
    real = study(tmp_path, "topk")
    state = real.run(real.start(), 2)
    order = real.order(state)
    first = {part: parts.snapshot(t) for part, t in real.ask("site-000", order).shared.items()}
    kept = (real.residual("site-000") / "round-000003.safetensors").read_bytes()
    before = real.traffic["site-000"]["down"]
    assert alike(real.ask("site-000", order).shared, first)
    assert (real.residual("site-000") / "round-000003.safetensors").read_bytes() == kept
    assert real.traffic["site-000"]["down"] < 1.5 * before  # it has the model already
    real.serve()
    assert not alike(
        real.ask("site-000", order).shared, first
    )  # a server that is started again sends what it has itself


def test_what_a_round_leaves_is_sent_in_the_next(tmp_path: Path) -> None:
    """Without what was left of the round before, another change comes."""
    real = study(tmp_path, "topk")
    order = real.order(real.run(real.start(), 1))
    with_rest = {part: parts.snapshot(t) for part, t in real.ask("site-000", order).shared.items()}
    for path in real.residual("site-000").iterdir():
        path.unlink()
    without = real.ask("site-000", order).shared
    assert not alike(without, with_rest)


# --- over Flower -----------------------------------------------------------------------------------------------------


@pytest.fixture
def link() -> Iterator[SuperLink]:
    made = SuperLink()
    yield made
    made.close()


def test_over_flower_a_site_that_has_forgotten_gets_the_whole_in_the_same_round(
    tmp_path: Path, link: SuperLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that was away for a moment is still the same node to the server. The bits are those of the simulation."""
    real = study(tmp_path / "real", "int8")
    monkeypatch.setattr(site_app, "open_kit", lambda path, _: Paper(path.stem))
    monkeypatch.setattr(site_app, "_members", {})

    def behave(node: Node, message: Message) -> None:
        at = {"data": f"{node.name}.npz", "test": f"{node.name}-test.npz", "state": f"states/{node.name}"}
        config: dict[str, Any] = {key: str(real.folder / value) for key, value in at.items()}
        config |= {"kit": f"{node.name}.kit", "device": "cpu"}
        if (node.name, message.metadata.message_type, node.taken.count(TRAIN)) == ("site-001", TRAIN, 2):
            del site_app._members[tuple(sorted(config.items()))]
        try:
            reply = site_app.app(message, Context(1, 2, node_config=config, state=RecordDict(), run_config={}))
        except Refusal as error:
            reply = Message(Error(2, str(error)), reply_to=message)
        node.announce(reply).go_on()

    nodes = [link.join(name, behave) for name in SITES]
    counted: list[Traffic] = []
    fleet = FlowerFleet(link.grid, real.wish.settings(), link.names, wire="int8", count=counted.append)
    reports: list[rounds.RoundReport] = []
    method, policy = real.config.method, replace(real.config.federation, min_clients=len(SITES))
    try:
        net = build(method, real.wish.task)
        state = rounds.run(fleet, method, real.start(), net, policy, 4, rounds.Hooks(after=reports.append))
    finally:
        fleet.close()
    assert [report.refused for report in reports] == [{}] * ROUNDS
    assert [node.taken.count(TRAIN) for node in nodes] == [3, 4, 3]
    down = {name: both["down"] for name, both in counted[-1].items()}
    assert down["site-001"] > 3 * down["site-000"]  # it is not relied on again
    simulate(real.config, tmp_path / "simulated", lambda _: None)
    found = checkpoint.latest(tmp_path / "simulated" / "checkpoints")
    assert found is not None
    assert alike(found.state.parts, state.parts)


# --- what must not get past ------------------------------------------------------------------------------------------


def test_a_change_of_a_model_that_the_site_has_not_is_refused(tmp_path: Path) -> None:
    real = study(tmp_path, "int8")
    state = real.run(real.start(), 1)
    [content] = real.orders.encoded(real.order(state), {1: real.card("site-000")}).values()
    got = decode_order(content)
    assert got.order.changes
    real.made.clear()
    with pytest.raises(Refusal, match=LACKS):
        real.member("site-000").answer(got.order, got.settings, got.fixed_digest, got.wire)


def test_an_order_on_another_wire_than_its_settings_say_is_refused(tmp_path: Path) -> None:
    real = study(tmp_path, "int8")
    order = real.order(real.start())
    got = decode_order(encode_order(order, real.wish.settings(), wire="fp32"))
    with pytest.raises(Refusal, match=r"travels as fp32, and its settings say federation\.wire = int8"):
        real.member("site-000").answer(got.order, got.settings, got.fixed_digest, got.wire)


PARTS = {PART: {"running_var": torch.ones(3), "w": torch.zeros(300)}, "head": {"w": torch.zeros(2)}}
TRAINED = {PART: {"running_var": torch.ones(3), "w": torch.linspace(0, 1, 300)}, "head": {"w": torch.ones(2)}}


def replied(folder: Path, wire: Wire, federation: str = "ab", trained: dict[str, Tensors] = TRAINED) -> Reply:
    residual = Residual(Store(folder), wire, 0.01, federation)
    return residual.code(Reply("north", 2, "m", 7, trained), PARTS[PART])


def test_a_reply_that_is_not_coded_as_it_should_be_is_refused(tmp_path: Path) -> None:
    order = Order(2, "m", PARTS, {})
    orders = Orders(Deployment(experiment("int8"), ImagesConfig(CLASSES, size=8, channels=1)).settings(), "int8")
    good, top = replied(tmp_path / "int8", "int8"), replied(tmp_path / "topk", "topk")
    got = orders.read(by_objects(encode_reply(good, "int8")), "north", order)
    assert torch.allclose(got.shared[PART]["w"], TRAINED[PART]["w"], atol=0.004)
    broken = replace(good.changes[PART], data=good.changes[PART].data[:-1])
    plain = Reply("north", 2, "m", 7, TRAINED)
    for reply, wire, reason in (
        (plain, "fp32", "it travels as fp32, and federation.wire is int8"),
        (plain, "int8", "its backbone is not coded as int8"),
        (top, "int8", "its backbone is not coded as int8"),
        (replace(good, shared=TRAINED), "int8", "its backbone is not coded as int8"),
        (replace(good, changes={**good.changes, "head": good.changes[PART]}), "int8", "not coded as int8"),
        (replace(good, changes={PART: broken}), "int8", "its backbone: its values do not match their checksum"),
    ):
        with pytest.raises(ValueError, match=reason) as refused:
            orders.read(by_objects(encode_reply(reply, wire)), "north", order)  # type: ignore[arg-type]
        assert str(refused.value).isprintable()
    with pytest.raises(ValueError, match="a change that was not asked for"):
        orders.read(encode_reply(good, "int8"), "north", replace(order, train=False))


@pytest.mark.parametrize(
    ("wire", "federation", "what"),
    [("int8", "another one", "another federation"), ("topk", "ab", "another wire"), ("int8", "ab", "another model")],
)
def test_what_is_left_of_something_else_is_dropped_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, wire: Wire, federation: str, what: str
) -> None:
    before = Residual(Store(tmp_path / "found"), "int8", 1.0, "ab")
    base = PARTS[PART] if what != "another model" else {**PARTS[PART], "w": torch.zeros(200)}
    trained = {PART: {**TRAINED[PART], "w": torch.linspace(0, 1, len(base["w"]))}}
    before.code(Reply("north", 1, "m", 7, trained), base)
    found = replied(tmp_path / "found", wire, federation)
    assert found.changes == replied(tmp_path / "fresh", wire, federation).changes
    [said] = caplog.messages
    assert f"what was left to send is of {what}: it is dropped" in said
    caplog.clear()
    assert replied(tmp_path / "found", wire, federation).changes == found.changes  # what it left itself is of round 2
    Residual(Store(tmp_path / "found"), wire, 0.01, federation).code(Reply("north", 3, "m", 7, TRAINED), PARTS[PART])
    assert len(caplog.messages) == 1


def test_values_that_are_not_finite_are_neither_sent_nor_kept(tmp_path: Path) -> None:
    trained = {PART: {**TRAINED[PART], "w": torch.full((300,), float("inf"))}}
    with pytest.raises(Diverged, match=r"use a smaller train\.lr"):
        replied(tmp_path, "int8", trained=trained)
    assert Store(tmp_path).rounds() == []
