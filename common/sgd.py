"""The one training step: plain SGD as the section `[train]` of the configuration says, momentum from zero."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from common.config import TrainConfig
from common.errors import UserError

Batch = tuple[Tensor, Tensor]


class Diverged(UserError):
    """The loss or a trained value is no number any more: what was trained must be neither kept nor sent."""


class Step:
    """One step on the parameters of `groups`. Nothing in it waits for the device, and its tensors keep their places,
    so that a GPU can replay it.

    A bound on the gradient (`train.clip`) holds for each group by itself: a head on detached features must not slow
    the backbone down.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[nn.Parameter]],
        loss: Callable[[Tensor, Tensor], Tensor],
        train: TrainConfig,
        device: torch.device,
    ) -> None:
        self._groups = groups
        self._loss = loss
        self._train = train
        self._parameters: list[Tensor] = [parameter for group in groups for parameter in group]
        self._momentum = [torch.zeros_like(p) for p in self._parameters] if train.momentum else []
        cuda = device.type == "cuda"
        # weights change between two steps: a cache of their casts is of no use, and a replay would never empty it
        half = train.precision == "bf16"
        self._half = torch.autocast(device.type, torch.bfloat16, enabled=half, cache_enabled=not cuda)
        self._total = torch.zeros((), device=device)
        for parameter in self._parameters:
            parameter.grad = None  # what others have left there

    @property
    def state(self) -> list[Tensor]:
        """All that a step changes beside the net."""
        return [*self._momentum, self._total]

    def restart(self) -> None:
        """Momentum is zero again."""
        for t in self._momentum:
            t.zero_()

    def begin_pass(self) -> None:
        self._total.zero_()

    def __call__(self, x: Tensor, y: Tensor) -> None:
        if self._train.layout == "plain":
            x = x.contiguous()
        with self._half:
            value = self._loss(x, y)
        value.backward()  # type: ignore[no-untyped-call]
        if self._train.clip > 0:
            for group in self._groups:
                torch.nn.utils.clip_grad_norm_(group, self._train.clip)
        self._descend()
        self._total += value.detach() * len(y)

    @torch.no_grad()
    def _descend(self) -> None:
        """The update of torch's own SGD, to the bit, for all tensors at once. Not fused: on a CPU that copies
        channels_last weights back and forth."""
        moved = [i for i, p in enumerate(self._parameters) if p.grad is not None]
        parameters = [self._parameters[i] for i in moved]
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self._train.weight_decay:
            gradients = list(torch._foreach_add(gradients, parameters, alpha=self._train.weight_decay))
        if self._momentum:
            momentum = [self._momentum[i] for i in moved]
            torch._foreach_mul_(momentum, self._train.momentum)
            torch._foreach_add_(momentum, gradients)
            gradients = momentum
        torch._foreach_add_(parameters, gradients, alpha=-self._train.lr)
        for parameter in parameters:
            parameter.grad = None

    def mean(self, seen: int) -> float:
        """The mean loss of the pass's `seen` images; raises `Diverged`."""
        mean = float(self._total) / max(seen, 1)
        if not math.isfinite(mean):
            raise Diverged(f"training diverged (the mean loss is {mean}): use a smaller train.lr")
        return mean


def fit(step: Step, passes: Iterable[Iterable[Batch]]) -> float:
    """Take a step for every batch of all passes; returns the mean loss of the last pass or raises `Diverged`."""
    seen = 0
    for batches in passes:
        step.begin_pass()
        seen = 0
        for x, y in batches:
            step(x, y)
            seen += len(y)
    return step.mean(seen)


def arithmetic(train: TrainConfig) -> None:
    """How this process calculates on a GPU: exactly but for `tf32`, and with the same bits every time."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = train.precision == "tf32"
    torch.backends.cudnn.deterministic = True
