"""The published way: a literal transcription of what the authors' code does, from its description.

Local update: three optimisers (backbone, global head, local head), three losses and three backward passes a batch; the
two heads learn on features detached before the backbone's step. The loss is read after every batch. Pictures are PIL
images which torchvision's transforms crop, mirror and normalise one by one, in a DataLoader in the main process.
Evaluation: the frame's model in batches of 100 over the global test, and every client's own model in batches of 8 over
its local test, each with forward passes of its own.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

Loss = Callable[[Tensor, Tensor], Tensor]
GLOBAL_BATCH, LOCAL_BATCH = 100, 8


class Pictures(Dataset[tuple[Tensor, int]]):
    def __init__(self, pixels: NDArray[np.uint8], labels: Sequence[int], transform: Any) -> None:
        self._pixels, self._labels, self._transform = pixels, labels, transform

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self._transform(Image.fromarray(self._pixels[i])), self._labels[i]


def training(mean: Sequence[float], std: Sequence[float]) -> Any:
    return transforms.Compose(
        [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), testing(mean, std)]
    )


def testing(mean: Sequence[float], std: Sequence[float]) -> Any:
    return transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])


def local_update(
    modules: tuple[nn.Module, nn.Module, nn.Module],
    frame: Tensor,
    batches: Iterable[tuple[Tensor, Tensor]],
    epochs: int,
    optimisers: Sequence[torch.optim.Optimizer],
    losses: Sequence[Loss],
) -> float:
    """Backbone, global and local head, with an optimiser and a loss each; the mean loss over batches and epochs."""
    backbone, global_head, local_head = modules
    of_backbone, of_global, of_local = optimisers
    for module in modules:
        module.train()
    by_epoch = []
    for _ in range(epochs):
        by_batch = []
        for x, y in batches:
            features = backbone(x)
            detached = features.detach()
            loss = losses[0](linear(features, frame), y)
            of_backbone.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            of_backbone.step()
            loss_global = losses[1](global_head(detached), y)
            of_global.zero_grad()
            loss_global.backward()  # type: ignore[no-untyped-call]
            of_global.step()
            loss_local = losses[2](local_head(detached), y)
            of_local.zero_grad()
            loss_local.backward()  # type: ignore[no-untyped-call]
            of_local.step()
            by_batch.append(loss.item())
        by_epoch.append(sum(by_batch) / len(by_batch))
    return sum(by_epoch) / len(by_epoch)


@torch.no_grad()
def accuracy(model: nn.Module, pictures: Dataset[tuple[Tensor, int]], batch: int, classes: int) -> list[float]:
    """Share of right answers for every class, by a pass over all pictures."""
    model.eval()
    answers, truth = [], []
    for x, y in DataLoader(pictures, batch_size=batch, shuffle=False):
        answers += model(x).max(1)[1].tolist()
        truth += y.tolist()
    said, true = np.array(answers), np.array(truth)
    return [float((said[true == c] == c).mean()) if (true == c).any() else 0.0 for c in range(classes)]
