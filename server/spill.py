"""A large model out of the way, in a file, while nobody needs it.

While a round's replies are folded, the parts that it began with are needed no more until it is closed: without them
the server holds the running sum and the reply in hand, and nothing else that is as large as the model.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from common import heap
from common.codec import CODED
from common.config import FederationConfig
from common.messages import Order

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
    with tempfile.TemporaryFile(dir=folder) as file:
        for t in here:
            file.write(_bytes(t.detach().contiguous()))
        file.flush()
        for t in here:
            t.data = t.new_empty(0)
        heap.trim()
        try:
            yield
        finally:
            file.seek(0)
            for t, (shape, stride) in zip(here, layouts, strict=True):
                values = t.new_empty(shape)
                if file.readinto(_bytes(values)) != values.nbytes:
                    raise OSError(f"{folder}: the model of this round cannot be read back")
                t.data = values if values.stride() == stride else t.new_empty_strided(shape, stride).copy_(values)


def _bytes(t: Tensor) -> memoryview:
    view: memoryview = t.reshape(-1).view(torch.uint8).numpy().data
    return view
