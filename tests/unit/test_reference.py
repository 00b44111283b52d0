"""The local round against a literal transcription of the published one: three losses, three optimisers.

So are its variants: psi trained by balanced softmax, and gradients clipped, each optimiser's by themselves.
"""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.step.reference import local_update
from common.config import parse
from common.engine import run_phase
from common.images import PixelImages
from common.methods.method import Site
from common.net import Net, Task, build
from common.parts import Tensors

CLASSES = tuple("abcdefghij")
SIZES = (8, 8, 5, 8, 1, 8, 8, 3, 8, 8, 2, 8, 8, 8, 7, 8, 8, 8, 8, 4)  # twenty batches, partial ones included


class RecordedBatches(Site):
    """A site whose batches are given, so that both sides see the same ones."""

    def batches(self, *stream):
        del stream
        yield from self.recorded  # type: ignore[attr-defined]


def task(layout: str, psi_loss: str = "plain", clip: float = 0.0) -> Task:
    table = {
        "seed": 3,
        "method": {"name": "fedloge", "psi_loss": psi_loss},
        "model": {"name": "resnet8"},
        "train": {"epochs": 1, "layout": layout, "clip": clip},
    }
    return Task(parse(table), CLASSES, channels=3, side=32)


def recorded(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    rng = torch.Generator().manual_seed(5)
    return [
        (torch.randn(n, 3, 32, 32, generator=rng).to(dtype), torch.randint(0, 10, (n,), generator=rng)) for n in SIZES
    ]


def site(task: Task, batches: list[tuple[Tensor, Tensor]]) -> Site:
    pixels, labels = torch.zeros(1, 32, 32, 3, dtype=torch.uint8), torch.zeros(1, dtype=torch.long)
    images = PixelImages(pixels, labels, CLASSES, mean=(0.5,) * 3, std=(0.5,) * 3)
    counts = torch.bincount(torch.cat([y for _, y in batches]), minlength=10).double()
    made = RecordedBatches("a", task, images, torch.arange(1), counts, 1, torch.device("cpu"))
    object.__setattr__(made, "recorded", batches)
    return made


def balanced(logits: Tensor, y: Tensor, counts: Tensor) -> Tensor:
    """-log(n_y e^l_y / sum over c of n_c e^l_c), as in Ren et al."""
    weighted = counts * logits.exp()
    return -(weighted[torch.arange(len(y)), y] / weighted.sum(1)).log().mean()


class Clipped(torch.optim.SGD):
    """Bounds the norm of all gradients it steps by."""

    bound = 0.0

    def step(self, *_: object) -> None:  # type: ignore[override]
        gradients = [p.grad for p in self.param_groups[0]["params"] if p.grad is not None]
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        if 0 < self.bound < norm:
            for g in gradients:
                g.mul_(self.bound / norm)
        super().step()


def literal(net: Net, batches: list[tuple[Tensor, Tensor]], psi_loss: str = "plain", clip: float = 0.0) -> None:
    """The loop that `fedloge bench step` measures against, with the psi loss or the bound of a variant."""
    counts = torch.stack([(torch.cat([y for _, y in batches]) == c).sum() for c in range(len(CLASSES))])
    modules = net["backbone"], net["global_head"], net["local_head"]
    W = net["frame"].weight
    assert isinstance(W, Tensor)
    optimisers = [Clipped(module.parameters(), lr=0.03, momentum=0.5, foreach=False) for module in modules]
    for optimiser in optimisers:
        optimiser.bound = clip
    of_psi = partial(balanced, counts=counts) if psi_loss == "balanced" else F.cross_entropy
    local_update(modules, W, batches, 1, optimisers, [F.cross_entropy, of_psi, F.cross_entropy])


def prepared(layout: str, dtype: torch.dtype, psi_loss: str = "plain", clip: float = 0.0) -> tuple[Task, Net]:
    common_task = task(layout, psi_loss, clip)
    net = build(common_task.config.method, common_task)
    net.load(common_task.config.method.init(net, common_task).parts)
    return common_task, net.to(dtype)


def worst(ours: nn.Module, theirs: nn.Module) -> float:
    """Largest difference of any parameter or statistic, relative to the largest value of that tensor."""
    gaps = []
    for (name, a), (_, b) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        if a.is_floating_point():
            gaps.append(float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)))
        else:
            assert torch.equal(a, b), name
    return max(gaps)


@pytest.mark.parametrize(
    ("layout", "dtype", "tolerance"),
    [
        ("plain", torch.float64, 1e-12),
        ("channels_last", torch.float64, 1e-12),
        ("plain", torch.float32, 1e-6),
    ],
)
def test_local_round_is_the_published_one(layout: str, dtype: torch.dtype, tolerance: float) -> None:
    common_task, ours = prepared(layout, dtype)
    theirs = copy.deepcopy(ours)
    batches = recorded(dtype)
    if layout == "channels_last":
        ours = ours.to(memory_format=torch.channels_last)
        ours_batches = [(x.to(memory_format=torch.channels_last), y) for x, y in batches]
    else:
        ours_batches = batches
    mine = site(common_task, ours_batches)
    (phase,) = common_task.config.method.phases(ours, mine)
    run_phase(ours, phase, mine, 0)
    literal(theirs, batches)
    assert worst(ours, theirs) <= tolerance


@pytest.mark.parametrize(
    ("psi_loss", "clip", "tolerance"),
    [
        ("balanced", 0.0, 1e-12),
        ("plain", 0.5, 1e-5),  # torch divides by the norm + 1e-6
    ],
)
def test_variants_are_the_published_round_but_for_what_they_say(psi_loss: str, clip: float, tolerance: float) -> None:
    common_task, ours = prepared("plain", torch.float64, psi_loss, clip)
    published, theirs = copy.deepcopy(ours), copy.deepcopy(ours)
    batches = recorded(torch.float64)
    mine = site(common_task, batches)
    (phase,) = common_task.config.method.phases(ours, mine)
    run_phase(ours, phase, mine, 0)
    literal(theirs, batches, psi_loss, clip)
    assert worst(ours, theirs) <= tolerance
    literal(published, batches)
    assert worst(ours, published) > 100 * tolerance


def test_the_comparison_notices_a_wrong_update() -> None:
    """A head that is not detached is a different method: the tolerance must not let it pass."""
    common_task, ours = prepared("plain", torch.float64)
    theirs = copy.deepcopy(ours)
    batches = recorded(torch.float64)
    mine = site(common_task, batches)
    (phase,) = common_task.config.method.phases(ours, mine)

    def attached(net: Net, x: Tensor, y: Tensor, given: Tensors) -> Tensor:
        assert not given
        f = net.features(x)
        psi = net["global_head"](f.detach() + 1e-6 * (f - f.detach()))
        return (
            F.cross_entropy(net["frame"](f), y)
            + F.cross_entropy(psi, y)
            + F.cross_entropy(net["local_head"](f.detach()), y)
        )

    run_phase(ours, type(phase)(phase.train, attached, 1), mine, 0)
    literal(theirs, batches)
    assert worst(ours, theirs) > 1e-9
