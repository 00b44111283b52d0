"""Which sites a round waits for, in which order replies are folded, and how a federation ends: on a scripted clock."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations

import pytest

from common.config import FederationConfig
from common.messages import Order, Reply
from server import rounds
from server.fleet import Failure
from tests.federation.test_rounds import NAMES, Clock, Script, reply, start  # noqa: F401

THIRDS = dict(zip(NAMES, (0.1, 0.7, 1e-7, 333.3), strict=True))  # their float sum depends on the order


@dataclass
class Gathering(Script):
    """Sites that come one by one, ten seconds after each other."""

    asked: list[tuple[int, float]] = field(default_factory=list)

    def names(self, at_least: int, wait: float) -> list[str]:
        self.asked.append((at_least, wait))
        until = self.clock.now + wait
        while (here := int(self.clock.now // 10)) < at_least and self.clock.now < until:
            self.clock.now += 1
        return list(NAMES[:here])


def once(start, fleet: Script, hooks: rounds.Hooks | None = None, **policy) -> rounds.RoundReport:  # noqa: F811
    task, net, state = start
    wish = FederationConfig(**{"quorum": 1.0, "grace": 10.0, "deadline": 100.0, **policy})
    return rounds.one_round(fleet, task.config.method, state, net, wish, 1, hooks or rounds.Hooks(), fleet.clock)


def bits(report: rounds.RoundReport) -> bytes:
    return b"".join(t.numpy().tobytes() for group in report.state.parts.values() for t in group.values())


def test_folding_by_name_gives_the_same_bits_in_every_order_of_arrival(start) -> None:  # noqa: F811
    found: dict[str, set[bytes]] = {"name": set(), "arrival": set()}
    for order in permutations(NAMES):
        answers = [(at, reply(name, examples=3, shift=THIRDS[name])) for at, name in enumerate(order, 1)]
        for fold, seen in found.items():
            report = once(start, Script(Clock(), answers), fold=fold)
            assert sorted(report.folded) == list(NAMES)
            seen.add(bits(report))
    assert len(found["name"]) == 1
    assert len(found["arrival"]) > 1  # or the test could not fail


def test_folding_by_name_keeps_quorum_grace_and_refusals(start) -> None:  # noqa: F811
    def fails(order: Order) -> Failure:
        del order
        return Failure("a", "disk full")

    answers = [(1, reply("d")), (2, reply("c", round=9)), (3, fails), (50, reply("b"))]
    report = once(start, Script(Clock(), answers), quorum=0.25, fold="name")
    assert report.folded == ("d",)
    assert report.refused.keys() == {"a", "c"}
    assert report.missing == ("b",)
    assert report.seconds == 11  # ten after the first


def test_replies_held_back_for_their_name_count_for_the_quorum_only_if_they_are_good(start) -> None:  # noqa: F811
    answers = [(1, reply("d", round=9)), (2, reply("c")), (3, reply("b"))]
    report = once(start, Script(Clock(), answers), quorum=0.75, fold="name")
    assert set(report.folded) == {"b", "c"}
    assert report.state is start[2]


def test_a_round_waits_for_its_sites_but_not_for_ever(start) -> None:  # noqa: F811
    fleet = Gathering(Clock(), [(1, reply(name)) for name in NAMES])
    report = once(start, fleet, min_clients=3, wait=600.0)
    assert fleet.asked == [(3, 600.0)]
    assert report.chosen == NAMES[:3]
    assert fleet.clock.now == 31
    alone = Gathering(Clock(), [])
    report = once(start, alone, min_clients=3, wait=25.0)
    assert (report.chosen, report.state, alone.clock.now) == ((), start[2], 25)


def test_a_run_without_enough_sites_gives_up(start) -> None:  # noqa: F811
    task, net, state = start
    fleet = Gathering(Clock(), [])
    policy = FederationConfig(min_clients=4, wait=5.0, failures=2)
    with pytest.raises(rounds.GaveUp, match=r"2 times in a row \(sites reached: 1 of 4\).*min_clients"):
        rounds.run(fleet, task.config.method, state, net, policy, 1, rounds.Hooks(), fleet.clock)
    assert fleet.clock.now == 10


def test_onlookers_see_every_change_of_a_round(start) -> None:  # noqa: F811
    seen: list[tuple[list[str], dict[str, str]]] = []
    hooks = rounds.Hooks(during=lambda now: seen.append((sorted(now.waiting), dict(now.refused))))
    once(start, Script(Clock(), [(1, reply("b")), (2, reply("a", examples=0))]), hooks, deadline=5.0)
    assert [waiting for waiting, _ in seen] == [["a", "b", "c", "d"], ["a", "c", "d"], ["c", "d"]]
    assert list(seen[-1][1]) == ["a"]


def test_sites_judge_the_model_of_the_round_before(start) -> None:  # noqa: F811
    task, net, state = start
    fleet = Script(Clock(), [(1, reply(name)) for name in NAMES])
    hooks = rounds.Hooks(judge=lambda round: round % 2 == 0)
    rounds.run(fleet, task.config.method, state, net, FederationConfig(rounds=5), 1, hooks, fleet.clock)
    assert [(order.round, order.judge) for order in fleet.orders] == [
        (1, False), (2, False), (3, True), (4, False), (5, True),
    ]  # fmt: skip
    assert all(order.train for order in fleet.orders)


def judgement(name: str, **changed: object):
    def make(order: Order) -> Reply:
        judged = {"generic": {"head": {"top1": 0.5}}, "personal": {}}
        return replace(Reply(name, order.round, order.model, 10, {}, judged=judged), **changed)  # type: ignore[arg-type]

    return make


def test_the_end_is_a_judgement_of_the_final_parts_by_everybody(start) -> None:  # noqa: F811
    task, _, state = start
    state = replace(state, round=7)
    answers: Sequence = [(1, judgement("a")), (2, judgement("b", model="old")), (3, judgement("c", round=6))]
    fleet = Script(Clock(), list(answers))
    policy = FederationConfig(rounds=7, fraction=0.25, deadline=20.0, quorum=1.0)
    report = rounds.final_judgement(fleet, task.config.method, state, policy, rounds.Hooks(), fleet.clock)
    (order,) = fleet.orders
    assert (order.round, order.train, order.judge) == (7, False, True)
    assert report.chosen == NAMES  # not only a round's share of the sites
    assert report.judged == {"a": {"generic": {"head": {"top1": 0.5}}, "personal": {}}}
    assert set(report.refused) == {"b", "c"}
    assert report.missing == ("d",)
    assert report.state is state
