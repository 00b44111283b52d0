"""FedLoGe+: what is left of FedLoGe when every ingredient has to show on the records that it helps. Our own.

Shared: backbone, global_head. Fixed: nothing (the computed head goes to all sites). Local: local_head.
FedLoGe trains a generic and a personal head for a long tail and mends both by their norms afterwards. Here
- the generic head is not mended but computed, from everybody's class statistics (common/statistics.py). Equal priors
  are in its formula, so a class with fifty images is on a par with one that has five thousand;
- the backbone learns through a head with balanced softmax by the site's own counts, which stay there, and not through
  the fixed frame, whose norm has to fit the length of the training (docs/method.md);
- the personal model is the mean of two that err in different ways: the computed head at the site's temperature and
  prior, and the global head plus a residual that the site has trained and keeps.
The residual learns on detached features and logits, as psi and phi do in FedLoGe, whose heads diverge once features are
long. Here its loss is scaled by what the features of the batch allow, so it is stable whatever they are.
Without any site's statistics its models are those of FedRoD.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.losses import balanced_softmax, log_prior
from common.methods.fedrod import FedRoD
from common.methods.method import Phase, Predictor, Site, computed
from common.net import Net
from common.parts import Tensors
from common.realign import averaged


@dataclass(frozen=True)
class FedLoGePlus(FedRoD):
    name: ClassVar[str] = "fedloge+"
    computed: ClassVar[bool] = True

    def phases(self, net: Net, site: Site) -> Sequence[Phase]:
        del net
        train = site.task.config.train
        # Gradient descent with momentum m on a curvature h is stable for lr h < 2 (1 + m). That of the softmax is at
        # most half the largest eigenvalue of E[f f^T], which is at most E|f|^2: this stays at half of the limit.
        bound = torch.tensor(2 * (1 + train.momentum) / train.lr, device=site.device)
        given = {"prior": log_prior(site.counts), "bound": bound}
        return [Phase(("backbone", "global_head", "local_head"), loss, train.epochs, given)]

    def personal(self, net: Net, site: Site) -> dict[str, Predictor]:
        trained, found = super().personal(net, site), computed(net, site)
        if not found:
            return trained
        residual, own = trained["global+residual"].head, found["statistics"].head
        assert isinstance(residual, nn.Linear)
        assert isinstance(own, nn.Linear)
        return {"mixed": Predictor(net["backbone"], averaged(residual, own)), **found, **trained}


def loss(net: Net, x: Tensor, y: Tensor, given: Tensors) -> Tensor:
    f = net.features(x)
    generic = net["global_head"](f)
    stopped = f.detach()
    residual = F.cross_entropy(generic.detach() + net["local_head"](stopped), y)
    allowed = (given["bound"] / (1 + stopped.square().sum(dim=1).mean())).clamp_max(1.0)  # 1: of the bias
    return balanced_softmax(generic, y, given["prior"]) + allowed * residual
