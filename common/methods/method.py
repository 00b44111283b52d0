"""The protocol behind which every method stands, and the defaults most of them share.

A method is stateless: a frozen dataclass whose fields are its knobs. It says which parts exist and who holds
them, which phases a local round has and which parts each phase trains with which loss, how the server turns the
mean of the replies into its next state, and which predictors come out. The optimiser and the batches of the local
round are not its business (client/train.py); what it optimises itself is no part in training: CReFF's features and
head at the server, the copies that tune.py makes for evaluation. It never touches files or the network.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from common import statistics
from common.features import features_of
from common.images import Images, PixelImages
from common.messages import Reply
from common.net import Maker, Net, Task
from common.parts import Tensors, snapshot
from common.realign import realigned
from common.seeds import generator

JUDGED = 2000  # images by which a temperature is chosen: more make no difference

Loss = Callable[[Net, Tensor, Tensor, Tensors], Tensor]  # net, images, labels, what the phase gives


@dataclass(frozen=True)
class Phase:
    """Some epochs in which exactly the listed parts change. A part not listed is in no optimiser.

    The loss depends on nothing but its arguments: what it needs to know of the site or of the received parts is in
    `given`. A method's own function or bound method is the same loss at every site and in every round, so on a GPU the
    step that was recorded for one is replayed for all (common/engine.py).
    """

    train: tuple[str, ...]
    loss: Loss
    epochs: int
    given: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class Site:
    """One site in one round, as far as a method may know it. Nothing of it leaves the site."""

    name: str
    task: Task
    images: Images
    train: Tensor  # index of its training images
    counts: Tensor  # its training images per class
    round: int
    device: torch.device
    notes: Tensors = field(default_factory=dict)  # what a method's `phases` leaves for its `extra` in this round

    def batches(self, *stream: str | int) -> Iterator[tuple[Tensor, Tensor]]:
        """One shuffled, augmented pass over the training images, the same for the same stream."""
        return self.images.batches(self.train, self.task.config.train.batch, self.device, self._draws(*stream))

    def chunks(self, *stream: str | int) -> Iterator[tuple[Tensor, Tensor]]:
        """The same pass of images in memory, several batches at a time."""
        assert isinstance(self.images, PixelImages)
        return self.images.chunks(self.train, self.task.config.train.batch, self.device, self._draws(*stream))

    def _draws(self, *stream: str | int) -> torch.Generator:
        return generator(self.task.config.seed, "batches", self.round, self.name, *stream)

    @property
    def support(self) -> Tensor:
        """Classes the site has trained on."""
        return self.counts > 0


@dataclass(frozen=True)
class Predictor:
    """A classifier as features and a head on them, so that heads on one backbone can share its pass."""

    features: nn.Module
    head: nn.Module

    def __call__(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x))
        return logits


@dataclass(frozen=True)
class ServerState:
    """All the server carries from one round to the next."""

    round: int
    parts: dict[str, Tensors]  # shared and fixed
    extra: Tensors = field(default_factory=dict)  # a method's own


@dataclass(frozen=True)
class Method(ABC):
    name: ClassVar[str]
    shared: ClassVar[frozenset[str]] = frozenset()  # averaged every round
    fixed: ClassVar[frozenset[str]] = frozenset()  # made once by the server, the same in every round
    local: ClassVar[frozenset[str]] = frozenset()  # never leave the site
    computed: ClassVar[bool] = False  # its results need heads computed from class statistics (common/statistics.py)

    @property
    @final
    def issued(self) -> frozenset[str]:
        """What the server makes and sites get: the fixed parts, and the head that is computed from their statistics."""
        return self.fixed | {statistics.PART}

    @final
    def surveyed(self, task: Task) -> bool:
        """Whether sites send class statistics: where it is asked for, and all sites have the same backbone."""
        config = task.config
        wanted = self.computed or config.evaluation.statistics
        return wanted and "backbone" in self.shared and config.model.norm != "local"

    @abstractmethod
    def makers(self, task: Task) -> dict[str, Maker]:
        """How each part is made, `backbone` first."""

    @abstractmethod
    def phases(self, net: Net, site: Site) -> Sequence[Phase]:
        """The local round. `net` holds the received and the site's own values at its start.

        It is called once a round, before anything is trained. Beside returning the phases it may do two things:
        measure the received model and leave what it found in `site.notes` for `extra` (CReFF), and overwrite a part
        that is stated, not trained: `class_prior` (prior.exchange). Every other value in `net` stays as it is.
        """

    def start(self, net: Net) -> None:  # noqa: B027 (a hook: most methods need none)
        """Called once at a site that has no local parts yet, after the first shared parts came in."""

    def extra(self, net: Net, site: Site) -> Tensors:  # noqa: ARG002
        """Statistics to send with the reply; the server gets their sum over the round's sites."""
        return {}

    def statistics(self, net: Net) -> dict[str, tuple[int, ...]]:  # noqa: ARG002
        """Names and shapes of what `extra` returns, always float32: the server refuses a reply with anything else."""
        return {}

    def objection(self, reply: Reply) -> str:  # noqa: ARG002
        """Why the server must refuse a reply of the right names and shapes with finite values; empty if it need not."""
        return ""

    def init(self, net: Net, task: Task) -> ServerState:
        """The server's state before round 1. A method with fixed parts makes them here."""
        del task
        parts = net.parts()
        keep = (self.shared | self.issued) & parts.keys()
        return ServerState(round=0, parts={part: snapshot(parts[part]) for part in sorted(keep)})

    def update(self, state: ServerState, mean: dict[str, Tensors], sums: Tensors, net: Net) -> ServerState:
        """The next state from the weighted mean of the shared parts. `net` is a workspace to compute in."""
        del sums, net
        return replace(state, parts={**state.parts, **mean})

    def trained_rows(self, state: ServerState) -> Tensor | None:  # noqa: ARG002
        """The (C, d) weights of the head that trains the backbone, where they may answer for classes of which no site
        gives statistics."""
        return None

    @abstractmethod
    def generic(self, net: Net, task: Task) -> dict[str, Predictor]:
        """Predictors for everybody, from the server's parts alone; the first is the method's own result."""

    @final
    def served(self, net: Net, task: Task) -> dict[str, Predictor]:
        """`generic`, and the computed head where there is one; or nothing where BatchNorm stays at the sites: the
        server then has no moving statistics of its own."""
        if "norms" in net.parts():
            return {}
        found, heads = self.generic(net, task), computed(net)
        return {**heads, **found} if self.computed else {**found, **heads}

    @abstractmethod
    def personal(self, net: Net, site: Site) -> dict[str, Predictor]:
        """Predictors for one site; the first is the method's own result. Masked by train support outside."""

    @final
    def deployed(self, net: Net, site: Site) -> dict[str, Predictor]:
        """`personal`, and the computed head with the site's own prior where there is one."""
        found = self.personal(net, site)
        return found if self.computed else {**found, **computed(net, site)}


