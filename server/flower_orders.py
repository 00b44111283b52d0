"""What an order looks like to each site, what a reply to it says, and how many bytes either was.

Sites need different things of one order: the fixed parts or not, and where backbones travel as changes the change or
the whole. Whatever two sites need alike is encoded once.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

from flwr.app import RecordDict

from common import statistics
from common.codec import CODED, Wire
from common.config import RunConfig
from common.deployment import from_settings
from common.messages import Order, Reply
from common.net import build
from common.packed import fixed_digest
from common.wire import Card, decode_reply, encode_order, reply_bytes, weight
from server.broadcast import Broadcast, opened
from server.status import Traffic


class Orders:
    """By the federation's settings. `count` is told of the bytes of the order under way and its replies, as they are
    handed to Flower, whenever there are more."""

    def __init__(self, settings: str, wire: Wire, count: Callable[[Traffic], None] = lambda _: None) -> None:
        deployment = from_settings(settings, RunConfig())
        method = deployment.config.method
        self.classes = deployment.task.classes
        self._statistics = method.statistics(build(method, deployment.task))
        self._frame = deployment.config.frame
        self._settings = settings
        self._wire: Wire = wire
        self._broadcast = Broadcast()
        self._count = count
        self._counted = ("", True)  # of the order that is: its model, and whether it trains
        self._traffic: Traffic = {}

    def encoded(self, order: Order, cards: Mapping[int, Card]) -> dict[int, RecordDict]:
        """The content for each node, by its site's card."""
        needed = frozenset(fixed_digest(order.fixed).split())
        made: dict[tuple[frozenset[str], str], RecordDict] = {}
        contents = {}
        for node, card in cards.items():
            held = needed & frozenset(card.holds.split())
            theirs = self._broadcast.of(order, card.reference) if self._wire in CODED else order
            form = held, theirs.base
            if form not in made:
                made[form] = encode_order(
                    theirs, self._settings, holds=" ".join(held), wire=self._wire, frame=self._frame
                )
            contents[node] = made[form]
        return contents

    def largest(self, order: Order) -> int:
        """Bytes an honest reply does not reach."""
        if order.centre is None:
            return reply_bytes(order, self._statistics)
        return reply_bytes(order, statistics.shapes(len(self.classes), len(order.centre)))

    def read(self, content: RecordDict, name: str, order: Order) -> Reply:
        """The reply of the site called `name`; ValueError if it is none."""
        return opened(decode_reply(content, name, self._wire), order, self._wire)

    def after(self, card: Card, order: Order) -> Card:
        """That of a site that has read `order`."""
        reference = self._broadcast.of(order).reference if self._wire in CODED and order.train else card.reference
        return replace(card, holds=fixed_digest(order.fixed), reference=reference)

    def note(self, way: str, order: Order, contents: Mapping[str, RecordDict]) -> None:
        """Count what went `down` to sites or came `up` from them. A round that is tried again goes on counting."""
        if (order.model, order.train) != self._counted:  # a model is surveyed, and then trained from
            self._counted, self._traffic = (order.model, order.train), {}
        sizes = {id(content): weight(content) for content in {id(c): c for c in contents.values()}.values()}
        for name, content in contents.items():
            self._traffic.setdefault(name, {"down": 0, "up": 0})[way] += sizes[id(content)]
        self._count({name: dict(both) for name, both in self._traffic.items()})
