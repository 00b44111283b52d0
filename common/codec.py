"""A part's change as few bytes: values of eight bits in blocks with a scale each, all of them or only the largest.

    sent = Q(target - base + left over)      left over = target - base + left over - sent

Both ends add `sent` to the same base, so they agree to the bit; what is not sent is kept by the sender for the next
time (error feedback), so nothing is lost, only late. "int8" sends every value as one of 255 steps of its block, whose
scale is its largest magnitude / 127; a block is 256 values of one tensor. "topk" sends the largest `share` of all
values so, with the gaps between their places. BatchNorm's moving statistics are sent as they are, and not as changes:
a variance that rounding takes below zero is none.

The bytes are little-endian and hold no names and no shapes: both ends know the base. No number is drawn, and every
operation is one that IEEE 754 rounds in one way, so any two machines make the same bytes and the same values of them.
What is decoded may be anything: what is not as it should be raises ValueError with one printable line.
"""

import math
import zlib
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.parts import Tensors

Wire: TypeAlias = Literal["fp32", "bf16", "int8", "topk"]
Coding: TypeAlias = Literal["int8", "topk"]
WIRES: Final[tuple[Wire, ...]] = ("fp32", "bf16", "int8", "topk")
CODED: Final[tuple[Coding, ...]] = ("int8", "topk")  # the wires on which the backbone travels as changes
PART: Final = "backbone"  # no other is coded: methods check heads and priors against statistics
BLOCK = 256  # values that share a scale
STEPS = 127
TINY = 2.0**-100  # a block without a value above this has nothing to send: its scale would have too few bits
EXACT = ("running_mean", "running_var")
HEAD = 4  # bytes of the number of values that are sent, of "topk"
INFINITE = "the change has values that are not finite"
FAR = 255  # the byte of a gap that says: so much further, and go on with the next byte


@dataclass(frozen=True)
class Change:
    """From one version of a part to the next."""

    coding: Coding
    data: bytes  # topk: how many; then scales, exact values, steps; topk: gaps
    checksum: str

    @classmethod
    def made(cls, coding: Coding, *pieces: npt.NDArray[Any]) -> "Change":
        data = b"".join(_memory(piece) for piece in pieces if piece.size)
        return cls(coding, data, checksum(data))


def checksum(data: bytes) -> str:
    return f"{zlib.crc32(data):08x}"


def fits(part: Tensors) -> bool:
    """Whether changes of this part can be coded: others travel as they are."""
    return bool(part) and all(t.dtype is torch.float32 for t in part.values())


@torch.no_grad()
def encode(target: Tensors, base: Tensors, left: Tensors | None = None, share: float = 1.0) -> tuple[Change, Tensors]:
    """The change from `base` to `target` and what was `left` over before, and what is left over now. A `share` below 1
    is topk. Values that are not finite are refused."""
    layout = _Layout(base)
    flat = _zeros(layout.padded)
    for name, place in layout.places(flat):
        torch.sub(target[name].cpu(), base[name].cpu(), out=place)
        if left is not None:
            place.add_(left[name].cpu())
    exact = [target[name].detach().cpu().reshape(-1).numpy() for name in layout.exact]
    if not all(bool(np.isfinite(values).all()) for values in exact):
        raise ValueError(INFINITE)
    if share < 1:
        change = Change.made("topk", *_largest(flat.numpy(), math.ceil(share * layout.count), exact))
    else:
        scales, steps = _quantise(flat)
        change = Change.made("int8", scales, *exact, *layout.pieces(steps))
    return change, dict(layout.places(flat))


