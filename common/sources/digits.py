"""Handwritten digits, 1,797 grey images of 8 x 8, that come with scikit-learn: real data on every machine.

`data.test_share` of every class is the test set, the same images always. Not augmented by default: a pixel is an
eighth of an image, and a mirrored digit is none.
"""

import numpy as np
import torch

from common.config import DataConfig
from common.errors import UsageError
from common.images import PixelImages, Split
from common.sources.source import augmentation, divide

CLASSES = tuple("0123456789")


def load(config: DataConfig, classes: tuple[str, ...] = ()) -> Split:
    from sklearn.datasets import load_digits

    if classes not in ((), CLASSES):
        raise UsageError(f"data.source = digits has classes 0 to 9, not {', '.join(classes)}: use another source")
    images, labels = load_digits(return_X_y=True)
    grey = np.rint(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)  # values come as 0..16
    everything = PixelImages(
        torch.from_numpy(grey),
        torch.from_numpy(labels),
        CLASSES,
        mean=(0.305,),
        std=(0.376,),
        augment=augmentation(config, "none"),
    )
    return divide(everything, config)
