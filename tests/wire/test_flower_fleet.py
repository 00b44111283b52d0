"""The fleet over a real ServerAppIo API: who counts as a site, what is sent, replies that stall, lie or are late."""

import hashlib
import logging
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_id, get_object_tree

from common.config import FederationConfig
from common.deployment import Deployment
from common.errors import UserError
from common.messages import Order, Reply, class_digest
from common.methods.method import ServerState
from common.net import Net, build
from common.packed import fixed_digest
from common.wire import (
    CARD,
    JUDGE,
    OVER,
    TRAIN,
    VERSION,
    Card,
    decode_order,
    encode_card,
    encode_reply,
    reply_bytes,
)
from server import flower_fleet, flower_post, rounds
from server.fleet import Failure
from server.flower_fleet import FlowerFleet
from server.flower_objects import TEXT, reason
from server.flower_post import Post
from tests.members import CLASSES, deployment
from tests.serverappio import TICK, Node, SuperLink

Act = Callable[[Node, Message], None]


@pytest.fixture
def link() -> Iterator[SuperLink]:
    logging.getLogger("flwr").setLevel(logging.WARNING)
    made = SuperLink()
    yield made
    made.close()


@pytest.fixture(scope="module")
def wish() -> Deployment:
    return deployment(Path("nowhere"))


@dataclass
class Server:
    """The operator's side of one test."""

    link: SuperLink
    wish: Deployment
    fleet: FlowerFleet
    net: Net
    state: ServerState
    problems: dict[str, str] = field(default_factory=dict)
    sites: dict[str, dict[str, Any]] = field(default_factory=dict)
    standings: list[rounds.Standing] = field(default_factory=list)

    def round(self, during: Callable[[rounds.Standing], None] = lambda _: None, **policy: Any) -> rounds.RoundReport:
        wished = {"quorum": 1.0, "grace": 20.0, "deadline": 60.0, "wait": 20.0, "fold": "arrival", **policy}
        report = rounds.one_round(
            self.fleet, self.wish.config.method, self.state, self.net, FederationConfig(**wished), 1,
            rounds.Hooks(during=during),
        )  # fmt: skip
        self.state = report.state
        return report

    def moved(self, by: float, since: ServerState) -> bool:
        """Whether every shared value is `by` larger than it was."""
        method = self.wish.config.method
        return all(
            torch.allclose(t, since.parts[part][name] + by, atol=1e-5)
            for part, group in self.state.parts.items() if part in method.shared for name, t in group.items()
        )  # fmt: skip

    def nothing_left(self, within: float = 20.0) -> bool:
        """Nothing of what was sent either way is left at the SuperLink, which hears soon of what has ended."""
        self.fleet.names(0, 0.0)
        state, until = self.link.state, time.monotonic() + within
        while left := len(self.link.store) + state.num_message_ins() + state.num_message_res():
            if time.monotonic() > until:
                break
            time.sleep(0.01)
        return left == 0


def serve(
    link: SuperLink, wish: Deployment, registry: Callable[[], dict[int, str]] | None = None, **more: Any
) -> Server:
    net = build(wish.config.method, wish.task)
    server: Server

    def notify(sites: dict[str, dict[str, Any]], problems: dict[str, str]) -> None:
        server.sites, server.problems = sites, problems

    fleet = FlowerFleet(link.grid, wish.settings(), registry or link.names, notify=notify, **more)
    server = Server(link, wish, fleet, net, wish.config.method.init(net, wish.task))
    return server


@pytest.fixture
def server(link: SuperLink, wish: Deployment) -> Server:
    return serve(link, wish)


# --- what nodes do ---------------------------------------------------------------------------------------------------


def card_of(node: Node, **more: Any) -> Card:
    return replace(Card(node.name, VERSION, class_digest(CLASSES), 10, ""), **more)


def trained(node: Node, order: Order, by: float = 1.0, **more: Any) -> Reply:
    shared = {part: {name: t + by for name, t in group.items()} for part, group in order.shared.items()}
    return replace(Reply(node.name, order.round, order.model, 10, shared, metrics={"loss 0": 0.5}), **more)


def honest(by: float = 1.0) -> Act:
    def act(node: Node, message: Message) -> None:
        received = decode_order(message.content)
        node.reply(message, encode_reply(trained(node, received.order, by), received.wire))

    return act


def judging(node: Node, message: Message) -> None:
    order = decode_order(message.content).order
    assert not order.train
    node.reply(message, encode_reply(Reply(node.name, order.round, order.model, 10, {})))


def doing(*acts: Act, card: Callable[[Node, Message], None] | None = None) -> Act:
    """Cards are shown and farewells are heard; orders are answered by one act after the other, then by the last."""
    left = list(acts) or [honest()]

    def behave(node: Node, message: Message) -> None:
        kind = message.metadata.message_type
        if kind == CARD:
            (card or (lambda node, message: node.reply(message, encode_card(card_of(node)))))(node, message)
        elif kind == OVER:
            node.reply(message, RecordDict())
        elif kind == JUDGE:
            judging(node, message)
        else:
            (left.pop(0) if len(left) > 1 else left[0])(node, message)

    return behave


