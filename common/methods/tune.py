"""Fine-tuning a copy of a model on one site's training data, after federated training."""

import copy
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from common.methods.method import Predictor, Site
from common.seeds import isolated


def tuned(features: nn.Module, head: nn.Module, site: Site, what: Literal["head", "full"] = "head") -> Predictor:
    """A copy trained for `evaluation.tune_epochs` augmented passes: the head on features as they are when deployed,
    or everything."""
    with isolated(site.task.config.seed, "tune", site.round, site.name):
        return _whole(features, head, site) if what == "full" else Predictor(features, _head(features, head, site))


def _head(features: nn.Module, start: nn.Module, site: Site) -> nn.Module:
    head = copy.deepcopy(start).requires_grad_(True)
    features.eval()
    optimizer = _sgd(head, site)
    for epoch in range(site.task.config.evaluation.tune_epochs):
        for x, y in site.batches("tune", epoch):
            with torch.no_grad():
                f = features(x)
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(head(f), y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return head.requires_grad_(False)


def _whole(features: nn.Module, start: nn.Module, site: Site) -> Predictor:
    model = nn.Sequential(copy.deepcopy(features), copy.deepcopy(start)).requires_grad_(True)
    model.train()
    optimizer = _sgd(model, site)
    for epoch in range(site.task.config.evaluation.tune_epochs):
        for x, y in site.batches("tune", epoch):
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    model.requires_grad_(False).eval()
    return Predictor(model[0], model[1])


def _sgd(module: nn.Module, site: Site) -> torch.optim.SGD:
    train = site.task.config.train
    return torch.optim.SGD(
        module.parameters(), lr=train.lr, momentum=train.momentum, weight_decay=train.weight_decay, foreach=True
    )
