"""Class frequencies as a part: how sites that agree to it learn the federation's class prior.

A site puts its own frequencies in before it answers; their mean weighted by examples, averaged like any shared
part, is the global prior it receives in the next round. In round 1 the prior is flat.
"""

import torch
from torch import Tensor, nn

from common.losses import log_prior
from common.methods.method import Site
from common.net import Net

PART = "class_prior"


class ClassPrior(nn.Module):
    frequency: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.register_buffer("frequency", torch.full((classes,), 1.0 / classes))


def exchange(net: Net, site: Site) -> Tensor:
    """The received log prior; the site's own frequencies take its place in what is sent back."""
    part = net[PART]
    assert isinstance(part, ClassPrior)
    # the sites of one round may miss a class that others have: it keeps a prior far below one sample
    received = log_prior(part.frequency.clamp_min(1e-6))
    part.frequency.copy_(site.counts / site.counts.sum())
    return received
