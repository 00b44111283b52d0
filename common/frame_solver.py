"""Solvers for the frame: unit rows on a fixed sparse support, every pair as far apart as possible.

W (classes x dim) holds one unit row w_c a class. The search runs over unconstrained rows v_c = |v_c| w_c; the
objective sees only the directions and its gradient is made tangent and masked, so length and support are exact
at every step and nothing has to be penalised. Two objectives do the work, both with gradients by hand:

    gram   sum over pairs of (cos + 1/(C-1))^2         asks for the simplex's whole Gram matrix at once
    lse    log sum over pairs of exp(tau cos) / tau    tends to the largest cosine as tau doubles

`lse` starts from the frame potential, costs 3 d C^2 operations an evaluation, and holds O(dC + BLOCK C) numbers
plus 2 HISTORY copies of W. `reference` is the published procedure, kept for comparisons.

Guarantee: what is returned is the best point measured, and for one machine, one thread and no time limit
reached, the same input gives the same bits.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from common.errors import UserError

BLOCK = 512  # rows of the cosine matrix held at a time
HISTORY = 10  # L-BFGS pairs
WINDOW = 5  # iterations over which progress is judged: a single short step says nothing

# (value, gradient with respect to the unit rows, largest cosine if it was seen)
Objective = Callable[[Tensor], tuple[float, Tensor, float | None]]
Progress = Callable[[int, float], None]  # evaluations so far, smallest angle so far in degrees


class Finished(Exception):
    """Ends a search from inside an evaluation; the message says why."""


@dataclass
class Search:
    """One solve: the support, when to stop, and the best point seen."""

    keep: Tensor  # 0/1, classes x dim
    target: float  # a largest cosine this small is good enough
    max_evaluations: int
    max_seconds: float
    progress: Progress | None = None
    evaluations: int = 0
    worst: float = math.inf
    best: Tensor | None = None
    started: float = field(default_factory=time.monotonic)

    def evaluate(self, V: Tensor, objective: Objective) -> tuple[float, Tensor]:
        """Value and gradient at V, counted, remembered if best, and refused once there is reason to stop."""
        length = V.norm(dim=1, keepdim=True)
        W = V / length
        value, grad, worst = objective(W)
        self.evaluations += 1
        if worst is None and math.isinf(self.worst):
            self.best = W  # nothing measured yet: the latest point is the best guess
        elif worst is not None and worst < self.worst:
            self.worst, self.best = worst, W
        if self.progress is not None:
            self.progress(self.evaluations, self.angle())
        if self.worst <= self.target:
            raise Finished("bound")
        if self.evaluations >= self.max_evaluations:
            raise Finished("evaluations")
        if time.monotonic() - self.started >= self.max_seconds:
            raise Finished("seconds")
        grad -= (grad * W).sum(dim=1, keepdim=True) * W
        grad *= self.keep
        grad /= length
        return value, grad

    def angle(self) -> float:
        return math.degrees(math.acos(max(-1.0, min(1.0, self.worst))))


def angle_bound(dim: int, classes: int) -> float:
    """Degrees: simplex up to d + 1 classes, Rankin's 90 up to 2d, Levenshtein's third bound beyond."""
    if classes <= dim + 1:
        return math.degrees(math.acos(-1 / (classes - 1)))
    if classes <= 2 * dim:
        return 90.0
    # L3(s) points at most have cosines <= s; it grows with s and holds up to `high`.
    low, high = 0.0, (math.sqrt(dim + 3) - 1) / (dim + 2)
    for _ in range(60):
        s = (low + high) / 2
        room = dim * (1 - s) * (2 + (dim + 1) * s) / (1 - dim * s * s)
        low, high = (s, high) if room < classes else (low, s)
    return math.degrees(math.acos(low))


def gram_energy(W: Tensor) -> tuple[float, Tensor, float | None]:
    """Sum over pairs of (cos + 1/(C-1))^2, kept as residuals so that it stays accurate near zero."""
    shift = 1 / (len(W) - 1)
    R = W @ W.T
    R += shift
    R.fill_diagonal_(-math.inf)
    worst = float(R.max()) - shift
    R.fill_diagonal_(0)
    return 0.5 * float(R.square().sum(dtype=torch.float64)), 2 * (R @ W), worst


def frame_potential(W: Tensor) -> tuple[float, Tensor, float | None]:
    """The same energy up to a constant, through the d x d operator W'W: cheaper than the Gram matrix if C > d."""
    shift = 1 / (len(W) - 1)
    S, total = W.T @ W, W.sum(dim=0)
    value = 0.5 * float(S.square().sum(dtype=torch.float64)) + shift * float(total.dot(total))
    return value, 2 * (W @ S) + 2 * shift * total, None


