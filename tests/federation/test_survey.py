"""Heads from class statistics in whole federations: for every method, with sites that keep them, lie and go on."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common import statistics
from common.config import Config, parse
from common.features import features_of
from common.messages import Order, Reply
from common.methods import METHODS
from common.methods.method import ServerState
from common.parts import Tensors
from common.statistics import PART, StatisticsHead, Sums
from fedloge.federation import Federation, assemble, judge
from fedloge.simulate import simulate
from server import rounds
from server.fleet import LocalFleet
from server.survey import Survey, centre

Handler = Callable[[Order], Reply]


def plan(method: str = "fedloge", **more: object) -> Config:
    table: dict[str, object] = {
        "seed": 1,
        "partition": {"clients": 3, "alpha": 0.3},
        "train": {"epochs": 1, "batch": 16},
        "federation": {"rounds": 2},
        "evaluation": {"every": 1, "last": 1, "statistics": True},
        "frame": {"norm": 3.0},
        "method": {"name": method},
    }
    return parse({**table, **more})


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return assemble(plan(), tmp_path / "run")


def surveyed(federation: Federation, change: Callable[[str, Handler], Handler] = lambda _, h: h) -> ServerState:
    """The state before round 1 with the head of what its sites answer."""
    config = federation.task.config
    state = config.method.init(federation.net, federation.task)
    fleet = LocalFleet({name: change(name, site.handle) for name, site in federation.sites.items()})
    return rounds.survey(
        fleet, config.method, federation.task, state, federation.net, config.federation, rounds.Hooks()
    )


def pooled(federation: Federation, names: list[str]) -> StatisticsHead:
    """The head of the images of these sites, as if they lay in one place."""
    config = federation.task.config
    state = config.method.init(federation.net, federation.task)
    about = centre(federation.net, federation.task, state)
    index = torch.cat([federation.sites[name].train_index for name in names])
    sums = Sums.nothing(len(federation.task.classes), len(about))
    for f, y in features_of(federation.net["backbone"], federation.images, index, federation.device, 64):
        sums.add(f.double() - about, y)
    found = statistics.solve(sums, about)
    assert found is not None
    head = StatisticsHead(*found.weight.shape)
    for name, t in found.tensors().items():
        getattr(head, name).copy_(t)
    return head


def same(state: ServerState, head: StatisticsHead) -> bool:
    part = state.parts[PART]
    return torch.allclose(part["weight"], head.weight, rtol=1e-5, atol=1e-6) and torch.allclose(
        part["bias"], head.bias, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_with_a_common_backbone_has_the_heads(method: str, tmp_path: Path) -> None:
    local = method in ("fedbn", "local")
    config = (
        plan(method, model={"name": "mlp"})
        if method != "fedbn"
        else plan(method, model={"name": "cnn", "norm": "local"})
    )
    result = simulate(config, tmp_path / "run", lambda _: None)
    for kind in ("generic", "generic_local", "personal"):
        assert ("statistics" in result[kind]) is not local
    if not local:
        assert result["generic"]["statistics"]["top1"] > 0.6  # after two rounds of one epoch


def test_training_is_the_same_with_and_without_them(tmp_path: Path) -> None:
    without = replace(plan(), evaluation=replace(plan().evaluation, statistics=False))
    results = [simulate(c, tmp_path / str(i), lambda _: None) for i, c in enumerate((plan(), without))]
    for kind in ("generic", "personal"):
        kept = {name: found for name, found in results[0][kind].items() if name != "statistics"}
        assert kept == results[1][kind]


def test_the_head_is_that_of_the_pooled_images(federation: Federation) -> None:
    assert same(surveyed(federation), pooled(federation, sorted(federation.sites)))


def test_a_site_that_keeps_its_statistics_is_left_out_and_served(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    def keeping(name: str, handle: Handler) -> Handler:
        return (lambda order: replace(handle(order), sums={})) if name == "site-001" else handle

    state = surveyed(federation, keeping)
    assert same(state, pooled(federation, ["site-000", "site-002"]))
    assert "kept to themselves: site-001" in caplog.text
    found = judge(federation, federation.task.config.method, state)
    assert set(found["personal"]["statistics"]["per_site"]) == set(federation.sites)


LIES: dict[str, Callable[[Reply], Reply]] = {
    "counts": lambda r: replace(r, sums={**r.sums, "count": r.sums["count"] + 1000}),
    "examples": lambda r: replace(r, examples=10**9),
    "means": lambda r: replace(r, sums={**r.sums, "total": r.sums["total"] * 100}),
    "not finite": lambda r: replace(r, sums={**r.sums, "scatter": r.sums["scatter"] * torch.inf}),
    "shape": lambda r: replace(r, sums={**r.sums, "scatter": r.sums["scatter"][:1]}),
    "type": lambda r: replace(r, sums={name: t.float() for name, t in r.sums.items()}),
    "missing": lambda r: replace(r, sums={"count": r.sums["count"]}),
    "another backbone": lambda r: replace(r, model="another"),
    "another round": lambda r: replace(r, round=7),
    "a model": lambda r: replace(r, shared={"backbone": {"w": torch.zeros(1)}}),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_site_that_lies_is_refused_and_named(
    federation: Federation, lie: str, caplog: pytest.LogCaptureFixture
) -> None:
    def lying(name: str, handle: Handler) -> Handler:
        return (lambda order: LIES[lie](handle(order))) if name == "site-001" else handle

    state = surveyed(federation, lying)
    assert same(state, pooled(federation, ["site-000", "site-002"]))
    assert caplog.text.count("the reply of site-001 is refused") == 1


def test_a_survey_without_a_quorum_is_tried_again(federation: Federation) -> None:
    """A site that dies in it is waited for as in a round, so the head is the same with every site required."""
    tries = []

    def flaky(name: str, handle: Handler) -> Handler:
        def answer(order: Order) -> Reply:
            tries.append(name)
            reply = handle(order)
            return replace(reply, model="of a life before") if tries.count(name) == 1 else reply

        return answer if name == "site-001" else handle

    config = federation.task.config
    policy = replace(config.federation, quorum=1.0)
    state = config.method.init(federation.net, federation.task)
    fleet = LocalFleet({name: flaky(name, site.handle) for name, site in federation.sites.items()})
    state = rounds.survey(fleet, config.method, federation.task, state, federation.net, policy, rounds.Hooks())
    assert len(tries) == 2
    assert same(state, pooled(federation, sorted(federation.sites)))


@pytest.mark.parametrize(("round", "patience"), [(1, 5.0), (2, 600.0)])
def test_a_survey_with_too_few_sites_holds_up_the_run_no_longer_than_a_round_with_its_quorum(
    federation: Federation, round: int, patience: float
) -> None:
    """But at the end, where the head is what everybody gets, sites are waited for as at the beginning of a round."""
    now = 0.0
    waits: list[float] = []

    class Lacking(LocalFleet):
        def names(self, at_least: int, wait: float) -> list[str]:
            nonlocal now
            now += wait
            waits.append(wait)
            return super().names(at_least, wait)

    config = federation.task.config
    policy = replace(config.federation, min_clients=3, wait=600.0, grace=5.0)
    state = replace(config.method.init(federation.net, federation.task), round=round)
    there = {name: federation.sites[name].handle for name in ("site-000", "site-002")}
    state = rounds.survey(
        Lacking(there), config.method, federation.task, state, federation.net, policy, rounds.Hooks(), lambda: now
    )
    assert waits == [patience]
    assert same(state, pooled(federation, ["site-000", "site-002"]))


def test_of_several_tries_the_best_is_used_and_what_is_lacking_is_said(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    there = [["site-000"], ["site-000", "site-002"], []]

    class Leaving(LocalFleet):
        def names(self, at_least: int, wait: float) -> list[str]:
            del at_least, wait
            return there.pop(0)

    config = federation.task.config
    policy = replace(config.federation, min_clients=3)
    state = config.method.init(federation.net, federation.task)
    fleet = Leaving({name: site.handle for name, site in federation.sites.items()})
    now = iter(range(1000))  # it never gets late
    late = rounds.survey(
        fleet, config.method, federation.task, state, federation.net, policy, rounds.Hooks(), lambda: next(now) / 1e6
    )
    assert there == []
    assert same(late, pooled(federation, ["site-000", "site-002"]))
    assert "class statistics of 2 of 2 sites" in caplog.text


def test_without_any_statistics_there_is_no_such_predictor(federation: Federation) -> None:
    state = surveyed(federation, lambda _, handle: lambda order: replace(handle(order), sums={}))
    assert "statistics" not in judge(federation, federation.task.config.method, state)["generic"]


@pytest.mark.parametrize("how", ["leaves", "leaves, and a survey fails", "keeps its statistics", "never had a part"])
def test_classes_that_one_site_alone_has(how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plus = plan("fedloge+", partition={"clients": 4, "alpha": 0.1}, train={"epochs": 2, "batch": 8, "lr": 0.03})
    federation = assemble(replace(plus, data=replace(plus.data, imbalance=0.05)), tmp_path / "run")
    task, net, config = federation.task, federation.net, federation.task.config
    alone = "site-003"
    rest = {name: site for name, site in federation.sites.items() if name != alone}
    own = [c for c in range(10) if federation.sites[alone].counts[c] and not any(s.counts[c] for s in rest.values())]
    assert own == [0, 8]

    everybody = {name: site.handle for name, site in federation.sites.items()}
    others = {name: site.handle for name, site in rest.items()}
    keeping = {**others, alone: lambda order: replace(everybody[alone](order), sums={})}
    first, then = {
        "leaves": (everybody, others),
        "leaves, and a survey fails": (everybody, others),
        "keeps its statistics": (keeping, keeping),
        "never had a part": (others, others),
    }[how]

    def survey(state: ServerState) -> ServerState:
        fleet = LocalFleet(first if state.round < 10 else then)
        return rounds.survey(fleet, config.method, task, state, net, config.federation, rounds.Hooks())

    state = config.method.init(net, task)
    for last, sites in ((5, first), (10, then)):
        policy = replace(config.federation, rounds=last)
        state = survey(rounds.run(LocalFleet(sites), config.method, state, net, policy, 1, rounds.Hooks()))
        if "fails" in how and last == 5:
            state = rounds.survey(LocalFleet({}), config.method, task, state, net, config.federation, rounds.Hooks())
            assert not state.parts[PART]["weight"].any()
    found = judge(federation, config.method, state)
    recall = found["generic"]["statistics"]["per_class"]
    if how == "never had a part":
        assert [recall[c] for c in own] == [0, 0]
        assert "round 10: classes without statistics that are never the answer: 0, 8" in caplog.text
        return
    assert min(recall[c] for c in own) > 0.5
    assert found["generic"]["statistics"]["top1"] > 0.85
    assert found["personal"]["mixed"]["per_site"][alone] > 0.9, "its own model knows them too"
    assert "round 10: classes without statistics that are answered from training alone: 0, 8" in caplog.text


def test_a_head_that_no_number_can_hold_is_none(federation: Federation) -> None:
    """One image of a liar, as long as he likes: it passes as an image, and must not pass into anybody's head."""

    def lying(_: str, handle: Handler) -> Handler:
        def lie(order: Order) -> Reply:
            reply = handle(order)
            sums = Sums.nothing(*reply.sums["total"].shape)
            sums.add(torch.full((1, sums.total.shape[1]), 1e11), torch.zeros(1, dtype=torch.int64))
            sums.scatter.add_(1e-20 * torch.eye(len(sums.scatter)))
            return replace(reply, examples=1, sums=sums.tensors())

        return lie

    state = surveyed(federation, lying)
    assert all(t.isfinite().all() for t in state.parts[PART].values())


