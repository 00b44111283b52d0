"""Labelled images and how they are turned into batches.

`Images` is all that training and evaluation know of a data set. Small images live in memory as one uint8
tensor and are cropped, flipped and normalised many at a time on the device (`PixelImages`); large ones stay
on disk and are decoded ahead of use (`FileImages`, in `common/sources/files.py`).

Normalisation is a constant of the data source, never computed from a site's own images: every site and the
server must see an image alike.
"""

import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, Self

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.nn.functional import pad as pad_with

log = logging.getLogger(__name__)

Augment = Literal["none", "crop-flip", "crop"]


class Images(Protocol):
    """Labelled images of one data set. Indices are positions in `labels`."""

    labels: Tensor  # int64 (n,)
    classes: tuple[str, ...]  # name of class 0, 1, ...
    groups: tuple[str, ...] | None  # the natural group (writer, camera, hospital) of every image
    channels: int
    side: int  # images are side x side when they reach the model
    mean: tuple[float, ...]  # of every channel, and so is std
    std: tuple[float, ...]

    @property
    def augment(self) -> Augment | Literal["resized-crop"]: ...

    def __len__(self) -> int: ...

    def take(self, index: Tensor) -> Self:
        """The images of `index` as a set of their own."""
        ...

    def batches(
        self, index: Tensor, size: int, device: torch.device, rng: torch.Generator | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over `index` as (x float32 NCHW normalised, y int64) on `device`, the last batch may be short.

        With `rng`: shuffled and augmented, every draw from it (one permutation first, then the augmentation),
        so the pass depends on nothing else. Without: in order, as the images are.
        """
        ...


@dataclass(frozen=True)
class Split:
    """What a data source gives: images to train with (already long-tailed) and images to judge by."""

    train: Images
    test: Images


class PixelImages:
    """Images in memory: uint8 (n, side, side, channels), batches in channels_last memory.

    `crop` pads every side with black, an eighth of the image (4 pixels at 32, 1 at 8), and cuts an image out
    at random; `crop-flip` also mirrors half of them. Values are those of torchvision's ToTensor and
    Normalize, bit for bit. Pixels are copied to a device once and stay there, for all who train on it.
    """

    def __init__(
        self,
        pixels: Tensor,
        labels: Tensor,
        classes: Sequence[str],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        augment: Augment = "none",
        groups: Sequence[str] | None = None,
    ) -> None:
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != pixels.shape[2]:
            raise ValueError(f"pixels must be uint8 (n, side, side, channels), not {pixels.dtype} {pixels.shape}")
        if labels.shape != pixels.shape[:1] or (groups is not None and len(groups) != len(pixels)):
            raise ValueError("every image needs one label and, with groups, one group")
        self.side, self.channels = pixels.shape[1], pixels.shape[3]
        if len(mean) != self.channels or len(std) != self.channels:
            raise ValueError(f"mean and std need {self.channels} values, one for every channel")
        self.pixels, self.labels = pixels.contiguous(), labels.to(torch.int64)
        self.classes, self.groups = tuple(classes), None if groups is None else tuple(groups)
        self.mean, self.std, self.augment = tuple(mean), tuple(std), augment
        self.pad = max(1, self.side // 8)
        self._on: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}
        self._placing = threading.Lock()

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> Self:
        groups = None if self.groups is None else [self.groups[i] for i in index.tolist()]
        return self._with(self.pixels[index], self.labels[index], groups)

    def resize(self, side: int) -> Self:
        """The same images brought to side x side, bilinear with antialiasing."""
        resized = torch.empty(len(self), side, side, self.channels, dtype=torch.uint8)
        for start in range(0, len(self), 1024):
            x = self.pixels[start : start + 1024].permute(0, 3, 1, 2).float()
            x = interpolate(x, size=(side, side), mode="bilinear", antialias=True)
            resized[start : start + 1024] = x.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
        return self._with(resized, self.labels, self.groups)

    def _with(self, pixels: Tensor, labels: Tensor, groups: Sequence[str] | None) -> Self:
        return type(self)(
            pixels, labels, self.classes, mean=self.mean, std=self.std, augment=self.augment, groups=groups
        )

    def batches(
        self, index: Tensor, size: int, device: torch.device, rng: torch.Generator | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in self.chunks(index, size, device, rng):
            for start in range(0, len(x), size):
                yield x[start : start + size], y[start : start + size]

    def chunks(
        self, index: Tensor, size: int, device: torch.device, rng: torch.Generator | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The same pass, as many whole batches at a time as there is room for."""
        codes = None
        if rng is not None:
            index = index[torch.randperm(len(index), generator=rng)]
            if self.augment != "none":
                codes = torch.randint(windows(self.pad, self.augment), (len(index),), generator=rng).to(device)
        pixels, mean, std = self._to(device)
        y = self.labels[index].to(device)
        index = index.to(pixels.device)
        step = self.room(size, device)
        for start in range(0, len(index), step):
            chunk = pixels[index[start : start + step]].to(device)
            if codes is not None:
                chunk = crop(chunk, self.pad, codes[start : start + step])
            yield normalise(chunk, mean, std), y[start : start + step]

    def room(self, size: int, device: torch.device) -> int:
        """Images made at a time: as many as stay in a core's cache, or keep a GPU busy; always whole batches."""
        budget = 1 << (23 if device.type == "cuda" else 20)
        return size * max(1, budget // (self.side**2 * self.channels * size))

    def stay_home(self, device: torch.device) -> bool:
        """Take the pixels out of a device whose memory is full: from then on each chunk is sent to it. False where
        they are not in it."""
        with self._placing:
            pixels, mean, std = self._on.get(device, (self.pixels, None, None))
            if mean is None or std is None or pixels.device.type == "cpu":
                return False
            self._on[device] = self.pixels, mean, std
            return True

    def _to(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels, mean and std where they are needed."""
        with self._placing:
            if device not in self._on:
                mean, std = (spread(values, self.side).to(device) for values in (self.mean, self.std))
                try:
                    pixels = self.pixels.to(device)
                except torch.OutOfMemoryError:
                    log.warning("%d images do not fit into the memory of %s: they stay outside", len(self), device)
                    pixels = self.pixels
                self._on[device] = pixels, mean, std
            return self._on[device]


def spread(values: Sequence[float], side: int) -> Tensor:
    """One number for every channel written out for every value of an image in (h, w, c) order: arithmetic
    that broadcasts over a last axis of three costs more than all the rest."""
    return torch.tensor(values, dtype=torch.float32).repeat(side * side)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 (n, h, w, c) to float32 (n, c, h, w) in channels_last memory, with `spread` mean and std, in the
    order of operations of ToTensor and Normalize."""
    flat = images.flatten(1).float().div_(255).sub_(mean).div_(std)
    return flat.view(images.shape).permute(0, 3, 1, 2)


def windows(pad: int, augment: str) -> int:
    """How many crops (and mirrored crops) an image has: code = flip * (2 pad + 1)^2 + dy * (2 pad + 1) + dx."""
    return (2 * pad + 1) ** 2 * (2 if augment == "crop-flip" else 1)


def crop(images: Tensor, pad: int, codes: Tensor) -> Tensor:
    """Cut a window out of every padded image of (n, h, w, c) and mirror it, as its code says."""
    n, h, w, c = images.shape
    offsets = 2 * pad + 1
    flip, window = codes // offsets**2, codes % offsets**2
    padded = pad_with(images, (0, 0, pad, pad, pad, pad)).contiguous()
    row = (w + 2 * pad) * c
    # A view of all windows at once: two axes for where the window starts share their memory with the image's.
    views = padded.as_strided((n, offsets, offsets, h, w * c), (padded[0].numel(), row, c, row, 1))
    cut = views[torch.arange(n, device=images.device), window // offsets, window % offsets].view(n, h, w, c)
    return torch.where(flip.view(n, 1, 1, 1) == 1, cut.flip(2), cut)
