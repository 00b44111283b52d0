"""Losses on logits that account for how many samples of each class there are."""

import torch
from torch import Tensor
from torch.nn import functional as F


def log_prior(counts: Tensor) -> Tensor:
    """log p(c) of class frequencies; -inf for a class without samples, which then takes no part in a softmax."""
    return torch.log(counts / counts.sum())


def balanced_softmax(logits: Tensor, y: Tensor, prior: Tensor) -> Tensor:
    """Cross-entropy of logits + log prior (Ren et al., NeurIPS 2020): the logits themselves learn a flat prior."""
    return F.cross_entropy(logits + prior, y)


def calibrated(logits: Tensor, y: Tensor, counts: Tensor, tau: float) -> Tensor:
    """Cross-entropy of logits - tau * n_c^(-1/4) (FedLC, Zhang et al., ICML 2022); absent classes are left out."""
    return F.cross_entropy(logits - tau * counts.pow(-0.25), y)


def proximal(values: dict[str, Tensor], anchor: dict[str, Tensor]) -> Tensor:
    """Squared distance of trained tensors to where they should stay near."""
    return torch.stack([(values[name] - anchor[name]).square().sum() for name in anchor]).sum()
