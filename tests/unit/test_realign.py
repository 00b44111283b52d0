"""The norms of heads: what realignment changes, and what it must leave alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from common.realign import added, linear, masked, personal_heads, realigned, transferred

GAIN = 1.7


def head(seed: int = 0, classes: int = 5, dim: int = 7, bias: bool = True) -> nn.Linear:
    rng = torch.Generator().manual_seed(seed)
    spread = torch.exp(2 * torch.randn(classes, 1, generator=rng))  # long-tailed norms
    weight = spread * torch.randn(classes, dim, generator=rng)
    return linear(weight, torch.randn(classes, generator=rng) if bias else None)


def features(seed: int = 9, many: int = 50, dim: int = 7) -> torch.Tensor:
    return torch.randn(many, dim, generator=torch.Generator().manual_seed(seed))


def norms(layer: nn.Linear) -> torch.Tensor:
    return layer.weight.norm(dim=1)


def directions(layer: nn.Linear) -> torch.Tensor:
    return layer.weight / layer.weight.norm(dim=1, keepdim=True)


def test_by_hand() -> None:
    psi = linear(torch.tensor([[3.0, 4.0], [0.0, 0.5]]), torch.tensor([1.0, -1.0]))
    phi = linear(torch.tensor([[0.0, 2.0], [6.0, 8.0]]), torch.tensor([0.5, 0.25]))
    torch.testing.assert_close(realigned(psi, 2.0).weight, torch.tensor([[1.2, 1.6], [0.0, 2.0]]))
    torch.testing.assert_close(transferred(psi, phi).weight, torch.tensor([[6.0, 8.0], [0.0, 5.0]]))
    torch.testing.assert_close(transferred(psi, phi).bias, psi.bias)
    both = personal_heads(psi, phi)
    torch.testing.assert_close(both["phi+psi_k"].weight, torch.tensor([[6.0, 10.0], [6.0, 13.0]]))
    torch.testing.assert_close(both["phi+psi_k"].bias, torch.tensor([1.5, -0.75]))
    torch.testing.assert_close(both["psi_k+psi"].weight, torch.tensor([[9.0, 12.0], [0.0, 5.5]]))
    torch.testing.assert_close(both["psi_k+psi"].bias, torch.tensor([2.0, -2.0]))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 20), st.floats(0.01, 100))
def test_realigned_rows_have_the_gain_as_norm_and_keep_direction_and_bias(
    seed: int, classes: int, dim: int, gain: float
) -> None:
    psi = head(seed, classes, dim)
    made = realigned(psi, gain)
    torch.testing.assert_close(norms(made), torch.full((classes,), gain), rtol=1e-5, atol=0)
    torch.testing.assert_close(directions(made), directions(psi), rtol=1e-5, atol=1e-6)
    assert torch.equal(made.bias, psi.bias)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 10**6))
def test_what_is_said_depends_on_directions_alone(seed: int) -> None:
    """Without a bias: any rescaling of rows before and any gain leave the generic head's argmax as it is."""
    psi = head(seed, bias=False)
    scales = torch.rand(5, 1, generator=torch.Generator().manual_seed(seed)) + 0.1
    x = features(seed)
    said = realigned(psi, GAIN)(x)
    torch.testing.assert_close(realigned(linear(scales * psi.weight, None), GAIN)(x), said, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(realigned(psi, 10 * GAIN)(x), 10 * said, rtol=1e-4, atol=1e-5)
    nearest = torch.cosine_similarity(x[:, None], psi.weight[None], dim=2).argmax(1)
    assert torch.equal(said.argmax(1), nearest)


def test_realigning_again_changes_nothing() -> None:
    once = realigned(head(), GAIN)
    torch.testing.assert_close(realigned(once, GAIN).weight, once.weight)


def test_a_row_of_zeros_stays_zero() -> None:
    psi = head()
    with torch.no_grad():
        psi.weight[2] = 0
    made = realigned(psi, GAIN)
    assert torch.equal(made.weight[2], torch.zeros(7))
    assert norms(made)[[0, 1, 3, 4]] == pytest.approx([GAIN] * 4)


def test_transfer_multiplies_norms_and_ignores_the_direction_of_phi() -> None:
    psi, phi = head(1), head(2)
    made = transferred(psi, phi)
    torch.testing.assert_close(norms(made), norms(psi) * norms(phi))
    torch.testing.assert_close(directions(made), directions(psi))
    turned = linear(phi.weight.flip(1), phi.bias + 1)
    torch.testing.assert_close(transferred(psi, turned).weight, made.weight)
    torch.testing.assert_close(made(features()) - psi.bias, (psi(features()) - psi.bias) * norms(phi))


def test_added_heads_add_their_logits() -> None:
    psi, phi, x = head(1), head(2), features()
    torch.testing.assert_close(added(psi, phi)(x), psi(x) + phi(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(added(psi, phi).weight, added(phi, psi).weight)
    both = personal_heads(psi, phi)
    psi_k = transferred(psi, phi)
    torch.testing.assert_close(both["phi+psi_k"](x), phi(x) + psi_k(x), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(both["psi_k+psi"](x), psi_k(x) + psi(x), rtol=1e-4, atol=1e-3)


def test_the_heads_given_are_not_touched_and_the_made_ones_do_not_train() -> None:
    psi, phi = head(1).requires_grad_(True), head(2)
    before = [t.clone() for t in (psi.weight, psi.bias, phi.weight, phi.bias)]
    made = [realigned(psi, GAIN), transferred(psi, phi), *personal_heads(psi, phi).values()]
    for layer in made:
        assert not any(p.requires_grad for p in layer.parameters())
        layer.weight.add_(1)
        layer.bias.add_(1)
    for t, old in zip((psi.weight, psi.bias, phi.weight, phi.bias), before, strict=True):
        assert torch.equal(t, old)


def test_dtype_and_layout_are_kept() -> None:
    psi = head().double()
    assert realigned(psi, GAIN).weight.dtype == torch.float64
    assert linear(psi.weight, None).bias is None


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 2**5 - 1))
def test_masked_classes_never_win_and_the_others_keep_their_logits(seed: int, bits: int) -> None:
    support = torch.tensor([bool(bits >> c & 1) for c in range(5)])
    logits = 100 * torch.randn(20, 5, generator=torch.Generator().manual_seed(seed))
    out = masked(logits, support)
    assert support[out.argmax(1)].all()
    assert torch.equal(out[:, support], logits[:, support])
    chances = torch.softmax(out, dim=1)
    assert (chances[:, ~support] == 0).all()
    torch.testing.assert_close(chances.sum(1), torch.ones(20))
