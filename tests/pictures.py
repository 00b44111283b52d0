"""Folders of images of three classes, told apart by their colour."""

from pathlib import Path

import torch
from PIL import Image

CLASSES = ("owl", "crow", "jay")


def write(folder: Path) -> None:
    rng = torch.Generator().manual_seed(1)
    for number, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(10):
            pixels = torch.randint(0, 120, (16, 16, 3), generator=rng).to(torch.uint8)
            pixels[..., number] += 100
            Image.fromarray(pixels.numpy()).save(folder / name / f"{i}.png")
