"""CIFAR-10 and CIFAR-100 from the original Python files in a folder; nothing is downloaded.

Those files are pickles. torchvision compares every one with the published md5 before it opens any, so only the
original bytes are ever unpickled.
"""

from pathlib import Path

import torch

from common.config import DataConfig
from common.errors import UsageError, UserError
from common.images import PixelImages, Split
from common.sources.source import augmentation

MOMENTS = {
    "cifar10": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar100": ((0.50708, 0.48655, 0.44092), (0.26733, 0.25644, 0.27615)),
}


def load(config: DataConfig, classes: tuple[str, ...] = ()) -> Split:
    from torchvision.datasets import CIFAR10, CIFAR100  # here, because importing it takes seconds

    kind = {"cifar10": CIFAR10, "cifar100": CIFAR100}[config.source]
    root = Path(config.path)
    if root.name == kind.base_folder:
        root = root.parent
    sides = []
    for train in (True, False):
        try:
            data = kind(str(root), train=train, download=False)
        except RuntimeError:
            raise UserError(
                f"{root / kind.base_folder}: missing, incomplete or not the original files: unpack {kind.filename} "
                f"(www.cs.toronto.edu/~kriz/cifar.html) in {root}"
            ) from None
        if classes and classes != tuple(data.classes):
            raise UsageError(f"data.source = {config.source} has other classes than this federation: use another")
        mean, std = MOMENTS[config.source]
        sides.append(
            PixelImages(
                torch.from_numpy(data.data),
                torch.tensor(data.targets),
                data.classes,
                mean=mean,
                std=std,
                augment=augmentation(config, "crop-flip"),
            )
        )
    return Split(*sides)