def failing(code: int, text: str) -> Act:
    return lambda node, message: node.announce(Message(Error(code, text), reply_to=message)).go_on()


def silent(node: Node, message: Message) -> None:
    del node, message


def three(link: SuperLink, *acts: Act) -> list[Node]:
    """Two honest sites and `west`."""
    return [link.join("north", doing()), link.join("south", doing()), link.join("west", doing(*acts))]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the operator reads."""
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("server")]


# --- who counts as a site --------------------------------------------------------------------------------------------


def test_sites_count_once_their_cards_are_good(server: Server) -> None:
    three(server.link)
    assert server.fleet.names(1, 20.0) == ["north", "south", "west"]  # not only the first that comes
    assert {name: (site["online"], site["examples"]) for name, site in server.sites.items()} == dict.fromkeys(
        ("north", "south", "west"), (True, 10)
    )


def test_the_wait_for_more_sites_ends(server: Server) -> None:
    server.link.join("north", doing())
    assert server.fleet.names(2, 0.3) == ["north"]


def test_sites_that_come_while_others_are_waited_for_count(server: Server) -> None:
    def late(node: Node, message: Message) -> None:
        server.link.join("south", doing())
        node.reply(message, encode_card(card_of(node)))

    server.link.join("north", doing(card=late))
    assert server.fleet.names(2, 20.0) == ["north", "south"]


BAD_CARDS: dict[str, tuple[Callable[[Node], RecordDict], str]] = {
    "classes": (lambda node: encode_card(card_of(node, classes=class_digest("ab"))), "its list of classes"),
    "empty": (lambda node: encode_card(card_of(node, examples=0)), "no image to train with"),
    "name": (lambda node: encode_card(card_of(node, name="north")), "its kit is that of 'north', its key that of west"),
    "schema": (lambda node: encode_card(card_of(node, schema=99)), "schema 99"),
    "negative": (lambda node: encode_card(card_of(node, examples=-1)), "examples or counts"),
    "nothing": (lambda _: RecordDict(), "holds no card"),
    "other": (lambda _: RecordDict({"card": MetricRecord({"examples": 3})}), "holds no card"),
    "version": (lambda node: encode_card(card_of(node, version="9.9")), f"fedloge 9.9, the server {VERSION}"),
    "line": (lambda node: encode_card(card_of(node, version="1\n2")), "not printable"),
}


@pytest.mark.parametrize("case", BAD_CARDS)
def test_a_bad_card_is_said_once_and_asked_for_again(
    server: Server, case: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, why = BAD_CARDS[case]
    cards = [make, make, make, lambda node: encode_card(card_of(node))]
    server.link.join("north", doing())
    server.link.join("west", doing(card=lambda node, message: node.reply(message, cards.pop(0)(node))))
    assert server.fleet.names(2, 0.0) == ["north"]
    assert list(server.problems) == ["west"]
    said = server.problems["west"]
    assert why in said
    monkeypatch.setattr(flower_fleet, "AGAIN", 0.05)
    assert server.fleet.names(2, 20.0) == ["north", "west"]
    assert server.problems == {}
    assert warnings(caplog) == [f"west cannot take part: {said}"]


def test_a_site_that_does_not_show_its_card_is_reported_and_asked_again(
    server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("CARD_TTL", 0.5), ("AGAIN", 0.0), ("FRESH", 0.0)):
        monkeypatch.setattr(flower_fleet, name, value)
    acts: list[Act] = [silent, lambda node, message: node.reply(message, encode_card(card_of(node)))]

    def show(node: Node, message: Message) -> None:
        acts.pop(0)(node, message)

    west = server.link.join("west", doing(card=show))
    assert server.fleet.names(1, 0.0) == []
    monkeypatch.setattr(flower_fleet, "CARD_TTL", 60.0)
    assert server.fleet.names(1, 20.0) == ["west"]
    assert warnings(caplog) == ["west cannot take part: has not answered in time"]
    assert west.taken == [CARD, CARD]


def test_who_went_offline_is_not_a_site_until_its_card_is_shown_again(server: Server) -> None:
    _, _, west = three(server.link)
    server.fleet.names(3, 20.0)
    west.go_offline()
    assert server.fleet.names(1, 0.0) == ["north", "south"]
    assert server.sites["west"]["online"] is False
    west.stop()
    west.go_online()
    assert server.fleet.names(3, 20.0) == ["north", "south", "west"]
    assert west.taken == [CARD, CARD]


def test_a_key_that_is_nobodys_is_left_out_and_said_once(
    link: SuperLink, wish: Deployment, caplog: pytest.LogCaptureFixture
) -> None:
    north, west = link.join("north", doing()), link.join("west", doing())
    server = serve(link, wish, lambda: {north.id: "north"})
    for _ in range(3):
        assert server.fleet.names(2, 0.3) == ["north"]
    assert caplog.text.count("with a key of no site that may take part") == 1
    assert west.taken == []


def test_a_registry_that_cannot_be_asked_is_asked_again(
    link: SuperLink, wish: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flower_fleet, "WATCH", 0.05)
    failures = [UserError("no answer")] * 3

    def registry() -> dict[int, str]:
        if failures:
            raise failures.pop()
        return link.names()

    server = serve(link, wish, registry)
    three(link)
    assert len(server.fleet.names(3, 20.0)) == 3


def test_without_a_registry_cards_give_the_names_and_no_name_is_given_twice(link: SuperLink, wish: Deployment) -> None:
    fleet = FlowerFleet(link.grid, wish.settings())
    link.join("north", doing())
    assert fleet.names(1, 20.0) == ["north"]
    link.join("north", doing())
    link.join("south", doing())
    assert fleet.names(2, 20.0) == ["north", "south"]
    assert fleet.names(3, 0.0) == ["north", "south"]


# --- what is sent ----------------------------------------------------------------------------------------------------


def test_the_fixed_parts_travel_once_to_every_site(server: Server) -> None:
    got: list[tuple[str, bool]] = []

    def watching(node: Node, message: Message) -> None:
        received = decode_order(message.content)
        got.append((node.name, bool(received.order.fixed)))
        assert received.fixed_digest
        assert received.settings == server.wish.settings()
        honest()(node, message)

    frame = fixed_digest({part: t for part, t in server.state.parts.items() if part in server.wish.config.method.fixed})
    knows = doing(watching, card=lambda node, message: node.reply(message, encode_card(card_of(node, holds=frame))))
    server.link.join("north", doing(watching))
    server.link.join("south", knows)
    server.round(min_clients=2)
    server.link.join("west", doing(watching))
    server.round(min_clients=3)
    server.round(min_clients=3)
    of = {name: [fixed for who, fixed in got if who == name] for name in ("north", "south", "west")}
    assert of == {"north": [True, False, False], "south": [False] * 3, "west": [True, False]}


def test_a_site_that_failed_says_anew_what_it_holds(server: Server) -> None:
    """It may have been restarted with another state folder: the frame is sent again if its card does not name it."""
    nodes = three(server.link, honest(), failing(2, "<class 'client.refusal.Refusal'>:<'its disk is full'>"), honest())
    server.round(min_clients=3)
    assert server.round(min_clients=3, quorum=0.5).refused == {"west": "its disk is full"}
    assert server.round(min_clients=3).folded
    assert nodes[2].taken == [CARD, TRAIN, TRAIN, CARD, TRAIN]
    assert nodes[0].taken == [CARD, TRAIN, TRAIN, TRAIN]


def test_what_many_sites_get_is_uploaded_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [server.link.join(f"site-{k}", doing(silent)) for k in range(8)]  # nothing of theirs is to be counted
    server.fleet.names(8, 20.0)
    uploaded: list[int] = []
    put = server.link.store.put
    monkeypatch.setattr(
        server.link.store, "put", lambda name, content: (uploaded.append(len(content)), put(name, content))
    )
    order = Order(1, "m", {"backbone": {"w": torch.rand(200_000)}}, {})
    exchange = server.fleet.broadcast(order, [node.name for node in nodes], 60.0)
    assert 800_000 < sum(uploaded) < 900_000  # the values and little else, once
    exchange.close()


def test_a_round_folds_what_the_sites_answer_and_leaves_nothing_at_the_superlink(server: Server) -> None:
    began = server.state
    server.link.join("north", doing(honest(1.0)))
    server.link.join("south", doing(honest(2.0)))
    server.link.join("west", doing(honest(6.0)))
    for many in (1, 2, 3):
        report = server.round(min_clients=3)
        assert sorted(report.folded) == ["north", "south", "west"]
        assert (report.refused, report.missing) == ({}, ())
        assert report.metrics["west"] == {"loss 0": 0.5}
        assert server.moved(3.0 * many, began)
    assert server.nothing_left()


def test_rounded_backbones_go_both_ways(link: SuperLink, wish: Deployment) -> None:
    server = serve(link, wish, wire="bf16")
    began = server.state
    link.join("north", doing(honest(1.0)))
    server.round(min_clients=1)
    for part, tolerance in (("global_head", 1e-6), ("backbone", 0.02)):
        apart = [t - began.parts[part][name] - 1 for name, t in server.state.parts[part].items()]
        assert 0 < max(float(t.abs().max()) for t in apart) < tolerance


def test_the_final_judgement_travels_as_an_evaluation(server: Server) -> None:
    nodes = three(server.link)
    policy = FederationConfig(min_clients=3, wait=20.0)
    report = rounds.final_judgement(server.fleet, server.wish.config.method, server.state, policy, rounds.Hooks())
    assert len(report.folded) == 3
    assert all(node.taken == [CARD, JUDGE] for node in nodes)


def test_every_site_hears_that_it_is_over(
    server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = three(server.link)
    nodes.append(server.link.join("east", doing(card=lambda node, message: node.reply(message, RecordDict()))))
    server.fleet.names(3, 20.0)
    server.fleet.over()
    assert all(node.taken[-1] == OVER for node in nodes)
    assert caplog.text.count("have not heard") == 0
    monkeypatch.setattr(flower_fleet, "FAREWELL", 0.3)
    monkeypatch.setattr(flower_fleet, "FRESH", 0.3)
    server.link.join("deaf", silent)
    server.fleet.names(4, 0.0)
    server.fleet.over()
    assert "these sites have not heard that it is over: deaf" in caplog.text


def test_nobody_there_is_no_reason_not_to_end(server: Server) -> None:
    server.fleet.over()


# --- sites that go, fail or are late ---------------------------------------------------------------------------------


def test_a_site_that_goes_offline_at_work_fails_at_once(server: Server) -> None:
    three(server.link, lambda node, _: node.go_offline(), honest())
    report = server.round(min_clients=3, quorum=0.5)
    assert sorted(report.folded) == ["north", "south"]
    assert report.refused == {"west": "went offline"}
    assert server.nothing_left()


def test_a_site_that_went_before_the_order_was_sent_fails_at_once(server: Server) -> None:
    nodes = three(server.link)
    names = server.fleet.names(3, 20.0)
    nodes[0].go_offline()
    order = Order(1, "m", {"backbone": {"w": torch.rand(5)}}, {})
    exchange = server.fleet.broadcast(order, names, 60.0)
    assert exchange.next(20.0) == Failure("north", "went offline before the order was sent")
    exchange.close()
    assert nodes[0].taken == [CARD]


@pytest.mark.parametrize(
    ("code", "text", "said"),
    [
        (2, "<class 'client.refusal.Refusal'>:<'its disk is full'>", "its disk is full"),
        (2, "<class 'RuntimeError'>:<'one\ntwo\x1b[31m'>", "one two [31m"),
        (2, "x" * 10_000, "x" * TEXT),
        (8, "anything", "its process ended before it had answered"),
        (1, "", "failed with Flower's error 1"),
    ],
)
def test_the_reason_of_a_site_is_one_printable_line(server: Server, code: int, text: str, said: str) -> None:
    three(server.link, failing(code, text))
    assert server.round(min_clients=3, quorum=0.5).refused == {"west": said}
    assert reason(code, text).isprintable()
    assert server.nothing_left()


def test_an_answer_after_the_deadline_is_not_taken(server: Server) -> None:
    """The SuperLink refuses it, and forgets both."""
    free = threading.Event()
    three(server.link, lambda node, message: (free.wait(), honest()(node, message))[0], honest())
    report = server.round(min_clients=3, quorum=0.5, deadline=3.0)
    assert sorted(report.folded) == ["north", "south"]
    assert report.missing == ("west",)
    free.set()
    report = server.round(min_clients=3)
    assert len(report.folded) == 3


def test_a_site_that_is_too_late_is_left_alone_until_it_has_answered(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    free = threading.Event()
    nodes = three(server.link, lambda node, message: (free.wait(), honest(1e6)(node, message))[0], honest())
    began = server.state
    report = server.round(min_clients=3, quorum=0.5, grace=0.2)
    assert report.missing == ("west",)
    assert server.round(min_clients=2).folded == ("north", "south") or True
    assert nodes[2].taken == [CARD, TRAIN]
    free.set()
    while not server.nothing_left(0.1):
        pass
    assert caplog.text.count("an answer of west has come too late and is thrown away") == 1
    assert len(server.round(min_clients=3).folded) == 3
    assert nodes[2].taken == [CARD, TRAIN, TRAIN]
    assert server.moved(3.0, began)


def test_a_site_at_work_on_an_old_order_gets_a_new_one_if_there_are_too_few_others(server: Server) -> None:
    nodes = three(server.link, silent, silent, honest())
    server.round(min_clients=3, quorum=0.5, grace=0.1)
    report = server.round(min_clients=3, quorum=0.5, grace=0.1)
    assert report.chosen == ("north", "south", "west")
    assert server.fleet.names(3, 0.3) == ["north", "south"]  # a third one would only pile up
    assert nodes[2].taken == [CARD, TRAIN, TRAIN]


def test_an_order_that_the_superlink_has_lost_is_a_failure(server: Server) -> None:
    def lose(node: Node, message: Message) -> None:
        node.link.state.delete_messages({message.metadata.message_id})

    three(server.link, lose)
    assert server.round(min_clients=3, quorum=0.5).refused == {"west": "has not answered in time"}


def test_a_superlink_that_fails_once_at_giving_replies_does_not_end_the_round(
    server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    three(server.link)
    server.fleet.names(3, 20.0)
    give = server.link.state.get_message_res
    failures = [ValueError("broken")]

    def failing_once(**more: Any) -> Any:
        if failures:
            raise failures.pop()
        return give(**more)

    monkeypatch.setattr(server.link.state, "get_message_res", failing_once)
    assert len(server.round(min_clients=3).folded) == 3
    assert "the SuperLink failed at giving replies" in caplog.text


def test_a_node_that_the_superlink_does_not_know_is_left_out(link: SuperLink) -> None:
    north = link.join("north", doing())
    post = Post(link.grid)
    record = RecordDict({"x": ConfigRecord({"y": 1})})
    letters = post.send({north.id: record, 77: record}, {north.id: "north", 77: "nobody"}, CARD, 60.0, 10_000)
    assert [letter.name for letter in letters] == ["north"]
    assert post.next(20.0) is not None
    post.close()
    assert len(link.store) == 0


def test_nobody_waits_until_the_superlink_has_forgotten(link: SuperLink, monkeypatch: pytest.MonkeyPatch) -> None:
    north = link.join("north", doing())
    post = Post(link.grid)
    confirm, may = link.grid._stub.ConfirmMessageReceived, threading.Event()
    monkeypatch.setattr(link.grid._stub, "ConfirmMessageReceived", lambda request: may.wait(20.0) and confirm(request))
    post.send({north.id: RecordDict({"x": ConfigRecord({"y": 1})})}, {north.id: "north"}, CARD, 60.0, 10_000)
    assert post.next(10.0) is not None
    assert len(link.store) > 0
    may.set()
    post.close()  # by the end it has
    assert len(link.store) == 0


# --- replies that are announced before they are there ----------------------------------------------------------------


def own(node: Node, message: Message) -> Message:
    """A reply that shares no object with those of others."""
    received = decode_order(message.content)
    reply = trained(node, received.order, float(ord(node.name[0])))
    return Message(encode_reply(reply, received.wire), reply_to=message)


def noticed(node: Node) -> None:
    """Wait until the server knows of all replies. One that is gone when it asks for them is said to be offline."""
    while node.link.state.num_message_res():
        time.sleep(TICK)


def test_a_reply_that_stalls_lets_others_pass(server: Server) -> None:
    others_are_in = threading.Event()

    def stalling(node: Node, message: Message) -> None:
        upload = node.announce(own(node, message))
        upload.go_on(3)
        announced.set()
        assert others_are_in.wait(60.0)
        upload.go_on()

    def waiting(node: Node, message: Message) -> None:
        assert announced.wait(60.0)
        honest()(node, message)

    announced = threading.Event()
    for name, act in (("north", waiting), ("south", waiting), ("west", stalling)):
        server.link.join(name, doing(act))
    order: list[int] = []

    def during(standing: rounds.Standing) -> None:
        order.append(len(standing.waiting))
        if standing.waiting == {"west"}:
            others_are_in.set()

    report = server.round(during, min_clients=3)
    assert report.folded[2] == "west"
    assert server.nothing_left()


def test_of_two_that_stall_neither_blocks_the_other(server: Server) -> None:
    turns = [threading.Event() for _ in range(3)]

    def stalling(number: int) -> Act:
        def act(node: Node, message: Message) -> None:
            upload = node.announce(own(node, message))
            upload.go_on(1 + number)
            assert turns[number].wait(60.0)
            upload.go_on()

        return act

    for number, name in enumerate(("north", "south", "west")):
        server.link.join(name, doing(stalling(number)))
    turns[2].set()

    def during(standing: rounds.Standing) -> None:
        if "west" not in standing.waiting:
            turns[1].set()
        if "south" not in standing.waiting:
            turns[0].set()

    assert server.round(during, min_clients=3).folded == ("west", "south", "north")


@pytest.mark.parametrize("uploaded", [0, 1, 3, 6])
def test_a_site_that_goes_offline_while_it_sends_has_failed(
    server: Server, uploaded: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flower_post, "STALL", 0.1)

    def dying(node: Node, message: Message) -> None:
        node.announce(own(node, message)).go_on(uploaded)
        noticed(node)
        node.go_offline()

    three(server.link, dying)
    report = server.round(min_clients=3, quorum=0.5)
    assert sorted(report.folded) == ["north", "south"]
    assert report.refused == {"west": "went offline while it was sending its reply"}
    assert server.nothing_left()


def test_a_reply_that_was_complete_before_its_site_went_is_taken(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flower_post, "STALL", 0.1)

    def leaving(node: Node, message: Message) -> None:
        upload = node.announce(own(node, message))
        noticed(node)
        upload.go_on()
        node.go_offline()

    server.link.join("west", doing(leaving))
    assert server.round(min_clients=1).folded == ("west",)


def test_a_reply_that_never_comes_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower_post, "STUCK", 2.0)
    three(server.link, lambda node, message: node.announce(own(node, message)).go_on(2))
    report = server.round(min_clients=3, quorum=0.5)
    assert sorted(report.folded) == ["north", "south"]
    assert report.refused["west"].startswith("nothing more of its reply has come")
    assert server.nothing_left()


def test_a_reply_that_is_half_there_when_the_round_closes_is_late(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    three(server.link, lambda node, message: node.announce(own(node, message)).go_on(4), honest())
    report = server.round(min_clients=3, quorum=0.5, grace=0.3)
    assert report.missing == ("west",)
    assert server.nothing_left()
    assert caplog.text.count("an answer of west has come too late") == 1
    assert len(server.round(min_clients=3).folded) == 3


def test_one_reply_is_in_hand_at_a_time(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve large replies are there at once; pulled and not yet taken is never more than one of them."""
    held: list[int] = []
    fetch = Post._fetch

    def watching(post: Post, arrival: Any) -> bool:
        found = fetch(post, arrival)
        held.append(sum(other.size for other in post._arrivals))
        return found

    monkeypatch.setattr(Post, "_fetch", watching)
    all_there = threading.Barrier(12, action=lambda: None)

    def together(node: Node, message: Message) -> None:
        upload = node.announce(Message(encode_reply(trained(node, decode_order(message.content).order, shift(node))),
                                       reply_to=message))  # fmt: skip
        upload.go_on(4)
        all_there.wait(60.0)
        upload.go_on()

    def shift(node: Node) -> float:
        return float(node.name[5:])

    for k in range(12):
        server.link.join(f"site-{k}", doing(together))
    order = Order(1, "m", {"backbone": {"w": torch.zeros(3_000_000)}}, {})
    exchange = server.fleet.broadcast(order, server.fleet.names(12, 20.0), 60.0)
    got = set()
    while len(got) < 12:
        answer = exchange.next(60.0)
        assert isinstance(answer, Reply), answer
        assert torch.all(answer.shared["backbone"]["w"] == float(answer.client[5:]))
        got.add(answer.client)
    assert max(held) < 1.1 * 12_000_000


