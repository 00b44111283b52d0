"""The class statistics of all sites for one model, and the head that follows from them."""

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from common import statistics
from common.messages import SCHEMA, Order, Reply
from common.methods.method import Method, ServerState
from common.net import Net, Task
from common.parts import Manifest, Tensors
from common.statistics import NOBODY, PART, Sums
from server.fold import Refused

log = logging.getLogger(__name__)

KNOWN = "known classes"  # in a state's extra
NAMED = 20  # classes in a line of the log, at most


class Survey:
    """The sum of what sites answer to `order`. A site that keeps its statistics to itself sends none."""

    def __init__(self, order: Order, classes: Sequence[str], max_examples: int) -> None:
        assert order.centre is not None
        self._order = order
        self._classes = classes
        self._centre = order.centre.cpu()
        shapes = statistics.shapes(len(classes), len(order.centre))
        self._manifest = Manifest(tuple((name, shape, "float64") for name, shape in sorted(shapes.items())))
        self._sums = Sums.nothing(len(classes), len(order.centre))
        self._max_examples = max_examples
        self.clients: list[str] = []
        self.kept: list[str] = []  # clients that keep theirs

    def add(self, reply: Reply) -> None:
        """Check `reply` and add it, or raise `Refused` and leave everything as it was."""
        order = self._order
        if reply.schema != SCHEMA or (reply.round, reply.model) != (order.round, order.model):
            raise Refused("its statistics are of another model than the one sent")
        if not 0 < reply.examples <= self._max_examples:
            raise Refused(f"{reply.examples} examples are not between 1 and {self._max_examples}")
        if not reply.sums:
            self.kept.append(reply.client)
            return
        if reply.shared or Manifest.of(reply.sums) != self._manifest:
            raise Refused("what it sends are no class statistics")
        sums = Sums(**{name: t.cpu() for name, t in reply.sums.items()})
        if wrong := sums.objection(reply.examples):
            raise Refused(wrong)
        self._sums = self._sums + sums
        self.clients.append(reply.client)

    def head(self, known: Tensor, others: Tensor | None) -> Tensors:
        """The head of all that came, as the part that sites get; all zero where there is none.

        A class that did not come may have been trained all the same: it is `known` of an earlier survey, or a site
        keeps its statistics to itself. Then `others` answers for it, where the method has such rows (see `solve`); a
        class that nobody ever had is never the answer.
        """
        found = statistics.solve(self._sums, self._centre, None if others is None else others.cpu())
        if found is None or not all(t.isfinite().all() for t in found.tensors().values()):
            if found is not None:
                log.warning("the head computed from the class statistics is not finite: there is none for this model")
            return {"weight": torch.zeros_like(self._sums.total).float(), "bias": torch.zeros(len(self._sums.count))}
        head = found.tensors()
        if not self.kept:
            head["bias"][(self._sums.count == 0) & ~known] = NOBODY
        for outcome, which in (
            ("are never the answer", head["bias"] == NOBODY),
            ("are answered from training alone", (self._sums.count == 0) & (head["bias"] > NOBODY)),
        ):
            names = [self._classes[c] for c in which.nonzero().flatten()]
            if names:
                listed = ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
                log.warning("round %d: classes without statistics that %s: %s", self._order.round, outcome, listed)
        return head


def known(state: ServerState, classes: int) -> Tensor:
    """Classes that some computed head so far could answer; a survey that brought nothing takes none away."""
    return state.extra.get(KNOWN, torch.zeros(classes, dtype=torch.bool)).cpu()


@torch.no_grad()
def centre(net: Net, task: Task, state: ServerState) -> Tensor:
    """The features of a blank image: about them those of real images are small, whatever offset all of them have."""
    net.load(state.parts)
    features = net["backbone"].eval()
    blank = torch.zeros(1, task.channels, task.side, task.side, device=next(features.parameters()).device)
    found: Tensor = features(blank)[0]
    return found.double().cpu()


def with_head(state: ServerState, head: Tensors) -> ServerState:
    device = next(t.device for group in state.parts.values() for t in group.values())
    answers = (head["bias"] > NOBODY) & head["weight"].any()
    return replace(
        state,
        parts={**state.parts, PART: {name: t.to(device) for name, t in head.items()}},
        extra={**state.extra, KNOWN: known(state, len(answers)) | answers.cpu()},
    )


def unsurveyed(method: Method, task: Task, state: ServerState) -> bool:
    """Whether a computed head is asked for that was not when the state was made."""
    return method.surveyed(task) and PART not in state.parts
