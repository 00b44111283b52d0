"""The local round's own rules and knobs: every knob does something, and nothing is carried over between rounds."""

import pytest
import torch

from client.train import Diverged, train
from common.engine import run_phase
from common.methods.method import Phase
from common.parts import Tensors, snapshot
from tests.fakes import CPU, tiny


def trained(round: int = 1, **knobs: object) -> Tensors:
    federation = tiny({"name": "fedavg"}, train=knobs)
    federation.net.load(federation.state.parts)
    train(federation.net, federation.method, federation.sites["north"].site(round))
    return snapshot(federation.net.parts()["backbone"])


def same(a: Tensors, b: Tensors) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "knob",
    [
        {"batch": 5},
        {"epochs": 1},
        {"lr": 0.01},
        {"momentum": 0.0},
        {"weight_decay": 0.1},
        {"clip": 0.01},
        {"precision": "bf16"},
    ],
    ids=lambda knob: next(iter(knob)),
)
def test_every_knob_changes_what_is_learned(knob: dict[str, object]) -> None:
    default, other = trained(), trained(**knob)
    assert not same(default, other)
    assert all(torch.isfinite(t).all() for t in other.values())


def test_bf16_stays_near_fp32_and_keeps_fp32_parameters() -> None:
    default, half = trained(), trained(precision="bf16")
    assert all(t.dtype == torch.float32 for t in half.values())
    start = tiny({"name": "fedavg"}).state.parts["backbone"]
    apart, learned = (torch.cat([(a[n] - default[n]).flatten() for n in default]).norm() for a in (half, start))
    assert apart < 0.3 * learned


def test_the_memory_layout_changes_nothing_but_rounding() -> None:
    plain, last = trained(layout="plain"), trained(layout="channels_last")
    for name in plain:
        torch.testing.assert_close(last[name], plain[name], rtol=1e-3, atol=1e-4)


def test_a_round_depends_on_seed_round_and_site_alone() -> None:
    torch.manual_seed(1)
    first = trained()
    torch.manual_seed(2)
    torch.rand(10)
    assert same(first, trained())
    assert not same(first, trained(round=2))


def test_momentum_starts_from_zero_every_round() -> None:
    federation = tiny({"name": "fedavg"}, train={"momentum": 0.9})
    net, site = federation.net, federation.sites["north"].site(1)
    (phase,) = federation.method.phases(net, site)
    net.load(federation.state.parts)
    run_phase(net, phase, site, 0)
    once = snapshot(net.parts()["backbone"])
    net.load(federation.state.parts)
    run_phase(net, phase, site, 0)
    assert same(once, snapshot(net.parts()["backbone"]))


def test_divergence_is_an_error_not_a_result() -> None:
    federation = tiny({"name": "fedavg"}, train={"lr": 1e30})
    federation.net.load(federation.state.parts)
    site = federation.sites["north"].site(1)
    with pytest.raises(Diverged, match=r"train\.lr"):
        train(federation.net, federation.method, site)


def test_a_phase_may_freeze_everything_but_a_head() -> None:
    federation = tiny({"name": "fedavg"})
    net, site = federation.net, federation.sites["north"].site(1)
    net.load(federation.state.parts)
    (phase,) = federation.method.phases(net, site)
    run_phase(net, Phase(("global_head",), phase.loss, 1), site, 0)
    now = net.parts()
    assert same(now["backbone"], federation.state.parts["backbone"])
    assert not same(now["global_head"], federation.state.parts["global_head"])
    assert site.device == CPU
