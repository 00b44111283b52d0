"""How many sites of a simulation train at once, and where: each lane has a net, on a GPU also a stream, of its own."""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch

from client.participant import Participant
from common.images import PixelImages
from common.messages import Order, Reply
from common.net import Net, build_on
from common.parts import snapshot
from fedloge.federation import Federation
from fedloge.wired import wired
from server.fleet import Fleet, LocalFleet
from server.lanes import LaneFleet

log = logging.getLogger(__name__)

MOST = 6  # lanes on a GPU: with more of them each takes so much longer that nothing is won
COPIES = 8  # of the net that a lane needs: values, gradients, momentum, what a step leaves, replies that wait
BESIDE = 1 << 30  # bytes a lane needs beside them: activations, workspaces of the libraries


_here = threading.local()  # the net of the lane that a thread is


class _Seat(Participant):
    """A site that trains on the net of whatever lane it is called in."""

    def handle(self, order: Order) -> Reply:
        return Participant.handle(replace(self, net=_here.net), order)


class TrainingLane:
    """A net on which sites train, one after another."""

    def __init__(self, handlers: Mapping[str, Callable[[Order], Reply]], net: Net, device: torch.device) -> None:
        self._handlers = handlers
        self._net = net
        self._device = device
        cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]

    def handle(self, name: str, order: Order) -> Reply:
        with self._apart():
            _here.net = self._net
            reply = self._handlers[name](order)
            reply = replace(reply, shared={p: snapshot(t) for p, t in reply.shared.items()}, sums=snapshot(reply.sums))
            if self._stream is not None:
                for t in [t for group in (*reply.shared.values(), reply.sums) for t in group.values()]:
                    t.record_stream(torch.cuda.default_stream(self._device))  # where it will be folded
        return reply

    def close(self) -> None:
        self._net.engine = None
        if self._stream is not None:
            torch.cuda.empty_cache()

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """On the lane's stream, after what was done before on the one of everybody; all of it is done at the end."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.default_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()


def fleet(federation: Federation, after: int) -> Fleet:
    """The sites of `federation` from the round `after` on, as many at a time as `run.lanes` says or as its device can
    bear."""
    config, device = federation.task.config, federation.device
    lanes = number(federation)
    if lanes == 1 and device.type == "cpu":
        return LocalFleet(wired(federation.sites, config.federation, after))
    if lanes > 1:
        log.info("%d sites train at once", lanes)
    nets = [federation.net, *(build_on(device, config.method, federation.task) for _ in range(lanes - 1))]
    seats = {name: _Seat(**vars(site)) for name, site in federation.sites.items()}
    handlers = wired(seats, config.federation, after)
    images = federation.images
    return LaneFleet(
        [TrainingLane(handlers, net, device) for net in nets],
        {name: len(site.train_index) for name, site in federation.sites.items()},
        lambda: isinstance(images, PixelImages) and images.stay_home(device),
    )


def number(federation: Federation) -> int:
    config, device = federation.task.config, federation.device
    chosen = max(int(config.federation.fraction * len(federation.sites)), 1)
    wish = config.run.lanes
    if federation.net.draws and (wish > 1 or (wish == 0 and device.type == "cuda")):
        log.warning("layers of this model draw random numbers while they train: one site trains at a time")
        return 1
    if wish or device.type == "cpu":
        return min(wish or 1, chosen)
    free, _ = torch.cuda.mem_get_info(device)
    need = COPIES * sum(t.nbytes for t in federation.net.parameters()) + BESIDE
    return max(min(MOST, chosen, free // need), 1)
