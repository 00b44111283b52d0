"""The sites of a running federation, reached through Flower: a `Fleet` over the Grid of a ServerApp.

A site counts from when its card is good until it goes offline or fails; its card says whether it holds the fixed
parts, which then need not be sent. Who a site is, the registry says, by the key that the SuperLink verified; only
where there is none, its card does. Sites that are offline are never addressed, those that still work on an order that
has been given up only if there are too few others, and never with a third one. A site that turns out to lack the model
that its order is a change of gets the whole at once.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from flwr.app import RecordDict
from flwr.superlink.grid import GrpcGrid

from common.codec import Wire
from common.errors import UserError
from common.messages import LACKS, Order, Reply, class_digest
from common.wire import CARD, JUDGE, OVER, TRAIN, VERSION, Card, decode_card, encode_ask
from server.fleet import Failure
from server.flower_orders import Orders
from server.flower_post import LATE, Answer, Letter, Post
from server.status import Traffic

log = logging.getLogger(__name__)

POLL = 0.2  # seconds between two looks for sites while some are awaited
WATCH = 1.0  # and while a round is open
CARD_TTL = 60.0  # seconds a site has for its card
AGAIN = 60.0  # seconds after which a site without a good one is asked again
FRESH = 10.0  # seconds that are waited for cards that were just asked for, though there are sites enough
CARD_BYTES = 16 << 20  # one with the counts of very many classes
FAREWELL = 15.0  # seconds the sites have to hear that it is over
LONGEST = 30 * 86400.0  # seconds a message may live
GONE = "went offline before the order was sent"
OWED = 2  # orders given up that a site may have left to answer

Names: TypeAlias = Callable[[], dict[int, str]]
Notify: TypeAlias = Callable[[dict[str, dict[str, Any]], dict[str, str]], None]


@dataclass
class _Node:
    """A node that is online."""

    id: int
    name: str  # empty as long as nobody knows
    since: float  # seconds since 1970
    card: Card | None = None
    problem: str = ""  # with its card
    forgets: bool = False  # it has lost a model that it had: it gets the whole from then on
    asked: float = -math.inf  # when its card was asked for last
    asking: Letter | None = None

    @property
    def called(self) -> str:
        return self.name or f"node {self.id}"


class FlowerFleet:
    """`registry` gives the names of nodes; None takes those of the cards. `notify` is told of sites (as in
    status.json) and of cards that are not good, whenever either changes; `count` of the bytes of a round."""

    def __init__(
        self,
        grid: GrpcGrid,
        settings: str,
        registry: Names | None = None,
        wire: Wire = "fp32",
        notify: Notify = lambda *_: None,
        count: Callable[[Traffic], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._orders = Orders(settings, wire, count)
        self._classes = class_digest(self._orders.classes)
        self._registry = registry
        self._notify = notify
        self._clock = clock
        self._post = Post(grid, clock)
        self._nodes: dict[int, _Node] = {}
        self._registered: dict[int, str] = {}
        self._unnamed: set[int] = set()  # nodes that were said to be nobody's
        self._seen: dict[str, dict[str, Any]] = {}  # every site there was, as in status.json
        self._told: tuple[dict[str, dict[str, Any]], dict[str, str]] = ({}, {})
        self._asked_registry = -math.inf
        self._watched = -math.inf

    def names(self, at_least: int, wait: float) -> list[str]:
        began = self._clock()
        while (answer := self._post.next(0.0)) is not None:  # what has come since the last round
            self._note(answer)
        while True:
            self._watch()
            now = self._clock()
            free, busy = self._ready()
            enough = len(free) >= at_least or len(free) + len(busy) >= at_least
            fresh = any(node.asking is not None and now < node.asked + FRESH for node in self._nodes.values())
            if not fresh and (enough or now >= began + wait):
                return sorted(free if len(free) >= at_least else free + busy)
            self._note(self._post.next(POLL))

    def broadcast(self, order: Order, names: Sequence[str], deadline: float) -> "FlowerExchange":
        self._watch()
        there = {node.name: node for node in self._nodes.values() if node.card is not None}
        gone = [Failure(name, GONE) for name in names if name not in there]
        exchange = FlowerExchange(self, order, gone, self._clock() + deadline)
        if here := [there[name] for name in names if name in there]:
            exchange.send(here)
        return exchange

    def send(self, order: Order, nodes: Sequence[_Node], closes: float) -> list[Letter]:
        """The order to each of `nodes` that is there, as it can read it."""
        contents = self._orders.encoded(order, {node.id: node.card for node in nodes if node.card is not None})
        names = {node.id: node.name for node in nodes}
        kind, ttl = TRAIN if order.train else JUDGE, min(max(closes - self._clock(), 1.0), LONGEST)
        letters = self._post.send(contents, names, kind, ttl, self._orders.largest(order))
        self._orders.note("down", order, {letter.name: contents[letter.node] for letter in letters})
        return letters

    def over(self) -> None:
        """Tell every site that it is over, and wait a little until they have heard it."""
        online = self._post.online()
        if not online:
            return
        self._asked_registry = -math.inf
        self._name(online)
        empty = RecordDict()
        named = {id: (self._nodes.get(id) or _Node(id, self._registered.get(id, ""), 0.0)).called for id in online}
        letters = self._post.send(dict.fromkeys(online, empty), named, OVER, CARD_TTL, CARD_BYTES)
        until = self._clock() + FAREWELL
        waiting = {letter.id: letter.name for letter in letters}
        while waiting and (left := until - self._clock()) > 0:
            answer = self._post.next(min(left, POLL))
            if answer is not None:
                waiting.pop(answer.letter.id, None)
        if waiting:
            log.warning("these sites have not heard that it is over: %s", ", ".join(sorted(waiting.values())))

    def close(self) -> None:
        self._post.close()

    def take(self, timeout: float, letters: dict[str, Letter]) -> Answer | None:
        """The next answer to one of `letters`; what else comes is noted."""
        until = self._clock() + timeout
        while True:
            if self._clock() >= self._watched + WATCH:
                self._watch()
            answer = self._post.next(max(min(until - self._clock(), WATCH), 0.0))
            if answer is not None and answer.letter.id in letters:
                return answer
            self._note(answer)
            if self._clock() >= until:
                return None

    def read(self, answer: Answer, order: Order) -> Reply | Failure | _Node:
        """The reply to `order`, or the site that needs the order again with the whole model."""
        letter, node = answer.letter, self._nodes.get(answer.letter.node)
        card = None if node is None else node.card
        if answer.content is None:
            if node is not None and card is not None and answer.error == LACKS and card.reference:
                node.card, node.forgets = replace(card, reference=""), True
                return node
            if node is not None:  # whatever it was: the site says anew how it is before it gets another order
                node.card, node.asked = None, -math.inf
            return Failure(letter.name, answer.error)
        self._orders.note("up", order, {letter.name: answer.content})
        try:
            reply = self._orders.read(answer.content, letter.name, order)
        except ValueError as error:
            return Failure(letter.name, f"its reply is not one: {error}")
        if node is not None and card is not None:
            after = self._orders.after(card, order)
            node.card = replace(after, reference="") if node.forgets else after
        return reply

    def drop(self, letters: Iterable[Letter]) -> None:
        for letter in letters:
            self._post.drop(letter)

    def _ready(self) -> tuple[list[str], list[str]]:
        """Sites that can get an order: those with nothing to do, and those with something that nobody waits for."""
        owing = self._post.owing()
        good = [node for node in self._nodes.values() if node.card is not None]
        free = [node.name for node in good if not owing[node.id]]
        return free, [node.name for node in good if 0 < owing[node.id] < OWED]

    def _watch(self) -> None:
        """See who has come and who has gone, and ask those who came for their cards."""
        self._watched = now = self._clock()
        online = self._post.online()
        for node in [node for node in self._nodes.values() if node.id not in online]:
            del self._nodes[node.id]
            if node.name:
                log.info("%s went offline", node.name)
                self._seen[node.name] = {**self._seen[node.name], "online": False, "since": time.time()}
        self._name(online)
        for id in sorted(online - self._nodes.keys()):
            if self._registry is None or id in self._registered:
                self._nodes[id] = node = _Node(id, self._registered.get(id, ""), time.time())
                self._see(node)
            elif id not in self._unnamed:
                self._unnamed.add(id)
                log.warning("node %d is online with a key of no site that may take part: it is left out", id)
        asked = [
            node for node in self._nodes.values()
            if node.card is None and node.asking is None and now >= node.asked + (AGAIN if node.problem else 0)
        ]  # fmt: skip
        if asked:
            self._ask(asked, now)
        self._tell()

    def _name(self, online: set[int]) -> None:
        if self._registry is None or online <= self._registered.keys() or self._clock() < self._asked_registry + WATCH:
            return
        self._asked_registry = self._clock()
        try:
            self._registered = self._registry()
        except UserError as error:  # it is asked again
            log.warning("the names of new sites cannot be had: %s", error)

    def _ask(self, nodes: list[_Node], now: float) -> None:
        ask = encode_ask()
        named = {node.id: node.called for node in nodes}
        letters = self._post.send(dict.fromkeys(named, ask), named, CARD, CARD_TTL, CARD_BYTES)
        asking = {letter.node: letter for letter in letters}
        for node in nodes:
            node.asked, node.asking = now, asking.get(node.id)

    def _note(self, answer: Answer | None) -> None:
        """An answer to something else than the order under way."""
        if answer is None:
            return
        if answer.letter.kind != CARD:
            if answer.error == LATE:
                log.info("an answer of %s has come too late and is thrown away", answer.letter.name)
            return
        node = self._nodes.get(answer.letter.node)
        if node is None or node.asking is None or node.asking.id != answer.letter.id:
            return  # it has gone since, and maybe come back
        node.asking = None
        before = node.problem
        try:
            if answer.content is None:
                raise ValueError(answer.error)
            self._meet(node, decode_card(answer.content))
        except ValueError as error:
            node.problem = str(error)
            if node.problem != before:
                log.warning("%s cannot take part: %s", node.called, node.problem)
        else:
            node.problem = ""
        self._tell()

    def _meet(self, node: _Node, card: Card) -> None:
        """Check the card and keep it; ValueError says what is wrong with it."""
        name = node.name or card.name
        if card.version != VERSION:
            raise ValueError(f"it runs fedloge {card.version}, the server {VERSION}: install the same on both sides")
        if card.name != name:
            raise ValueError(f"its kit is that of {card.name!r}, its key that of {name}")
        if any(other.name == name for other in self._nodes.values() if other is not node):
            raise ValueError(f"another site is called {name!r}")
        if card.classes != self._classes:
            raise ValueError("its list of classes is not that of the federation: it needs a new kit")
        if not card.examples:
            raise ValueError("it has no image to train with")
        if node.card is None and not node.name:
            node.name = name
        log.info("%s is there with %d images", name, card.examples)
        node.card = card
        self._see(node)

    def _see(self, node: _Node) -> None:
        if node.name:
            examples = node.card.examples if node.card else self._seen.get(node.name, {}).get("examples", 0)
            self._seen[node.name] = {"online": True, "examples": examples, "since": node.since}

    def _tell(self) -> None:
        problems = {node.called: node.problem for node in self._nodes.values() if node.problem}
        told = ({name: self._seen[name] for name in sorted(self._seen)}, problems)
        if told != self._told:
            self._told = told
            self._notify(*told)


class FlowerExchange:
    def __init__(self, fleet: FlowerFleet, order: Order, gone: list[Failure], closes: float) -> None:
        self._fleet = fleet
        self._order = order
        self._closes = closes
        self._letters: dict[str, Letter] = {}
        self._failed = deque(gone)

    def send(self, nodes: Sequence[_Node]) -> None:
        letters = self._fleet.send(self._order, nodes, self._closes)
        self._letters |= {letter.id: letter for letter in letters}
        sent = {letter.node for letter in letters}
        self._failed.extend(Failure(node.name, GONE) for node in nodes if node.id not in sent)

    def next(self, timeout: float) -> Reply | Failure | None:
        if self._failed:
            return self._failed.popleft()
        answer = self._fleet.take(timeout, self._letters)
        if answer is None:
            return None
        del self._letters[answer.letter.id]
        found = self._fleet.read(answer, self._order)
        if isinstance(found, _Node):
            self.send([found])
            return None
        return found

    def close(self) -> None:
        self._fleet.drop(self._letters.values())
