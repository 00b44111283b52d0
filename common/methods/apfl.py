"""APFL: Adaptive Personalized Federated Learning, Deng, Kamani & Mahdavi, arXiv 2003.13461, 2020.

Shared: backbone, global_head (w). Fixed: nothing. Local: own_backbone, own_head (v), alpha.
The personal model has the mixed *parameters* alpha v + (1 - alpha) w. Every batch trains w as FedAvg does, and v
and alpha by the loss of the mixture with w held still there, so their gradients are the paper's: alpha grad f and
<v - w, grad f>. v starts from the first global model the site receives.
BatchNorm: scale and shift are mixed like all parameters, the moving statistics are the mixture's own, measured
while it trains, and live in own_backbone. They are not a mean of v's and w's: v is never run alone.
Differs from the paper: alpha is a sigmoid of what is learned, so it stays in (0, 1) without clipping (its gradient
gains the factor alpha (1 - alpha)), it moves with every batch, by train.lr, instead of once a round, and its
optimiser is v's, weight decay included. Generic: w. Personal: v mixed with the global model of the day (paper: with
the site's last w). `train.clip` bounds the gradient of every part by itself, so w stays FedAvg's.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from common.config import require
from common.methods.fedavg import FedAvg
from common.methods.method import Phase, Predictor, Site
from common.net import Maker, Net, Task
from common.parts import Tensors, tensors


class Alpha(nn.Module):
    """A number in (0, 1) that can be learned."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.tensor(math.log(start / (1 - start))))

    def forward(self) -> Tensor:
        return self.logit.sigmoid()


@dataclass(frozen=True)
class APFL(FedAvg):
    name: ClassVar[str] = "apfl"
    local: ClassVar[frozenset[str]] = frozenset({"own_backbone", "own_head", "alpha"})

    alpha: float = 0.5  # its first value: 0 is the global model alone, 1 the own one
    adaptive: bool = True  # False keeps alpha as it is (the paper's fixed variant)

    def __post_init__(self) -> None:
        require(0 < self.alpha < 1, "method.alpha", self.alpha, "a number between 0 and 1, both excluded")

    def makers(self, task: Task) -> dict[str, Maker]:
        own: dict[str, Maker] = {"own_backbone": lambda _: task.backbone(), "own_head": task.head}
        return {**super().makers(task), **own, "alpha": lambda _: Alpha(self.alpha)}

    def start(self, net: Net) -> None:
        net.load({"own_backbone": tensors(net["backbone"]), "own_head": tensors(net["global_head"])})

    def phases(self, net: Net, site: Site) -> Sequence[Phase]:
        (phase,) = super().phases(net, site)
        own = ("own_backbone", "own_head", "alpha") if self.adaptive else ("own_backbone", "own_head")
        return [replace(phase, train=(*phase.train, *own))]

    def loss(self, net: Net, x: Tensor, y: Tensor, given: Tensors) -> Tensor:
        alpha = net["alpha"]()
        f = functional_call(net["own_backbone"], mixed(net["own_backbone"], net["backbone"], alpha), (x,))
        logits = functional_call(net["own_head"], mixed(net["own_head"], net["global_head"], alpha), (f,))
        return super().loss(net, x, y, given) + F.cross_entropy(logits, y)

    @torch.no_grad()
    def personal(self, net: Net, site: Site) -> dict[str, Predictor]:
        alpha = net["alpha"]()
        pair = []
        for own, other in (("own_backbone", "backbone"), ("own_head", "global_head")):
            module = copy.deepcopy(net[own]).requires_grad_(False)  # it keeps the mixture's BatchNorm statistics
            module.load_state_dict(mixed(net[own], net[other], alpha), strict=False)
            pair.append(module)
        return {"mixed": Predictor(*pair), **super().personal(net, site)}


def mixed(own: nn.Module, other: nn.Module, alpha: Tensor) -> Tensors:
    """Parameters alpha * own + (1 - alpha) * other; no gradient reaches `other`."""
    theirs = dict(other.named_parameters())
    return {name: alpha * v + (1 - alpha) * theirs[name].detach() for name, v in own.named_parameters()}
