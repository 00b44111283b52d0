"""Fine-tuning a copy of a model on one site's training data, after federated training."""

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from common.methods.method import Site


def head(features: nn.Module, start: nn.Module, site: "Site", epochs: int) -> nn.Module:
    """A copy of the head `start` trained for some augmented passes on features as they are when deployed."""
    tuned = copy.deepcopy(start).requires_grad_(True)
    features.eval()
    optimizer = _sgd(tuned, site)
    for epoch in range(epochs):
        for x, y in site.batches("tune", epoch):
            with torch.no_grad():
                f = features(x)
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(tuned(f), y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return tuned.requires_grad_(False)


def whole(features: nn.Module, start: nn.Module, site: "Site", epochs: int) -> tuple[nn.Module, nn.Module]:
    """Copies of backbone and head trained together."""
    model = nn.Sequential(copy.deepcopy(features), copy.deepcopy(start)).requires_grad_(True)
    model.train()
    optimizer = _sgd(model, site)
    for epoch in range(epochs):
        for x, y in site.batches("tune", epoch):
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    model.requires_grad_(False).eval()
    return model[0], model[1]


def _sgd(module: nn.Module, site: "Site") -> torch.optim.SGD:
    train = site.task.config.train
    return torch.optim.SGD(
        module.parameters(),
        lr=train.lr,
        momentum=train.momentum,
        weight_decay=train.weight_decay,
        foreach=True,
    )
