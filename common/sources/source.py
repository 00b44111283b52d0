"""What sources have in common: class names to numbers, a test set where there is none, choices of augmentation."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from common.config import DataConfig
from common.errors import UsageError, UserError
from common.images import Augment, Images, Split
from common.partition import holdout


def augmentation(config: DataConfig, auto: Augment) -> Augment:
    """The augmentation of images in memory; `auto` is what suits the source."""
    if config.augment == "auto":
        return auto
    if config.augment == "resized-crop":
        raise UsageError(
            f'data.augment = "resized-crop" is for files of images, not for {config.source}: use crop-flip or crop'
        )
    return config.augment


def divide(images: Images, config: DataConfig) -> Split:
    """Put a share of every class aside as test set: the same images at every call, never a class's last one. Images
    of one group may fall on both sides; where that matters, bring a test set."""
    train, test = holdout(torch.arange(len(images)), images.labels, config.test_share, 0, "test")
    if len(test) == 0:
        raise UserError(
            f"data.test_share = {config.test_share} of {len(images)} images leaves none to test with: "
            "use a larger share or name a test set"
        )
    return Split(images.take(train), images.take(test))


def number(
    names: Sequence[str], classes: tuple[str, ...], where: Callable[[int], str]
) -> tuple[Tensor, tuple[str, ...]]:
    """Labels for class names. Without given `classes` those found are taken, in order of number when all are numbers
    and of name otherwise, so the result does not depend on the order of the images. `where` says where label i
    comes from."""
    if not classes:
        classes = tuple(sorted(set(names)))
        if all(name.isdecimal() for name in classes):
            classes = tuple(sorted(classes, key=int))
    ids = {name: c for c, name in enumerate(classes)}
    for i, name in enumerate(names):
        if name not in ids:
            raise UserError(
                f"{where(i)}: class {name!r} is not among the {len(classes)} known classes "
                f"({', '.join(classes[:5])}{', …' if len(classes) > 5 else ''}): rename or remove it"
            )
    return torch.tensor([ids[name] for name in names], dtype=torch.int64), classes
