"""Images on disk, decoded while training goes on: memory does not grow with the data set.

Decoding runs in `workers` threads, not processes: Pillow decodes and resizes without holding Python's lock, a pass
starts at once (a fresh loader process needs seconds to import torch), and nothing is forked from a process that holds
gRPC threads or a CUDA context. Every draw is made before the pass starts, one row for every image, so a pass is the
same whatever the number of threads.

Small sets are decoded once and kept (`settle`): then they are `PixelImages` like any other.
"""

import math
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from common.config import DataConfig
from common.errors import UserError
from common.images import Augment, PixelImages, Split, crop, normalise, spread, windows
from common.sources.source import divide, number

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
KEPT = 256 << 20  # bytes of decoded images up to which a set is kept in memory
ZOOM = 7 / 8  # part of an image seen without augmentation by a model trained on resized crops (224 of 256)

UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)  # what Pillow raises

Row = Sequence[float]
AnyAugment = Augment | Literal["resized-crop"]


@dataclass(frozen=True)
class Listing:
    """Image files, the class name of each, and its group."""

    paths: list[str]
    names: list[str]
    groups: list[str] | None = None


def load(train: Listing, test: Listing | None, config: DataConfig, classes: tuple[str, ...]) -> Split:
    """The images of one or two listings; without a test listing a share of the first is put aside."""
    side = config.size or _side(train.paths[0])
    labels, classes = number(train.names, classes, lambda i: train.paths[i])
    images = FileImages(train, labels, classes, side, config)
    if test is None:
        return divide(images, config)
    labels, _ = number(test.names, classes, lambda i: test.paths[i])
    return Split(images, FileImages(test, labels, classes, side, config))


