"""What a site keeps where backbones travel as changes: the backbone that the next change is from, and what it has not
sent yet of what it has learnt.

The first is in memory only: a site that has lost it gets the whole. The second, the residual, is part of what it has
learnt and as durable as its local parts: a file a round, written before the reply is, so that a round which is run
again begins with what it began with the first time. Where a round does not count for a site (its reply was late,
refused or lost) the change it sent is lost with it, as its whole round is in FedAvg; the residual of that round stays.
It is kept in bfloat16: half the bytes to write and to check in every round, for an error that is a 500th of what was
late anyway.
"""

import logging
from dataclasses import replace

import torch

from client.refusal import Refusal
from client.store import Store
from common import codec
from common.codec import CODED, PART, Wire
from common.messages import LACKS, Order, Reply
from common.parts import Tensors
from common.sgd import Diverged

log = logging.getLogger(__name__)


class Reference:
    """The backbone of the last order to train: others travel whole and have no name."""

    def __init__(self) -> None:
        self.name = ""  # by which the server knows it; empty for none
        self._values: Tensors = {}

    def take(self, order: Order) -> Order:
        """The order with whole parts."""
        if not order.train:
            return order
        shared = order.shared
        if order.base:
            if order.base != self.name:
                raise Refusal(LACKS)
            try:
                changed = {part: codec.decode(change, self._values) for part, change in order.changes.items()}
            except ValueError as error:
                raise Refusal(f"the change of the backbone cannot be read ({error})") from None
            shared = {**shared, PART: self._values, **changed}
        self.name = order.reference
        self._values = shared[PART] if order.reference else {}
        return replace(order, shared=shared, changes={}, base="", reference="")


class Residual:
    """What a site has learnt and not sent, kept in `store`. `federation` says whose it is."""

    def __init__(self, store: Store, wire: Wire, share: float, federation: str) -> None:
        self.store = store
        self._about = {"wire": str(wire), "federation": federation}
        self._wire = wire
        self._share = share if wire == "topk" else 1.0

    def code(self, reply: Reply, received: Tensors) -> Reply:
        """The reply with its backbone as a change from the `received` one, if that is how it travels."""
        if self._wire not in CODED or not codec.fits(received):
            return reply
        try:
            change, left = codec.encode(reply.shared[PART], received, self._kept(reply.round, received), self._share)
        except ValueError as error:
            raise Diverged(f"training diverged ({error}): use a smaller train.lr") from None
        kept = {name: t.to(torch.bfloat16) for name, t in left.items()}
        self.store.save(reply.round, {PART: kept}, self._about)
        others = {part: t for part, t in reply.shared.items() if part != PART}
        return replace(reply, shared=others, changes={PART: change})

    def _kept(self, round: int, like: Tensors) -> Tensors | None:
        found = self.store.newest(round)
        if found is None:
            return None
        values, about = found
        left = values.get(PART, {})
        for what, ours in self._about.items():
            if about.get(what) != ours:
                log.warning("%s: what was left to send is of another %s: it is dropped", self.store.folder, what)
                return None
        wanted = {name: t.shape for name, t in like.items() if not name.endswith(codec.EXACT)}
        if {name: t.shape for name, t in left.items()} != wanted or any(
            t.dtype is not torch.bfloat16 for t in left.values()
        ):
            log.warning("%s: what was left to send is of another model: it is dropped", self.store.folder)
            return None
        return left
