"""The round loop against a scripted fleet and a clock that only moves when told: no network, no waiting."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch

from common.config import FederationConfig, parse
from common.messages import Order, Reply
from common.methods.method import ServerState
from common.net import Net, Task, build
from server import rounds
from server.fleet import Failure

NAMES = ("a", "b", "c", "d")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Script:
    """Answers at given times; `next` moves the clock to the next answer or by the whole timeout."""

    clock: Clock
    answers: list[tuple[float, object]]  # (seconds after the broadcast, function of the order)
    closed: bool = False
    orders: list[Order] = field(default_factory=list)

    def names(self) -> list[str]:
        return list(NAMES)

    def broadcast(self, order: Order, names: Sequence[str], deadline: float) -> "Script":
        del names, deadline
        self.orders.append(order)
        self.began = self.clock.now
        self.waiting = sorted(self.answers, key=lambda a: a[0])
        return self

    def next(self, timeout: float) -> Reply | Failure | None:
        if self.waiting and self.began + self.waiting[0][0] <= self.clock.now + timeout:
            at, make = self.waiting.pop(0)
            self.clock.now = max(self.clock.now, self.began + at)
            return make(self.orders[-1])  # type: ignore[operator,no-any-return]
        self.clock.now += timeout
        return None

    def close(self) -> None:
        self.closed = True


def reply(name: str, *, examples: int = 10, shift: float = 1.0, **changed: object):
    def make(order: Order) -> Reply:
        shared = {part: {n: t + shift for n, t in group.items()} for part, group in order.shared.items()}
        made = Reply(name, order.round, order.model, examples, shared, metrics={"loss": 1.0})
        return replace(made, **changed)  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="module")
def start() -> tuple[Task, Net, ServerState]:
    task = Task(parse({"method": {"name": "fedavg"}, "model": {"width": 4}}), ("x", "y"), 1, 8)
    net = build(task.config.method, task)
    return task, net, task.config.method.init(net, task)


def one(start, answers, **policy) -> tuple[rounds.RoundReport, Script]:
    task, net, state = start
    clock = Clock()
    fleet = Script(clock, answers)
    wish = FederationConfig(**{"quorum": 0.5, "grace": 10.0, "deadline": 100.0, **policy})
    return rounds.one_round(fleet, task.config.method, state, net, wish, 1, clock), fleet


def moved(start, report: rounds.RoundReport) -> float:
    before, after = start[2].parts["global_head"]["bias"], report.state.parts["global_head"]["bias"]
    return float((after - before).mean())


def test_all_answers_close_the_round_at_once(start) -> None:
    report, fleet = one(start, [(t, reply(n)) for t, n in enumerate(NAMES, 1)])
    assert report.folded == NAMES
    assert report.seconds == 4
    assert report.missing == ()
    assert fleet.closed


def test_grace_runs_from_the_quorum(start) -> None:
    report, _ = one(start, [(5, reply("a")), (20, reply("b")), (29, reply("c")), (31, reply("d"))])
    assert report.folded == ("a", "b", "c")
    assert report.missing == ("d",)
    assert report.seconds == 30
    assert report.state.round == 1


def test_deadline_closes_even_within_grace(start) -> None:
    report, _ = one(start, [(1, reply("a")), (95, reply("b")), (102, reply("c"))])
    assert report.folded == ("a", "b")
    assert report.seconds == 100


def test_without_quorum_nothing_changes(start) -> None:
    report, _ = one(start, [(1, reply("a"))])
    assert report.state is start[2]
    assert report.missing == ("b", "c", "d")


def test_mean_is_weighted_by_examples(start) -> None:
    report, _ = one(start, [(1, reply("a", examples=30, shift=1.0)), (2, reply("b", examples=10, shift=5.0))], grace=0)
    assert moved(start, report) == pytest.approx(2.0, abs=1e-5)


def _spoil(part: str, change):
    """A reply of site d with one of its parts changed."""

    def make(order: Order) -> Reply:
        good = reply("d", shift=100.0)(order)
        return replace(good, shared={**good.shared, part: change(good.shared[part])})

    return make


BAD = {
    "schema": (reply("d", schema=0), "schema 0"),
    "round": (reply("d", round=7), "for round 7"),
    "model": (reply("d", model="other"), "another model"),
    "no examples": (reply("d", examples=0), "0 examples"),
    "too many examples": (reply("d", examples=10**9), "examples are not between"),
    "missing part": (reply("d", shared={}), "parts []"),
    "missing tensor": (_spoil("global_head", lambda g: {"weight": g["weight"]}), "bias is missing"),
    "extra tensor": (_spoil("global_head", lambda g: {**g, "more": g["bias"]}), "more is not expected"),
    "shape": (_spoil("global_head", lambda g: {**g, "bias": g["bias"][:1]}), "bias is float32[1] instead of"),
    "dtype": (_spoil("global_head", lambda g: {**g, "bias": g["bias"].double()}), "float64[2] instead of float32[2]"),
    "nan": (_spoil("global_head", lambda g: {**g, "bias": g["bias"] * torch.nan}), "not finite"),
    "infinite": (_spoil("backbone", lambda g: {n: t / 0 for n, t in g.items()}), "not finite"),
    "norm": (reply("d", shift=100.0), "update's norm"),
    "sums": (reply("d", sums={"n": torch.tensor(torch.inf)}), "not finite"),
    "failure": (lambda _: Failure("d", "no disk space"), "no disk space"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_reply_is_refused_and_the_round_goes_on(start, case: str) -> None:
    bad, reason = BAD[case]
    good = [(t, reply(n, shift=0.5)) for t, n in ((1, "a"), (3, "b"))]
    report, _ = one(start, [*good, (2, bad)], max_examples=10**6, max_update=50.0, grace=1)
    assert reason in report.refused["d"]
    assert report.folded == ("a", "b")
    assert moved(start, report) == pytest.approx(0.5, abs=1e-5)


def test_a_second_answer_of_a_site_is_ignored(start) -> None:
    report, _ = one(
        start, [(1, reply("a", shift=1.0)), (2, reply("a", shift=9.0)), (3, reply("b", shift=1.0))], grace=0
    )
    assert report.folded == ("a", "b")
    assert moved(start, report) == pytest.approx(1.0, abs=1e-5)


def test_run_gives_up_naming_who_is_missing(start) -> None:
    task, net, state = start
    clock = Clock()
    fleet = Script(clock, [(1, reply("a")), (2, reply("b", round=3))])
    policy = FederationConfig(rounds=5, failures=3, deadline=50.0)
    with pytest.raises(rounds.GaveUp, match=r"3 times in a row \(missing: c, d; refused: b: for round 3"):
        rounds.run(fleet, task.config.method, state, net, policy, 1, after=lambda _: None, clock=clock)
    assert clock.now == 150


def test_run_goes_on_from_the_state_it_is_given(start) -> None:
    task, net, state = start
    clock = Clock()
    fleet = Script(clock, [(1, reply(n)) for n in NAMES])
    seen: list[int] = []
    later = replace(state, round=3)
    end = rounds.run(
        fleet, task.config.method, later, net, FederationConfig(rounds=5), 1,
        after=lambda report: seen.append(report.round), clock=clock,
    )  # fmt: skip
    assert seen == [4, 5]
    assert end.round == 5


def test_sites_are_drawn_by_seed_and_round_alone() -> None:
    names = [f"s{i}" for i in range(40)]
    drawn = rounds.choose(names, 0.3, seed=1, round=5)
    assert len(drawn) == len(set(drawn)) == 12
    assert drawn == rounds.choose(list(reversed(names)), 0.3, seed=1, round=5)
    assert drawn != rounds.choose(names, 0.3, seed=1, round=6)
    assert drawn != rounds.choose(names, 0.3, seed=2, round=5)
    assert rounds.choose(names, 0.001, 1, 1) != []
    assert rounds.choose([], 0.5, 1, 1) == []
