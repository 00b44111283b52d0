"""The backbone as sites get it where it travels as changes (federation.wire = "int8" or "topk").

    broadcast(t) = broadcast(t-1) + Q(server(t) - broadcast(t-1))

What Q leaves out of one round is part of the next one's difference, so the broadcast never falls behind by more than
that. Sites answer with their change from broadcast(t), and the server adds it to its own server(t): nothing that was
left out is lost. All sites train from the same values: one that has kept broadcast(t-1) gets the change, any other
one the whole, and what there is of either is made once, for any number of sites. The way down is "int8" on both
wires: a mean over many sites is nowhere near zero, and slow links are slow on the way up.

Of the broadcast nothing is kept on disk: a server that starts again begins with server(t) for everybody, so its
rounds differ from then on, within the rounding, from those that would have been.
"""

import hashlib
from dataclasses import replace

from common import codec
from common.codec import CODED, PART, Change, Wire
from common.messages import Order, Reply
from common.parts import Tensors


class Broadcast:
    def __init__(self) -> None:
        self._model = ""  # the server's own
        self._base = self._name = ""  # of what was sent before, and of what is sent now
        self._values: Tensors = {}
        self._change: Change | None = None

    def of(self, order: Order, holds: str = "") -> Order:
        """The order as it is sent to a site that says it `holds` a broadcast of that name. Final parts, and what
        cannot be coded, are sent as they are."""
        if not (order.train and codec.fits(order.shared.get(PART, {}))):
            return order
        self._follow(order)
        others = {part: t for part, t in order.shared.items() if part != PART}
        if holds == self._name:
            return replace(order, shared=others, base=holds, reference=self._name)
        if self._change is not None and holds == self._base:
            changes = {PART: self._change}
            return replace(order, shared=others, changes=changes, base=holds, reference=self._name)
        return replace(order, shared={**order.shared, PART: self._values}, reference=self._name)

    def name(self, order: Order) -> str:
        """What a site holds that has read `order`; empty for nothing."""
        return self.of(order).reference

    def _follow(self, order: Order) -> None:
        """Move to the order's backbone, unless it was sent before: a round that is tried again sends the same."""
        if order.model == self._model:
            return
        target = order.shared[PART]
        if self._values.keys() == target.keys():
            self._change, _ = codec.encode(target, self._values)
            self._values = codec.decode(self._change, self._values)
        else:
            self._values = {name: t.detach().clone() for name, t in target.items()}
        # by it alone what is sent is known, wherever and whenever a server comes to it
        self._base, self._name = self._name, hashlib.sha256(f"{self._name} {order.model}".encode()).hexdigest()
        self._model = order.model


def opened(reply: Reply, order: Order, wire: Wire) -> Reply:
    """The reply with whole parts: the server's own and the change that the site sends. ValueError if it is not coded
    as it was asked to be."""
    if not (wire in CODED and order.train and codec.fits(order.shared.get(PART, {}))):
        if reply.changes:
            raise ValueError("it holds a change that was not asked for")
        return reply
    change = reply.changes.get(PART)
    if change is None or reply.changes.keys() != {PART} or PART in reply.shared or change.coding != wire:
        raise ValueError(f"its backbone is not coded as {wire}")
    try:
        whole = codec.decode(change, order.shared[PART])
    except ValueError as error:
        raise ValueError(f"its backbone: {error}") from None
    return replace(reply, shared={**reply.shared, PART: whole}, changes={})
