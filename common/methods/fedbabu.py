"""FedBABU: Toward Enhanced Representation for Federated Image Classification, Oh, Kim & Yun, ICLR 2022.

Shared: backbone. Fixed: global_head. Local: nothing (the tuned copy is a result, not a state).
The head keeps its random initial values, the same at all sites, for the whole run: only the backbone is trained
and averaged. (Implementations that only zero the head's gradients still move it by weight decay; here it is in no
optimiser.) Generic: the backbone under that head. Personal: fine-tuned from it at the end, the whole model as in
the paper's main results, or with `tune = "head"` the head on features in evaluation mode. The number of epochs is
`evaluation.tune_epochs`, as for every tuned model (paper: 5).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F

from common.methods.method import Method, Phase, Predictor, Site, linear_predictors
from common.methods.tune import tuned
from common.net import Maker, Net, Task
from common.parts import Tensors


@dataclass(frozen=True)
class FedBABU(Method):
    name: ClassVar[str] = "fedbabu"
    shared: ClassVar[frozenset[str]] = frozenset({"backbone"})
    fixed: ClassVar[frozenset[str]] = frozenset({"global_head"})

    tune: Literal["full", "head"] = "full"

    def makers(self, task: Task) -> dict[str, Maker]:
        return {"backbone": lambda _: task.backbone(), "global_head": task.head}

    def phases(self, net: Net, site: Site) -> Sequence[Phase]:
        del net
        return [Phase(("backbone",), global_loss, site.task.config.train.epochs)]

    def generic(self, net: Net, task: Task) -> dict[str, Predictor]:
        return linear_predictors(net, task)

    def personal(self, net: Net, site: Site) -> dict[str, Predictor]:
        backbone, head = net["backbone"], net["global_head"]
        return {"tuned": tuned(backbone, head, site, self.tune), "global": Predictor(backbone, head)}


def global_loss(net: Net, x: Tensor, y: Tensor, given: Tensors) -> Tensor:
    del given
    return F.cross_entropy(net["global_head"](net.features(x)), y)
