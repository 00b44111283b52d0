"""A site taking part: it answers orders with its own data and keeps its local parts in its own store."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from client.store import Store
from client.train import train
from common.errors import UserError
from common.features import features_of
from common.images import Images
from common.messages import Order, Reply
from common.methods.method import Method, Site
from common.net import Net, Task, fresh, roles
from common.parts import Tensors
from common.seeds import isolated
from common.statistics import Sums


@dataclass(frozen=True)
class Participant:
    """One site. `net` is a workspace: its values before an order do not matter, so sites may share one."""

    name: str
    task: Task
    method: Method
    net: Net
    images: Images
    train_index: Tensor
    counts: Tensor  # training images per class
    store: Store
    device: torch.device

    def site(self, round: int) -> Site:
        return Site(
            self.name, self.task, self.images, self.train_index, self.counts.to(self.device), round, self.device
        )

    def handle(self, order: Order) -> Reply:
        """Train one round from the order's parts, keep the local parts, return the shared ones; or count, if asked to.

        The reply's tensors are the workspace's own, so they are good until the next order: fold or encode them first.
        """
        if order.centre is not None:
            self.net.load(order.shared)
            counted = self.count(order.centre)
            return Reply(self.name, order.round, order.model, int(counted.count.sum()), {}, counted.tensors())
        self.prepare({**order.shared, **order.fixed}, before=order.round)
        shared, _, local = roles(self.method, self.net)
        site = self.site(order.round)
        # dropout and the like draw from torch's global generator: give them this round's own stream
        own = isolated(self.task.config.seed, "layers", order.round, self.name)
        with own if self.net.draws else nullcontext():
            metrics = train(self.net, self.method, site)
        sums = self.method.extra(self.net, site)
        mine = self.net.parts()
        if local:
            self.store.save(order.round, {part: mine[part] for part in sorted(local)})
        return Reply(
            client=self.name,
            round=order.round,
            model=order.model,
            examples=len(self.train_index),
            shared={part: mine[part] for part in sorted(shared)},
            sums=sums,
            metrics=metrics,
        )

    def prepare(self, received: dict[str, Tensors], before: int) -> None:
        """Fill the workspace: the received parts, and the site's own as they were before round `before`."""
        _, _, local = roles(self.method, self.net)
        self.net.load(received)
        if not local:
            return
        kept = self.store.load(before)
        if kept is not None and kept.keys() != local:
            raise UserError(
                f"{self.store.folder}: holds local parts {sorted(kept)}, {self.method.name} has {sorted(local)}: "
                "use another folder for another method"
            )
        if kept is None:
            self.net.load(fresh(self.method, self.task, self.net, local, self.name))
            self.method.start(self.net)
        else:
            self.net.load(kept)

    def count(self, centre: Tensor) -> Sums:
        """The class statistics of the training images as they are, by the backbone of the net, about `centre`."""
        backbone, centre = self.net["backbone"], centre.to(self.device)
        sums = Sums.nothing(len(self.task.classes), len(centre), self.device)
        batch, precision = self.task.config.evaluation.batch, self.task.config.train.precision
        for f, y in features_of(backbone, self.images, self.train_index, self.device, batch, precision):
            sums.add(f.double() - centre, y)
        return sums

    def has_trained(self) -> bool:
        """Whether the personal model rests on training of this site; without local parts it always does."""
        _, _, local = roles(self.method, self.net)
        return not local or bool(self.store.rounds())
