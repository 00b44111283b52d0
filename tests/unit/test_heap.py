"""What a process keeps of freed memory, seen from the kernel's side."""

import os
import subprocess
import sys

import pytest

from common import heap

SIZE = 48 << 20  # above 32 MB glibc never learns to keep it
# A block of that size, freed and asked for again: how many pages did the kernel have to give anew?
PROGRAM = f"""
import resource
from common import heap
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def use():
    return len(bytearray({SIZE}))
{{keep}}
use()
before = faults()
for _ in range(10):
    use()
print(faults() - before)
"""


def faults(keep: str = "", **environment: str) -> int:
    environment = {**{k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}, **environment}
    command = [sys.executable, "-c", PROGRAM.format(keep=keep)]
    return int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif("glibc" not in os.confstr("CS_GNU_LIBC_VERSION").lower(), reason="the C library is not glibc")
def test_a_freed_block_is_used_again():
    pages = SIZE // os.sysconf("SC_PAGE_SIZE")
    assert faults() > 5 * pages  # as it is without
    assert faults("heap.keep()") < pages // 10
    assert faults(**heap.keeping()) < pages // 10
