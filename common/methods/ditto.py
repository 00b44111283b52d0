"""Ditto: Fair and Robust Federated Learning Through Personalization, Li, Hu, Beirami & Smith, ICML 2021.

Shared: backbone, global_head (w). Fixed: nothing. Local: own_backbone, own_head (v).
A round trains w exactly as FedAvg does, then v on CE(v) + lambda/2 |v - w_t|^2, w_t being the received parameters.
Both take `train.epochs` epochs (the paper's choice), so a round costs twice FedAvg's. v starts from the first
global model the site receives. BatchNorm statistics are no parameters: v has its own and nothing pulls them.
Differs from the paper: v gets its own pass over the data after w's instead of sharing w's batches, so that a bound
on the gradient cannot couple the two. Generic: w. Personal: v.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from common.config import require
from common.methods.fedavg import FedAvg
from common.methods.fedprox import distance, parameters
from common.methods.method import Phase, Predictor, Site
from common.net import Maker, Net, Task
from common.parts import Tensors, snapshot, tensors


@dataclass(frozen=True)
class Ditto(FedAvg):
    name: ClassVar[str] = "ditto"
    local: ClassVar[frozenset[str]] = frozenset({"own_backbone", "own_head"})

    lam: float = 1.0  # lambda, how strongly v is pulled to w_t; the paper's values are between 0.05 and 2

    def __post_init__(self) -> None:
        require(self.lam >= 0, "method.lam", self.lam, "0 or more")

    def makers(self, task: Task) -> dict[str, Maker]:
        own: dict[str, Maker] = {"own_backbone": lambda _: task.backbone(), "own_head": task.head}
        return {**super().makers(task), **own}

    def start(self, net: Net) -> None:
        net.load({"own_backbone": tensors(net["backbone"]), "own_head": tensors(net["global_head"])})

    def phases(self, net: Net, site: Site) -> Sequence[Phase]:
        received = snapshot(parameters(net, "backbone", "global_head"))
        own = Phase(("own_backbone", "own_head"), self.own_loss, site.task.config.train.epochs, received)
        return [*super().phases(net, site), own]

    def own_loss(self, net: Net, x: Tensor, y: Tensor, given: Tensors) -> Tensor:
        pull = distance(parameters(net, "own_backbone", "own_head"), given)
        return F.cross_entropy(net["own_head"](net["own_backbone"](x)), y) + self.lam / 2 * pull

    def personal(self, net: Net, site: Site) -> dict[str, Predictor]:
        return {"own": Predictor(net["own_backbone"], net["own_head"]), **super().personal(net, site)}