# --- hostile replies -------------------------------------------------------------------------------------------------


def with_values(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Reply], Reply]:
    """The global head is changed in place."""

    def make(reply: Reply) -> Reply:
        head = {name: t.clone() for name, t in reply.shared["global_head"].items()}
        change(head)
        return replace(reply, shared={**reply.shared, "global_head": head})

    return make


def poisoned(value: float) -> Callable[[Reply], Reply]:
    return with_values(lambda head: head["weight"].view(-1)[7:8].fill_(value).sum() and None)


def swapped(name: str, t: torch.Tensor) -> Callable[[Reply], Reply]:
    return with_values(lambda head: head.update({name: t}))


WRONG_REPLIES: dict[str, tuple[Callable[[Reply], Reply], str]] = {
    "nan": (poisoned(math.nan), "not finite"),
    "inf": (poisoned(math.inf), "not finite"),
    "-inf": (poisoned(-math.inf), "not finite"),
    "too large": (poisoned(1e30), "too large to be averaged"),
    "scalar": (swapped("bias", torch.ones(())), r"bias is float32\[\] instead of float32\[10\]"),
    "broadcastable": (swapped("bias", torch.ones(1)), r"bias is float32\[1\] instead"),
    "shape": (swapped("weight", torch.ones(3, 3)), r"weight is float32\[3, 3\] instead"),
    "missing tensor": (with_values(lambda head: head.__delitem__("bias")), "bias is missing"),
    "extra tensor": (swapped("more", torch.ones(2)), "more is not expected"),
    "dtype": (
        lambda r: replace(
            r, shared={**r.shared, "global_head": {n: t.double() for n, t in r.shared["global_head"].items()}}
        ),
        "float64",
    ),
    "missing part": (lambda r: replace(r, shared={"backbone": r.shared["backbone"]}), r"parts \['backbone'\] instead"),
    "no part": (lambda r: replace(r, shared={}), r"parts \[\] instead"),
    "extra part": (lambda r: replace(r, shared={**r.shared, "local_head": {"weight": torch.ones(2)}}), "local_head"),
    "frame": (lambda r: replace(r, shared={**r.shared, "frame": {"weight": torch.ones(10, 16)}}), "frame"),
    "statistics": (lambda r: replace(r, sums={"n": torch.ones(3)}), "statistics: n is not expected"),
    "negative": (lambda r: replace(r, examples=-5), "-5 examples are not between"),
    "zero": (lambda r: replace(r, examples=0), "0 examples are not between"),
    "absurd": (lambda r: replace(r, examples=2**62), "examples are not between"),
    "stale": (lambda r: replace(r, round=r.round - 1), "for round 1, this is round 2"),
    "future": (lambda r: replace(r, round=r.round + 1), "for round 3, this is round 2"),
    "model": (lambda r: replace(r, model="0" * 64), "another model than the one sent"),
    "schema": (lambda r: replace(r, schema=99), "schema 99"),
    "metric": (lambda r: replace(r, metrics={"loss 0": math.nan}), "loss 0 is not a finite number"),
}


