"""SSE-C, the static sparse equiangular frame: one fixed row w_c a class, all of one length, far apart, mostly zero.

(FedLoGe, ICLR 2024.) Up to C = d + 1 classes the rows aim at the simplex, whose angles are all arccos(-1/(C-1));
beyond that the smallest angle is made as large as the budget allows. Guarantees of `build`:

- exactly int(sparsity * dim * classes) entries are zero, at places that depend only on (dim, classes, sparsity,
  seed) and are the same on every machine and with every library version;
- with the solvers `gram` and `lse` every row has the asked length to fp32 rounding;
- a support on which the simplex cannot exist is refused, naming the condition that fails, unless `best_effort`.

The values themselves are the end of a non-convex search and may differ between machines. So one side builds the
frame once, sends `pack(...)` (the mask is rebuilt, not sent) with the `digest`, and the other side refuses a mismatch.
"""

import hashlib
import math
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.errors import UsageError, UserError
from common.frame_solver import BLOCK, Progress, Search, angle_bound, solve_gram, solve_lse, solve_reference

SOLVERS = ("auto", "reference", "gram", "lse")


@dataclass(frozen=True)
class FrameSpec:
    """Everything a frame depends on. The budgets only ever cut a search short; `max_work` does so reproducibly."""

    dim: int
    classes: int
    norm: float = 0.1  # length of every row: the temperature of the logits
    sparsity: float = 0.6  # share of exact zeros
    solver: str = "auto"  # gram where the simplex is possible, else lse
    seed: int = 0
    best_effort: bool = False  # build even where the simplex is impossible, and report the angle reached
    tolerance: float = 1e-3  # degrees: stop this close to the bound
    max_evaluations: int = 2000  # of the objective
    max_work: float = 5e13  # floating-point operations; about ten minutes of one core
    max_seconds: float = 900.0  # safety net; a search that meets it is not reproducible
    reference_steps: int = 10_000

    def __post_init__(self) -> None:
        rules = {
            "dim": (self.dim >= 1, "1 or more"),
            "classes": (self.classes >= 2, "2 or more"),
            "norm": (0 < self.norm < math.inf, "a number above 0"),
            "sparsity": (0 <= self.sparsity < 1, "a number in [0, 1)"),
            "solver": (self.solver in SOLVERS, "one of " + ", ".join(SOLVERS)),
            "seed": (0 <= self.seed < 2**63, "a number from 0 to 2^63 - 1"),
            "tolerance": (self.tolerance > 0, "a number of degrees above 0"),
            "max_evaluations": (self.max_evaluations >= 1, "1 or more"),
            "max_work": (self.max_work > 0, "a number above 0"),
            "max_seconds": (self.max_seconds > 0, "a number above 0"),
            "reference_steps": (self.reference_steps >= 0, "0 or more"),
        }
        for name, (holds, allowed) in rules.items():
            if not holds:
                raise UsageError(f"frame: {name} = {getattr(self, name)!r} is not allowed; give {allowed}")

    @property
    def zeros(self) -> int:
        return int(self.sparsity * self.dim * self.classes)

    @property
    def bound_deg(self) -> float:
        """No frame of this size has a smallest angle above this."""
        return angle_bound(self.dim, self.classes)


@dataclass(frozen=True)
class Angles:
    """Angles over all pairs of rows, in degrees."""

    min_deg: float
    mean_deg: float


@dataclass(frozen=True)
class Report:
    """What was built, as measured on the final fp32 weight."""

    min_angle_deg: float
    mean_angle_deg: float
    bound_deg: float
    norm_std: float  # standard deviation of the row lengths over their mean
    zeros: int
    seconds: float
    solver: str  # the one that ran
    evaluations: int
    stopped: str  # bound, converged, or the budget that ended it: evaluations, seconds, steps


@dataclass(frozen=True, eq=False)
class Frame:
    weight: Tensor  # fp32, classes x dim: the layout of nn.Linear.weight
    spec: FrameSpec
    digest: str
    report: Report


def keys(seed: int, start: int, count: int) -> npt.NDArray[np.uint64]:
    """Numbers start .. start+count-1 of the SplitMix64 stream of this seed; integers only, so the same everywhere."""
    state = scramble(np.array([seed + 1], dtype=np.uint64))  # neighbouring seeds get unrelated streams
    steps = np.arange(start + 1, start + count + 1, dtype=np.uint64)
    return scramble(state + steps * np.uint64(0x9E3779B97F4A7C15))


