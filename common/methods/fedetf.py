"""FedETF: No Fear of Classifier Biases: Neural Collapse Inspired Federated Learning with Synthetic and Fixed
Classifier, Li et al., ICCV 2023.

Shared: backbone, projection, temperature. Fixed: frame (a simplex ETF of unit rows). Local: nothing (the tuned copy
is a result, not a state).
Logits = temperature * W p / |p| with p = projection(features), a linear layer with bias to as many dimensions as
there are classes, in which W is a full simplex, and a learned temperature that starts from 1: all as in the
authors' code. The balanced feature loss is balanced softmax on the site's own class counts (gamma = 1) and trains
backbone, projection and temperature together; W is in no optimiser.
Personal: a copy of projection and W is tuned with plain cross-entropy on features in evaluation mode, for
`evaluation.tune_epochs` by train.lr. Differs: the authors first train the whole model once more at the site, then
alternate 20 times between 3 epochs of W and 3 of the projection, with rates of their own; here both move
together, within the epochs every tuned model gets. The temperature stays, as theirs does in that stage.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.config import FrameConfig
from common.losses import balanced_softmax, log_prior
from common.methods.fedloge import FrameHead, solve_frame
from common.methods.method import Method, Phase, Predictor, ServerState, Site
from common.methods.tune import tuned
from common.net import Maker, Net, Task
from common.parts import Tensors, tensors


class Temperature(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.ones(()))

    def forward(self, cosines: Tensor) -> Tensor:
        return self.value * cosines


class EtfHead(nn.Module):
    """The head as it is deployed. Its parameters, projection and W, are what a site tunes."""

    temperature: Tensor

    def __init__(self, projection: nn.Module, frame: Tensor, temperature: Tensor) -> None:
        super().__init__()
        self.projection = copy.deepcopy(projection)
        self.frame = nn.Parameter(frame.clone())
        self.register_buffer("temperature", temperature.detach().clone())
        self.requires_grad_(False)

    @classmethod
    def of(cls, net: Net) -> "EtfHead":
        return cls(net["projection"], tensors(net["frame"])["weight"], tensors(net["temperature"])["value"])

    def forward(self, f: Tensor) -> Tensor:
        return self.temperature * F.linear(F.normalize(self.projection(f)), self.frame)


@dataclass(frozen=True)
class FedETF(Method):
    name: ClassVar[str] = "fedetf"
    shared: ClassVar[frozenset[str]] = frozenset({"backbone", "projection", "temperature"})
    fixed: ClassVar[frozenset[str]] = frozenset({"frame"})

    def makers(self, task: Task) -> dict[str, Maker]:
        classes = len(task.classes)
        return {
            "backbone": lambda _: task.backbone(),
            "projection": lambda dim: nn.Linear(dim, classes),
            "temperature": lambda _: Temperature(),
            "frame": lambda _: FrameHead(classes, classes),
        }

    def init(self, net: Net, task: Task) -> ServerState:
        """Of the frame's knobs a full simplex of unit rows has only the seed."""
        solve_frame(net, FrameConfig(norm=1.0, sparsity=0.0, seed=task.config.frame.seed))
        return super().init(net, task)

    def phases(self, net: Net, site: Site) -> Sequence[Phase]:
        del net
        given = {"prior": log_prior(site.counts)}
        return [Phase(("backbone", "projection", "temperature"), etf_loss, site.task.config.train.epochs, given)]

    def generic(self, net: Net, task: Task) -> dict[str, Predictor]:
        del task
        return {"etf": Predictor(net["backbone"], EtfHead.of(net))}

    def personal(self, net: Net, site: Site) -> dict[str, Predictor]:
        backbone, head = net["backbone"], EtfHead.of(net)
        return {"tuned": tuned(backbone, head, site), "etf": Predictor(backbone, head)}


def etf_loss(net: Net, x: Tensor, y: Tensor, given: Tensors) -> Tensor:
    cosines = net["frame"](F.normalize(net["projection"](net.features(x))))
    return balanced_softmax(net["temperature"](cosines), y, given["prior"])