def mutated(make: Callable[[Reply], Reply]) -> Act:
    def act(node: Node, message: Message) -> None:
        received = decode_order(message.content)
        node.reply(message, encode_reply(make(trained(node, received.order, 1e3)), received.wire))

    return act


def lying(change: Callable[[RecordDict], None]) -> Act:
    """An honest reply whose record is changed before it is sent."""

    def act(node: Node, message: Message) -> None:
        received = decode_order(message.content)
        record = encode_reply(trained(node, received.order, 1e3), received.wire)
        change(record)
        node.reply(message, record)

    return act


def about(key: str, value: Any) -> Act:
    def change(record: RecordDict) -> None:
        config = ConfigRecord({**record["reply"]})
        if value is None:
            del config[key]
        else:
            config[key] = value
        record["reply"] = config

    return lying(change)


def array(change: Callable[[Array], Array]) -> Act:
    def replaced(record: RecordDict) -> None:
        arrays = dict(record["parts"])
        arrays["shared/global_head"] = change(arrays["shared/global_head"])
        record["parts"] = ArrayRecord(arrays)

    return lying(replaced)


def only(record: RecordDict) -> Act:
    return lambda node, message: node.reply(message, record)


def noise(many: int) -> bytes:
    return (
        torch.randint(0, 256, (many,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)).numpy().tobytes()
    )


