"""Fine-tuning a copy of a model on one site's training data, after federated training."""

import copy
from collections.abc import Iterator
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.images import PixelImages
from common.methods.method import Predictor, Site
from common.seeds import isolated
from common.sgd import Step, fit


def tuned(features: nn.Module, head: nn.Module, site: Site, what: Literal["head", "full"] = "head") -> Predictor:
    """A copy trained for `evaluation.tune_epochs` augmented passes: the head on features as they are when deployed,
    or everything."""
    features.eval()
    if what == "full":
        features = copy.deepcopy(features).requires_grad_(True).train()
    head = copy.deepcopy(head).requires_grad_(True)

    config = site.task.config
    # deployed features are the same in any batch: a GPU computes those of many images at a time
    ahead = what == "head" and site.device.type == "cuda" and isinstance(site.images, PixelImages)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        with torch.set_grad_enabled(what == "full"):
            f = x if ahead else features(x)
        return F.cross_entropy(head(f), y)

    groups = [list(module.parameters()) for module in ((features, head) if what == "full" else (head,))]
    batches = partial(_ahead, features, site) if ahead else site.batches
    passes = (batches("tune", epoch) for epoch in range(config.evaluation.tune_epochs))
    with isolated(config.seed, "tune", site.round, site.name):
        fit(Step(groups, loss, config.train, site.device), passes)
    features.eval()
    return Predictor(features.requires_grad_(False) if what == "full" else features, head.requires_grad_(False))


@torch.no_grad()
def _ahead(features: nn.Module, site: Site, *stream: str | int) -> Iterator[tuple[Tensor, Tensor]]:
    """The same pass as `site.batches`, as features."""
    config = site.task.config
    half = torch.autocast(site.device.type, torch.bfloat16, enabled=config.train.precision == "bf16")
    for x, y in site.chunks(*stream):
        with half:
            f = torch.cat([features(part) for part in torch.split(x, config.evaluation.batch)])
        yield from zip(torch.split(f, config.train.batch), torch.split(y, config.train.batch), strict=True)
