"""FedRoD: On Bridging Generic and Personalized Federated Learning for Image Classification, Chen & Chao, ICLR 2022.

Shared: backbone, global_head. Fixed: nothing. Local: local_head.
Built as in the paper (linear version): the global head is trained with balanced softmax on the site's own counts,
through the backbone; the local head is a residual on the detached global logits, CE(G(f) + P(f)), and trains
nothing but itself. (A variant in circulation trains a separate head that is not detached; this is not it.)
Generic: G. Personal: G + P. For the backbone and G this is `balanced` with the local prior, to the bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from common.losses import balanced_softmax, log_prior
from common.methods.method import Method, Phase, Predictor, Site, linear_predictors
from common.net import Maker, Net, Task
from common.parts import Tensors
from common.realign import added


@dataclass(frozen=True)
class FedRoD(Method):
    name: ClassVar[str] = "fedrod"
    shared: ClassVar[frozenset[str]] = frozenset({"backbone", "global_head"})
    local: ClassVar[frozenset[str]] = frozenset({"local_head"})

    def makers(self, task: Task) -> dict[str, Maker]:
        return {"backbone": lambda _: task.backbone(), "global_head": task.head, "local_head": task.head}

    def phases(self, net: Net, site: Site) -> Sequence[Phase]:
        del net
        given = {"prior": log_prior(site.counts)}
        return [Phase(("backbone", "global_head", "local_head"), rod_loss, site.task.config.train.epochs, given)]

    def generic(self, net: Net, task: Task) -> dict[str, Predictor]:
        return linear_predictors(net, task)

    def personal(self, net: Net, site: Site) -> dict[str, Predictor]:
        del site
        generic, residual = net["global_head"], net["local_head"]
        assert isinstance(generic, nn.Linear)
        assert isinstance(residual, nn.Linear)
        return {
            "global+residual": Predictor(net["backbone"], added(generic, residual)),
            "global": Predictor(net["backbone"], generic),
        }


def rod_loss(net: Net, x: Tensor, y: Tensor, given: Tensors) -> Tensor:
    f = net.features(x)
    generic = net["global_head"](f)
    residual = net["local_head"](f.detach())
    return balanced_softmax(generic, y, given["prior"]) + F.cross_entropy(generic.detach() + residual, y)