def scramble(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser, a bijection of 64-bit words: distinct inputs give distinct keys."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def mask(dim: int, classes: int, sparsity: float, seed: int) -> Tensor:
    """The support, dim x classes: False at the int(sparsity * dim * classes) smallest keys, True (free) elsewhere."""
    ranks = keys(seed, 0, dim * classes)
    zeros = int(sparsity * dim * classes)
    free = ranks > np.partition(ranks, zeros - 1)[zeros - 1] if zeros else np.ones(len(ranks), dtype=np.bool_)
    return torch.from_numpy(free.reshape(dim, classes))


def uniform(spec: FrameSpec) -> Tensor:
    """Starting values in [0, 1), dim x classes: the stream's numbers after those that chose the mask."""
    size = spec.dim * spec.classes
    words = keys(spec.seed, size, size)
    return torch.from_numpy((words >> np.uint64(11)) * 2.0**-53).reshape(spec.dim, spec.classes)


def angles(weight: Tensor) -> Angles:
    """Smallest and mean angle over pairs of rows, in float64, holding BLOCK rows of the cosine matrix at a time."""
    W = weight.detach().double()
    W = W / W.norm(dim=1, keepdim=True)
    largest, total = -1.0, 0.0
    for start in range(0, len(W), BLOCK):
        cosines = W[start : start + BLOCK] @ W[start:].T
        above = torch.ones_like(cosines, dtype=torch.bool).triu_(1)
        pairs = cosines[above].clamp_(-1, 1)
        if len(pairs):
            largest = max(largest, float(pairs.max()))
            total += float(pairs.arccos_().sum())
    count = len(W) * (len(W) - 1) / 2
    return Angles(min_deg=math.degrees(math.acos(largest)), mean_deg=math.degrees(total / count))


def simplex_limit(dim: int, sparsity: float) -> float:
    """Most classes for which the free entries suffice: C (C-1) / 2 <= (1 - sparsity) d C - d."""
    q = (1 - sparsity) * dim + 0.5
    return q + math.sqrt(q * q - 2 * dim) if q * q >= 2 * dim else 0.0


def conditions(spec: FrameSpec) -> list[str]:
    """Why the frame cannot be what it aims at, a line a condition; empty if nothing is known against it.

    A class needs a free entry. The simplex (C <= d + 1) also needs the count (its Gram matrix fixes a number a
    pair, and rows summing to zero cost one number a dimension in use) and the overlap (two rows without a common
    free dimension are at 90 degrees whatever their values). Beyond d + 1 no angle above 90 is aimed at.
    """
    support = mask(spec.dim, spec.classes, spec.sparsity, spec.seed)
    return empty_classes(support) + simplex_failures(spec, support)


def empty_classes(support: Tensor) -> list[str]:
    empty = (~support.any(dim=0)).nonzero().flatten().tolist()
    if not empty:
        return []
    return [f"empty: {len(empty)} of {support.shape[1]} classes have no free entry (first: class {empty[0]})"]


def simplex_failures(spec: FrameSpec, support: Tensor) -> list[str]:
    failures: list[str] = []
    if spec.classes > spec.dim + 1:
        return failures
    freedom = int((support.sum(dim=1) - 1).clamp_(min=0).sum())
    pairs = spec.classes * (spec.classes - 1) // 2
    if freedom < pairs:
        limit = int(simplex_limit(spec.dim, spec.sparsity))
        failures.append(
            f"count: {freedom} degrees of freedom for {pairs} pairs of classes "
            f"(dim {spec.dim} at sparsity {spec.sparsity:g} carries about {limit} classes)"
        )
    shared = support.T.float() @ support.float()
    apart = (shared == 0).triu_(1).nonzero().tolist()
    if apart:
        failures.append(
            f"overlap: {len(apart)} of {pairs} pairs of classes share no free dimension "
            f"(first: {apart[0][0]} and {apart[0][1]}), so their angle is 90 and not {spec.bound_deg:.3f} degrees"
        )
    return failures


def build(spec: FrameSpec, *, device: str = "cpu", progress: Progress | None = None) -> Frame:
    """Solve the frame; `progress` hears (evaluations so far, smallest angle so far in degrees)."""
    started = time.monotonic()
    support = mask(spec.dim, spec.classes, spec.sparsity, spec.seed)
    solver = choose_solver(spec, support)
    keep = support.T.contiguous()
    W, evaluations, stopped = solve(spec, solver, keep.to(device), progress)
    weight = W.cpu().masked_fill(~keep, 0).contiguous()  # +0 at every zero, so that equal frames have equal bytes
    measured, lengths = angles(weight.to(device)), weight.double().norm(dim=1)
    report = Report(
        min_angle_deg=measured.min_deg,
        mean_angle_deg=measured.mean_deg,
        bound_deg=spec.bound_deg,
        norm_std=float(lengths.std(correction=0) / lengths.mean()),
        zeros=int((weight == 0).sum()),
        seconds=time.monotonic() - started,
        solver=solver,
        evaluations=evaluations,
        stopped=stopped,
    )
    return Frame(weight=weight, spec=spec, digest=digest(weight), report=report)


def choose_solver(spec: FrameSpec, support: Tensor) -> str:
    """The solver that will run, or a refusal that names the condition that fails."""
    if empty := empty_classes(support):
        raise UserError(f"frame: {empty[0]}; lower sparsity {spec.sparsity:g} or raise dim {spec.dim}")
    simplex = spec.classes <= spec.dim + 1
    if spec.solver == "gram" and not simplex:
        raise UserError(
            f"frame: solver 'gram' solves for the simplex, which needs classes <= dim + 1 = {spec.dim + 1}, "
            f"not {spec.classes}; use solver 'auto'"
        )
    failures = simplex_failures(spec, support)
    if failures and not spec.best_effort:
        raise UserError(
            f"frame: the exact simplex is impossible: {'; '.join(failures)}; "
            "lower sparsity, raise dim, or ask for best_effort"
        )
    if spec.solver == "auto":
        return "gram" if simplex and not failures else "lse"
    return spec.solver


def solve(spec: FrameSpec, solver: str, keep: Tensor, progress: Progress | None) -> tuple[Tensor, int, str]:
    """(fp32 weight, evaluations, why it stopped); `keep` is classes x dim."""
    A = uniform(spec).to(keep.device)
    if solver == "reference":
        return solve_reference(keep, A, spec.norm, spec.reference_steps), spec.reference_steps, "steps"
    # Large frames are solved in fp32 for memory and speed: their budget ends them long before its rounding does.
    dtype = torch.float64 if spec.dim * spec.classes <= 2**18 else torch.float32
    per_evaluation = 3 * spec.dim * spec.classes**2
    search = Search(
        keep=keep.to(dtype),
        target=math.cos(math.radians(spec.bound_deg - 0.9 * spec.tolerance)),  # the rest is for rounding to fp32
        max_evaluations=max(1, min(spec.max_evaluations, int(spec.max_work / per_evaluation))),
        max_seconds=spec.max_seconds,
        progress=progress,
    )
    V = ((2 * A - 1).T * keep).to(dtype).contiguous()
    stopped = solve_gram(search, V) if solver == "gram" else solve_lse(search, V, spec.tolerance)
    assert search.best is not None  # every search evaluates at least once
    W = search.best.double()
    return (W / W.norm(dim=1, keepdim=True) * spec.norm).float(), search.evaluations, stopped


def digest(weight: Tensor) -> str:
    """SHA-256 of the fp32 values, little-endian, class after class."""
    return hashlib.sha256(weight.detach().cpu().contiguous().numpy().astype("<f4").tobytes()).hexdigest()


def pack(weight: Tensor, support: Tensor) -> Tensor:
    """The free values, class after class; `support` is the dim x classes mask."""
    free = support.T
    if weight.shape != free.shape or weight.dtype != torch.float32:
        raise UserError(
            f"frame: a {weight.dtype} weight of shape {tuple(weight.shape)} does not fit a mask for "
            f"{tuple(free.shape)}; pack the fp32 weight with the mask of its own spec"
        )
    if bool((weight[~free] != 0).any()):
        raise UserError("frame: the weight is not zero outside its mask; pack it with the mask of its own spec")
    return weight[free]


def unpack(values: Tensor, spec: FrameSpec, expected: str | None = None) -> Tensor:
    """The weight again, bit for bit; refused if its digest is not `expected`."""
    free = mask(spec.dim, spec.classes, spec.sparsity, spec.seed).T
    size = spec.dim * spec.classes - spec.zeros
    if values.shape != (size,) or values.dtype != torch.float32:
        raise UserError(
            f"frame: {values.dtype} values of shape {tuple(values.shape)} received, float32 of shape ({size},) "
            "expected; both sides must use the same frame settings"
        )
    weight = torch.zeros(spec.classes, spec.dim)
    weight[free] = values
    if expected is not None and digest(weight) != expected:
        raise UserError(
            f"frame: digest {digest(weight)[:16]} is not the expected {expected[:16]}; fetch the frame again"
        )
    return weight
