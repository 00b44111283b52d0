"""One local round: the method's phases on the site's data."""

import math

import torch

from common.errors import UserError
from common.methods.method import Method, Phase, Site
from common.net import Net


class Diverged(UserError):
    """The loss is no number any more: what was trained must be neither kept nor sent."""


def train(net: Net, method: Method, site: Site) -> dict[str, float]:
    """Run every phase of `method` in order; returns the mean loss of the last epoch of each phase."""
    return {
        f"loss {number}": run_phase(net, phase, site, number) for number, phase in enumerate(method.phases(net, site))
    }


def run_phase(net: Net, phase: Phase, site: Site, number: int) -> float:
    """SGD on the parts the phase lists, momentum from zero. Everything else is frozen, statistics included."""
    config = site.task.config.train
    parameters = net.train_only(phase.train)
    # foreach, not fused: on a CPU the fused step copies channels_last weights back and forth
    optimizer = torch.optim.SGD(
        parameters,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        foreach=True,
    )
    half = torch.autocast(site.device.type, torch.bfloat16, enabled=config.precision == "bf16")
    total = torch.zeros((), device=site.device)
    seen = 0
    for epoch in range(phase.epochs):
        total.zero_()
        seen = 0
        for x, y in site.batches(number, epoch):
            if config.layout == "plain":
                x = x.contiguous()  # noqa: PLW2901
            with half:
                loss = phase.loss(net, x, y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            if config.clip > 0:
                torch.nn.utils.clip_grad_norm_(parameters, config.clip)
            optimizer.step()
            total += loss.detach() * len(y)  # stays on the device: no synchronisation in the loop
            seen += len(y)
    mean = float(total) / max(seen, 1)
    if not math.isfinite(mean):
        raise Diverged(f"training diverged (the loss of phase {number} is {mean}): use a smaller train.lr")
    return mean
