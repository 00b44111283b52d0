"""Make packs of CIFAR-10's long-tailed sets that are small enough to travel: `python -m benchmarks.pack DATA OUT`.

DATA holds cifar-10-batches-py. OUT/cifar10_lt_train.npz has the training images of imbalance .02, in their order, and
marks those of .01 among them; OUT/cifar10_lt_test.npz has all test images. Together they have less than 40 MiB, where
the original has 160. `python -m benchmarks.unpack OUT FOLDER` makes data sets of them (what a pack is: unpack.py).
"""

import argparse
import io
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from common import sources
from common.config import DataConfig
from common.errors import UserError
from common.images import PixelImages

STRIP = 64  # images one below the other: WebP finds more to save in them than in one


def strips(images: NDArray[np.uint8]) -> Iterator[bytes]:
    for start in range(0, len(images), STRIP):
        buffer = io.BytesIO()
        column = Image.fromarray(images[start : start + STRIP].reshape(-1, images.shape[2], 3))
        column.save(buffer, "WEBP", lossless=True, exact=True, method=6, quality=74)
        yield buffer.getvalue()


def write(path: Path, images: PixelImages, **more: NDArray[np.generic]) -> None:
    found = list(strips(images.pixels.numpy()))
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        path,
        allow_pickle=False,
        webp=np.frombuffer(b"".join(found), np.uint8),
        offs=np.cumsum([0, *map(len, found)]),
        hw=np.array([images.side, images.side], np.int32),
        labels=images.labels.numpy().astype(np.uint8),
        classes=np.array(images.classes),
        **more,
    )


def pack(data: Path, out: Path) -> list[Path]:
    larger, smaller = (sources.load(DataConfig("cifar10", str(data), imbalance=i)) for i in (0.02, 0.01))
    train, test = larger.train, larger.test
    assert isinstance(train, PixelImages)
    assert isinstance(test, PixelImages)
    paths = [out / "cifar10_lt_train.npz", out / "cifar10_lt_test.npz"]
    write(paths[0], train, in_if100=within(train.labels, smaller.train.labels))
    write(paths[1], test)
    return paths


def within(labels: torch.Tensor, fewer: torch.Tensor) -> NDArray[np.bool_]:
    """The first images of every class, as many as are in `fewer`: the smaller set lies in the larger one so."""
    chosen = np.zeros(len(labels), bool)
    for c in labels.unique().tolist():  # type: ignore[no-untyped-call]
        chosen[torch.nonzero(labels == c).flatten()[: int((fewer == c).sum())].numpy()] = True
    return chosen


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pack", description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with cifar-10-batches-py")
    parser.add_argument("out", type=Path, help="folder to write to")
    given = parser.parse_args()
    try:
        for path in pack(given.data, given.out):
            print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB", flush=True)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
