"""One local round: the method's phases on the site's data."""

import math

import torch

from common.engine import run_phase
from common.methods.method import Method, Site
from common.net import Net
from common.sgd import Diverged


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
