"""CReFF: Federated Learning on Heterogeneous and Long-Tailed Data via Classifier Re-Training with Federated Features,
Shang, Lu, Huang & Wang, IJCAI 2022.

Shared: backbone, global_head, retrained_head. Fixed: nothing. Local: nothing.
Sites train backbone and global_head as in FedAvg. Before that, on the received backbone, each computes for every
class it has the mean gradient of the received re-trained head's loss over its images of that class. The server
averages those gradients over the sites that have the class, moves some synthetic "federated features" of the class
until their gradient at that head points the same way, and trains a new head on all federated features, as many of
each class. This head is the generic model's and goes out with the next round. It travels as a shared part: sites
send it back as it came, and the server writes its own over the mean.
As in the authors' code: the distance of two gradients is the sum of 1 - cosine over the rows of the weight, plus
1 - cosine of the bias; features start from a normal distribution and go on from round to round; the head starts
anew every round. Differs: a site's gradient is the exact mean over its images as they are, where the authors mean
ten draws of at most 32 augmented ones; a class without any site in a round keeps its features.

What it costs: a site sends C^2 (d + 1) numbers beside the model (20 MB for C = 100, d = 512), which tell the server
the classes the site has and, of a class with few images, nearly their features. The server works with tensors of
that size: with the default knobs a round takes it about a minute of one core at C = 100, d = 512, growing with C^2.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.config import require
from common.messages import Reply
from common.methods.fedavg import FedAvg
from common.methods.method import Phase, Predictor, ServerState, Site
from common.methods.tune import tuned
from common.net import Maker, Net, Task
from common.parts import Tensors, tensors
from common.seeds import generator, isolated

BATCH = 32  # federated features in a step of the head's training


@dataclass(frozen=True)
class CReFF(FedAvg):
    name: ClassVar[str] = "creff"
    shared: ClassVar[frozenset[str]] = FedAvg.shared | {"retrained_head"}

    features_per_class: int = 100
    match_steps: int = 100  # steps of the features a round
    match_lr: float = 0.1
    retrain_epochs: int = 300  # passes over the features for the head
    retrain_lr: float = 0.01

    def __post_init__(self) -> None:
        for key in ("features_per_class", "match_steps", "retrain_epochs"):
            require(getattr(self, key) >= 1, f"method.{key}", getattr(self, key), "1 or more")
        for key in ("match_lr", "retrain_lr"):
            require(getattr(self, key) > 0, f"method.{key}", getattr(self, key), "a number above 0")

    def makers(self, task: Task) -> dict[str, Maker]:
        return {**super().makers(task), "retrained_head": task.head}

    def init(self, net: Net, task: Task) -> ServerState:
        state = super().init(net, task)
        seed = task.config.seed
        shape = (len(task.classes), self.features_per_class, net.feature_dim)
        features = torch.randn(shape, generator=generator(seed, "creff", "features"))
        like = state.parts["retrained_head"]["weight"]
        return replace(state, extra={"features": features.to(like), "seed": torch.tensor(seed)})

    def phases(self, net: Net, site: Site) -> Sequence[Phase]:
        site.notes.update(class_gradients(net, site))  # now, while the net still holds what was received
        return super().phases(net, site)

    def extra(self, net: Net, site: Site) -> Tensors:
        del net
        return dict(site.notes)

    def statistics(self, net: Net) -> dict[str, tuple[int, ...]]:
        classes, dim = tensors(net["retrained_head"])["weight"].shape
        return {"weight": (classes, classes, dim), "bias": (classes, classes), "sites": (classes,)}

    def objection(self, reply: Reply) -> str:
        """A site counts once or not at all for a class. Its gradients are taken on trust: max_update is not theirs."""
        sites = reply.sums["sites"]
        return "" if bool(((sites == 0) | (sites == 1)).all()) else "its statistics count it as neither 0 nor 1 site"

    def update(self, state: ServerState, mean: dict[str, Tensors], sums: Tensors, net: Net) -> ServerState:
        device = next(net.parameters()).device
        before = {name: t.to(device) for name, t in state.parts["retrained_head"].items()}
        sites = sums["sites"].to(device)
        n = sites.clamp_min(1)
        weight, bias = sums["weight"].to(device), sums["bias"].to(device)
        gradient = {"weight": weight / n[:, None, None], "bias": bias / n[:, None]}
        features = self.match(state.extra["features"].to(device), before, gradient, sites > 0)
        head = self.retrain(features, int(state.extra["seed"]), state.round + 1)
        like = mean["retrained_head"]
        mean = {**mean, "retrained_head": {name: t.to(like[name]) for name, t in head.items()}}
        extra = {**state.extra, "features": features.to(state.extra["features"])}
        return replace(super().update(state, mean, sums, net), extra=extra)

    def match(self, features: Tensor, head: Tensors, gradient: Tensors, seen: Tensor) -> Tensor:
        """Features (C, m, d), those of `seen` classes moved to where their mean gradients point as given."""
        V = features.clone().requires_grad_(True)
        optimizer = torch.optim.SGD([V], lr=self.match_lr)
        for _ in range(self.match_steps):
            optimizer.zero_grad(set_to_none=True)
            distance(gradients(V, head), gradient)[seen].sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return V.detach()

    def retrain(self, features: Tensor, seed: int, round: int) -> Tensors:
        """A new linear head trained by plain SGD on the federated features of all classes."""
        classes, many, dim = features.shape
        V, y = features.flatten(0, 1), torch.arange(classes, device=features.device).repeat_interleave(many)
        with isolated(seed, "creff", "head", round):
            head = nn.Linear(dim, classes).to(features).requires_grad_(False)
        W, b = head.weight, head.bias
        one_hot = torch.eye(classes).to(features)
        rng = generator(seed, "creff", "order", round)
        for _ in range(self.retrain_epochs):
            order = torch.randperm(len(V), generator=rng).to(V.device)
            for f, of in zip(torch.split(V[order], BATCH), torch.split(y[order], BATCH), strict=True):
                # the gradient by hand: there are thousands of steps, each far cheaper than autograd's bookkeeping
                error = F.linear(f, W, b).softmax(1).sub_(one_hot[of])
                W.addmm_(error.T, f, alpha=-self.retrain_lr / len(f))
                b.sub_(error.sum(0), alpha=self.retrain_lr / len(f))
        return {"weight": W.detach(), "bias": b.detach()}

    def generic(self, net: Net, task: Task) -> dict[str, Predictor]:
        return {"retrained": Predictor(net["backbone"], net["retrained_head"]), **super().generic(net, task)}

    def personal(self, net: Net, site: Site) -> dict[str, Predictor]:
        backbone, head = net["backbone"], net["retrained_head"]
        return {
            "tuned": tuned(backbone, head, site),
            "retrained": Predictor(backbone, head),
            **super().personal(net, site),
        }


@torch.no_grad()
def class_gradients(net: Net, site: Site) -> Tensors:
    """Mean gradient of the re-trained head's loss over the site's images of each class, 0 if it has none.

    `weight` (C, C, d) and `bias` (C, C): the first index is the class of the images. `sites` (C,) is 1 where the
    site has the class, so that sums over sites give means.
    """
    net.eval()
    classes = len(site.counts)
    weight = torch.zeros(classes, classes, net.feature_dim, device=site.device)
    bias = torch.zeros(classes, classes, device=site.device)
    for x, y in site.images.batches(site.train, site.task.config.evaluation.batch, site.device):
        f = net.features(x)
        error = net["retrained_head"](f).softmax(1) - F.one_hot(y, classes)
        for c in set(y.tolist()):
            weight[c] += error[y == c].T @ f[y == c]
            bias[c] += error[y == c].sum(0)
    counts = site.counts.to(weight)
    n = counts.clamp_min(1)
    return {"weight": weight / n[:, None, None], "bias": bias / n[:, None], "sites": (counts > 0).to(weight)}


def gradients(features: Tensor, head: Tensors) -> Tensors:
    """The same of the features (C, m, d), those of class c in row c."""
    labels = torch.eye(len(features)).to(features)[:, None]
    error = F.linear(features, head["weight"], head["bias"]).softmax(-1) - labels
    return {"weight": error.transpose(1, 2) @ features / features.shape[1], "bias": error.mean(1)}


def distance(ours: Tensors, theirs: Tensors) -> Tensor:
    """Of the gradients of each class: summed over the rows of the weight, and the bias as one more row."""
    return apart(ours["weight"], theirs["weight"]).sum(-1) + apart(ours["bias"], theirs["bias"])


def apart(a: Tensor, b: Tensor) -> Tensor:
    """1 - cosine; a vector of zeros has no direction and is 1 apart from all."""
    cosine: Tensor = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1) + 1e-6)
    return 1 - cosine
