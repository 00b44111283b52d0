"""Changes as bytes: back within half a step, nothing lost, and nothing that is malformed gets past."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from common import codec
from common.codec import BLOCK, EXACT, STEPS, TINY, Change
from common.parts import Tensors

MANY = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
NAMES = ("a", "bn.running_mean", "bn.running_var", "conv.weight", "z")
SHAPES = st.lists(st.integers(0, 40), max_size=3).map(tuple)
SCALES = st.sampled_from([0.0, 1e-45, 1e-38, 1e-6, 1.0, 1e30])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def values(shape: tuple[int, ...], scale: float, seed: int) -> Tensor:
    """Of every size below `scale`, zeros and denormals too."""
    rng = torch.Generator().manual_seed(seed)
    size = torch.randn(shape, generator=rng) * 10 ** (-6 * torch.rand(shape, generator=rng))
    return size * scale * (torch.rand(shape, generator=rng) > 0.2)


@st.composite
def parts(draw: st.DrawFn, count: int) -> list[Tensors]:
    """Several of the same names and shapes."""
    shapes = draw(st.dictionaries(st.sampled_from(NAMES), SHAPES, min_size=1))
    return [
        {name: values(shape, draw(SCALES), draw(st.integers(0, 10**6))) for name, shape in shapes.items()}
        for _ in range(count)
    ]


def exact(name: str) -> bool:
    return name.endswith(EXACT)


def step(change: Tensor) -> float:
    """The widest step of any block of a tensor with these values."""
    return float(change.abs().max()) / STEPS if change.numel() else 0.0


@MANY
@given(parts(3))
def test_what_arrives_is_within_half_a_step_and_the_rest_is_left(given: list[Tensors]) -> None:
    base, target, before = given
    before = {name: t for name, t in before.items() if not exact(name)}
    change, left = codec.encode(target, base, before)
    got = codec.decode(change, base)
    assert got.keys() == base.keys()
    assert left.keys() == before.keys()
    for name, t in target.items():
        assert (got[name].shape, got[name].dtype) == (t.shape, t.dtype)
        if exact(name):
            assert torch.equal(got[name], t)
            continue
        wanted = (t - base[name]) + before[name]
        assert float(left[name].abs().amax() if t.numel() else 0) <= max(0.5001 * step(wanted), TINY)
        rounding = 1e-6 * (base[name].abs() + wanted.abs())  # of adding to the base
        assert bool((((got[name] - base[name]) + left[name] - wanted).abs() <= rounding + TINY).all())


@MANY
@given(parts(2), st.sampled_from([0.01, 0.1, 0.5]))
def test_the_largest_values_are_sent_and_all_others_left_as_they_are(given: list[Tensors], share: float) -> None:
    base, target = given
    change, left = codec.encode(target, base, None, share)
    got = codec.decode(change, base)
    wanted = {name: t - base[name] for name, t in target.items() if not exact(name)}
    count = math.ceil(share * sum(t.numel() for t in wanted.values()))
    sizes = torch.cat([torch.zeros(0), *(t.abs().reshape(-1) for t in wanted.values())]).sort(descending=True)[0]
    least = max(float(sizes[count - 1]), TINY) if count else math.inf
    for name, t in wanted.items():
        unsent = t.abs() < least
        assert torch.equal(left[name][unsent], t[unsent])
        assert torch.equal(got[name][unsent], base[name][unsent])
        assert float(left[name].abs().max() if t.numel() else 0) <= max(
            least, 0.5001 * float(sizes[0]) / STEPS if len(sizes) else 0.0
        )
    assert all(torch.equal(got[name], t) for name, t in target.items() if exact(name))


def part(seed: int = 0, size: float = 1.0) -> Tensors:
    rng = torch.Generator().manual_seed(seed)
    shapes = {"bn.running_mean": (8,), "bn.running_var": (8,), "conv": (300, 3), "fc": (7,)}
    return {name: size * torch.randn(shape, generator=rng) for name, shape in shapes.items()}


@pytest.mark.parametrize("share", [1.0, 0.1, 0.01])
def test_what_was_left_is_sent_later(share: float) -> None:
    """A server that adds up what comes is near what the site has learnt in all, however few values come at a time."""
    server, learnt, left = part(0), part(0), None
    drift = part(1, 0.01)
    for _ in range(300):
        base = server
        learnt = {name: t + drift[name] for name, t in learnt.items()}
        trained = {name: t + drift[name] for name, t in base.items()}
        change, left = codec.encode(trained, base, left, share)
        server = codec.decode(change, base)
    gap = float((server["conv"] - learnt["conv"]).norm() / learnt["conv"].norm())
    # a value waits for about 1 / share of the 300 rounds
    assert gap < {1.0: 1e-4, 0.1: 0.05, 0.01: 0.4}[share]
    assert float((server["conv"] + left["conv"] - learnt["conv"]).norm() / learnt["conv"].norm()) < 1e-4


def test_few_bytes() -> None:
    base = {"w": torch.zeros(1000, 1000)}
    target = {"w": torch.randn(1000, 1000)}
    whole, _ = codec.encode(target, base)
    assert len(whole.data) == 10**6 + 4 * math.ceil(10**6 / BLOCK)
    few, _ = codec.encode(target, base, None, 0.01)
    assert len(few.data) < 0.022 * 10**6
    nothing, _ = codec.encode(base, base, None, 0.01)
    assert len(nothing.data) == 4


def test_the_same_values_make_the_same_bytes_in_any_layout() -> None:
    base, target = {"w": torch.randn(4, 3, 5, 5)}, {"w": torch.randn(4, 3, 5, 5, requires_grad=True)}
    change, _ = codec.encode(target, base)
    other = {name: t.detach().to(memory_format=torch.channels_last) for name, t in target.items()}
    again, _ = codec.encode(other, {"w": base["w"].to(memory_format=torch.channels_last)})
    assert again == change
    assert not any(t.requires_grad for t in codec.decode(change, base).values())


@pytest.mark.parametrize("share", [1.0, 0.1])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["conv", "bn.running_var"])
def test_what_is_not_finite_is_refused(share: float, value: float, name: str) -> None:
    target = part()
    target[name].view(-1)[3] = value
    with pytest.raises(ValueError, match="not finite"):
        codec.encode(target, part(), None, share)


def test_a_difference_beyond_all_numbers_is_refused() -> None:
    large = {"w": torch.full((3,), 3e38)}
    with pytest.raises(ValueError, match="not finite"):
        codec.encode(large, {"w": -large["w"]})


def made(coding: Any, *pieces: Any) -> Change:
    data = b"".join(np.asarray(piece, kind).tobytes() for kind, piece in pieces)
    return Change(coding, data, codec.checksum(data))


BASE = {"running_var": torch.ones(2), "w": torch.zeros(3)}
GOOD = (("<f4", [0.5]), ("<f4", [7, 8]), ("i1", [1, -127, 127]))
TOP = (("<u4", 2), ("<f4", [0.5]), ("<f4", [7, 8]), ("i1", [3, 4]), ("u1", [0, 1]))


def test_the_bytes_are_what_they_are_said_to_be() -> None:
    got = codec.decode(made("int8", *GOOD), BASE)
    assert got["running_var"].tolist() == [7, 8]
    assert got["w"].tolist() == [0.5, -63.5, 63.5]
    assert codec.decode(made("topk", *TOP), BASE)["w"].tolist() == [1.5, 0, 2.0]
    far = codec.decode(
        made("topk", ("<u4", 1), ("<f4", [1]), ("i1", [9]), ("u1", [255, 255, 1])), {"w": torch.zeros(600)}
    )
    assert far["w"].nonzero().tolist() == [[511]]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (Change("int8", b"", "0"), "checksum"),
        (made("int8"), "fewer than its part needs"),
        (made("int8", *GOOD[:2], ("i1", [1, 2])), "fewer than"),
        (made("int8", *GOOD, ("i1", [1])), "more than its part needs"),
        (made("int8", *GOOD[:2], ("i1", [1, 2, -128])), "below -127"),
        (made("int8", ("<f4", [-0.5]), *GOOD[1:]), "a scale is not"),
        (made("int8", ("<f4", [math.nan]), *GOOD[1:]), "a scale is not"),
        (made("int8", ("<f4", [math.inf]), *GOOD[1:]), "a scale is not"),
        (made("topk", ("u1", [1])), "fewer than"),
        (made("topk", ("<u4", 2**32 - 1), *TOP[1:]), "fewer than"),
        (made("topk", ("<u4", 3), *TOP[1:]), "places are not those of 3"),
        (made("topk", ("<u4", 1), *TOP[1:]), "places are not those of 1"),
        (made("topk", *TOP[:4], ("u1", [0, 255, 255])), "places are not"),
        (made("topk", *TOP[:4], ("u1", [0, 5, 255])), "places are not"),
        (made("topk", *TOP[:4], ("u1", [254, 1])), "beyond"),
        (made("topk", *TOP[:4], ("u1", [0, 255, 3])), "beyond"),
    ],
)  # fmt: skip
def test_what_is_malformed_is_refused(change: Change, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as refused:
        codec.decode(change, BASE)
    assert str(refused.value).isprintable()


@settings(MANY, max_examples=150)
@given(st.binary(max_size=200), st.sampled_from(["int8", "topk"]), st.data())
def test_random_bytes_never_crash(noise: bytes, coding: Any, data: st.DataObject) -> None:
    if data.draw(st.booleans()):  # nearly right ones
        whole = bytearray(made(coding, *(GOOD if coding == "int8" else TOP)).data)
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
        noise = bytes(whole)
    found: object = None
    try:
        found = {name: t.shape for name, t in codec.decode(Change(coding, noise, codec.checksum(noise)), BASE).items()}
    except ValueError as error:
        found = str(error).isprintable()
    assert found in (True, {name: t.shape for name, t in BASE.items()})
