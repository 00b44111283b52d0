"""Random streams that depend on what they are for, never on what ran before.

Every draw comes from a generator keyed by (seed, purpose, round, client name, ...). Nothing reads or leaves a
mark on global random state, so a resumed run, a different order of clients or another process gives the same
numbers bit for bit.
"""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_alone = threading.RLock()


def derive(seed: int, *keys: str | int) -> int:
    """A 63-bit seed for the stream named by `keys`; different keys give independent streams."""
    text = "\x1f".join([str(seed), *(f"{type(key).__name__}:{key}" for key in keys)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *keys: str | int) -> torch.Generator:
    return torch.Generator().manual_seed(derive(seed, *keys))


@contextmanager
def isolated(seed: int, *keys: str | int) -> Iterator[None]:
    """Run code that draws from torch's global generator (layer initialisation, dropout) on a stream of its own: one
    thread at a time, as they share that generator."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with _alone, torch.random.fork_rng(devices):
        torch.manual_seed(derive(seed, *keys))
        yield
