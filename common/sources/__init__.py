"""Data sources: every kind of data set behind one call, `load(config)`, which gives images to train with and images to
judge by.

A source is a function of (config, classes): one small module each. `classes` is the federation's class list where one
exists, so that class 3 is the same thing at every site; without it the source's own list is taken. Nothing a source
reads is ever executed, and whatever is wrong with the data is one line that names the file or key and the mend.
"""

from collections.abc import Callable

import torch

from common.config import DataConfig
from common.errors import UsageError, UserError
from common.images import Images, PixelImages, Split
from common.longtail import profile, subset
from common.partition import counts
from common.sources import cifar, digits, folder, inaturalist, lists, manifest, npz
from common.sources.files import FileImages

Source = Callable[[DataConfig, tuple[str, ...]], Split]

SOURCES: dict[str, Source] = {
    "digits": digits.load,
    "cifar10": cifar.load,
    "cifar100": cifar.load,
    "npz": npz.load,
    "folder": folder.load,
    "manifest": manifest.load,
    "lists": lists.load,
    "inaturalist": inaturalist.load,
}


def load(config: DataConfig, classes: tuple[str, ...] = ()) -> Split:
    """The data set, its training images already long-tailed as `config.imbalance` and `config.largest` say."""
    split = SOURCES[config.source](config, classes)
    present = counts(split.train.labels, torch.arange(len(split.train)), len(split.train.classes)) > 0
    unknown = [split.test.classes[c] for c in sorted(set(split.test.labels.tolist())) if not present[c]]
    if unknown and not classes:
        raise UserError(
            f"data.path = {config.path!r}: no training image of class {unknown[0]!r}, which the test images have "
            f"({len(unknown)} such): add some or remove it from the test images"
        )
    return Split(_settled(_longtailed(split.train, config), config, True), _settled(split.test, config, False))


def _longtailed(images: Images, config: DataConfig) -> Images:
    if config.imbalance == 1 and not config.largest:
        return images
    have = counts(images.labels, torch.arange(len(images)), len(images.classes))
    keep = profile(config.largest or int(have.max()), config.imbalance, len(images.classes), config.profile)
    if 0 in keep:
        raise UsageError(
            f"data.imbalance = {config.imbalance} leaves class {images.classes[keep.index(0)]!r} without images: "
            "use a larger one or a larger data.largest"
        )
    return images.take(subset(images.labels, keep))


def _settled(images: Images, config: DataConfig, training: bool) -> Images:
    """The images that are left, at their size, in memory where they fit."""
    if isinstance(images, FileImages):
        return images.settle(training)
    if isinstance(images, PixelImages) and config.size not in (0, images.side):
        return images.resize(config.size)
    return images
