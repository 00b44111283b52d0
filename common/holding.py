"""Labelled images where they lie: at a site, or the test set of an operator.

A place is a folder with a subfolder of images for every class (see common/sources/folder.py), a table (.csv or
.parquet, manifest.py) or an .npz file (npz.py). Classes are those of the federation: an image of any other class is
refused, a class without images is fine. How an image becomes numbers (size, channels, mean and standard deviation)
is said by the federation's [images] alone, also where an .npz file brings values of its own, so that every site and
the server see an image alike.
"""

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, Self

import torch
from torch import Tensor

from common.config import DataConfig
from common.deployment import ImagesConfig
from common.errors import UsageError, UserError
from common.images import Augment, Images, PixelImages
from common.sources import folder, manifest, npz
from common.sources.files import MEAN, STD, FileImages, Listing
from common.sources.source import number

ACCEPTED = "a folder with a subfolder of images for every class, a .csv or .parquet table, or an .npz file"


class Holding(Protocol):
    """Images that are known but not yet read, in the order of the data."""

    @property
    def labels(self) -> Tensor: ...

    @property
    def names(self) -> list[str]:
        """What tells images apart also after others came or went: the path of a file, or a digest of its pixels."""
        ...

    def take(self, index: Tensor) -> Self: ...

    def images(self, wish: ImagesConfig, training: bool) -> Images:
        """The images as the federation sees them, in memory where they fit."""
        ...


def gather(path: Path, classes: tuple[str, ...], test: Path | None = None) -> tuple[Holding, Holding | None]:
    """What lies at `path`, and the test set that comes with it or is named by `test`."""
    try:
        return _gather(path, classes, test)
    except PermissionError as error:
        raise UserError(
            f"{error.filename}: the user that runs this (number {os.geteuid()}) may not read it: "
            "give it the right to, or run as the one who owns it"
        ) from None


def unlabelled(path: Path, wish: ImagesConfig) -> tuple[list[str], Images]:
    """Images of classes nobody knows, and what to call them: files anywhere below a folder, one file, or an .npz."""
    classes = wish.classes
    if path.suffix.lower() == ".npz":
        pixels = torch.from_numpy(npz.read(path, labelled=False).images)
        nothing = torch.zeros(len(pixels), dtype=torch.int64)
        return list(map(str, range(len(pixels)))), _Pixels(path, pixels, nothing, classes, []).images(wish, False)
    paths = folder.find(str(path)) if path.is_dir() else [str(path)]
    if not path.exists() or not paths:
        raise UserError(f"{path}: no image there: name a folder of images, an image or an .npz file")
    listing = Listing(paths, [""] * len(paths))
    root = path if path.is_dir() else path.parent
    files = _Files(listing, torch.zeros(len(paths), dtype=torch.int64), classes, root)
    return files.names, files.images(wish, False)


def _gather(path: Path, classes: tuple[str, ...], test: Path | None) -> tuple[Holding, Holding | None]:
    if path.is_dir():
        if test is not None:
            raise UsageError(f"{test}: the test images of a folder lie in it: make {path}/train and {path}/test")
        return _files(*folder.listings(path), classes, (path, path))
    if not path.exists():
        raise UserError(f"{path}: no such file or folder: name {ACCEPTED}")
    kind = path.suffix.lower()
    if kind in (".csv", ".parquet"):
        return _files(*manifest.listings(path, test), classes, (path.parent, (test or path).parent))
    if kind == ".npz":
        return _pixels(path, classes, False), None if test is None else _pixels(test, classes, True)
    raise UserError(f"{path}: is of no known kind: name {ACCEPTED}")


def _files(
    train: Listing, test: Listing | None, classes: tuple[str, ...], roots: tuple[Path, Path]
) -> tuple[Holding, Holding | None]:
    for listing in (train, test):
        _open_some(listing)
    made = [
        None if listing is None else _Files(listing, _labels(listing.names, classes, listing.paths), classes, root)
        for listing, root in zip((train, test), roots, strict=True)
    ]
    assert made[0] is not None
    return made[0], made[1]


def _open_some(listing: Listing | None) -> None:
    """One image of every class, to know that we may; with all of them this could take minutes."""
    for path in {} if listing is None else dict(zip(listing.names, listing.paths, strict=True)).values():
        with Path(path).open("rb"):
            pass


def _labels(names: list[str], classes: tuple[str, ...], places: list[str]) -> Tensor:
    return number(names, classes, places.__getitem__)[0]


@dataclass(frozen=True)
class _Files:
    listing: Listing
    labels: Tensor
    classes: tuple[str, ...]
    root: Path

    @property
    def names(self) -> list[str]:
        """Paths from the root, so that the whole folder may be moved."""
        return [os.path.relpath(path, self.root) for path in self.listing.paths]

    def take(self, index: Tensor) -> Self:
        paths, names = ([items[i] for i in index.tolist()] for items in (self.listing.paths, self.listing.names))
        return type(self)(Listing(paths, names), self.labels[index], self.classes, self.root)

    def images(self, wish: ImagesConfig, training: bool) -> Images:
        if wish.channels != FileImages.channels:
            raise UserError(
                f"{self.root}: image files are read in colour and this federation's images are grey: save them as .npz"
            )
        mean, std = moments(wish)
        config = DataConfig(source="folder", path=str(self.root), size=wish.size, augment=wish.augment)
        listed = FileImages(self.listing, self.labels, self.classes, wish.size, config, mean=mean, std=std)
        return listed.settle(training)


@dataclass(frozen=True)
class _Pixels:
    path: Path
    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    names: list[str]

    def take(self, index: Tensor) -> Self:
        names = [self.names[i] for i in index.tolist()]
        return type(self)(self.path, self.pixels[index], self.labels[index], self.classes, names)

    def images(self, wish: ImagesConfig, training: bool) -> Images:
        channels = self.pixels.shape[3]
        if wish.channels != channels:
            raise UserError(
                f"{self.path}: its images have {channels} channel(s), those of this federation {wish.channels}: "
                "save them so"
            )
        mean, std = moments(wish)
        augment = _augmentation(wish, self.path) if training else "none"
        made = PixelImages(self.pixels, self.labels, self.classes, mean=mean, std=std, augment=augment)
        return made if made.side == wish.size else made.resize(wish.size)


def _pixels(path: Path, classes: tuple[str, ...], empty: bool) -> Holding:
    if path.suffix.lower() != ".npz":
        raise UserError(f"{path}: the test images of an .npz file are an .npz file too: save them so")
    file = npz.read(path, empty)
    labels, _ = number(file.names, classes, lambda i: f"{path}, image {i}")
    names = [hashlib.sha256(image.tobytes()).hexdigest() for image in file.images]
    return _Pixels(path, torch.from_numpy(file.images), labels, classes, names)


def moments(wish: ImagesConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of every channel: the federation's, or what is usual for colour and for grey."""
    mean, std = (MEAN, STD) if wish.channels == 3 else ((0.5,), (0.5,))
    return wish.mean or mean, wish.std or std


def resolved(wish: ImagesConfig) -> ImagesConfig:
    """With numbers for `moments`, whatever is usual elsewhere or later."""
    mean, std = moments(wish)
    return replace(wish, mean=mean, std=std)


def _augmentation(wish: ImagesConfig, path: Path) -> Augment:
    if wish.augment == "resized-crop":
        raise UserError(f'{path}: images.augment = "resized-crop" is for files of images: bring those')
    return "crop" if wish.augment == "auto" else wish.augment
