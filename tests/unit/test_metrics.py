"""Figures worked out by hand, by naive loops and by scikit-learn."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.metrics import CALIBRATION_BINS, Groups, calibration_error, groups, measure, over_sites

BY = (Groups("share", many=(0,), medium=(1,), few=(2,)), Groups("count", many=(2, 0), medium=(), few=(1, 3)))


def confident(predicted: list[int], classes: int = 4, margin: float = 5.0) -> Tensor:
    return margin * torch.nn.functional.one_hot(torch.tensor(predicted), classes).float()


def drawn(seed: int, samples: int, classes: int, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(samples, classes, generator=rng)
    return logits, torch.randint(0, classes, (samples,), generator=rng)


def test_by_hand() -> None:
    # class 0: 3 of 4 right; class 1: 0 of 1; class 2: 2 of 2; class 3 has no sample but is said once
    y = torch.tensor([0, 0, 0, 0, 1, 2, 2])
    found = measure(confident([0, 0, 0, 3, 0, 2, 2]), y, BY)
    assert found["samples"] == 7
    assert found["top1"] == pytest.approx(5 / 7)
    assert found["per_class"] == [0.75, 0.0, 1.0, None]
    assert found["balanced"] == pytest.approx((0.75 + 0 + 1) / 3)
    assert found["macro_f1"] == pytest.approx((2 * 3 / (4 + 4) + 0 + 1) / 3)
    assert found["groups"]["share"] == {"many": 0.75, "medium": 0.0, "few": 1.0}
    assert found["groups"]["count"] == {"many": pytest.approx(5 / 6), "medium": None, "few": 0.0}


def test_groups_weigh_samples_and_not_classes() -> None:
    y = torch.tensor([0] * 9 + [2])
    found = measure(confident([0] * 9 + [1]), y, BY)
    assert found["groups"]["count"]["many"] == pytest.approx(0.9)
    assert found["balanced"] == pytest.approx(0.5)


def test_no_samples_have_no_value() -> None:
    found = measure(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), BY)
    assert found["samples"] == 0
    assert [found[key] for key in ("top1", "balanced", "macro_f1", "ece")] == [None] * 4
    assert found["per_class"] == [None] * 4
    assert set(found["groups"]["share"].values()) == {None}


def test_a_diverged_model_is_measured_and_has_no_calibration() -> None:
    found = measure(torch.full((3, 4), torch.nan), torch.tensor([0, 1, 2]), BY)
    assert found["ece"] is None
    assert "NaN" not in json.dumps(found)


def test_groups_come_from_training_counts_by_both_rules() -> None:
    by_share, by_count = groups([500, 300, 100, 50, 30, 20])
    assert by_share == Groups("share", many=(0, 1), medium=(2, 3), few=(4, 5))
    assert by_count == Groups("count", many=(0, 1), medium=(2, 3, 4, 5), few=())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(2, 9))
def test_shares_are_shares_and_agree_with_each_other(seed: int, samples: int, classes: int) -> None:
    logits, y = drawn(seed, samples, classes)
    by = groups(torch.bincount(y, minlength=classes).tolist())
    found = measure(logits, y, by)
    known = [r for r in found["per_class"] if r is not None]
    assert len(known) == len(set(y.tolist()))
    assert found["balanced"] == pytest.approx(sum(known) / len(known))
    assert found["top1"] == pytest.approx(float((logits.argmax(1) == y).double().mean()))
    assert 0 <= found["macro_f1"] <= 1
    sizes = torch.bincount(y, minlength=classes)
    for g in by:
        parts = [(found["groups"][g.rule][name], int(sizes[list(c)].sum())) for name, c in g.items()]
        assert sum(share * n for share, n in parts if share is not None) == pytest.approx(found["top1"] * samples)
        assert all((share is None) == (n == 0) for share, n in parts)
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("seed", range(3))
def test_balanced_and_f1_are_those_of_scikit_learn(seed: int) -> None:
    reference = pytest.importorskip("sklearn.metrics")
    logits, y = drawn(seed, 200, 7)
    y[y == 6] = 0  # a class without samples, yet sometimes predicted
    predicted = logits.argmax(1)
    found = measure(logits, y, ())
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        assert found["balanced"] == pytest.approx(reference.balanced_accuracy_score(y, predicted))
    assert found["macro_f1"] == pytest.approx(
        reference.f1_score(y, predicted, average="macro", labels=sorted(set(y.tolist())), zero_division=0)
    )


# --- calibration ---------------------------------------------------------------------------------------------------


def naive_calibration(logits: Tensor, y: Tensor, bins: int) -> float:
    """The definition, bin by bin: sum over bins of |B|/n * |hit rate(B) - confidence(B)|."""
    inside: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
    for row, label in zip(logits.double().tolist(), y.tolist(), strict=True):
        top = max(row)
        weights = [math.exp(v - top) for v in row]
        confidence = max(weights) / sum(weights)
        inside[min(int(confidence * bins), bins - 1)].append((confidence, row.index(top) == label))
    total = 0.0
    for members in inside:
        if members:
            confidence = sum(c for c, _ in members) / len(members)
            rate = sum(hit for _, hit in members) / len(members)
            total += len(members) / len(y) * abs(rate - confidence)
    return total


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 80), st.integers(2, 6), st.floats(0.1, 30))
def test_calibration_error_is_the_naive_one(seed: int, samples: int, classes: int, scale: float) -> None:
    logits, y = drawn(seed, samples, classes, scale)
    error = calibration_error(logits, y)
    assert error == pytest.approx(naive_calibration(logits, y, CALIBRATION_BINS), abs=1e-9)
    assert 0 <= error <= 1


def test_calibration_by_hand() -> None:
    sure = torch.tensor([[1000.0, 0.0]] * 4)
    assert calibration_error(sure, torch.tensor([0, 0, 0, 0])) == 0
    assert calibration_error(sure, torch.tensor([1, 1, 1, 0])) == pytest.approx(0.75)
    assert calibration_error(torch.zeros(4, 2), torch.tensor([0, 0, 1, 1])) == pytest.approx(0)


def test_gaps_of_one_bin_cancel_but_those_of_two_do_not() -> None:
    half, sure = [0.0, 0.0], [1000.0, 0.0]
    apart = calibration_error(torch.tensor([half, sure]), torch.tensor([0, 1]))
    assert apart == pytest.approx(0.5 * 0.5 + 0.5 * 1.0)  # under- and overconfident, both count
    together = calibration_error(torch.tensor([half, half]), torch.tensor([0, 1]))
    assert together == pytest.approx(0)


# --- sites ---------------------------------------------------------------------------------------------------------


def test_sites_count_alike_whatever_their_size() -> None:
    large = measure(confident([0] * 8), torch.tensor([0] * 8), BY)
    small = measure(confident([1, 2]), torch.tensor([0, 2]), BY)
    mean = over_sites({"b": small, "a": large}, BY)
    assert mean["sites"] == 2
    assert mean["top1"] == pytest.approx((1.0 + 0.5) / 2)
    assert mean["balanced"] == pytest.approx((1.0 + 0.5) / 2)
    assert mean["per_site"] == {"a": 1.0, "b": 0.5}
    assert list(mean["per_site"]) == ["a", "b"]


def test_a_site_counts_for_a_group_where_it_has_samples() -> None:
    first = measure(confident([0, 1]), torch.tensor([0, 1]), BY)
    second = measure(confident([1]), torch.tensor([0]), BY)
    by_share = over_sites({"a": first, "b": second}, BY)["groups"]["share"]
    assert by_share == {"many": 0.5, "medium": 1.0, "few": None}


def test_without_sites_there_is_no_mean() -> None:
    assert over_sites({}, BY)["top1"] is None
