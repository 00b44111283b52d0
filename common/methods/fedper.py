"""FedPer: Federated Learning with Personalization Layers, Arivazhagan et al., arXiv 1912.00818, 2019.

Shared: backbone. Fixed: nothing. Local: local_head.
Backbone and head are trained together, as in FedAvg; only the backbone is averaged. There is no generic model:
no head belongs to everybody. Differs from the paper, which may keep several last blocks at the site: here the
personal layer is always the linear head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from common.methods.method import Method, Phase, Predictor, Site
from common.net import Maker, Net, Task
from common.parts import Tensors


@dataclass(frozen=True)
class FedPer(Method):
    name: ClassVar[str] = "fedper"
    shared: ClassVar[frozenset[str]] = frozenset({"backbone"})
    local: ClassVar[frozenset[str]] = frozenset({"local_head"})

    def makers(self, task: Task) -> dict[str, Maker]:
        return {"backbone": lambda _: task.backbone(), "local_head": task.head}

    def phases(self, net: Net, site: Site) -> Sequence[Phase]:
        del net
        return [Phase(("backbone", "local_head"), local_loss, site.task.config.train.epochs)]

    def generic(self, net: Net, task: Task) -> dict[str, Predictor]:
        del net, task
        return {}

    def personal(self, net: Net, site: Site) -> dict[str, Predictor]:
        del site
        return {"local": Predictor(net["backbone"], net["local_head"])}


def local_loss(net: Net, x: Tensor, y: Tensor, given: Tensors) -> Tensor:
    del given
    return F.cross_entropy(net["local_head"](net.features(x)), y)