def bits(many: int) -> RecordDict:
    return RecordDict(
        {"reply": ConfigRecord({"x": noise(many)}), "parts": ArrayRecord({"y": Array(*VALUES, noise(many))})}
    )


ENDLESS = f'[["w",[{",".join(["9" * 300] * 9)}],"float32"]]'
VALUES = ("float32", (1,), "numpy.ndarray")


def objects(change: Callable[[Message, dict[str, bytes]], dict[str, bytes]], keep: bool = True) -> Act:
    """The objects of an honest reply, changed; the tree as it was, or made of what is left."""

    def act(node: Node, message: Message) -> None:
        received = decode_order(message.content)
        reply = Message(encode_reply(trained(node, received.order, 1e3), received.wire), reply_to=message)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        contents = {name: part.deflate() for name, part in get_all_nested_objects(reply).items()}
        changed = change(reply, dict(contents))
        tree = get_object_tree(reply)
        if not keep:
            root = next(name for name in changed if name not in contents)
            reply.metadata.__dict__["_message_id"] = root
            tree = ObjectTree(object_id=root, children=[ObjectTree(object_id=name) for name in changed if name != root])
        node.announce_tree(reply, tree, changed).go_on()

    return act


def rooted(content: bytes) -> Callable[[Message, dict[str, bytes]], dict[str, bytes]]:
    """A message object of these bytes instead of the real one."""

    def change(reply: Message, contents: dict[str, bytes]) -> dict[str, bytes]:
        del contents[reply.object_id]
        return {**contents, get_object_id(content): content}

    return change


