"""FedBN: Federated Learning on Non-IID Features via Local Batch Normalization, Li et al., ICLR 2021.

Shared: backbone without its BatchNorm layers, global_head. Fixed: nothing. Local: norms (scale, shift and moving
statistics of every BatchNorm layer; they train along with the backbone).
FedAvg on a net whose BatchNorm stays at the site. The net splits off `norms` where `model.norm = "local"`, and
this method refuses any other setting: without it, it would silently be FedAvg. There is no generic model: the
server has no BatchNorm statistics. Personal: the global model with the site's own BatchNorm.
"""

from dataclasses import dataclass
from typing import ClassVar

from common.config import require
from common.methods.fedavg import FedAvg
from common.methods.method import Predictor, Site
from common.net import Maker, Net, Task


@dataclass(frozen=True)
class FedBN(FedAvg):
    name: ClassVar[str] = "fedbn"
    local: ClassVar[frozenset[str]] = frozenset({"norms"})

    def makers(self, task: Task) -> dict[str, Maker]:
        norm = task.config.model.norm
        require(norm == "local", "model.norm", norm, '"local" with method.name = "fedbn"')
        return super().makers(task)

    def generic(self, net: Net, task: Task) -> dict[str, Predictor]:
        del net, task
        return {}

    def personal(self, net: Net, site: Site) -> dict[str, Predictor]:
        del site
        return {"own norms": Predictor(net["backbone"], net["global_head"])}
