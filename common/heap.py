"""Memory that a process keeps for the next step and the next round instead of giving it back to the kernel in between.

Both allocate the same few blocks of megabytes again and again, and the C library asks the kernel for each of them:
fresh pages, to be zeroed and mapped, which cost more than copying into them. What is kept so is at most `KEPT` beyond
what is in use.
"""

import ctypes
from contextlib import suppress

KEPT = 256 << 20  # bytes: also the size from which a block has pages of its own again
ARENAS = 2  # heaps of a process started; as many as the C library likes, eight a core, each keep what they once held
TRIM, MMAP = -1, -3  # glibc's names for the two are M_TRIM_THRESHOLD and M_MMAP_THRESHOLD


def keep() -> None:
    """In this process, where its C library is glibc."""
    with suppress(OSError, AttributeError):
        for option in (TRIM, MMAP):
            ctypes.CDLL(None).mallopt(option, KEPT)


def trim() -> None:
    """Give back now what is free, wherever in the heap it lies."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def keeping() -> dict[str, str]:
    """The same for a process to be started, as variables of its environment."""
    limits = {"MALLOC_TRIM_THRESHOLD_": KEPT, "MALLOC_MMAP_THRESHOLD_": KEPT, "MALLOC_ARENA_MAX": ARENAS}
    return {name: str(limit) for name, limit in limits.items()}
