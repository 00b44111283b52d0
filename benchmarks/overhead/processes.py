"""Processes of a benchmark: started under a guard, so that none outlives it, and looked at through /proc."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from server import guard

END = 15.0  # seconds until a process that was told to end is gone
PROC = Path("/proc")
TICKS = os.sysconf("SC_CLK_TCK")


@contextmanager
def started(log: Path, command: Sequence[object], **environment: str) -> Iterator["subprocess.Popen[bytes]"]:
    """The guard of the command, which ends with us; killing the guard kills the command."""
    words = [sys.executable, "-I", guard.__file__, log, *command]
    child = subprocess.Popen(
        [str(word) for word in words],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env={**os.environ, **environment},
        start_new_session=True,  # a Ctrl-C is ours to handle
    )
    assert child.stdin is not None
    try:
        yield child
    finally:
        child.stdin.close()
        try:
            child.wait(END)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def guarded(child: "subprocess.Popen[bytes]") -> int:
    """The process that a guard guards."""
    return int((PROC / str(child.pid) / "task" / str(child.pid) / "children").read_text().split()[0])


def memory(pid: int) -> dict[str, float]:
    """Resident megabytes of a process: `now`, and the most there ever were."""
    status = (PROC / str(pid) / "status").read_text()
    lines: Mapping[str, str] = dict(line.split(":", 1) for line in status.splitlines())
    return {name: int(lines[key].split()[0]) * 1024 / 1e6 for name, key in (("now", "VmRSS"), ("peak", "VmHWM"))}


def processor_seconds(pid: int) -> float:
    fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS
