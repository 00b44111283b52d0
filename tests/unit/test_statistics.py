"""Heads from class statistics: exact however the images are spread over sites, sound for any that there may be."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.statistics import (
    NOBODY,
    USUAL,
    Head,
    StatisticsHead,
    Sums,
    adapted,
    shapes,
    solve,
    temperature,
)  # fmt: skip

CLASSES, DIM = 7, 12


def images(count: int, seed: int = 0, classes: int = CLASSES, dim: int = DIM) -> tuple[Tensor, Tensor]:
    """Features about class means, as unevenly many of each class as in real life."""
    rng = torch.Generator().manual_seed(seed)
    y = (torch.rand(count, generator=rng) ** 3 * classes).long()
    means = torch.randn(classes, dim, generator=torch.Generator().manual_seed(1))
    mixing = torch.randn(dim, dim, generator=torch.Generator().manual_seed(2))
    return means[y] + torch.randn(count, dim, generator=rng) @ mixing / dim**0.5, y


def sums(f: Tensor, y: Tensor, centre: Tensor | None = None, classes: int = CLASSES) -> Sums:
    made = Sums.nothing(classes, f.shape[1])
    for start in range(0, len(f), 97):
        part = f[start : start + 97].double()
        made.add(part if centre is None else part - centre, y[start : start + 97])
    return replace(made, **made.tensors())


def head(of: Sums, centre: Tensor | None = None) -> Head:
    found = solve(of, torch.zeros(of.total.shape[1]) if centre is None else centre)
    assert found is not None
    return found


def logits(of: Head, f: Tensor) -> Tensor:
    return f.double() @ of.weight.T + of.bias


def close(a: Tensor, b: Tensor, relative: float) -> bool:
    return float((a - b).abs().max()) <= relative * float(b.abs().max())


def test_the_sums_of_twenty_sites_are_those_of_their_pooled_images() -> None:
    f, y = images(4000)
    whose = torch.randint(20, (4000,), generator=torch.Generator().manual_seed(3))
    merged = Sums.nothing(CLASSES, DIM)
    for site in range(20):
        merged = merged + sums(f[whose == site], y[whose == site])
    pooled = sums(f, y)
    for name in shapes(CLASSES, DIM):
        assert close(getattr(merged, name), getattr(pooled, name), 1e-12)
    assert close(head(merged).weight, head(pooled).weight, 1e-12)


def test_the_head_is_that_of_a_direct_solution() -> None:
    f, y = images(3000)
    found = head(sums(f, y))
    f = f.double()
    means = torch.stack([f[y == c].mean(dim=0) for c in range(CLASSES)])
    away = f - means[y]
    within = away.T @ away / (len(f) - CLASSES)
    size = within.trace() / DIM
    covariance = (1 - found.shrinkage) * within + found.shrinkage * size * torch.eye(DIM, dtype=torch.float64)
    weight = means @ torch.linalg.inv(covariance)
    assert close(found.weight, weight, 1e-10)
    assert close(found.bias, -(weight * means).sum(dim=1) / 2, 1e-10)
    assert 0 < found.shrinkage < 0.02


def test_the_rule_shrinks_little_with_many_images_and_wholly_where_they_say_nothing() -> None:
    many, some, few = (head(sums(*images(count))).shrinkage for count in (20_000, 500, 40))
    assert many < some < few <= 1
    f, y = images(400)
    ball = torch.randn(f.shape, generator=torch.Generator().manual_seed(4))  # its true covariance is the identity
    assert head(sums(ball, y)).shrinkage > 0.5


def test_an_offset_of_a_thousand_changes_nothing() -> None:
    f, y = images(3000)
    f = f.double()
    offset = torch.full((DIM,), 1000.0, dtype=torch.float64)
    plain, moved = head(sums(f, y)), head(sums(f + offset, y, centre=offset), offset)
    assert close(moved.weight, plain.weight, 1e-10)
    assert close(logits(moved, f + offset), logits(plain, f), 1e-9)
    rough = head(sums(f + offset, y))  # even about nothing at all
    assert torch.equal(logits(rough, f + offset).argmax(dim=1), logits(plain, f).argmax(dim=1))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 60), st.integers(1, 9), st.integers(1, 20), st.integers(0, 2**20))
def test_whatever_the_sites_have_the_head_is_finite(count: int, classes: int, dim: int, seed: int) -> None:
    f, y = images(count, seed, classes, dim)
    found = solve(sums(f, y, classes=classes), torch.zeros(dim))
    assert (found is None) == (count == 0)
    if found is not None:
        assert found.weight.isfinite().all()
        assert found.bias.isfinite().all()
        assert 0 <= found.shrinkage <= 1
        said = logits(found, f).argmax(dim=1)
        assert set(said.tolist()) <= set(y.tolist())  # never a class that nobody has


@pytest.mark.parametrize(
    "case", ["one image", "one class", "one image of each class", "all the same", "fewer than dimensions"]
)
def test_a_singular_scatter_gives_a_head(case: str) -> None:
    f, y = images(400)
    if case == "one image":
        f, y = f[:1], y[:1]
    elif case == "one class":
        y = torch.zeros_like(y)
    elif case == "one image of each class":
        first = torch.tensor([int((y == c).nonzero()[0]) for c in range(CLASSES)])
        f, y = f[first], y[first]
    elif case == "all the same":
        f = torch.ones_like(f)
    else:
        f, y = f[:9], y[:9]
    found = head(sums(f, y))
    assert found.weight.isfinite().all()
    if case == "one image of each class":
        means = torch.stack([f[y == c].mean(dim=0) if (y == c).any() else f[0] + 1e3 for c in range(CLASSES)])
        nearest = torch.cdist(f, means).argmin(dim=1)
        assert torch.equal(logits(found, f).argmax(dim=1), nearest)


def test_a_class_that_nobody_has_is_never_the_answer() -> None:
    f, y = images(500)
    found = head(sums(f[y != 2], y[y != 2]))
    assert float(found.bias[2]) == NOBODY
    assert not (logits(found, f).argmax(dim=1) == 2).any()


def simplex(count: int, lacks: int | None = None) -> tuple[Tensor, Tensor]:
    """Images of classes that are all equally far from each other, as features of a trained backbone come to be."""
    rng = torch.Generator().manual_seed(4)
    y = torch.randint(CLASSES, (count,), generator=rng)
    y = y if lacks is None else y[y != lacks]
    return 4 * (torch.eye(CLASSES, DIM) - 1 / CLASSES)[y] + torch.randn(len(y), DIM, generator=rng) + 5, y


@pytest.mark.parametrize("scale", [1e-3, 0.2, 1.0, 50.0])
def test_a_class_without_images_is_answered_by_another_head_on_the_same_scale(scale: float) -> None:
    f, y = simplex(700, lacks=2)
    others = scale * (torch.eye(CLASSES, DIM) + torch.linspace(-1, 1, DIM))  # what all rows share says nothing
    whole = solve(sums(f, y), torch.zeros(DIM), others)
    assert whole is not None
    told = head(sums(f, y))
    kept = torch.arange(CLASSES) != 2
    assert torch.equal(whole.weight[kept], told.weight[kept])
    assert torch.equal(whole.bias[kept], told.bias[kept])
    unseen, truth = simplex(1000)
    said = logits(whole, unseen).argmax(dim=1)
    right = said == truth
    known = head(sums(*simplex(700)))
    best = logits(known, unseen).argmax(dim=1) == truth
    for chosen in (truth == 2, truth != 2):
        assert float(right[chosen].double().mean()) > float(best[chosen].double().mean()) - 0.03


@pytest.mark.parametrize("case", ["nothing learnt", "the opposite", "one class"])
def test_another_head_that_does_not_agree_about_the_rest_answers_nothing(case: str) -> None:
    f, y = simplex(300, lacks=2)
    if case == "one class":
        y = torch.zeros_like(y)
    scale = {"nothing learnt": 0.0, "the opposite": -1.0, "one class": 1.0}[case]
    found = solve(sums(f, y), torch.zeros(DIM), scale * torch.eye(CLASSES, DIM))
    assert found is not None
    assert float(found.bias[2]) == NOBODY


def test_a_site_adds_its_own_prior() -> None:
    f, y = images(3000)
    made = StatisticsHead(CLASSES, DIM)
    assert not made.known
    for name, t in head(sums(f, y)).tensors().items():
        getattr(made, name).copy_(t)
    assert made.known
    counts = torch.tensor([50, 30, 0, 10, 5, 4, 1])
    prior = torch.log(counts.clamp_min(0) / 100.0)
    own = adapted(made, counts, 0.5)(f)
    assert torch.allclose(own[:, counts > 0], (0.5 * made(f) + prior)[:, counts > 0], atol=1e-5)
    assert own.isfinite().all()


HONEST = sums(*images(200))


@pytest.mark.parametrize(
    ("lie", "told"),
    [
        (lambda s: replace(s, scatter=s.scatter * torch.nan), "finite"),
        (lambda s: replace(s, count=s.count + torch.tensor([30.0, -30.0, 0, 0, 0, 0, 0])), "whole numbers"),
        (lambda s: replace(s, count=s.count + 0.5), "whole numbers"),
        (lambda s: replace(s, total=s.total * 1e200), "numbers above 1e+24"),
        (lambda s: replace(s, scatter=s.scatter * 1e30), "numbers above"),
        (lambda s: replace(s, count=s.count + 1), "are of 207 images"),
        (lambda s: replace(s, total=s.total * 5), "smaller than that of its class means"),
        (lambda s: replace(s, scatter=-s.scatter), "smaller"),
        (lambda s: replace(s, scatter=s.scatter + torch.eye(DIM).double().roll(1, 0)), "symmetric"),
    ],
)  # fmt: skip
def test_sums_that_cannot_be_are_refused(lie, told: str) -> None:
    assert HONEST.objection(200) == ""
    assert told in lie(HONEST).objection(200)


def test_features_of_a_class_without_images_are_refused() -> None:
    one = sums(*images(1))
    assert one.objection(1) == ""
    assert "without images" in replace(one, count=one.count.roll(1)).objection(1)


def test_a_site_without_images_sends_what_changes_nothing() -> None:
    nothing = Sums.nothing(CLASSES, DIM)
    assert nothing.objection(0) == ""
    assert solve(nothing, torch.zeros(DIM)) is None
    assert torch.equal((HONEST + nothing).scatter, HONEST.scatter)


def test_the_temperature_is_what_makes_a_site_certain_to_the_degree_it_is_right() -> None:
    rng = torch.Generator().manual_seed(5)
    counts = torch.tensor([600, 300, 100, 0])
    prior = torch.log(counts / counts.sum())
    logits = 3 * torch.randn(4000, 4, generator=rng)
    for true in (0.3, 0.6, 1.0):
        chances = torch.softmax(true * logits + prior, dim=1)
        y = torch.multinomial(chances, 1, generator=rng).flatten()
        assert temperature(logits, y, counts) == pytest.approx(true, rel=0.12)
    few = temperature(logits[:3], y[:3], counts)
    assert temperature(logits[:0], y[:0], counts) == pytest.approx(USUAL, rel=0.05)
    assert USUAL / 3 < few < 3 * USUAL
