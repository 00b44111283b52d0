"""Losses against their formulas, and at the classes a site does not have."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from common.losses import balanced_softmax, calibrated, log_prior, proximal

COUNTS = torch.tensor([40, 8, 1, 0])


def drawn(classes: int = 4, samples: int = 12, present: int = 3) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(4)
    logits = torch.randn(samples, classes, generator=rng, dtype=torch.float64).requires_grad_(True)
    return logits, torch.randint(0, present, (samples,), generator=rng)


def naive(logits: Tensor, y: Tensor, weight: list[float]) -> float:
    """-mean log(w_y e^z_y / sum_c w_c e^z_c)."""
    total = 0.0
    for row, label in zip(logits.tolist(), y.tolist(), strict=True):
        mass = [w * math.exp(z) for w, z in zip(weight, row, strict=True)]
        total -= math.log(mass[label] / sum(mass))
    return total / len(y)


def test_log_prior_is_the_frequency_and_minus_infinity_where_there_is_none() -> None:
    prior = log_prior(COUNTS)
    torch.testing.assert_close(prior[:3].exp(), torch.tensor([40, 8, 1]) / 49)
    assert prior[3] == -torch.inf
    torch.testing.assert_close(log_prior(COUNTS / 7.0), prior)  # frequencies will do as well as counts


def test_balanced_softmax_is_its_formula() -> None:
    logits, y = drawn()
    found = balanced_softmax(logits, y, log_prior(COUNTS)).item()
    assert found == pytest.approx(naive(logits, y, COUNTS.tolist()))


def test_balanced_softmax_with_equal_counts_is_cross_entropy() -> None:
    logits, y = drawn(present=4)
    flat = log_prior(torch.full((4,), 17))
    torch.testing.assert_close(balanced_softmax(logits, y, flat), F.cross_entropy(logits, y))


def test_calibrated_is_its_formula() -> None:
    logits, y = drawn()
    tau = 0.7
    weight = [math.exp(-tau * n**-0.25) if n else 0.0 for n in COUNTS.tolist()]
    assert calibrated(logits, y, COUNTS, tau).item() == pytest.approx(naive(logits, y, weight), rel=1e-6)


def test_calibrated_with_equal_counts_is_cross_entropy() -> None:
    logits, y = drawn(present=4)
    torch.testing.assert_close(calibrated(logits, y, torch.full((4,), 9), 2.0), F.cross_entropy(logits, y))


def test_rare_classes_get_the_larger_margin() -> None:
    """With equal logits the rarer class is the dearer one, so it is pushed up harder."""
    logits = torch.zeros(1, 4)
    for loss in (lambda y: balanced_softmax(logits, y, log_prior(COUNTS)), lambda y: calibrated(logits, y, COUNTS, 1)):
        common, rare = (float(loss(torch.tensor([c]))) for c in (0, 2))
        assert rare > common


@pytest.mark.parametrize("loss", ["balanced", "calibrated"])
def test_absent_classes_take_no_part_and_give_no_nan(loss: str) -> None:
    logits, y = drawn()
    value = balanced_softmax(logits, y, log_prior(COUNTS)) if loss == "balanced" else calibrated(logits, y, COUNTS, 1)
    value.backward()
    assert torch.isfinite(value)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[:, 3] == 0).all()
    assert (logits.grad[:, :3] != 0).all()
    with torch.no_grad():
        logits[:, 3] += 1000  # whatever the head says of a class that is not there
    again = balanced_softmax(logits, y, log_prior(COUNTS)) if loss == "balanced" else calibrated(logits, y, COUNTS, 1)
    torch.testing.assert_close(again, value)


def test_proximal_is_the_squared_distance_over_all_tensors() -> None:
    values = {"a": torch.tensor([1.0, 2.0], requires_grad=True), "b": torch.tensor([[3.0]], requires_grad=True)}
    anchor = {"a": torch.tensor([0.0, 4.0]), "b": torch.tensor([[1.0]])}
    distance = proximal(values, anchor)
    assert distance.item() == 1 + 4 + 4
    distance.backward()
    assert values["a"].grad is not None
    assert values["a"].grad.tolist() == [2.0, -4.0]
    assert proximal({**values, "more": torch.ones(3)}, anchor).item() == 9  # what has no anchor is free
