"""Heads that are computed from class statistics instead of trained: linear discriminant analysis over a federation.

Features of a trained backbone gather at class means with one scatter within the classes, and then the best linear head
is the nearest mean in that scatter's metric. It has a closed form, owes nothing to how many samples a class has, and
needs of every site only sums: n_c, sum f and one pooled sum f f^T. So sites may come late, leave or send their sums
through a secure sum, and the head of their total is that of their pooled images.

All is float64, and features are taken about a centre that the server names: the features of a blank image, about which
no large offset is left. Sums of squares about 0 would lose everything there.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.parts import Tensors
from common.realign import linear

PART = "statistics"  # of a net: the head of everybody, as its sites get it
NOBODY = -1e9  # logit of a class that no site gives statistics of
USUAL = 0.6  # temperature that was best where it was looked for
LOOSE = 2.0  # how much evidence it takes to depart from it: so many times its squared logarithm
TEMPERATURES = torch.logspace(-1, 0.5, 61).tolist()
LARGEST = 1e24  # of a site's sums: products of features as large as a reply's may be, of many images
SOUND = 1e-9  # share of the trace by which rounding may make a scatter less than nothing


class StatisticsHead(nn.Module):
    """Logits W f + b of the computed head; all zero while there is none. Buffers, so no optimiser can ever hold it."""

    weight: Tensor
    bias: Tensor

    def __init__(self, classes: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(classes, dim))
        self.register_buffer("bias", torch.zeros(classes))

    def forward(self, f: Tensor) -> Tensor:
        return F.linear(f, self.weight, self.bias)

    @property
    def known(self) -> bool:
        return bool(self.weight.any() or self.bias.any())


@dataclass(frozen=True)
class Sums:
    """Over some images: how many of every class, and their features about a common centre. Sums of two sets add up."""

    count: Tensor  # (C,) n_c
    total: Tensor  # (C, d) sum of f
    scatter: Tensor  # (d, d) sum of f f^T

    @classmethod
    def nothing(cls, classes: int, dim: int, device: torch.device | str = "cpu") -> "Sums":
        empty = {
            name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes(classes, dim).items()
        }
        return cls(**empty)

    @torch.no_grad()
    def add(self, f: Tensor, y: Tensor) -> None:
        """Take in features, already about the centre, of images of classes `y`."""
        f = f.double()
        self.count.add_(torch.bincount(y, minlength=len(self.count)))
        self.total.index_add_(0, y, f)
        self.scatter.addmm_(f.T, f)

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(self.count + other.count, self.total + other.total, self.scatter + other.scatter)

    def tensors(self) -> Tensors:
        """As they are sent: the scatter is symmetric to the bit."""
        return {"count": self.count, "total": self.total, "scatter": (self.scatter + self.scatter.T) / 2}

    def objection(self, examples: int) -> str:
        """Why these cannot be the sums of a site with so many images; empty if they can.

        Sums of real features obey sum f f^T >= sum_c (sum_c f)(sum_c f)^T / n_c, which bounds what a liar can do to the
        mean of a class by what he must admit as scatter.
        """
        if not all(t.isfinite().all() for t in vars(self).values()):
            return "its statistics are not finite"
        if any(float(t.abs().max()) > LARGEST for t in vars(self).values()):
            return f"its statistics have numbers above {LARGEST:g}"
        if bool((self.count < 0).any()) or bool((self.count != self.count.round()).any()):
            return "its statistics count classes in what are no whole numbers"
        if float(self.count.sum()) != examples:
            return f"its statistics are of {float(self.count.sum()):.0f} images, its reply of {examples}"
        if bool(self.total[self.count == 0].any()):
            return "its statistics have features of classes without images"
        if not torch.equal(self.scatter, self.scatter.T):
            return "its scatter is not symmetric"
        spread = float(self.scatter.trace())
        within = self.scatter - _between(self.count, self.total)
        if spread < 0 or float(torch.linalg.eigvalsh(within)[0]) < -SOUND * max(spread, 1e-300):
            return "its scatter is smaller than that of its class means"
        return ""


@dataclass(frozen=True)
class Head:
    """w_c = S^-1 mu_c, b_c = -|mu_c|^2 / 2 in the metric of S: equal priors, so balanced by construction."""

    weight: Tensor
    bias: Tensor
    shrinkage: float  # share of the identity in S

    def tensors(self) -> Tensors:
        """As a StatisticsHead holds it."""
        return {"weight": self.weight.float(), "bias": self.bias.float()}


def solve(sums: Sums, centre: Tensor, others: Tensor | None = None) -> Head | None:
    """The head of all images behind `sums`; None where there are none.

    A class without images is never its answer, unless `others` has a row for it: the (C, d) weights of another head.
    """
    count, images = sums.count, float(sums.count.sum())
    seen = count > 0
    if images == 0:
        return None
    mu = sums.total / count.clamp_min(1)[:, None]
    degrees = images - float(seen.sum())
    within = sums.scatter - _between(count, sums.total)
    covariance, shrinkage = _conditioned((within + within.T) / 2, degrees, sums, images)
    weight = torch.linalg.solve(covariance, mu.T).T.contiguous()
    bias = -(weight * mu).sum(dim=1) / 2 - weight @ centre.double()
    bias = bias.masked_fill(~seen, NOBODY)
    if others is not None and not seen.all():
        weight, bias = _completed(weight, bias, mu, seen, others.to(weight))
    return Head(weight, bias, shrinkage)


def adapted(head: StatisticsHead | nn.Linear, counts: Tensor, temperature: float) -> nn.Linear:
    """The head of one site: t (w_c f + b_c) + log pi_c, pi its own class frequencies, which it keeps to itself."""
    return linear(temperature * head.weight, temperature * head.bias + log_frequencies(counts).to(head.bias))


@torch.no_grad()
def temperature(logits: Tensor, y: Tensor, counts: Tensor) -> float:
    """The one by which a site's adapted head is most likely to say `y` of augmented training images.

    The scatter takes features for more certain than they are, so it is below 1. Augmented, images are not those of the
    statistics; it comes out as it does on images put apart. The fewer images there are to choose by, the nearer it
    stays to what is usual.
    """
    shifted = log_frequencies(counts).to(logits).masked_fill(counts <= 0, -torch.inf)

    def cost(t: float) -> float:
        return float(F.cross_entropy(t * logits + shifted, y, reduction="sum")) + LOOSE * math.log(t / USUAL) ** 2

    best: float = min(TEMPERATURES, key=cost)
    return best


def log_frequencies(counts: Tensor) -> Tensor:
    """log pi_c, finite also for classes a site has not: they are masked where it counts."""
    return torch.log(counts.double().clamp_min(0.5) / counts.sum().clamp_min(1))


def _completed(weight: Tensor, bias: Tensor, mu: Tensor, seen: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """With rows of the other head for classes that are not seen.

    Logits of both are log p(f | c) up to what is common to all classes, but one may be surer than the other. So the
    rows are scaled until both are equally sure of the seen classes at their means, and agree about them on average.
    """

    def sureness(rows: Tensor) -> Tensor:
        logits = mu[seen] @ rows.T  # biases fall out of the difference
        return logits.diagonal().mean() - logits.mean()

    mine, theirs = weight[seen], others[seen]
    scale = sureness(mine) / sureness(theirs)
    if not 0 < scale < torch.inf:  # one class is seen, or the other head has learnt nothing yet
        return weight, bias
    rows = scale * others + (mine - scale * theirs).mean(dim=0)
    return torch.where(seen[:, None], weight, rows), torch.where(seen, bias, bias[seen].mean())


def _between(count: Tensor, total: Tensor) -> Tensor:
    """sum_c n_c mu_c mu_c^T."""
    scaled = total / count.clamp_min(1).sqrt()[:, None]
    return scaled.T @ scaled


def _conditioned(within: Tensor, degrees: float, sums: Sums, images: float) -> tuple[Tensor, float]:
    """The covariance within classes, mixed with as much of a ball of the same size as the number of images calls for.

    The share is that of the oracle approximating shrinkage (Chen et al., IEEE TSP 2010), which needs nothing but the
    covariance: it falls with the number of images and is 1 where they say nothing of the shape. Where no class has two
    images the ball is that of all features, and the head that of the nearest mean.
    """
    dim = len(within)
    ball = torch.eye(dim, dtype=within.dtype, device=within.device)
    whole = sums.scatter.trace() - sums.total.sum(dim=0).square().sum() / images
    spread = float(within.trace())
    if degrees <= 0 or spread <= SOUND * float(sums.scatter.trace()):
        size = float(whole) / (dim * images)
        return ball * (size if size > 0 else 1.0), 1.0
    covariance = within / degrees
    trace, square = float(covariance.trace()), float(covariance.square().sum())
    apart = square - trace**2 / dim
    share = 1.0
    if apart > 0:
        share = min(1.0, ((1 - 2 / dim) * square + trace**2) / ((degrees + 1 - 2 / dim) * apart))
    return (1 - share) * covariance + (share * trace / dim) * ball, share


def shapes(classes: int, dim: int) -> dict[str, tuple[int, ...]]:
    """Of what a site sends, always float64."""
    return {"count": (classes,), "total": (classes, dim), "scatter": (dim, dim)}