def bomb(node: Node, message: Message) -> None:
    """One GB: an Array that lists a chunk of 0.1 MB ten thousand times."""
    chunk = b"ArrayChunk  100000\0" + bytes(100_000)
    listed = str([0] * 10_000).encode()
    body = b'{"dtype": "float32", "shape": [1], "stype": "fedloge.raw", "arraychunk_ids": ' + listed + b"}"
    made = b"Array %s %d\0" % (get_object_id(chunk).encode(), len(body)) + body
    body = b'{"shared/backbone": "%s"}' % get_object_id(made).encode()
    arrays = b"ArrayRecord %s %d\0" % (get_object_id(made).encode(), len(body)) + body
    body = b'{"parts": "%s"}' % get_object_id(arrays).encode()
    record = b"RecordDict %s %d\0" % (get_object_id(arrays).encode(), len(body)) + body
    reply = Message(RecordDict(), reply_to=message)
    body = reply.deflate().partition(b"\0")[2]
    root = b"Message %s %d\0" % (get_object_id(record).encode(), len(body)) + body
    contents = {get_object_id(content): content for content in (chunk, made, arrays, record, root)}
    reply.metadata.__dict__["_message_id"] = get_object_id(root)
    tree = ObjectTree(object_id=get_object_id(chunk))
    for content in (made, arrays, record, root):
        tree = ObjectTree(object_id=get_object_id(content), children=[tree])
    node.announce_tree(reply, tree, contents).go_on()


