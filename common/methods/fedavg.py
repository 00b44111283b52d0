"""FedAvg: Communication-Efficient Learning of Deep Networks from Decentralized Data, McMahan et al., AISTATS 2017.

Shared: backbone, global_head. Fixed: nothing. Local: nothing.
Also the base of the methods that differ from it in a loss or in who holds the head. The personal result is the
global model with the classes a site never saw masked; `fedavg-ft` tunes it.
With `probes` two more heads learn beside the global one, by balanced softmax with the site's and with the
federation's prior, on detached features: they show what the head alone can gain and cannot change the rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from common.losses import balanced_softmax, log_prior
from common.methods import prior
from common.methods.method import Method, Phase, Predictor, Site, linear_predictors
from common.net import Maker, Net, Task
from common.parts import Tensors

PROBES = {"balanced_head": "balanced (local prior)", "balanced_global_head": "balanced (global prior)"}


@dataclass(frozen=True)
class FedAvg(Method):
    name: ClassVar[str] = "fedavg"
    shared: ClassVar[frozenset[str]] = frozenset({"backbone", "global_head", prior.PART, *PROBES})

    probes: bool = False  # sends class frequencies, for the federation's prior

    def makers(self, task: Task) -> dict[str, Maker]:
        made: dict[str, Maker] = {"backbone": lambda _: task.backbone(), "global_head": task.head}
        if self.probes:
            made |= dict.fromkeys(PROBES, task.head)
            made[prior.PART] = lambda _: prior.ClassPrior(len(task.classes))
        return made

    def given(self, net: Net, site: Site) -> Tensors:
        """What `criterion` needs to know in this round."""
        del net, site
        return {}

    def criterion(self, logits: Tensor, y: Tensor, given: Tensors) -> Tensor:
        """The loss of the global head's logits: what most variants change."""
        del given
        return F.cross_entropy(logits, y)

    def phases(self, net: Net, site: Site) -> Sequence[Phase]:
        given, probes = self.given(net, site), {}
        if self.probes:
            probes = {"balanced_head": log_prior(site.counts), "balanced_global_head": prior.exchange(net, site)}
        parts = ("backbone", "global_head", *probes)
        return [Phase(parts, self.loss, site.task.config.train.epochs, {**given, **probes})]

    def loss(self, net: Net, x: Tensor, y: Tensor, given: Tensors) -> Tensor:
        f = net.features(x)
        total = self.criterion(net["global_head"](f), y, given)
        for part in PROBES if self.probes else ():
            total = total + balanced_softmax(net[part](f.detach()), y, given[part])
        return total

    def generic(self, net: Net, task: Task) -> dict[str, Predictor]:
        found = linear_predictors(net, task)
        if self.probes:
            found |= {name: Predictor(net["backbone"], net[part]) for part, name in PROBES.items()}
        return found

    def personal(self, net: Net, site: Site) -> dict[str, Predictor]:
        del site
        return {"global": Predictor(net["backbone"], net["global_head"])}
