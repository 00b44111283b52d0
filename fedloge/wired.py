"""Simulated sites as if their backbones travelled: rounded or coded by the functions of the wire itself, so that
accuracy is that of a real federation with the same `federation.wire`."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from threading import Lock

import torch

from client.changes import Residual
from client.participant import Participant
from client.store import Store
from common.codec import PART
from common.config import FederationConfig
from common.messages import Order, Reply
from common.parts import Tensors
from server.broadcast import Broadcast, opened

Handler = Callable[[Order], Reply]


def wired(sites: Mapping[str, Participant], policy: FederationConfig, after: int) -> dict[str, Handler]:
    """What answers orders for each site, from the rounds after `after` on; also in several threads at once."""
    if policy.wire == "fp32":
        return {name: site.handle for name, site in sites.items()}
    if policy.wire == "bf16":
        return {name: _rounding(site) for name, site in sites.items()}
    broadcast, lock = Broadcast(), Lock()
    return {name: _coding(site, policy, after, broadcast, lock) for name, site in sites.items()}


def _rounding(site: Participant) -> Handler:
    def handle(order: Order) -> Reply:
        reply = site.handle(replace(order, shared=_rounded(order.shared)))
        return replace(reply, shared=_rounded(reply.shared))

    return handle


def _coding(site: Participant, policy: FederationConfig, after: int, broadcast: Broadcast, lock: Lock) -> Handler:
    store = Store(site.store.folder / "residual", site.store.keep, site.store.durable)
    store.rewind(after)  # a killed or damaged run may have left it ahead
    residual = Residual(store, policy.wire, policy.topk, "")

    def handle(order: Order) -> Reply:
        with lock:  # the first site that asks moves it
            received = broadcast.of(order)
            if site.device.type == "cuda":  # the next one may be on another stream
                torch.cuda.current_stream(site.device).synchronize()
        reply = site.handle(received)
        if not order.train:  # nothing of it is a change
            return reply
        return opened(residual.code(reply, received.shared.get(PART, {})), order, policy.wire)

    return handle


def _rounded(shared: dict[str, Tensors]) -> dict[str, Tensors]:
    part = {
        name: t.detach().to(torch.bfloat16).to(t.dtype) if t.dtype is torch.float32 else t
        for name, t in shared.get(PART, {}).items()
    }
    return {**shared, PART: part} if part else shared
