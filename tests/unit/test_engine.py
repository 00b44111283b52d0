"""Recorded steps give the bits of steps taken one by one, whatever is recorded and however it comes to be replayed."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from common import engine
from common.engine import Program, Recorder, run_phase
from common.images import PixelImages
from common.methods.method import Phase, Site
from common.methods.tune import _ahead
from common.net import Net
from common.sgd import Step, arithmetic, fit
from tests.fakes import SITES, Tiny, tiny

METHODS: dict[str, dict[str, Any]] = {
    "fedloge": {"name": "fedloge", "psi_loss": "balanced"},
    "fedavg with probes": {"name": "fedavg", "probes": True},
    "fedprox": {"name": "fedprox", "mu": 0.5},
    "ditto, two phases": {"name": "ditto"},
    "apfl": {"name": "apfl"},
    "fedlc": {"name": "fedlc"},
    "fedrep, batchnorm frozen and not": {"name": "fedrep", "head_epochs": 2},
}
KNOBS: dict[str, dict[str, Any]] = {
    "partial batches": {"batch": 8},
    "batches of one at the end": {"batch": 4, "momentum": 0.0},
    "a batch larger than a site": {"batch": 64},
    "clipped, with weight decay": {"batch": 8, "clip": 0.1, "weight_decay": 0.01},
    "bf16": {"batch": 8, "precision": "bf16"},
    "channels_last": {"batch": 8, "layout": "channels_last"},
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def calls(body: engine.Body, state: list[Tensor]) -> engine.Body:
    """Records nothing: to replay a step is to take it."""
    del state
    return body


def recorded(net: Net, phase: Phase, site: Site, number: int, record: engine.Record, made: dict[int, Program]) -> float:
    """What an engine does on a GPU, with one program for each phase in all rounds and at all sites."""
    assert isinstance(site.images, PixelImages)
    net.train_only(phase.train)
    program = made.setdefault(number, Program(net, phase, site, site.images, record))
    return program.run(phase, site, site.images, number)


def everything(federation: Tiny) -> dict[str, Tensor]:
    """Integer buffers too."""
    return {name: t.detach().clone() for name, t in federation.net.state_dict().items()}


def rounds(federation: Tiny, train: Any) -> list[tuple[list[float], dict[str, Tensor]]]:
    """Two rounds of all sites on one net, the smallest site between larger ones."""
    found = []
    for round in (1, 2):
        for name in ("north", "west", "south"):
            site = federation.sites[name]
            site.prepare(federation.state.parts, before=round)
            mine = site.site(round)
            phases = federation.method.phases(federation.net, mine)
            losses = [train(federation.net, phase, mine, number) for number, phase in enumerate(phases)]
            found.append((losses, everything(federation)))
    return found


def assert_same(ours: list[tuple[list[float], dict[str, Tensor]]], plain: Any) -> None:
    for (losses, tensors), (expected, values) in zip(ours, plain, strict=True):
        assert losses == expected
        assert [name for name in values if not torch.equal(tensors[name], values[name])] == []


@pytest.mark.parametrize("method", METHODS)
def test_the_steps_of_every_kind_of_loss(method: str) -> None:
    plain = rounds(tiny(METHODS[method]), run_phase)
    assert_same(rounds(tiny(METHODS[method]), partial(recorded, record=calls, made={})), plain)


@pytest.mark.parametrize("knobs", KNOBS)
def test_the_steps_with_every_knob(knobs: str) -> None:
    plain = rounds(tiny({"name": "fedloge"}, train=KNOBS[knobs]), run_phase)
    assert_same(rounds(tiny({"name": "fedloge"}, train=KNOBS[knobs]), partial(recorded, record=calls, made={})), plain)


def test_a_pass_of_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = rounds(tiny({"name": "fedavg"}), run_phase)
    monkeypatch.setattr(PixelImages, "room", lambda *_: 8)
    assert_same(rounds(tiny({"name": "fedavg"}), partial(recorded, record=calls, made={})), plain)


class Played:
    """A recorder whose graphs are functions: all of it but CUDA's own part is real."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failing: str = "") -> None:
        self.captured = 0
        self.sizes: list[int] = []
        monkeypatch.setattr(Recorder, "failed", False)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 0)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self)
        monkeypatch.setattr(Recorder, "_captured", lambda _, body: self.capture(body, failing))

    def synchronize(self) -> None:
        pass

    def capture(self, body: engine.Body, failing: str) -> engine.Body:
        self.captured += 1
        self.sizes += getattr(body, "args", ())
        if failing:
            raise RuntimeError(failing)
        return body


