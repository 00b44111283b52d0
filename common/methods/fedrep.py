"""FedRep: Exploiting Shared Representations for Personalized Federated Learning, Collins et al., ICML 2021.

Shared: backbone. Fixed: nothing. Local: local_head.
A round trains the head on the frozen backbone, then the backbone under the frozen head (`train.epochs` epochs).
That is the paper's order, with many head epochs so that the head is near its optimum for the received backbone
before that moves. While the head is trained, BatchNorm runs in evaluation mode and its statistics stay as received
(implementations that only stop the gradients let those of the "frozen" backbone move). There is no generic model:
no head belongs to everybody.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from common.config import require
from common.methods.fedper import FedPer, local_loss
from common.methods.method import Phase, Site
from common.net import Net


@dataclass(frozen=True)
class FedRep(FedPer):
    name: ClassVar[str] = "fedrep"

    head_epochs: int = 10  # a round; the paper's value, next to 1 or 5 epochs of the backbone

    def __post_init__(self) -> None:
        require(self.head_epochs >= 1, "method.head_epochs", self.head_epochs, "1 or more")

    def phases(self, net: Net, site: Site) -> Sequence[Phase]:
        del net
        return [
            Phase(("local_head",), local_loss, self.head_epochs),
            Phase(("backbone",), local_loss, site.task.config.train.epochs),
        ]