@torch.no_grad()
def decode(change: Change, base: Tensors) -> Tensors:
    """`base` with the change: new tensors, on the devices of the old ones."""
    layout = _Layout(base)
    if checksum(change.data) != change.checksum:
        raise ValueError("its values do not match their checksum")
    reader = _Reader(change.data)
    flat = _zeros(layout.padded)
    if change.coding == "topk":
        exact = _scatter(reader, layout, flat)
    else:
        scales = reader.scales(layout.padded // BLOCK)
        exact = reader.take(layout.exact_count, "<f4")
        flat.copy_(torch.from_numpy(layout.spread(reader.steps(layout.count))))
        flat.view(len(scales), BLOCK).mul_(torch.from_numpy(scales)[:, None])
    reader.end()
    found = {name: place.add_(base[name].cpu()) for name, place in layout.places(flat)}
    for name in layout.exact:
        values, exact = exact[: base[name].numel()], exact[base[name].numel() :]
        found[name] = torch.from_numpy(values.copy()).view(base[name].shape)
    return {name: found[name].to(t.device) for name, t in base.items()}


class _Layout:
    """Where the values of a part are: in a flat tensor every coded tensor begins a block, in the bytes none does."""

    def __init__(self, part: Tensors) -> None:
        self._shapes = {name: t.shape for name, t in sorted(part.items()) if not name.endswith(EXACT)}
        self._sizes = [shape.numel() for shape in self._shapes.values()]
        self._starts = np.cumsum([0, *(-(-size // BLOCK) * BLOCK for size in self._sizes)]).tolist()
        self.exact = [name for name in sorted(part) if name.endswith(EXACT)]
        self.exact_count = sum(part[name].numel() for name in self.exact)
        self.padded = self._starts[-1]
        self.count = sum(self._sizes)

    def places(self, flat: Tensor) -> list[tuple[str, Tensor]]:
        """Each coded tensor as a view."""
        spans = zip(self._shapes.items(), self._starts, self._sizes, strict=False)
        return [(name, flat[start : start + size].view(shape)) for (name, shape), start, size in spans]

    def pieces(self, flat: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        """What is not padding."""
        return [flat[start : start + size] for start, size in zip(self._starts, self._sizes, strict=False)]

    def spread(self, values: npt.NDArray[np.int8]) -> npt.NDArray[np.int8]:
        """The other way."""
        flat = np.zeros(self.padded, np.int8)
        done = 0
        for start, size in zip(self._starts, self._sizes, strict=False):
            flat[start : start + size] = values[done : done + size]
            done += size
        return flat


class _Reader:
    """Takes a change's bytes apart."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def rest(self) -> int:
        return len(self._data) - self._at

    def take(self, count: int, dtype: str) -> npt.NDArray[Any]:
        size = count * np.dtype(dtype).itemsize
        if size > self.rest:
            raise ValueError(f"it is {len(self._data)} bytes, fewer than its part needs")
        values = np.frombuffer(self._data, dtype, count, self._at)
        self._at += size
        return values

    def scales(self, count: int) -> npt.NDArray[np.float32]:
        scales = self.take(count, "<f4")
        if not bool(((scales >= 0) & np.isfinite(scales)).all()):
            raise ValueError("a scale is not a finite number from 0 on")
        return scales.copy()

    def steps(self, count: int) -> npt.NDArray[np.int8]:
        steps = self.take(count, "i1")
        if count and int(steps.min()) < -STEPS:
            raise ValueError(f"a value is below -{STEPS} steps")
        return steps

    def end(self) -> None:
        if self.rest:
            raise ValueError(f"it is {len(self._data)} bytes, more than its part needs")


def _quantise(flat: Tensor) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int8]]:
    """Scales and steps of whole blocks. What is left over stays in `flat`."""
    blocks = flat.view(flat.numel() // BLOCK, BLOCK)
    low, high = torch.aminmax(blocks, dim=1)
    largest = torch.maximum(high, -low)
    if not bool(largest.isfinite().all()):
        raise ValueError(INFINITE)
    scales = torch.where(largest > TINY, largest / STEPS, 0.0)
    steps = _zeros(flat.numel()).view(blocks.shape)
    torch.div(blocks, torch.where(scales > 0, scales, 1.0)[:, None], out=steps).round_()
    whole = steps.to(torch.int8).view(-1)
    blocks.sub_(steps.mul_(scales[:, None]))
    return scales.numpy(), whole.numpy()


def _largest(flat: npt.NDArray[np.float32], count: int, exact: list[npt.NDArray[np.float32]]) -> list[npt.NDArray[Any]]:
    """The bytes of the `count` largest values, and of those that are as large as the last of them. What is left over
    stays in `flat`."""
    sizes = np.abs(flat)
    sizes.partition(max(len(sizes) - count, 0))
    top = sizes[-count:] if count else sizes[:0]
    if not bool(np.isfinite(top).all()):
        raise ValueError(INFINITE)
    least = max(float(top[0]), TINY) if count else TINY
    places = np.flatnonzero(np.abs(flat) >= least)
    blocks = np.zeros(-(-len(places) // BLOCK) * BLOCK, np.float32)
    blocks[: len(places)] = flat[places]
    scales, steps = _quantise(torch.from_numpy(blocks))
    flat[places] = blocks[: len(places)]
    gaps = np.diff(places, prepend=-1) - 1
    ends = np.cumsum(gaps // FAR + 1)
    coded = np.full(int(ends[-1]) if len(ends) else 0, FAR, np.uint8)
    coded[ends - 1] = gaps % FAR
    return [np.array([len(places)], "<u4"), scales, *exact, steps[: len(places)], coded]


def _scatter(reader: _Reader, layout: _Layout, flat: Tensor) -> npt.NDArray[np.float32]:
    """Put the largest values where they belong; returns the exact ones."""
    count = int(reader.take(1, "<u4")[0])
    scales = reader.scales(-(-count // BLOCK))
    exact = reader.take(layout.exact_count, "<f4")
    steps = reader.steps(count)
    gaps = reader.take(reader.rest, "u1")
    ends = gaps != FAR
    if int(ends.sum()) != count or (count and not ends[-1]):
        raise ValueError(f"its places are not those of {count} values")
    places = np.cumsum(gaps, dtype=np.int64)[ends] + np.arange(count)
    if count and int(places[-1]) >= layout.padded:
        raise ValueError("a place is beyond its part")
    values = steps.astype(np.float32)
    values *= np.repeat(scales, BLOCK)[:count]
    flat.numpy()[places] = values
    return exact


def _zeros(count: int) -> Tensor:
    return torch.from_numpy(np.zeros(count, np.float32))  # in numpy's memory, because it comes in large pages


def _memory(values: npt.NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(values).data.cast("B")