def log_sum_exp(W: Tensor, tau: float) -> tuple[float, Tensor, float | None]:
    """log(sum over pairs of exp(tau cos)) / tau in one pass over the upper triangle, block by block."""
    grad, worst, mass = torch.zeros_like(W), -1.0, 0.0
    for start in range(0, len(W), BLOCK):
        rows, rest = W[start : start + BLOCK], W[start:]
        P = rows @ rest.T
        square = P[:, : len(rows)]
        square.masked_fill_(torch.ones_like(square, dtype=torch.bool).tril_(), -math.inf)
        peak = float(P.max())
        if peak > worst:  # keep the largest exponent at zero: what was summed so far shrinks with it
            shrink = math.exp(tau * (worst - peak))
            grad *= shrink
            mass, worst = mass * shrink, peak
        P.sub_(worst).mul_(tau).exp_()
        mass += float(P.sum(dtype=torch.float64))
        grad[start : start + BLOCK].addmm_(P, rest)
        grad[start:].addmm_(P.T, rows)
    return worst + math.log(mass) / tau, grad.div_(mass), worst


def dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.flatten(), b.flatten()))


def direction(grad: Tensor, pairs: list[tuple[Tensor, Tensor, float]]) -> Tensor:
    """The L-BFGS descent direction from (step, change of gradient, their product), oldest first."""
    q = grad.neg()
    weights = []
    for s, y, sy in reversed(pairs):
        weights.append(dot(s, q) / sy)
        q.add_(y, alpha=-weights[-1])
    if pairs:
        _, y, sy = pairs[-1]
        q *= sy / dot(y, y)
    for (s, y, sy), weight in zip(pairs, reversed(weights), strict=True):
        q.add_(s, alpha=weight - dot(y, q) / sy)
    return q


def minimise(search: Search, V: Tensor, objective: Objective, iterations: int, least: float) -> Tensor:
    """L-BFGS with backtracking, until WINDOW iterations gain less than `least` of the value."""
    V = V / V.norm(dim=1, keepdim=True)
    value, grad = search.evaluate(V, objective)
    values, pairs = [value], list[tuple[Tensor, Tensor, float]]()
    for _ in range(iterations):
        D = direction(grad, pairs)
        slope = dot(grad, D)
        if slope >= 0:
            break
        # Without curvature yet, turn the rows by a tenth of a radian on average at most.
        step = 1.0 if pairs else min(1.0, 0.1 * math.sqrt(len(V)) / math.sqrt(-slope))
        for _ in range(12):
            V_next = V.add(D, alpha=step)
            value, grad_next = search.evaluate(V_next, objective)
            excess = value - values[-1] - step * slope
            if value <= values[-1] + 1e-4 * step * slope:
                break
            step = min(0.5 * step, max(0.1 * step, -slope * step * step / (2 * excess)))
        else:
            break
        s, y = V_next - V, grad_next - grad
        sy = dot(s, y)
        if sy > 1e-10 * math.sqrt(dot(s, s) * dot(y, y)):
            pairs = [*pairs[1 - HISTORY :], (s, y, sy)]
        V, grad = V_next, grad_next
        values.append(value)
        if len(values) > WINDOW and values[-1 - WINDOW] - value <= least * abs(value):
            break
    return V


def solve_gram(search: Search, V: Tensor) -> str:
    try:
        minimise(search, V, gram_energy, search.max_evaluations, 1e-6)
    except Finished as reason:
        return str(reason)
    return "converged"


def solve_lse(search: Search, V: Tensor, tolerance: float) -> str:
    """Doubles tau until smoothing can hide no more than `tolerance` (degrees) of the largest cosine."""
    classes, dim = V.shape
    stage = max(30, min(100, search.max_evaluations // 5))  # a small budget must still see several values of tau
    tau = 2 * math.sqrt(dim)  # 1 / tau starts at half the spread of random cosines
    try:
        if classes <= dim + 1:
            V = minimise(search, V, gram_energy, 10 * stage, 1e-4)
        else:
            V = minimise(search, V, frame_potential, 10, 1e-3)
        while math.log(classes * classes / 2) / tau > math.radians(tolerance):
            V = minimise(search, V, lambda W, tau=tau: log_sum_exp(W, tau), stage, 1e-5)  # type: ignore[misc]
            tau *= 2
    except Finished as reason:
        return str(reason)
    return "converged"


def solve_reference(keep: Tensor, A: Tensor, norm: float, steps: int) -> Tensor:
    """The published procedure from A ~ U[0,1) (dim x classes): a masked simplex ETF, then Adam on norms and angles.

    Minimises sum_c (|w_c| - norm)^2 - mean_c arccos(max_{j != c} cos(w_c, w_j)); the lengths stay approximate.
    """
    dim, classes = A.shape
    if classes > dim:
        raise UserError(
            f"solver 'reference' starts from the QR factors of a {dim} x {classes} matrix and needs classes <= dim; "
            "use solver 'auto'"
        )
    centre = torch.eye(classes, dtype=A.dtype, device=A.device) - 1 / classes
    M = math.sqrt(classes / (classes - 1)) * torch.linalg.qr(A).Q @ centre
    W: Tensor = (M.T.float() * keep).requires_grad_()
    adam = torch.optim.Adam([W], lr=1e-4)
    for _ in range(steps):
        length = W.norm(dim=1)
        U = W / length[:, None]
        largest = (U @ U.T).fill_diagonal_(-2).amax(dim=1)
        loss = (length - norm).square().sum() - largest.clamp(-1 + 1e-6, 1 - 1e-6).arccos().mean()
        (grad,) = torch.autograd.grad(loss, W)
        W.grad = grad * keep
        adam.step()
    return W.detach()
