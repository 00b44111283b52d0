"""FedAvg with balanced softmax: Balanced Meta-Softmax for Long-Tailed Visual Recognition, Ren et al., NeurIPS 2020.

Shared: backbone, global_head, class_prior (only with `prior = "global"`). Fixed: nothing. Local: nothing.
The head is trained on logits + log prior, so the logits themselves assume a flat prior. `prior = "local"` uses
the site's own class counts, which stay there; `prior = "global"` the federation's (common/methods/prior.py), which
reveals class frequencies to the server and is therefore not the default. A head without a prior must be given
the site's own before use: the personal result is the tuned head.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from common.errors import UsageError
from common.losses import balanced_softmax, log_prior
from common.methods import prior
from common.methods.fedavg import FedAvg
from common.methods.method import Predictor, Site
from common.methods.tune import tuned
from common.net import Maker, Net, Task
from common.parts import Tensors


@dataclass(frozen=True)
class Balanced(FedAvg):
    name: ClassVar[str] = "balanced"

    prior: Literal["local", "global"] = "local"

    def __post_init__(self) -> None:
        if self.probes and self.prior == "global":
            raise UsageError("method.probes = true and method.prior = 'global' would exchange the prior twice: use one")

    def makers(self, task: Task) -> dict[str, Maker]:
        made = super().makers(task)
        if self.prior == "global":
            made[prior.PART] = lambda _: prior.ClassPrior(len(task.classes))
        return made

    def given(self, net: Net, site: Site) -> Tensors:
        return {"prior": log_prior(site.counts) if self.prior == "local" else prior.exchange(net, site)}

    def criterion(self, logits: Tensor, y: Tensor, given: Tensors) -> Tensor:
        return balanced_softmax(logits, y, given["prior"])

    def personal(self, net: Net, site: Site) -> dict[str, Predictor]:
        backbone, head = net["backbone"], net["global_head"]
        return {"tuned": tuned(backbone, head, site), "global": Predictor(backbone, head)}
