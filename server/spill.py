"""A large model out of the way, in a file, while nobody needs it.

While a round's replies are folded, the parts that it began with are needed no more until it is closed: without them
the server holds the running sum and the reply in hand, and nothing else that is as large as the model.
"""

import errno
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from common import heap
from common.codec import CODED
from common.config import FederationConfig
from common.messages import Order

log = logging.getLogger(__name__)

LARGE = 256 << 20  # bytes; writing and reading fewer is not worth what it saves


def aside(
    policy: FederationConfig, folder: Path, ready: Callable[[], None] = lambda: None
) -> Callable[[Order], AbstractContextManager[None]]:
    """For `Hooks.waiting`: without the shared parts of a round, unless they may be sent once more or compared with."""
    if policy.wire in CODED or policy.max_update > 0:
        return lambda _: nullcontext()
    return lambda order: spilled([t for group in order.shared.values() for t in group.values()], folder, ready)


@contextmanager
def spilled(tensors: Sequence[Tensor], folder: Path, ready: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Within it the values of `tensors` lie in a file of `folder` and their memory is free; afterwards they are what
    they were. Those of a GPU stay where they are, and so do all if they are not `LARGE` together; `ready` returns once
    nobody reads them any more."""
    here = [t for t in tensors if t.device.type == "cpu"]
    if sum(t.nbytes for t in here) < LARGE:
        yield
        return
    ready()
    layouts = [(t.shape, t.stride()) for t in here]
    with ExitStack() as stack:
        try:
            file = stack.enter_context(tempfile.TemporaryFile(dir=folder, buffering=0))
            for t in here:
                _all(file.write, _bytes(t.detach().contiguous()))
        except OSError as error:
            log.warning("%s: the model of this round stays in memory (%s)", folder, error.strerror)
            yield
            return
        for t in here:
            t.data = t.new_empty(0)
        heap.trim()
        try:
            yield
        finally:
            file.seek(0)
            for t, (shape, stride) in zip(here, layouts, strict=True):
                values = t.new_empty(shape)
                _all(file.readinto, _bytes(values))
                t.data = values if values.stride() == stride else t.new_empty_strided(shape, stride).copy_(values)


def _all(move: Callable[[memoryview], int | None], view: memoryview) -> None:
    """The system moves at most 2 GB at a time."""
    while len(view):
        moved = move(view)
        if not moved:
            raise OSError(errno.EIO, "a file of a model is shorter than it was")
        view = view[moved:]


def _bytes(t: Tensor) -> memoryview:
    view: memoryview = t.reshape(-1).view(torch.uint8).numpy().data
    return view