def piecemeal(node: Node, message: Message) -> None:
    """A reply cut into very many pieces, each of which costs a call."""
    reply = Message(RecordDict(), reply_to=message)
    reply.metadata.__dict__["_message_id"] = reply.object_id
    names = [hashlib.sha256(str(k).encode()).hexdigest() for k in range(20_000)]
    tree = ObjectTree(object_id=reply.object_id, children=[ObjectTree(object_id=name) for name in names])
    node.announce_tree(reply, tree, {})


def sized(megabytes: int, chunk: int) -> Act:
    """Honest but for an array that is as large as nobody asked for."""

    def act(node: Node, message: Message) -> None:
        content = bytes(chunk << 20)
        made = {}
        for k in range(megabytes // chunk):
            one = b"ArrayChunk  %d\0" % len(content) + k.to_bytes(4, "little") + content[4:]
            made[get_object_id(one)] = one
        reply = Message(RecordDict(), reply_to=message)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        made[reply.object_id] = reply.deflate()
        tree = ObjectTree(object_id=reply.object_id, children=[ObjectTree(object_id=n) for n in list(made)[:-1]])
        node.announce_tree(reply, tree, made).go_on()

    return act


WRONG_RECORDS: dict[str, tuple[Act, str]] = {
    "empty": (only(RecordDict()), "holds no reply"),
    "other record": (only(RecordDict({"reply": MetricRecord({"examples": 3})})), "holds no reply"),
    "a card": (lambda node, message: node.reply(message, encode_card(card_of(node))), "holds no reply"),
    "random values": (only(bits(5000)), "its reply is not one"),
    "no examples": (about("examples", None), "examples is not of type int"),
    "examples as text": (about("examples", "10"), "examples is not of type int"),
    "examples as truth": (about("examples", True), "examples is not of type int"),
    "extra key": (about("more", 1), "'more' is not expected"),
    "extra record": (lying(lambda record: record.update({"x": ConfigRecord({"y": 1})})), "only"),
    "no manifest": (about("shared/backbone", None), "shared/backbone is no flat array"),
    "other manifest": (about("shared/backbone", ['[["w",[3],"float32"]]', "0" * 8]), "shared/backbone"),
    "endless shape": (about("shared/backbone", [ENDLESS, "0" * 8]), "shape"),
    "judged": (about("judged", "[[[["), "judged is not valid JSON"),
    "deep": (about("judged", "[" * 60_000), "judged"),
    "name": (about("metrics/\x1b[31m", 1.0), "printable"),
    "pickle": (array(lambda a: Array(a.dtype, a.shape, "pickle", a.data)), "global_head"),
    "cut array": (array(lambda a: Array(a.dtype, a.shape, a.stype, a.data[:-4])), "global_head"),
    "long array": (array(lambda a: Array(a.dtype, a.shape, a.stype, a.data * 2)), "global_head"),
    "flipped bit": (array(lambda a: Array(a.dtype, a.shape, a.stype, a.data[:-1] + b"\x7f")), "global_head"),
    "random message": (objects(rooted(b"Message  500\0" + noise(500)), keep=False), "its reply cannot be read"),
    "chunk for a message": (objects(rooted(b"ArrayChunk  500\0" + noise(500)), keep=False), "its reply cannot be read"),
    "childless message": (objects(rooted(b"Message %s 0\0" % (b"a" * 64)), keep=False), "its reply cannot be read"),
    "bomb": (bomb, "its arrays would be 1000"),
    "piecemeal": (piecemeal, "its reply is cut into 20001 pieces"),
    "40 MB": (sized(40, 5), "its reply is larger than"),
    "one object of 40 MB": (sized(40, 40), "an object of its reply is larger than"),
}  # fmt: skip


def judged(server: Server, caplog: pytest.LogCaptureFixture, act: Act, why: str) -> None:
    """Of west's second reply nothing is folded, it is logged once with name and reason, and its third counts again."""
    began = server.state
    three(server.link, honest(), act, honest())
    assert len(server.round(min_clients=3).folded) == 3
    caplog.clear()
    report = server.round(min_clients=3, quorum=0.5)
    assert sorted(report.folded) == ["north", "south"]
    assert list(report.refused) == ["west"]
    assert re.search(why, report.refused["west"]), report.refused
    assert report.refused["west"].isprintable()
    (line,) = warnings(caplog)
    assert "west" in line
    assert report.refused["west"] in line
    assert server.moved(2.0, began)
    assert len(server.round(min_clients=3).folded) == 3
    assert server.moved(3.0, began)
    assert server.nothing_left()


@pytest.mark.parametrize("case", WRONG_REPLIES)
def test_a_wrong_reply_is_refused_and_the_round_goes_on(
    server: Server, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    make, why = WRONG_REPLIES[case]
    judged(server, caplog, mutated(make), why)


@pytest.mark.parametrize("case", WRONG_RECORDS)
def test_a_broken_reply_is_refused_and_the_round_goes_on(
    server: Server, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    act, why = WRONG_RECORDS[case]
    judged(server, caplog, act, why)


def test_a_replayed_reply_is_refused(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    kept: list[RecordDict] = []

    def recording(node: Node, message: Message) -> None:
        received = decode_order(message.content)
        kept.append(encode_reply(trained(node, received.order), received.wire))
        node.reply(message, kept[0])

    began = server.state
    three(server.link, recording, lambda node, message: node.reply(message, kept[0]), honest())
    server.round(min_clients=3)
    report = server.round(min_clients=3, quorum=0.5)
    assert report.refused == {"west": "for round 1, this is round 2"}
    assert server.moved(2.0, began)
    assert caplog.text.count("west") == 1


def test_a_second_reply_to_the_same_order_is_not_even_taken(server: Server) -> None:
    def twice(node: Node, message: Message) -> None:
        honest(1.0)(node, message)
        honest(1e3)(node, message)

    began = server.state
    three(server.link, twice)
    assert len(server.round(min_clients=3).folded) == 3
    assert server.moved(1.0, began)


def test_no_site_can_answer_for_another(server: Server) -> None:
    orders: dict[str, Message] = {}
    both = threading.Barrier(2)

    def stealing(node: Node, message: Message) -> None:
        orders[node.name] = message
        both.wait(60.0)
        mine = Message(encode_reply(trained(node, decode_order(message.content).order, 1e3)), reply_to=orders["south"])
        mine.metadata.__dict__["_src_node_id"] = node.id
        node.announce(mine).go_on()
        both.wait(60.0)
        honest()(node, message)

    def robbed(node: Node, message: Message) -> None:
        orders[node.name] = message
        both.wait(60.0)
        both.wait(60.0)
        honest()(node, message)

    began = server.state
    server.link.join("south", doing(robbed))
    server.link.join("west", doing(stealing))
    assert len(server.round(min_clients=2).folded) == 2
    assert server.moved(1.0, began)


def test_the_bound_on_a_reply_leaves_room_for_an_honest_one(server: Server) -> None:
    method = server.wish.config.method
    shared = {part: t for part, t in server.state.parts.items() if part in method.shared}
    order = Order(1, "m", shared, {})
    reply = Message(
        encode_reply(Reply("west", 1, "m", 10, shared)),
        reply_to=Message(RecordDict(), 5, TRAIN),
    )
    weight = sum(len(part.deflate()) for part in get_all_nested_objects(reply).values())
    assert weight < reply_bytes(order, {}) < weight + 2**20