def test_what_warms_up_a_recording_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = rounds(tiny({"name": "fedloge"}), run_phase)
    played = Played(monkeypatch)
    assert_same(rounds(tiny({"name": "fedloge"}), partial(recorded, record=Recorder(), made={})), plain)
    last = {len(labels) % 8 for labels in SITES.values()}
    assert sorted(set(played.sizes)) == sorted({8} | last)  # one for whole batches, one for each size of a last one
    assert played.captured == len(played.sizes) <= 2 * len(set(played.sizes))  # again when a larger site came


def test_a_step_that_cannot_be_captured_is_taken_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = rounds(tiny({"name": "fedavg"}), run_phase)
    played = Played(monkeypatch, failing="operation not permitted when stream is capturing\nCompile with ...")
    assert_same(rounds(tiny({"name": "fedavg"}), partial(recorded, record=Recorder(), made={})), plain)
    assert played.captured == 1
    assert [record.message for record in caplog.records] == [
        "a training step cannot be captured as a CUDA graph (operation not permitted when stream is capturing): steps "
        "are taken one by one"
    ]


def test_memory_that_is_full_while_capturing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    Played(monkeypatch)

    def full(*_: object) -> engine.Body:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Recorder, "_captured", full)
    with pytest.raises(torch.OutOfMemoryError):
        rounds(tiny({"name": "fedavg"}), partial(recorded, record=Recorder(), made={}))


def test_losses_are_the_same_in_all_rounds_and_at_all_sites() -> None:
    """What is recorded for one would otherwise be recorded again for every other."""
    for method in METHODS.values():
        federation = tiny(method)
        seen = []
        for name in ("north", "west"):
            federation.sites[name].prepare(federation.state.parts, before=1)
            phases = federation.method.phases(federation.net, federation.sites[name].site(1))
            seen.append([(phase.train, phase.loss, tuple(phase.given)) for phase in phases])
        assert seen[0] == seen[1]
        assert hash(tuple(seen[0])) == hash(tuple(seen[1]))


def test_the_update_is_that_of_torchs_own_sgd() -> None:
    rng = torch.Generator().manual_seed(1)
    mine, theirs = (torch.nn.Linear(6, 3, dtype=torch.float64) for _ in range(2))
    theirs.load_state_dict(mine.state_dict())
    config = tiny({"name": "fedavg"}, train={"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}).task.config.train

    def loss(module: torch.nn.Linear, x: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(module(x), y)

    def batch() -> tuple[Tensor, Tensor]:
        return torch.randn(5, 6, generator=rng, dtype=torch.float64), torch.randint(0, 3, (5,), generator=rng)

    batches = [batch() for _ in range(20)]
    fit(Step([list(mine.parameters())], partial(loss, mine), config, torch.device("cpu")), [batches])
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01, foreach=True)
    for x, y in batches:
        optimizer.zero_grad()
        loss(theirs, x, y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert torch.equal(mine.weight, theirs.weight)
    assert torch.equal(mine.bias, theirs.bias)


def test_features_computed_ahead_are_those_of_the_batches() -> None:
    """What a GPU tunes a head on."""
    federation = tiny({"name": "fedavg-ft"}, train={"batch": 4})
    site, backbone = federation.sites["north"].site(1), federation.net["backbone"].eval()
    found = list(_ahead(backbone, site, "tune", 0))
    for (f, y), (x, labels) in zip(found, site.batches("tune", 0), strict=True):
        torch.testing.assert_close(f, backbone(x))
        assert torch.equal(y, labels)
        assert not f.requires_grad
    assert [len(y) for _, y in found] == [4, 4, 4, 4, 4, 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("knobs", KNOBS)
def test_a_gpu_replays_what_it_would_compute_step_by_step(knobs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_gpu(graphs: bool) -> list[tuple[list[float], dict[str, Tensor]]]:
        monkeypatch.setattr(Recorder, "failed", not graphs)
        federation = tiny({"name": "fedloge"}, train=KNOBS[knobs])
        arithmetic(federation.task.config.train)
        federation.net.to("cuda").draws = False
        sites = {n: replace(site, device=torch.device("cuda")) for n, site in federation.sites.items()}
        found = rounds(replace(federation, sites=sites), run_phase)
        assert Recorder.failed != graphs
        return found

    assert_same(on_gpu(True), on_gpu(False))