def test_a_survey_that_fails_once_costs_the_mean_of_its_rows_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def failing(self: Survey, known: Tensor, others: Tensor | None) -> Tensors:
        asked.append(self)
        part = real(self, known, others)
        return {name: torch.zeros_like(t) for name, t in part.items()} if len(asked) == 1 else part

    real = Survey.head
    monkeypatch.setattr(Survey, "head", failing)
    both = replace(plan(), evaluation=replace(plan().evaluation, last=2))
    result = simulate(both, tmp_path / "run", lambda _: None)
    assert len(asked) == 2
    assert list(result["generic"]) == ["psi realigned", "psi", "frame"]
    assert "statistics" in result["evaluations"][-1]["personal"]
    assert "statistics" not in result["personal"]


def test_a_site_sends_no_more_numbers_than_it_says(federation: Federation) -> None:
    state = federation.task.config.method.init(federation.net, federation.task)
    about = centre(federation.net, federation.task, state)
    sent = federation.sites["site-000"].count(about).tensors()
    classes, dim = len(federation.task.classes), federation.net.feature_dim
    assert sum(t.numel() for t in sent.values()) == classes + classes * dim + dim**2


def test_a_resumed_run_ends_in_the_same_bits(tmp_path: Path) -> None:
    longer = replace(plan(), federation=replace(plan().federation, rounds=3))
    simulate(plan(), tmp_path / "stopped", lambda _: None)
    results = [simulate(longer, tmp_path / name, lambda _: None) for name in ("stopped", "whole")]
    assert json.dumps(results[0]) == json.dumps(results[1])


def test_features_that_are_not_finite_are_not_counted(federation: Federation) -> None:
    site = federation.sites["site-000"]
    state = federation.task.config.method.init(federation.net, federation.task)
    about = centre(federation.net, federation.task, state)
    with torch.no_grad():
        next(federation.net["backbone"].parameters()).fill_(torch.nan)
    assert "finite" in site.count(about).objection(len(site.train_index))
