"""The round loop against a scripted fleet and a clock that only moves when told: no network, no waiting."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from client.train import Diverged
from common.config import FederationConfig, parse
from common.messages import Order, Reply
from common.methods.fedavg import FedAvg
from common.methods.method import Phase, ServerState, Site
from common.net import Net, Task, build
from common.parts import Tensors
from server import rounds
from server.fleet import Failure, LocalFleet
from server.fold import HEADROOM, Fold, Refused
from tests.fakes import SITES, Tiny, tiny

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

    def names(self, at_least: int, wait: float) -> list[str]:
        del at_least, wait
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
    return rounds.one_round(fleet, task.config.method, state, net, wish, 1, rounds.Hooks(), clock), fleet


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


def test_a_quorum_is_not_one_site_more_because_of_rounding(start) -> None:
    assert math.ceil(0.07 * 100) == 8
    task, net, state = start
    names = [f"s{i:02d}" for i in range(100)]

    @dataclass
    class Hundred(Script):
        def names(self, at_least: int, wait: float) -> list[str]:
            del at_least, wait
            return names

    for many, counts in ((6, 0), (7, 1)):
        clock = Clock()
        fleet = Hundred(clock, [(1, reply(name)) for name in names[:many]])
        policy = FederationConfig(quorum=0.07, grace=0, deadline=10.0)
        report = rounds.one_round(fleet, task.config.method, state, net, policy, 1, rounds.Hooks(), clock)
        assert report.state.round == counts


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
    "huge": (reply("d", shift=1e33), "too large to be averaged"),
    "norm": (reply("d", shift=100.0), "update's norm"),
    "statistics": (reply("d", sums={"n": torch.ones(2)}), "statistics: n is not expected"),
    "nan metric": (reply("d", metrics={"loss": math.nan}), "metric loss is not a finite number"),
    "text metric": (reply("d", metrics={"loss": "low"}), "metric loss is not a finite number"),
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


def test_the_largest_values_that_are_accepted_have_a_finite_mean(start) -> None:
    answers = [(t, reply(n, examples=10**7, shift=1e13)) for t, n in enumerate(NAMES)]
    report, _ = one(start, answers)
    assert report.folded == NAMES
    assert moved(start, report) == pytest.approx(1e13)


LIMIT = math.sqrt(torch.finfo(torch.float32).max) / HEADROOM
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 3).contiguous().transpose(0, 3),
    "every other": lambda t: torch.stack([t, t.new_full(t.shape, torch.nan)], dim=-1)[..., 0],
}


@given(
    shape=st.tuples(*[st.integers(1, 9)] * 4),
    layout=st.sampled_from(sorted(LAYOUTS)),
    rest=st.sampled_from([0.0, 1.0, LIMIT / 100, 0.9 * LIMIT]),
    value=st.floats(width=32) | st.sampled_from([0.4, 0.6, 0.99, 1.01, -0.99, -1.01, 1e6, -1e7]).map(LIMIT.__mul__),
    data=st.data(),
)
def test_one_value_anywhere_is_refused_exactly_when_it_has_no_headroom(
    shape: tuple[int, ...], layout: str, rest: float, value: float, data: st.DataObject
) -> None:
    t = torch.full(shape, rest)
    t.view(-1)[data.draw(st.integers(0, t.numel() - 1))] = value
    largest = abs(float(torch.tensor(value)))
    fold = Fold(Order(1, "m", {"backbone": {"w": torch.zeros(shape)}}, {}), {}, lambda _: "", max_examples=10)
    bad = Reply("a", 1, "m", 10, {"backbone": {"w": LAYOUTS[layout](t)}})
    if largest <= LIMIT:
        fold.add(bad)
        assert torch.equal(fold.result()[0]["backbone"]["w"], t * 10 / 10)
    else:
        with pytest.raises(Refused, match="too large" if math.isfinite(largest) else "not finite"):
            fold.add(bad)
        assert fold.examples == 0


def test_live_parameters_are_folded_without_a_graph(start) -> None:
    def live(order: Order) -> Reply:
        sent = reply("a")(order)
        for group in sent.shared.values():
            for t in group.values():
                t.requires_grad_(True)
        return sent

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns when a tensor with a graph is read as a number
        report, _ = one(start, [(1, live), (2, reply("b"))], max_update=50.0, grace=0)
    assert report.folded == ("a", "b")
    assert not any(t.requires_grad for group in report.state.parts.values() for t in group.values())


def spoiled(federation: Tiny, spoil: Callable[[Reply], Reply]) -> rounds.RoundReport:
    """A round in which north, the first to answer, spoils its reply."""
    sites = {name: site.handle for name, site in federation.sites.items()}
    honest = sites["north"]
    sites["north"] = lambda order: spoil(honest(order))
    policy = FederationConfig(quorum=0.5)
    fleet, hooks = LocalFleet(sites), rounds.Hooks()
    return rounds.one_round(fleet, federation.method, federation.state, federation.net, policy, 1, hooks)


def with_sums(change: Callable[[Tensors], Tensors]) -> Callable[[Reply], Reply]:
    return lambda reply: replace(reply, sums={**reply.sums, **change(reply.sums)})


CREFF = {"name": "creff", "features_per_class": 4, "match_steps": 2, "retrain_epochs": 2}
COUNT_AWARE = {"name": "fedloge", "count_aware": True}
BAD_STATISTICS: dict[str, tuple[dict[str, Any], Callable[[Reply], Reply], str]] = {
    "none": (CREFF, lambda r: replace(r, sums={}), "statistics: bias is missing"),
    "one more": (CREFF, with_sums(lambda _: {"more": torch.ones(1)}), "statistics: more is not expected"),
    "shape": (CREFF, with_sums(lambda s: {"bias": s["bias"][0]}), "bias is float32[4] instead of float32[4, 4]"),
    "float64": (COUNT_AWARE, with_sums(lambda s: {"n": s["n"].double()}), "n is float64[4] instead of float32[4]"),
    "integer": (COUNT_AWARE, with_sums(lambda s: {"n": s["n"].long()}), "n is int64[4] instead of float32[4]"),
    "nan": (CREFF, with_sums(lambda s: {"weight": s["weight"] * torch.nan}), "weight has values that are not finite"),
    "huge": (CREFF, with_sums(lambda s: {"weight": s["weight"] + 1e20}), "too large to be averaged"),
    "minus one site": (CREFF, with_sums(lambda s: {"sites": -s["sites"]}), "neither 0 nor 1 site"),
    "negative samples": (
        COUNT_AWARE,
        with_sums(lambda s: {"n": s["n"] + torch.tensor([9.0, -9, 0, 0])}),
        "do not add up to its examples",
    ),
    "too many samples": (COUNT_AWARE, with_sums(lambda s: {"n": 2 * s["n"]}), "do not add up to its examples"),
    "foreign rows": (COUNT_AWARE, with_sums(lambda s: {"weight": s["weight"] + 1}), "not those of its global_head"),
    "foreign bias": (COUNT_AWARE, with_sums(lambda s: {"bias": s["bias"] + 1}), "not those of its global_head"),
}


@pytest.mark.parametrize("case", BAD_STATISTICS)
def test_bad_statistics_of_the_first_site_cost_the_others_nothing(case: str) -> None:
    method, spoil, reason = BAD_STATISTICS[case]
    report = spoiled(tiny(method, train={"epochs": 1}), spoil)
    assert reason in report.refused["north"]
    assert report.folded == tuple(sorted(SITES.keys() - {"north"}))
    assert report.state.round == 1


@pytest.mark.parametrize("method", [CREFF, COUNT_AWARE], ids=lambda method: method["name"])
def test_a_method_declares_the_statistics_that_its_sites_send(method: dict[str, Any]) -> None:
    replies: list[Reply] = []
    federation = tiny(method, train={"epochs": 1})
    report = spoiled(federation, lambda r: replies.append(r) or r)  # type: ignore[func-returns-value]
    assert not report.refused
    declared = federation.method.statistics(federation.net)
    assert declared == {name: tuple(t.shape) for name, t in replies[0].sums.items()}


@dataclass(frozen=True)
class BreaksAtTheEnd(FedAvg):
    """The loss of the only step is a number, its gradient is not: the root of 0 has none."""

    def phases(self, net: Net, site: Site) -> Sequence[Phase]:
        (phase,) = super().phases(net, site)

        def loss(net: Net, x: Tensor, y: Tensor, given: Tensors) -> Tensor:
            return phase.loss(net, x, y, given) + (0 * net["global_head"](net.features(x))).sum().sqrt()

        return [replace(phase, loss=loss, epochs=1)]


def test_a_site_that_diverges_in_its_last_step_sends_and_keeps_nothing() -> None:
    federation = tiny({"name": "fedavg"}, model={"norm": "local"}, train={"batch": 100})
    order = Order(1, "m", shared=federation.state.parts, fixed={})
    broken = replace(federation.sites["north"], method=BreaksAtTheEnd())
    with pytest.raises(Diverged, match=r"the norm of all the net's values is nan.*train\.lr"):
        broken.handle(order)
    assert broken.store.load(before=2) is None
    federation.sites["north"].handle(order)
    assert broken.store.load(before=2) is not None


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
    with pytest.raises(
        rounds.GaveUp, match=r"3 times in a row \(sites reached: 4; missing: c, d; refused: b: for round 3"
    ):
        rounds.run(fleet, task.config.method, state, net, policy, 1, rounds.Hooks(), clock)
    assert clock.now == 150


def test_run_goes_on_from_the_state_it_is_given(start) -> None:
    task, net, state = start
    clock = Clock()
    fleet = Script(clock, [(1, reply(n)) for n in NAMES])
    seen: list[int] = []
    later = replace(state, round=3)
    end = rounds.run(
        fleet, task.config.method, later, net, FederationConfig(rounds=5), 1,
        rounds.Hooks(lambda report: seen.append(report.round)), clock,
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
