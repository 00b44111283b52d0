"""One local round: the method's phases on the site's data."""

import math
from functools import partial

import torch

from common.methods.method import Method, Phase, Site
from common.net import Net
from common.sgd import Diverged, fit


def train(net: Net, method: Method, site: Site) -> dict[str, float]:
    """Run every phase of `method` in order; returns the mean loss of the last epoch of each phase.

    When it returns, the losses, all parameters and all moving statistics are finite: otherwise it raises `Diverged`.
    """
    losses = {
        f"loss {number}": run_phase(net, phase, site, number) for number, phase in enumerate(method.phases(net, site))
    }
    norm = float(torch.nn.utils.get_total_norm([t for part in net.parts().values() for t in part.values()]))
    if not math.isfinite(norm):  # the last step has no loss after it
        raise Diverged(f"training diverged (the norm of all the net's values is {norm}): use a smaller train.lr")
    return losses


def run_phase(net: Net, phase: Phase, site: Site, number: int) -> float:
    """Train the parts the phase lists. Everything else is frozen, statistics included."""
    net.train_only(phase.train)
    groups = [list(net[part].parameters()) for part in phase.train]
    passes = (site.batches(number, epoch) for epoch in range(phase.epochs))
    return fit(groups, passes, partial(phase.loss, net), site.task.config.train, site.device)
