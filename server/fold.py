"""Folding replies one by one into a running weighted mean; a bad reply is refused before it touches anything.

Memory is one accumulator and the reply in hand, whatever the number of sites.
"""

import math

import torch

from common.messages import SCHEMA, Order, Reply
from common.parts import Manifest, Tensors


class Refused(Exception):
    """A reply that must not be folded; the text is the logged reason."""


class Fold:
    """The mean of the shared parts, weighted by examples, and the sum of the statistics, of one round."""

    def __init__(self, order: Order, max_examples: int, max_update: float = 0.0) -> None:
        self._order = order
        self._manifests = {part: Manifest.of(t) for part, t in order.shared.items()}
        self._max_examples = max_examples
        self._max_update = max_update
        self._total: dict[str, Tensors] = {}
        self._sums: Tensors = {}
        self.examples = 0
        self.clients: list[str] = []

    def add(self, reply: Reply) -> None:
        """Check `reply` and fold it in, or raise `Refused` and leave everything as it was."""
        self._check(reply)
        for part, values in reply.shared.items():
            into = self._total.setdefault(part, {})
            for name, t in values.items():
                if name in into:
                    into[name].add_(t.detach(), alpha=reply.examples)
                else:
                    into[name] = t.detach() * reply.examples
        for name, t in reply.sums.items():
            self._sums[name] = self._sums[name] + t if name in self._sums else t.clone()
        self.examples += reply.examples
        self.clients.append(reply.client)

    def result(self) -> tuple[dict[str, Tensors], Tensors]:
        """(mean of the shared parts, sums). The accumulator becomes the mean: call it once."""
        for values in self._total.values():
            for t in values.values():
                t.div_(self.examples)
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
        if self._sums and {n: t.shape for n, t in reply.sums.items()} != {n: t.shape for n, t in self._sums.items()}:
            raise Refused("its statistics have other names or shapes than the other sites'")
        for values in [*reply.shared.values(), reply.sums]:
            for name, t in values.items():
                # a sum is finite only if all values are; should finite ones overflow it, look at each
                if not torch.isfinite(t.sum()) and not torch.isfinite(t).all():
                    raise Refused(f"{name} has values that are not finite")
        if self._max_update > 0:
            norm = self._distance(reply)
            if norm > self._max_update:
                raise Refused(f"its update's norm {norm:.3g} is above the bound {self._max_update:.3g}")

    def _distance(self, reply: Reply) -> float:
        squares = 0.0
        for part, values in reply.shared.items():
            for name, t in values.items():
                squares += float((t - self._order.shared[part][name]).double().square().sum())
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
