"""Runs one command of which nothing may be left over: `guard.py LOG COMMAND...`, a program of its own.

The command gets a process group. All of that group is killed when the command ends, when the guard is asked to end
(SIGTERM), or when the guard's standard input closes: the kernel closes it when the process that started the guard
dies, however it dies. Should the guard itself be killed, the kernel kills the command. What the command prints goes,
without Flower's and gRPC's chatter, to LOG, which is bounded in size, and line by line to standard output. Nothing
that happens to the log or to standard output stops the command. It needs the standard library only.
"""

import contextlib
import ctypes
import fcntl
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

LARGEST = 2_000_000  # bytes of the log; the one before it is kept as LOG.1
LONGEST = 4_000  # bytes of a line; below PIPE_BUF, so that lines arrive whole or not at all
PATIENCE = 2.0  # seconds the command has to end by itself when it is asked to
TICK = 0.2  # seconds in which the end of the command is noticed
PR_SET_PDEATHSIG = 1

COLOURS = re.compile(r"\x1b\[\d+m")
CHATTER = re.compile(  # one line a poll, a second or a message: it would bury the rest
    r"INFO :\s+(\[Fleet\.(PullMessages|PushMessages|GetRun)\]|ControlServicer\.List(Nodes|Runs))"
)
NATIVE = re.compile(r"[IWEF]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ ([\w.]+:\d+\] .*)")  # a line of gRPC's C core
FAILED = re.compile(r"handshaker\.cc:\d+\] CallNextHandshakerLocked: error=(?!OK)(.*)")
PLACES = re.compile(r"endpoint_local_address=(\S+?),.*endpoint_peer_address=(\S+?),")


class Sieve:
    """Says of every line what of it is kept; a failed TLS handshake becomes one line out of several."""

    def __init__(self) -> None:
        self._failure = ""
        self._native = False  # whether the last line that began something was one of gRPC's C core

    def keep(self, line: str) -> str | None:
        line = COLOURS.sub("", line).rstrip()
        if found := NATIVE.match(line):
            self._native = True
            failed = FAILED.match(found[1])
            self._failure = failed[1] if failed else ""
            return line if line[0] in "EF" else None
        if self._native and (not line or line[0] in " =" or line.startswith("src/")):  # what follows such a line
            places = PLACES.search(line)
            if not self._failure or places is None:
                return None
            reason, self._failure = self._failure, ""
            return f"TLS handshake of {places[2]} with {places[1]} failed: {reason}"
        self._native = False
        return None if not line or CHATTER.match(line) else line


class Log:
    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, line: str) -> None:
        with contextlib.suppress(OSError):  # a full disk is no reason to stop the command
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
                size = file.tell()
            if size > LARGEST:
                self._path.replace(self._path.with_name(f"{self._path.name}.1"))


def guard(log: Log, command: Sequence[str]) -> int:
    """Run the command to its end, or to ours; gives its exit status."""
    asked = [0.0]  # when the command was asked to end

    def ask(*_: object) -> None:
        if not asked[0]:
            asked[0] = time.monotonic()
            os.kill(child.pid, signal.SIGTERM)  # not terminate(): that would wait for one that has just ended

    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True, preexec_fn=partial(_die_with, os.getpid()),  # noqa: PLW1509 - we have one thread
    )  # fmt: skip
    signal.signal(signal.SIGTERM, ask)
    assert child.stdout is not None
    lines = Lines(child.stdout.fileno())
    sieve = Sieve()
    watched = {lines.pipe, sys.stdin.fileno()}
    while not _over(child.pid):
        ready, _, _ = select.select(watched, [], [], TICK)
        if sys.stdin.fileno() in ready and not os.read(sys.stdin.fileno(), 1):
            watched.remove(sys.stdin.fileno())
            ask()
        for line in lines.new():
            _pass_on(sieve.keep(line), log)
        if lines.ended:
            watched.discard(lines.pipe)
        if asked[0] and time.monotonic() - asked[0] > PATIENCE:
            break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)  # before the child is waited for: until then its number is not reused
    for line in lines.new():
        _pass_on(sieve.keep(line), log)
    return child.wait()


class Lines:
    """What a pipe holds by now, line by line, without ever waiting for it."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe
        self.ended = False
        self._rest = b""
        _never_wait(pipe)

    def new(self) -> Iterator[str]:
        with contextlib.suppress(BlockingIOError):
            while block := os.read(self.pipe, 65536):
                *whole, self._rest = (self._rest + block).split(b"\n")
                self._rest = self._rest[:LONGEST]  # of a line without end the beginning is enough
                yield from (line[:LONGEST].decode("utf-8", "replace") for line in whole)
            self.ended = True


def _pass_on(line: str | None, log: Log) -> None:
    if line is not None:
        log.write(line)
        with contextlib.suppress(OSError):  # nobody reads, or nobody is there any more
            os.write(sys.stdout.fileno(), line.encode()[:LONGEST] + b"\n")


def _over(pid: int) -> bool:
    """Whether the child has ended; it stays a zombie until it is waited for."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _never_wait(file: int) -> None:
    fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) | os.O_NONBLOCK)


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the kernel knew of our wish
            os._exit(1)


def main() -> None:
    _never_wait(sys.stdout.fileno())
    status = guard(Log(Path(sys.argv[1])), sys.argv[2:])
    sys.exit(status if status >= 0 else 128 - status)


if __name__ == "__main__":
    main()
