"""Images in NumPy .npz files: `data.path` to train with, `data.test_path` to test with.

Keys of a file (arrays; pickled objects are refused):
  images   uint8 (n, side, side, channels) or (n, side, side)
  labels   whole numbers (n,), class of every image
  classes  texts, name of class 0, 1, ...                          optional: the numbers are the names
  groups   texts or whole numbers (n,), natural group of an image  optional
  mean     numbers (channels,), and std: the normalisation         optional, read from data.path: 0.5 and 0.5
Without data.test_path, `data.test_share` of every class is put aside. Augmented by crops alone by default: whether
a mirrored image keeps its class is known to the one who has the data (say data.augment = "crop-flip" if it does).
"""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from common.config import DataConfig
from common.errors import UserError
from common.images import PixelImages, Split
from common.sources.source import augmentation, divide, number


@dataclass(frozen=True)
class File:
    path: Path
    images: NDArray[np.uint8]
    names: list[str]  # class name of every image
    classes: tuple[str, ...]
    groups: list[str] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load(config: DataConfig, classes: tuple[str, ...] = ()) -> Split:
    train = read(Path(config.path))
    images = _images(train, train, classes or train.classes, config)
    if not config.test_path:
        return divide(images, config)
    test = read(Path(config.test_path))
    if test.images.shape[1:] != train.images.shape[1:]:
        raise UserError(
            f"{test.path}: images of {test.images.shape[1:]} but {train.images.shape[1:]} in {train.path}: "
            "bring them to one size"
        )
    return Split(images, _images(test, train, images.classes, config))


def _images(file: File, moments: File, classes: tuple[str, ...], config: DataConfig) -> PixelImages:
    labels, _ = number(file.names, classes, lambda i: f"{file.path}, image {i}")
    return PixelImages(
        torch.from_numpy(file.images),
        labels,
        classes,
        mean=moments.mean,
        std=moments.std,
        augment=augmentation(config, "crop"),
        groups=file.groups,
    )


def read(path: Path, empty: bool = False, labelled: bool = True) -> File:
    """The arrays of a file, checked. With `empty` it may be one without images; unless `labelled` one without labels,
    which then are all 0."""
    try:
        with path.open("rb") as stream:  # numpy leaves a file it cannot read open
            file = np.load(stream, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("it is a single array")
            arrays: dict[str, NDArray[Any]] = dict(file)
    except PermissionError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: name an .npz file with images and labels") from None
    except (OSError, ValueError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: cannot be read as .npz ({error}): save it again with numpy.savez") from None
    if not labelled and "images" in arrays:
        arrays = {"images": arrays["images"], "labels": np.zeros(arrays["images"].shape[:1], np.int64)}
    for key in ("images", "labels"):
        if key not in arrays:
            raise UserError(f"{path}: has no array {key!r}: save it with numpy.savez(path, images=..., labels=...)")
    images, labels = arrays["images"], arrays["labels"]
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != images.shape[2] or not (images.size or empty):
        raise UserError(
            f"{path}: images are {images.dtype} {images.shape}: save them as uint8 (n, side, side, channels)"
        )
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise UserError(f"{path}: labels are {labels.dtype} {labels.shape}: save one whole number for every image")
    classes = tuple(map(str, arrays["classes"].tolist())) if "classes" in arrays else ()
    classes = classes or tuple(map(str, range(max(int(labels.max(initial=0)) + 1, 1))))
    if len(set(classes)) < len(classes) or not all(classes):
        raise UserError(f"{path}: two classes have one name, or one has none: name every class in the array 'classes'")
    bad = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if len(bad):
        raise UserError(
            f"{path}: label {labels[bad[0]]} of image {bad[0]} is not in 0..{len(classes) - 1}: mend the labels"
        )
    groups = arrays.get("groups")
    if groups is not None and groups.shape != labels.shape:
        raise UserError(f"{path}: groups are {groups.shape}: save one for every of the {len(labels)} images")
    moments = []
    for key in ("mean", "std"):
        values = np.atleast_1d(arrays.get(key, np.full(images.shape[3], 0.5)))
        if values.dtype.kind not in "fiu" or values.shape != images.shape[3:] or (key == "std" and values.min() <= 0):
            raise UserError(f"{path}: {key} = {values.tolist()}: save {images.shape[3]} numbers, one for every channel")
        moments.append(tuple(float(v) for v in values))
    return File(
        path,
        images,
        [classes[c] for c in labels.tolist()],
        classes,
        None if groups is None else [str(g) for g in groups.tolist()],
        moments[0],
        moments[1],
    )
