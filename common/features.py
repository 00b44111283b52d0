"""Features of images as a backbone gives them when it is deployed."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from common.images import Images

IN_CACHE = 125  # images at a time on a processor: the maps of more leave its caches, which costs a tenth


@torch.no_grad()
def features_of(
    features: nn.Module,
    images: Images,
    index: Tensor,
    device: torch.device,
    batch: int,
    precision: str = "fp32",
    rng: torch.Generator | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(f in fp32, y) of images by a backbone as it is when deployed, some images at a time: as they are, or with `rng`
    shuffled and augmented."""
    features.eval()
    size = batch if device.type != "cpu" else min(batch, IN_CACHE)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):  # one, as it casts weights once
        for x, y in images.batches(index, size, device, rng):
            yield features(x).float(), y