class FileImages:
    """Image files as RGB, side x side: the middle square, or as `data.augment` says when training."""

    channels = 3

    def __init__(
        self,
        listing: Listing,
        labels: Tensor,
        classes: tuple[str, ...],
        side: int,
        config: DataConfig,
        *,
        mean: tuple[float, ...] = MEAN,
        std: tuple[float, ...] = STD,
    ) -> None:
        self.listing, self.labels, self.classes, self.side, self.config = listing, labels, classes, side, config
        self.mean, self.std = mean, std
        self.groups = None if listing.groups is None else tuple(listing.groups)
        self.augment = kind_of(config.augment, side)
        self.pad = max(1, side // 8)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> Self:
        def pick(items: list[str]) -> list[str]:
            return [items[i] for i in index.tolist()]

        own = self.listing
        listing = Listing(pick(own.paths), pick(own.names), None if own.groups is None else pick(own.groups))
        return type(self)(
            listing, self.labels[index], self.classes, self.side, self.config, mean=self.mean, std=self.std
        )

    def settle(self, training: bool) -> "FileImages | PixelImages":
        """The same images in memory if they are few and, for training, their augmentation can do with the middle."""
        augment: Augment = "none"
        if training:
            if self.augment == "resized-crop":
                return self
            augment = self.augment
        if len(self) * self.side**2 * self.channels > KEPT:
            return self
        pixels = np.empty((len(self), self.side, self.side, self.channels), dtype=np.uint8)
        for i, image in enumerate(self._decode(list(range(len(self))), None, 64)):
            pixels[i] = image
        return PixelImages(
            torch.from_numpy(pixels),
            self.labels,
            self.classes,
            mean=self.mean,
            std=self.std,
            augment=augment,
            groups=self.groups,
        )

    def batches(
        self, index: Tensor, size: int, device: torch.device, rng: torch.Generator | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        n, rows, codes = len(index), None, None
        if rng is not None:
            index = index[torch.randperm(n, generator=rng)]
            if self.augment == "resized-crop":
                rows = torch.rand(n, 5, generator=rng, dtype=torch.float64).tolist()
            elif self.augment != "none":
                codes = torch.randint(windows(self.pad, self.augment), (n,), generator=rng).to(device)
        mean, std = spread(self.mean, self.side).to(device), spread(self.std, self.side).to(device)
        y = self.labels[index].to(device)
        with closing(self._decode(index.tolist(), rows, size)) as images:
            for start in range(0, n, size):
                pixels = torch.from_numpy(np.stack(list(islice(images, size)))).to(device)
                if codes is not None:
                    pixels = crop(pixels, self.pad, codes[start : start + size])
                yield normalise(pixels, mean, std), y[start : start + size]

    def _decode(self, index: list[int], rows: list[Row] | None, ahead: int) -> Generator[NDArray[np.uint8], None, None]:
        """The images of `index` in order, about `ahead` of them before they are asked for."""
        zoom, exact = seen(self.augment, self.side), not self.config.size

        def one(position: int) -> NDArray[np.uint8]:
            row = None if rows is None else rows[position]
            return decode(self.listing.paths[index[position]], self.side, row, zoom, exact)

        workers = self.config.workers
        if not workers:
            yield from map(one, range(len(index)))
            return
        with ThreadPoolExecutor(workers, "decode") as pool:
            waiting: deque[Future[NDArray[np.uint8]]] = deque()
            try:
                for position in range(len(index)):
                    waiting.append(pool.submit(one, position))
                    if len(waiting) > ahead + 2 * workers:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:  # a pass left early, or a file that cannot be read
                pool.shutdown(cancel_futures=True)


def kind_of(augment: AnyAugment | Literal["auto"], side: int) -> AnyAugment:
    """What `auto` is for files."""
    if augment != "auto":
        return augment
    return "crop-flip" if side <= 64 else "resized-crop"


def seen(augment: AnyAugment | Literal["auto"], side: int) -> float:
    """The side of the middle square that a model sees of an image as it is, as a share of the image's shorter side."""
    return ZOOM if kind_of(augment, side) == "resized-crop" else 1.0


def decode(path: str, side: int, row: Row | None = None, zoom: float = 1.0, exact: bool = False) -> NDArray[np.uint8]:
    """One image file as uint8 (side, side, 3): a random resized crop if `row` (five numbers in [0, 1)) is given, else
    the middle square of `zoom` times its shorter side. With `exact` the file must be side x side."""
    try:
        with Image.open(path) as image:
            if exact and image.size != (side, side):
                raise UserError(f"{path}: is {_size(image)}, others are {side} x {side}: set data.size")
            if image.mode[0] in "IF":
                raise UserError(f"{path}: has more than 8 bits a channel: save it as an 8-bit image")
            width, height = image.size
            left, top, w, h = _middle(width, height, zoom) if row is None else _window(width, height, row)
            # JPEG can be decoded at a fraction of its size for a fraction of the time.
            image.draft("RGB", (math.ceil(side * width / w), math.ceil(side * height / h)))
            x, y = image.width / width, image.height / height
            box = (left * x, top * y, min((left + w) * x, image.width), min((top + h) * y, image.height))
            rgb = image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR, box=box)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: put it there or take it out of the list") from None
    except UNREADABLE as error:
        raise UserError(f"{path}: cannot be read as an image ({error}): replace or remove it") from None
    pixels = np.asarray(rgb)
    return pixels[:, ::-1] if row is not None and row[4] < 0.5 else pixels


def _middle(width: int, height: int, zoom: float) -> tuple[float, float, float, float]:
    edge = min(width, height) * zoom
    return (width - edge) / 2, (height - edge) / 2, edge, edge


def _window(width: int, height: int, row: Row) -> tuple[float, float, float, float]:
    """A random 8 to 100 % of the image with sides 3:4 to 4:3, as in torchvision's RandomResizedCrop, but
    from one draw: a side that does not fit is cut to the image instead of drawn again."""
    area = (0.08 + 0.92 * row[0]) * width * height
    ratio = (3 / 4) ** (1 - 2 * row[1])
    w, h = min(math.sqrt(area * ratio), width), min(math.sqrt(area / ratio), height)
    return row[2] * (width - w), row[3] * (height - h), w, h


def _side(path: str) -> int:
    """Side of the square images when none is asked for: that of the first."""
    try:
        with Image.open(path) as image:
            if image.width != image.height:
                raise UserError(f"{path}: is {_size(image)}: set data.size to bring images to a square")
            return image.width
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: put it there or take it out of the list") from None
    except UNREADABLE as error:
        raise UserError(f"{path}: cannot be read as an image ({error}): replace or remove it") from None


def _size(image: Image.Image) -> str:
    return f"{image.width} x {image.height}"


def require_files(paths: Sequence[str], where: Path) -> None:
    """A list that names a file that is not there is found out now, not in the middle of a round."""
    missing = [path for path in paths if not Path(path).is_file()]
    if missing:
        raise UserError(f"{where}: {missing[0]} is not there ({len(missing)} such): add or unlist them")
