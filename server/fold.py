"""Folding replies one by one into a running weighted mean; a bad reply is refused before it touches anything.

Memory is one accumulator and the reply in hand, whatever the number of sites. What is folded is finite and far
enough from its dtype's limit that the mean and the sums are finite too, and so are the squares of the sums.
"""

import math
from collections.abc import Callable

import torch

from common.messages import SCHEMA, Order, Reply
from common.parts import Manifest, Tensors

HEADROOM = 1e6  # below the root of the largest number: 1.8e13 in float32, times 10^24 examples before a mean overflows


class Refused(Exception):
    """A reply that must not be folded; the text is the logged reason."""


class Fold:
    """The mean of the shared parts, weighted by examples, and the sum of the statistics, of one round.

    Both are computed on the device of the order's tensors, wherever a reply's are. `statistics` and `objection` are
    the method's.
    """

    def __init__(
        self,
        order: Order,
        statistics: dict[str, tuple[int, ...]],
        objection: Callable[[Reply], str],
        max_examples: int,
        max_update: float = 0.0,
    ) -> None:
        self._order = order
        self._device = next((t.device for group in order.shared.values() for t in group.values()), torch.device("cpu"))
        self._manifests = {part: Manifest.of(t) for part, t in order.shared.items()}
        self._statistics = Manifest(tuple((name, shape, "float32") for name, shape in sorted(statistics.items())))
        self._objection = objection
        self._max_examples = max_examples
        self._max_update = max_update
        self._total: dict[str, Tensors] = {}
        self._sums: Tensors = {}
        self.examples = 0
        self.clients: list[str] = []

    @torch.no_grad()  # a site in this process replies with its live parameters
    def add(self, reply: Reply) -> None:
        """Check `reply` and fold it in, or raise `Refused` and leave everything as it was."""
        self._check(reply)
        for part, values in reply.shared.items():
            here = [t.to(self._device) for t in values.values()]
            if part in self._total:
                torch._foreach_add_([self._total[part][name] for name in values], here, alpha=reply.examples)
            else:
                self._total[part] = dict(zip(values, torch._foreach_mul(here, reply.examples), strict=True))
        for name, t in reply.sums.items():
            if name in self._sums:
                self._sums[name].add_(t.to(self._device))
            else:
                self._sums[name] = t.to(self._device, copy=True)
        self.examples += reply.examples
        self.clients.append(reply.client)

    def result(self) -> tuple[dict[str, Tensors], Tensors]:
        """(mean of the shared parts, sums). The accumulator becomes the mean: call it once."""
        for values in self._total.values():
            torch._foreach_div_(list(values.values()), self.examples)
        return self._total, self._sums

    def _check(self, reply: Reply) -> None:
        order = self._order
        if reply.schema != SCHEMA:
            raise Refused(f"schema {reply.schema} instead of {SCHEMA}")
        if reply.round != order.round:
            raise Refused(f"for round {reply.round}, this is round {order.round}")
        if reply.model != order.model:
            raise Refused("trained from another model than the one sent")
        if reply.client in self.clients:
            raise Refused("this site has already answered")
        if not 0 < reply.examples <= self._max_examples:
            raise Refused(f"{reply.examples} examples are not between 1 and {self._max_examples}")
        if reply.shared.keys() != self._manifests.keys():
            raise Refused(f"parts {sorted(reply.shared)} instead of {sorted(self._manifests)}")
        for part, values in reply.shared.items():
            wrong = _difference(self._manifests[part], Manifest.of(values))
            if wrong:
                raise Refused(f"part {part}: {wrong}")
        wrong = _difference(self._statistics, Manifest.of(reply.sums))
        if wrong:
            raise Refused(f"statistics: {wrong}")
        for name, value in reply.metrics.items():
            if not (isinstance(value, float) and math.isfinite(value)):
                raise Refused(f"its metric {name} is not a finite number")
        for values in [*reply.shared.values(), reply.sums]:
            wrong = _overflow(values)
            if wrong:
                raise Refused(wrong)
        if self._max_update > 0:
            norm = self._distance(reply)
            if norm > self._max_update:
                raise Refused(f"its update's norm {norm:.3g} is above the bound {self._max_update:.3g}")
        wrong = self._objection(reply)
        if wrong:
            raise Refused(wrong)

    def _distance(self, reply: Reply) -> float:
        squares = 0.0
        for part, values in reply.shared.items():
            for name, t in values.items():
                squares += float((t.to(self._device) - self._order.shared[part][name]).double().square().sum())
        return math.sqrt(squares)


def _difference(expected: Manifest, got: Manifest) -> str:
    """The first way in which a part is not what was asked for; empty when it is."""
    ours, theirs = ({name: (shape, dtype) for name, shape, dtype in m.entries} for m in (expected, got))
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in theirs:
            return f"{name} is missing"
        if name not in ours:
            return f"{name} is not expected"
        if ours[name] != theirs[name]:
            return f"{name} is {theirs[name][1]}{list(theirs[name][0])} instead of {ours[name][1]}{list(ours[name][0])}"
    return ""


def _overflow(values: Tensors) -> str:
    """The first tensor that is not finite or has no headroom; empty when there is none."""
    norms = torch.stack(torch._foreach_norm(list(values.values()))).tolist() if values else []  # one wait for a GPU
    for (name, t), norm in zip(values.items(), norms, strict=True):
        limit = math.sqrt(torch.finfo(t.dtype).max) / HEADROOM
        # One pass at the speed of memory in any layout: no value is above the norm, and NaN is below nothing. Half,
        # because it is rounded. The largest value itself would take twice as long at best, aminmax up to ten times.
        if norm <= limit / 2:
            continue
        largest = float(t.abs().max())
        if not math.isfinite(largest):
            return f"{name} has values that are not finite"
        if largest > limit:
            return f"{name} has values up to {largest:.1e}, which are too large to be averaged"
    return ""
