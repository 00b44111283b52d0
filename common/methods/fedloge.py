"""FedLoGe: Joint Local and Global Imbalance Learning, Xiao et al., ICLR 2024.

Shared: backbone, global_head (psi). Fixed: frame (W, the sparse simplex frame SSE-C). Local: local_head (phi).
The frame alone trains the backbone; psi and phi learn on detached features, so one backward pass over the sum of
the three losses and one SGD over all three groups give the published three-optimiser update. Afterwards both
heads are realigned by their norms (common/realign.py).
Differs from the authors' code: the frame has no (random, untrained) bias and exists for any number of classes,
classes a site never trained on are masked by its training data (theirs: by its test data). Options beyond the
paper, off by default: `psi_loss = "balanced"` trains psi with balanced softmax, `count_aware` averages every row
of psi by the sites' samples of that class instead of by all their samples. The server then accepts a site's rows only
if they are those of the head it sent, so federation.max_update bounds them as well; how a site divides its examples
among the classes it can only take on trust.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import frame, realign
from common.config import FrameConfig
from common.losses import balanced_softmax, log_prior
from common.messages import Reply
from common.methods.method import Method, Phase, Predictor, ServerState, Site
from common.net import Maker, Net, Task
from common.parts import Tensors, tensors


class FrameHead(nn.Module):
    """Logits W f of the fixed frame: W is a buffer, so no optimiser can ever hold it."""

    weight: Tensor

    def __init__(self, classes: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(classes, dim))

    def forward(self, f: Tensor) -> Tensor:
        return F.linear(f, self.weight)


def solve_frame(net: Net, knobs: FrameConfig) -> None:
    """The server solves W once; sites get its values with every order and never solve it themselves."""
    classes, dim = tensors(net["frame"])["weight"].shape
    spec = frame.FrameSpec(dim=dim, classes=classes, **asdict(knobs))
    net.load({"frame": {"weight": frame.build(spec).weight}})


@dataclass(frozen=True)
class FedLoGe(Method):
    name: ClassVar[str] = "fedloge"
    shared: ClassVar[frozenset[str]] = frozenset({"backbone", "global_head"})
    fixed: ClassVar[frozenset[str]] = frozenset({"frame"})
    local: ClassVar[frozenset[str]] = frozenset({"local_head"})

    psi_loss: Literal["plain", "balanced"] = "plain"  # balanced: softmax by the class counts of the site
    count_aware: bool = False  # true: rows of psi averaged by the samples of their class; sites send those counts

    def makers(self, task: Task) -> dict[str, Maker]:
        return {
            "backbone": lambda _: task.backbone(),
            "frame": lambda dim: FrameHead(len(task.classes), dim),
            "global_head": task.head,
            "local_head": task.head,
        }

    def init(self, net: Net, task: Task) -> ServerState:
        solve_frame(net, task.config.frame)
        return super().init(net, task)

    def phases(self, net: Net, site: Site) -> Sequence[Phase]:
        del net
        given = {"prior": log_prior(site.counts)} if self.psi_loss == "balanced" else {}
        return [Phase(("backbone", "global_head", "local_head"), self.loss, site.task.config.train.epochs, given)]

    def loss(self, net: Net, x: Tensor, y: Tensor, given: Tensors) -> Tensor:
        f = net.features(x)
        stopped = f.detach()
        psi = net["global_head"](stopped)
        of_psi = balanced_softmax(psi, y, given["prior"]) if self.psi_loss == "balanced" else F.cross_entropy(psi, y)
        return F.cross_entropy(net["frame"](f), y) + of_psi + F.cross_entropy(net["local_head"](stopped), y)

    def extra(self, net: Net, site: Site) -> Tensors:
        if not self.count_aware:
            return {}
        head = net["global_head"]
        assert isinstance(head, nn.Linear)
        n = site.counts.to(head.weight)
        return {"n": n, "weight": head.weight.detach() * n[:, None], "bias": head.bias.detach() * n}

    def statistics(self, net: Net) -> dict[str, tuple[int, ...]]:
        if not self.count_aware:
            return {}
        classes, dim = _linear(net["global_head"]).weight.shape
        return {"n": (classes,), "weight": (classes, dim), "bias": (classes,)}

    def objection(self, reply: Reply) -> str:
        """The samples of the classes are none below 0 and add up to the examples; the rows are those of the head."""
        if not self.count_aware:
            return ""
        n, head = reply.sums["n"], reply.shared["global_head"]
        if bool((n < 0).any()) or not math.isclose(float(n.double().sum()), reply.examples, rel_tol=1e-6):
            return "its samples of the classes do not add up to its examples"
        rows = {"weight": head["weight"] * n[:, None], "bias": head["bias"] * n}
        if not all(torch.allclose(reply.sums[name], t) for name, t in rows.items()):
            return "its weighted rows are not those of its global_head"
        return ""

    def update(self, state: ServerState, mean: dict[str, Tensors], sums: Tensors, net: Net) -> ServerState:
        state = super().update(state, mean, sums, net)
        if not self.count_aware:
            return state
        seen = sums["n"] > 0  # a row no site of this round has samples of keeps the plain mean
        n = sums["n"].clamp_min(1)
        plain = mean["global_head"]
        head = {
            "weight": torch.where(seen[:, None], sums["weight"] / n[:, None], plain["weight"]),
            "bias": torch.where(seen, sums["bias"] / n, plain["bias"]),
        }
        return replace(state, parts={**state.parts, "global_head": head})

    def generic(self, net: Net, task: Task) -> dict[str, Predictor]:
        backbone, psi = net["backbone"], _linear(net["global_head"])
        return {
            "psi realigned": Predictor(backbone, realign.realigned(psi, task.config.evaluation.gain)),
            "psi": Predictor(backbone, psi),
            "frame": Predictor(backbone, net["frame"]),
        }

    def personal(self, net: Net, site: Site) -> dict[str, Predictor]:
        del site
        backbone, psi, phi = net["backbone"], _linear(net["global_head"]), _linear(net["local_head"])
        heads = {**realign.personal_heads(psi, phi), "phi": phi, "psi": psi, "frame": net["frame"]}
        return {name: Predictor(backbone, head) for name, head in heads.items()}


def _linear(module: nn.Module) -> nn.Linear:
    assert isinstance(module, nn.Linear)
    return module
