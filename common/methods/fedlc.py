"""FedLC: Federated Learning with Label Distribution Skew via Logits Calibration, Zhang et al., ICML 2022.

Shared: backbone, global_head. Fixed: nothing. Local: nothing.
FedAvg whose local loss is the cross-entropy of logits - tau n_c^(-1/4), n_c being the site's own class counts, which
stay there. Classes a site lacks have an infinite margin and take no part in its softmax, so it never pushes them
down: the limit of the formula. The margins are for training only. As with every such head, a site adapts it to its
own classes before use: the personal result is the tuned head.
Differs: the sum of the softmax includes the true class, as in the implementations in circulation; the formula as
printed in the paper sums over the other classes only (our reading, not verified against the authors' code).
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from common.config import require
from common.losses import calibrated
from common.methods.fedavg import FedAvg
from common.methods.method import Predictor, Site
from common.methods.tune import tuned
from common.net import Net
from common.parts import Tensors


@dataclass(frozen=True)
class FedLC(FedAvg):
    name: ClassVar[str] = "fedlc"

    tau: float = 1.0  # strength of the margins; the paper tunes it per data set

    def __post_init__(self) -> None:
        require(self.tau > 0, "method.tau", self.tau, "a number above 0")

    def given(self, net: Net, site: Site) -> Tensors:
        del net
        return {"counts": site.counts}

    def criterion(self, logits: Tensor, y: Tensor, given: Tensors) -> Tensor:
        return calibrated(logits, y, given["counts"], self.tau)

    def personal(self, net: Net, site: Site) -> dict[str, Predictor]:
        backbone, head = net["backbone"], net["global_head"]
        return {"tuned": tuned(backbone, head, site), **super().personal(net, site)}
