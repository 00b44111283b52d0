"""A site between messages: its data, its net, its personal state. It knows nothing of how messages travel.

Under the state folder lie `splits.json` (data.py), `fixed.safetensors` (fixed.py), `store/` (the local parts of every
method in every federation, store.py), `models/` (the final personal model) and `events.jsonl` (a line for every
order). Made once and used for all orders: data are read and the net is built again only when the server's settings
change. A new one on the same folder answers as the old one would have, bit for bit on one thread.
"""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from client import data, personal
from client.changes import Reference, Residual
from client.devices import failed, wished
from client.fixed import Fixed
from client.judge import brief, judge
from client.participant import Participant
from client.refusal import Refusal, told
from client.store import Store
from common import files
from common.codec import PART, Wire
from common.config import RunConfig
from common.deployment import ImagesConfig, from_settings
from common.errors import UserError
from common.evaluation import FeatureCache
from common.images import Images, PixelImages
from common.messages import Judgement, Order, Reply
from common.net import Task, build_on

log = logging.getLogger(__name__)

SENT = (
    "how many images of each class there are here and their mean features are sent, which tell the operator of the "
    "classes but hold no image; --keep-statistics keeps them"
)
KEPT = "this site keeps its own to itself and uses the heads of the others"


class Ticket(Protocol):
    """What of a kit counts here."""

    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def classes(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Told:
    """What an answer came to, for those who look on: a line of events.jsonl begins with it."""

    round: int
    trained: bool  # False: the round is the last one, and the personal model is kept
    loss: float | None  # of the round's first phase
    generic: float | None  # accuracy on the site's own test images: before the round, or at the end
    personal: float | None


@dataclass(frozen=True)
class _Work:
    """What follows from the server's settings."""

    settings: str
    wire: Wire
    participant: Participant
    residual: Residual
    judged_on: Images


class Member:
    def __init__(
        self,
        ticket: Ticket,
        place: Path,
        state: Path,
        *,
        test: Path | None = None,
        device: str = "auto",
        share_counts: bool = False,
        keep_statistics: bool = False,
        notify: Callable[[Told], None] = lambda _: None,
    ) -> None:
        """Look at the data at `place`, and refuse what cannot work before anybody is told of this site."""
        self.ticket = ticket
        self.device, self._spare = wished(device)
        self.lost = False  # the GPU has failed, and only a new process can use one again
        self.state = state
        self.notify = notify
        state.mkdir(parents=True, exist_ok=True)
        self.data = data.load(place, test, ticket.classes, ticket.name, state / "splits.json")
        self._share_counts = share_counts
        self._keep_statistics = keep_statistics
        self._told_of_statistics = False
        self._fixed = Fixed(state / "fixed.safetensors")
        self._reference = Reference()
        self._images: tuple[ImagesConfig, Images, Images] | None = None
        self._work: _Work | None = None

    @property
    def examples(self) -> int:
        return len(self.data.train.labels)

    @property
    def counts(self) -> tuple[int, ...] | None:
        """Training images of every class, if the site has decided to share them."""
        return tuple(self.data.counts.tolist()) if self._share_counts else None

    @property
    def holds(self) -> str:
        """Digest of the fixed parts at hand; empty asks for them."""
        return self._fixed.digest

    @property
    def reference(self) -> str:
        """Name of the backbone at hand, from which the next may be a change."""
        return self._reference.name

    @property
    def model(self) -> Path:
        """Where the personal model is kept at the end."""
        return self.state / "models" / "personal.safetensors"

    @property
    def ended(self) -> Path:
        """The file that is there once the federation is over."""
        return self.state / "over"

    def answer(self, order: Order, settings: str, fixed_digest: str, wire: Wire | None = None) -> Reply:
        """Train or judge as `order`, which has come by `wire`, asks. The reply's tensors are good until the next order.
        Raises only `Refusal`."""
        with told(self.state):
            began = time.monotonic()
            order = self._reference.take(order)
            while (reply := self._attempt(order, settings, fixed_digest, wire)) is None:
                pass
            if order.centre is not None:
                return reply
            told_now = self._note(order, reply, time.monotonic() - began)
        self.notify(told_now)
        return reply

    def _attempt(self, order: Order, settings: str, fixed_digest: str, wire: Wire | None) -> Reply | None:
        """The reply; None where the device failed and it is worth trying again."""
        try:
            work = self._prepared(settings)
            if wire not in (None, work.wire):
                raise Refusal(f"the order travels as {wire}, and its settings say federation.wire = {work.wire}")
            order = replace(order, fixed=self._fixed.take(order.fixed, fixed_digest))
            if order.centre is not None:
                return self._count(work, order)
            return self._train(work, order) if order.train else self._finish(work, order)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) and self._room():
                log.warning("the memory of %s is full: images stay outside from here on", self.device)
                return None
            if not isinstance(error, torch.OutOfMemoryError) and not failed(error):
                raise
            self._drop()
            if self._spare is None:
                self.lost = failed(error)
                raise
            log.warning("%s failed (%s): the CPU takes its place", self.device, str(error).partition("\n")[0])
            self.device, self._spare = self._spare, None
            return None

    def _room(self) -> bool:
        """Make some in the memory of the GPU; whether there was anything to take out of it."""
        self._drop()
        found = [held for held in self._images[1:] if isinstance(held, PixelImages)] if self._images else []
        return True in [images.stay_home(self.device) for images in found]

    def _drop(self) -> None:
        """Forget the net and what is recorded of its steps, which know each other."""
        if self._work is not None:
            self._work.participant.net.engine = None
        self._work = None

    def over(self) -> None:
        """The server has said that nothing more will come."""
        with told(self.state):
            files.write(self.ended, "")

    def _train(self, work: _Work, order: Order) -> Reply:
        site, kept = work.participant, work.participant.store.rounds()
        # the server's state is that before this round: what the site has of this and later ones comes from rounds that
        # did not count, and a site that was away goes on from the newest it has
        if len(kept) == site.store.keep and kept[0] >= order.round:  # earlier ones were there and had to make room
            log.warning("the server went back to before round %d: the parts of this site start anew", order.round)
        for store in (site.store, work.residual.store):
            store.rewind(order.round - 1)
        judged: Judgement = {}
        if order.judge:
            site.prepare({**order.shared, **order.fixed}, before=order.round)
            judged = self._judge(work, order.round - 1)
        reply = replace(site.handle(order), judged=judged)  # it fills the net anew: judging leaves no trace
        return work.residual.code(reply, order.shared.get(PART, {}))

    def _count(self, work: _Work, order: Order) -> Reply:
        """Class statistics of the order's backbone, unless this site keeps them to itself."""
        if not self._told_of_statistics:
            log.warning("the server computes heads from class statistics: %s", KEPT if self._keep_statistics else SENT)
            self._told_of_statistics = True
        reply = work.participant.handle(order)
        return replace(reply, sums={}) if self._keep_statistics else reply

    def _finish(self, work: _Work, order: Order) -> Reply:
        """Keep the personal model of the final parts and say how good both are."""
        site = work.participant
        site.store.rewind(order.round)
        site.prepare({**order.shared, **order.fixed}, before=order.round + 1)
        judged = self._judge(work, order.round) if order.judge else {}
        if site.has_trained():
            self.model.parent.mkdir(exist_ok=True)
            files.sweep(self.model.parent)
            personal.save(site, order.round, self.model)
        return Reply(
            client=site.name, round=order.round, model=order.model, examples=self.examples, shared={}, judged=judged
        )

    def _judge(self, work: _Work, round: int) -> Judgement:
        site = work.participant
        # one pass of the images for all heads on the received backbone, whose values change only after this
        config = site.task.config
        batch, precision = config.evaluation.batch, config.train.precision
        cache = FeatureCache(work.judged_on, self.device, batch, site.net["backbone"], precision)
        return brief(judge(site, cache, torch.arange(len(work.judged_on)), (), round))

    def _note(self, order: Order, reply: Reply, seconds: float) -> Told:
        found = Told(
            round=order.round,
            trained=order.train,
            loss=next(iter(reply.metrics.values()), None),
            generic=_first(reply.judged, "generic"),
            personal=_first(reply.judged, "personal"),
        )
        line = {**asdict(found), "examples": reply.examples, "losses": reply.metrics, "seconds": round(seconds, 3)}
        with (self.state / "events.jsonl").open("a", encoding="utf-8") as events:
            events.write(json.dumps(line) + "\n")
        return found

    def _prepared(self, settings: str) -> _Work:
        """What the settings ask for, made anew only when they are others than before."""
        if self._work is not None and self._work.settings == settings:
            return self._work
        self._drop()  # its net and this one need not fit into memory together
        task, wish = self._agreed(settings)
        policy = task.config.federation
        train, judged_on = self._read(wish)
        method = task.config.method
        net = build_on(self.device, method, task)
        kept = self.state / "store" / f"{method.name}-{self.ticket.fingerprint[:16]}"
        # a site may be two rounds ahead of the checkpoints: one is written while the next round runs; and the oldest of
        # them must still find its local parts
        stores = [Store(folder, keep=RunConfig().keep + 2, durable=True) for folder in (kept, kept / "residual")]
        participant = Participant(
            name=self.ticket.name,
            task=task,
            method=method,
            net=net,
            images=train,
            train_index=torch.arange(len(train)),
            counts=self.data.counts,
            store=stores[0],
            device=self.device,
        )
        residual = Residual(stores[1], policy.wire, policy.topk, self.ticket.fingerprint)
        self._work = _Work(settings, policy.wire, participant, residual, judged_on)
        return self._work

    def _agreed(self, settings: str) -> tuple[Task, ImagesConfig]:
        try:
            found = from_settings(settings, RunConfig(device=str(self.device)))
            task = found.task
        except UserError as error:  # it speaks of nothing but the settings
            raise Refusal(str(error)) from None
        if task.classes != self.ticket.classes:
            raise Refusal("its kit lists other classes than the server's settings: give it a new kit")
        return task, found.images

    def _read(self, wish: ImagesConfig) -> tuple[Images, Images]:
        """Training and test images, read again only when they shall look otherwise."""
        if self._images is None or self._images[0] != wish:
            self._images = None
            self._images = wish, self.data.train.images(wish, True), self.data.test.images(wish, False)
        return self._images[1:]


def _first(judged: Judgement, kind: str) -> float | None:
    """Accuracy of the method's own predictor."""
    return next((measured["top1"] for measured in judged.get(kind, {}).values()), None)
