"""FedLoGe+: what is left of FedLoGe when every ingredient has to show on the records that it helps. Our own.

Shared: backbone. Fixed: frame (W; and the computed head goes to all sites). Local: local_head (P).
With more classes than d + 1 there is no simplex for W to be; then a global_head is shared and learned in its place.
FedLoGe trains a generic and a personal head for a long tail and mends both by their norms afterwards. Here
- the generic head is not mended but computed, from everybody's class statistics (common/statistics.py). Equal priors
  are in its formula, so a class with fifty images is on a par with one that has five thousand;
- the frame still trains the backbone, by balanced softmax with the site's own counts, which stay there, and at a
  temperature that suits tens of rounds (`norm`; the published .1 suits long runs of large models). Where there is no
  simplex a head that is learned by plain cross-entropy, as FedAvg's, trains it better than frames of all norms tried;
- the personal model is a mean of two that err in different ways: the computed head at the site's temperature and
  prior, and the frame with the site's prior (or the learned head) and a residual P that the site trains and keeps. The
  second is much surer of itself, so it counts for a quarter.
P learns on detached features and logits, as psi and phi do in FedLoGe, whose heads diverge once features are long. Its
loss is scaled by what the features of the batch allow, so it is stable whatever they are. Without any site's statistics
the frame is the generic head, and the personal model the second of the two; where only those of some classes are
missing, because the sites that have them left or keep their statistics, the frame answers for these. (All of this
holds for the learned head, where there is one in the frame's place.)
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.config import require
from common.losses import log_prior
from common.methods.fedloge import FrameHead, solve_frame
from common.methods.method import Method, Phase, Predictor, ServerState, Site, computed
from common.net import Maker, Net, Task
from common.parts import Tensors
from common.realign import added, averaged, linear
from common.statistics import log_frequencies

COMPUTED = 0.75  # share of the computed head in the personal model; chosen on images put aside


@dataclass(frozen=True)
class FedLoGePlus(Method):
    name: ClassVar[str] = "fedloge+"
    shared: ClassVar[frozenset[str]] = frozenset({"backbone", "global_head"})
    fixed: ClassVar[frozenset[str]] = frozenset({"frame"})
    local: ClassVar[frozenset[str]] = frozenset({"local_head"})
    computed: ClassVar[bool] = True

    norm: float = 3.0  # length of the frame's columns, in place of frame.norm; unused without a frame

    def __post_init__(self) -> None:
        require(self.norm > 0, "method.norm", self.norm, "a number above 0")

    def makers(self, task: Task) -> dict[str, Maker]:
        classes = len(task.classes)
        return {
            "backbone": lambda _: task.backbone(),
            "frame": lambda dim: FrameHead(classes, dim) if classes <= dim + 1 else None,
            "global_head": lambda dim: task.head(dim) if classes > dim + 1 else None,
            "local_head": lambda dim: _nothing(task.head(dim)),
        }

    def init(self, net: Net, task: Task) -> ServerState:
        if "frame" in net.by_part:
            solve_frame(net, replace(task.config.frame, norm=self.norm))
        return super().init(net, task)

    def phases(self, net: Net, site: Site) -> Sequence[Phase]:
        train = site.task.config.train
        # Gradient descent with momentum m on a curvature h is stable for lr h < 2 (1 + m). That of the softmax is at
        # most half the largest eigenvalue of E[f f^T], which is at most E|f|^2: this stays at half of the limit.
        bound = torch.tensor(2 * (1 + train.momentum) / train.lr, device=site.device)
        given = {"prior": log_prior(site.counts), "bound": bound}
        parts = ("backbone", "global_head", "local_head")
        return [Phase(tuple(part for part in parts if part in net.by_part), loss, train.epochs, given)]

    def trained_rows(self, state: ServerState) -> Tensor:
        return state.parts["frame" if "frame" in state.parts else "global_head"]["weight"]

    def generic(self, net: Net, task: Task) -> dict[str, Predictor]:
        del task
        name, part = ("frame", "frame") if "frame" in net.by_part else ("head", "global_head")
        return {name: Predictor(net["backbone"], net[part])}

    def personal(self, net: Net, site: Site) -> dict[str, Predictor]:
        backbone, residual = net["backbone"], net["local_head"]
        assert isinstance(residual, nn.Linear)
        if "frame" in net.by_part:
            frame, prior = net["frame"], log_frequencies(site.counts).to(residual.weight)
            assert isinstance(frame, FrameHead)
            name, untrained, base = "frame", "frame+prior", linear(frame.weight, prior)
        else:
            learned = net["global_head"]
            assert isinstance(learned, nn.Linear)
            name, untrained, base = "head", "head", learned
        trained = added(base, residual)
        own = computed(net, site)
        found = {f"{name}+residual": Predictor(backbone, trained), **own, untrained: Predictor(backbone, base)}
        if own:
            head = own["statistics"].head
            assert isinstance(head, nn.Linear)
            found = {"mixed": Predictor(backbone, averaged(trained, head, COMPUTED)), **found}
        return found


def loss(net: Net, x: Tensor, y: Tensor, given: Tensors) -> Tensor:
    f = net.features(x)
    base = net["frame"](f) + given["prior"] if "frame" in net.by_part else net["global_head"](f)
    stopped = f.detach()
    personal = base.detach() + net["local_head"](stopped)
    allowed = (given["bound"] / (1 + stopped.square().sum(dim=1).mean())).clamp_max(1.0)  # 1: of the bias
    return F.cross_entropy(base, y) + allowed * F.cross_entropy(personal, y)


def _nothing(head: nn.Module) -> nn.Module:
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    return head
