"""FedProx: Federated Optimization in Heterogeneous Networks, Li et al., MLSys 2020.

Shared: backbone, global_head. Fixed: nothing. Local: nothing.
FedAvg with mu/2 |w - w_t|^2 added to the local loss, w_t being the received parameters. BatchNorm statistics are
no parameters and are not pulled; with `model.norm = "local"` neither is BatchNorm at all, which was not received.
Differs from the paper: every site trains all its epochs (no partial work of stragglers). `mu = 0` is FedAvg.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor, nn

from common.config import require
from common.losses import proximal
from common.methods.fedavg import FedAvg
from common.methods.method import Phase, Site
from common.net import Net
from common.parts import Tensors, snapshot


@dataclass(frozen=True)
class FedProx(FedAvg):
    name: ClassVar[str] = "fedprox"

    mu: float = 0.01  # paper: tuned in {0.001, 0.01, 0.1, 1}

    def __post_init__(self) -> None:
        require(self.mu >= 0, "method.mu", self.mu, "0 or more")

    def phases(self, net: Net, site: Site) -> Sequence[Phase]:
        (phase,) = super().phases(net, site)
        anchor = snapshot(parameters(net, "backbone", "global_head"))
        return [replace(phase, given={**phase.given, **anchor})]

    def loss(self, net: Net, x: Tensor, y: Tensor, given: Tensors) -> Tensor:
        pull = distance(parameters(net, "backbone", "global_head"), given)
        return super().loss(net, x, y, given) + self.mu / 2 * pull


def distance(values: Tensors, given: Tensors) -> Tensor:
    """Squared, to what is given under the same names; what was not received is free."""
    return proximal(values, {name: given[name] for name in values if name in given})


def parameters(net: Net, *parts: str) -> Tensors:
    """The live parameters of some parts, without buffers, named by the place of their part among `parts`."""
    mine = net.parts()
    named = [(f"{place}/{name}", t) for place, part in enumerate(parts) for name, t in mine[part].items()]
    return {name: t for name, t in named if isinstance(t, nn.Parameter)}
