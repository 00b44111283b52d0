"""Fine-tuning a copy of a model on one site's training data, after federated training."""

import copy
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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

    def loss(x: Tensor, y: Tensor) -> Tensor:
        with torch.set_grad_enabled(what == "full"):
            f = features(x)
        return F.cross_entropy(head(f), y)

    config = site.task.config
    groups = [list(module.parameters()) for module in ((features, head) if what == "full" else (head,))]
    passes = (site.batches("tune", epoch) for epoch in range(config.evaluation.tune_epochs))
    with isolated(config.seed, "tune", site.round, site.name):
        fit(Step(groups, loss, config.train, site.device), passes)
    features.eval()
    return Predictor(features.requires_grad_(False) if what == "full" else features, head.requires_grad_(False))