def computed(net: Net, site: Site | None = None) -> dict[str, Predictor]:
    """The head computed from everybody's class statistics: as it is, or at a site with its own class frequencies."""
    if statistics.PART not in net.by_part:
        return {}
    head = net[statistics.PART]
    assert isinstance(head, statistics.StatisticsHead)
    if not head.known:
        return {}
    backbone = net["backbone"]
    return {"statistics": Predictor(backbone, head if site is None else _adapted(head, backbone, site))}


def _adapted(head: statistics.StatisticsHead, backbone: nn.Module, site: Site) -> nn.Linear:
    config = site.task.config
    passes = config.evaluation.batch, config.train.precision
    rng = generator(config.seed, "temperature", site.round, site.name)
    return fitted(head, backbone, site.images, site.train, site.counts, site.device, *passes, rng)


@torch.no_grad()
def fitted(
    head: statistics.StatisticsHead | nn.Linear,
    backbone: nn.Module,
    images: Images,
    train: Tensor,
    counts: Tensor,
    device: torch.device,
    batch: int,
    precision: str,
    rng: torch.Generator,
) -> nn.Linear:
    """A balanced head for a site that trains on `train`: with its class frequencies, and at the temperature that suits
    an augmented pass over some of these images."""
    index = train[torch.randperm(len(train), generator=rng)[:JUDGED]]
    said = [(head(f), y) for f, y in features_of(backbone, images, index, device, batch, precision, rng)]
    logits, y = (torch.cat(part) for part in zip(*said, strict=True))
    return statistics.adapted(head, counts, statistics.temperature(logits, y, counts))


def linear_predictors(net: Net, task: Task) -> dict[str, Predictor]:
    """The linear global head, as it is and with its norms realigned."""
    backbone, head = net["backbone"], net["global_head"]
    assert isinstance(head, nn.Linear)
    return {
        "head": Predictor(backbone, head),
        "head realigned": Predictor(backbone, realigned(head, task.config.evaluation.gain)),
    }
