"""Images in memory: torchvision's values bit for bit, and a pass that depends on its generator alone."""

from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as official

from common.images import PixelImages, crop, windows

CPU = torch.device("cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def some(
    n: int = 37, side: int = 32, channels: int = 3, augment: Literal["none", "crop", "crop-flip"] = "none"
) -> PixelImages:
    rng = torch.Generator().manual_seed(n)
    pixels = torch.randint(0, 256, (n, side, side, channels), dtype=torch.uint8, generator=rng)
    mean, std = MEAN[:channels], STD[:channels]
    groups = [f"g{i % 5}" for i in range(n)]
    return PixelImages(pixels, torch.arange(n) % 7, list("abcdefg"), mean=mean, std=std, augment=augment, groups=groups)


def by_torchvision(images: PixelImages, i: int, code: int | None) -> Tensor:
    array = images.pixels[i].numpy()
    picture = Image.fromarray(array if images.channels == 3 else array[..., 0])
    if code is not None:
        offsets = 2 * images.pad + 1
        flip, window = divmod(code, offsets**2)
        padded = official.pad(picture, [images.pad])  # what RandomCrop(side, padding=pad) does
        picture = official.crop(padded, window // offsets, window % offsets, images.side, images.side)
        picture = official.hflip(picture) if flip else picture
    values: Tensor = official.normalize(official.to_tensor(picture), list(images.mean), list(images.std))
    return values


@pytest.mark.parametrize(("side", "channels"), [(32, 3), (8, 1), (28, 1), (12, 3)])
@pytest.mark.parametrize("augment", ["none", "crop", "crop-flip"])
def test_values_are_torchvisions(side: int, channels: int, augment: Literal["none", "crop", "crop-flip"]) -> None:
    images = some(50, side, channels, augment)
    rng = torch.Generator().manual_seed(5)
    order = torch.randperm(50, generator=rng).tolist()
    codes = [None] * 50
    if augment != "none":
        codes = torch.randint(windows(images.pad, augment), (50,), generator=rng).tolist()
    batches = list(images.batches(torch.arange(50), 8, CPU, torch.Generator().manual_seed(5)))
    x, y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    expected = torch.stack([by_torchvision(images, i, code) for i, code in zip(order, codes, strict=True)])
    assert x.dtype == torch.float32
    assert torch.equal(x, expected)
    assert y.tolist() == [i % 7 for i in order]


def test_every_code_is_its_own_window() -> None:
    images = some(1)
    codes = torch.arange(162)
    cut = crop(images.pixels.expand(162, -1, -1, -1), 4, codes)
    assert len({bytes(c.numpy().tobytes()) for c in cut}) == 162
    assert torch.equal(cut[40], images.pixels[0])  # the middle window of nine times nine
    assert torch.equal(cut[81 + 40], images.pixels[0].flip(1))


def test_a_pass_in_order_over_an_index() -> None:
    images = some()
    index = torch.tensor([5, 0, 36, 5, 2, 7, 8, 9, 10, 11])
    batches = list(images.batches(index, 4, CPU))
    assert [len(x) for x, _ in batches] == [4, 4, 2]
    assert torch.cat([y for _, y in batches]).tolist() == (index % 7).tolist()
    assert torch.equal(batches[0][0][1], by_torchvision(images, 0, None))
    assert batches[0][0].is_contiguous(memory_format=torch.channels_last)
    assert list(images.batches(index[:0], 4, CPU, torch.Generator())) == []
    assert [len(x) for x, _ in images.batches(index[:1], 4, CPU, torch.Generator())] == [1]


def test_a_pass_depends_on_its_generator_alone() -> None:
    images = some(3000, 8, 3, "crop-flip")  # several chunks

    def run(seed: int, size: int) -> Tensor:
        rng = torch.Generator().manual_seed(seed)
        return torch.cat([x for x, _ in images.batches(torch.arange(3000), size, CPU, rng)])

    torch.manual_seed(0)
    first = run(1, 8)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(first, run(1, 8))
    assert torch.equal(first, run(1, 500))
    assert not torch.equal(first, run(2, 8))
    assert torch.equal(torch.get_rng_state(), state)


def test_take_keeps_everything_that_belongs_to_an_image() -> None:
    images = some(augment="crop-flip")
    index = torch.tensor([3, 30, 4])
    taken = images.take(index)
    assert torch.equal(taken.pixels, images.pixels[index])
    assert taken.labels.tolist() == [3, 2, 4]
    assert taken.groups == ("g3", "g0", "g4")
    assert (taken.classes, taken.mean, taken.augment) == (images.classes, images.mean, "crop-flip")


def test_resize() -> None:
    images = some(5)
    assert torch.equal(images.resize(32).pixels, images.pixels)
    half = images.resize(16)
    assert (half.side, half.pad, tuple(half.pixels.shape)) == (16, 2, (5, 16, 16, 3))
    pillow = Image.fromarray(images.pixels[2].numpy()).resize((16, 16), Image.Resampling.BILINEAR)
    assert np.abs(np.asarray(pillow).astype(int) - half.pixels[2].numpy()).max() <= 1


@pytest.mark.parametrize(
    ("pixels", "labels", "mean"),
    [
        (torch.zeros(2, 4, 4, 3), torch.zeros(2), MEAN),
        (torch.zeros(2, 4, 5, 3, dtype=torch.uint8), torch.zeros(2), MEAN),
        (torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.zeros(3), MEAN),
        (torch.zeros(2, 4, 4, 1, dtype=torch.uint8), torch.zeros(2), MEAN),
    ],
)
def test_what_does_not_fit_is_refused(pixels: Tensor, labels: Tensor, mean: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"need|must"):
        PixelImages(pixels, labels.long(), ["a"], mean=mean, std=STD)
