"""The one training loop: plain SGD as the section `[train]` of the configuration says, momentum from zero."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from common.config import TrainConfig
from common.errors import UserError

Batch = tuple[Tensor, Tensor]


class Diverged(UserError):
    """The loss or a trained value is no number any more: what was trained must be neither kept nor sent."""


def fit(
    groups: Sequence[Sequence[nn.Parameter]],
    passes: Iterable[Iterable[Batch]],
    loss: Callable[[Tensor, Tensor], Tensor],
    train: TrainConfig,
    device: torch.device,
) -> float:
    """Train `groups` on all batches of all passes; returns the mean loss of the last pass or raises `Diverged`.

    A bound on the gradient (`train.clip`) holds for each group by itself: a head on detached features must not slow
    the backbone down.
    """
    # foreach, not fused: on a CPU the fused step copies channels_last weights back and forth
    optimizer = torch.optim.SGD(
        [parameter for group in groups for parameter in group],
        lr=train.lr,
        momentum=train.momentum,
        weight_decay=train.weight_decay,
        foreach=True,
    )
    half = torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bf16")
    total = torch.zeros((), device=device)
    seen = 0
    for batches in passes:
        total.zero_()
        seen = 0
        for x, y in batches:
            if train.layout == "plain":
                x = x.contiguous()  # noqa: PLW2901
            with half:
                value = loss(x, y)
            optimizer.zero_grad(set_to_none=True)
            value.backward()  # type: ignore[no-untyped-call]
            if train.clip > 0:
                for group in groups:
                    torch.nn.utils.clip_grad_norm_(group, train.clip)
            optimizer.step()
            total += value.detach() * len(y)  # stays on the device: no synchronisation in the loop
            seen += len(y)
    mean = float(total) / max(seen, 1)
    if not math.isfinite(mean):
        raise Diverged(f"training diverged (the mean loss is {mean}): use a smaller train.lr")
    return mean
