"""The SuperLink: Flower's own server process, started, watched and ended by us.

`flower-superlink` runs under server/guard.py, so it, the ServerApp it starts and everything else it started are gone
when we are, even after kill -9. It serves sites on one address, with TLS and with keys of sites; its other two doors
are on the loopback, on ports the kernel chooses. They are written to run/link.json while it runs. State is in memory:
after a crash sites are registered anew and a new run continues from the checkpoint.

This module needs no Flower, only its command. One SuperLink runs per folder: who starts one holds the folder's lock.
"""

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from common import files, heap
from common.errors import UserError
from server import guard

log = logging.getLogger(__name__)

START = 60.0  # seconds a SuperLink may take to come up; a free machine needs two
END = 10.0  # seconds until everything must be gone after it was told to end
PROC = Path("/proc")
PROGRAMS = ("flower-superlink", "flower-superexec", "flwr-serverapp", "guard.py")
DOORS = {
    "control": re.compile(r"Starting Control API on .*:(\d+)$"),
    "serverappio": re.compile(r"Starting ServerAppIo API on .*:(\d+)$"),
    "fleet": re.compile(r"Starting Fleet API .* on .*:(\d+)$"),
}
LINK = "link.json"


@dataclass(frozen=True)
class Doors:
    """Ports."""

    fleet: int  # for sites, on the address asked for
    control: int  # registers sites, starts and stops runs; TLS, on the loopback
    serverappio: int  # for the ServerApp, on the loopback


class SuperLink:
    """One process after another: `start` may be called again when it has died or was stopped."""

    def __init__(self, folder: Path, bind: str, port: int) -> None:
        self._folder = folder
        self._run = folder / "run"
        self._bind = bind
        self._port = port
        self._guard: subprocess.Popen[bytes] | None = None
        self._lines: guard.Lines | None = None

    def start(self) -> Doors:
        """Returns when sites can connect. UserError if the port is taken or the SuperLink does not come up."""
        if strays := end_strays(self._run):
            log.warning("ended what an earlier start had left: %s", ", ".join(strays))
        check_free(self._bind, self._port)
        home = _home(self._run)
        for made in (home, self._run / "logs"):
            made.mkdir(parents=True, exist_ok=True)
        self._guard = subprocess.Popen(
            [sys.executable, "-I", guard.__file__, str(self._run / "logs" / "superlink.log"), *self._command()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_environment(home),
            start_new_session=True,  # a Ctrl-C is ours to handle
        )
        assert self._guard.stdout is not None
        self._lines = guard.Lines(self._guard.stdout.fileno())
        doors = self._await_doors()
        files.write(self._run / LINK, json.dumps({**vars(doors), "pid": os.getpid()}) + "\n")
        return doors

    @property
    def alive(self) -> bool:
        return self._guard is not None and self._guard.poll() is None

    def said(self) -> list[str]:
        """What it printed since the last time, without chatter."""
        return list(self._lines.new()) if self._lines else []

    def stop(self) -> None:
        (self._run / LINK).unlink(missing_ok=True)
        if self._guard is None:
            return
        assert self._guard.stdin is not None
        assert self._guard.stdout is not None
        self._guard.stdin.close()  # tells the guard to end everything
        try:
            self._guard.wait(END)
        except subprocess.TimeoutExpired:
            self._guard.kill()
            self._guard.wait()
        self._guard.stdout.close()
        self._guard = self._lines = None
        end_strays(self._run)

    def _command(self) -> list[str]:
        pki = self._folder / "pki"
        host = f"[{self._bind}]" if ":" in self._bind else self._bind
        return [
            find_program("flower-superlink"),
            "--ssl-ca-certfile", str(pki / "ca.crt"),
            "--ssl-certfile", str(pki / "server.crt"),
            "--ssl-keyfile", str(pki / "server.key"),
            "--enable-supernode-auth",
            "--disable-runtime-dependency-installation",
            "--isolation", "subprocess",
            "--fleet-api-address", f"{host}:{self._port}",
            "--control-api-address", "127.0.0.1:0",
            "--serverappio-api-address", "127.0.0.1:0",
        ]  # fmt: skip

    def _await_doors(self) -> Doors:
        found: dict[str, int] = {}
        last = ""
        end = time.monotonic() + START
        while len(found) < len(DOORS):
            over = not self.alive or time.monotonic() > end
            for line in self.said():
                last = line
                found |= {door: int(hit[1]) for door, pattern in DOORS.items() if (hit := pattern.search(line))}
            if over and len(found) < len(DOORS):
                self.stop()
                log = self._run / "logs" / "superlink.log"
                raise UserError(f"the SuperLink does not start ({last or 'it says nothing'}): see {log}")
            time.sleep(0.05)
        return Doors(**found)


def read_link(run: Path) -> Doors | None:
    """The doors of the SuperLink that runs on this folder; None when none does."""
    try:
        table = json.loads((run / LINK).read_text(encoding="utf-8"))
        return Doors(**{name: int(table[name]) for name in DOORS})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def serverapp(run: Path) -> int | None:
    """The process of the ServerApp, if it lives. None also where processes cannot be looked at."""
    return next((pid for pid, name in processes(run).items() if name == "flwr-serverapp"), None)


def processes(run: Path) -> dict[int, str]:
    """Every live process of the SuperLink of this folder: pid -> program. A zombie is not alive."""
    found = {}
    mark = f"FLWR_HOME={_home(run)}".encode()
    for entry in PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or is not ours to look at
            if mark not in (entry / "environ").read_bytes().split(b"\0"):
                continue
            words = (entry / "cmdline").read_bytes().split(b"\0")[:3]
            names = {Path(os.fsdecode(word)).name for word in words}
            if program := next((program for program in PROGRAMS if program in names), None):
                found[int(entry.name)] = program
    return found


def end_strays(run: Path, programs: Collection[str] = PROGRAMS) -> list[str]:
    """Kill what an earlier run or SuperLink of this folder left, and see it gone; gives the names of what there was."""
    seen: dict[int, str] = {}
    end = time.monotonic() + END
    while left := {pid: program for pid, program in processes(run).items() if program in programs}:
        seen |= left
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > end:
            raise UserError(f"process {next(iter(left))} of an earlier start does not end: end it by hand")
        time.sleep(0.05)
    return list(seen.values())


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        os.kill(pid, 0)
        return not (PROC / str(pid) / "stat").read_text().rpartition(")")[2].startswith(" Z")
    except FileNotFoundError:
        return not PROC.exists()  # no way to tell a zombie here
    except OSError:
        return False


def holder(port: int) -> str:
    """Which process listens on a TCP port, in words; "another program" if that cannot be found."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            rows = [line.split() for line in (PROC / "net" / table).read_text().splitlines()[1:]]
            inodes |= {row[9] for row in rows if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port}
    for entry in PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(str(fd.readlink())[8:-1] in inodes for fd in (entry / "fd").iterdir()):  # socket:[INODE]
                return f"{(entry / 'comm').read_text().strip()} (pid {entry.name})"
    return "another program"


def check_free(bind: str, port: int) -> None:
    """UserError unless we can listen there. gRPC itself would share the port with another program and say nothing."""
    try:
        kind, protocol, _, _, address = socket.getaddrinfo(bind, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that are closing do no harm
            probe.bind(address)
            probe.listen()
    except socket.gaierror:
        raise UserError(f"server.bind = {bind!r} is no address of this machine: use 0.0.0.0 for all of them") from None
    except PermissionError:
        raise UserError(f"port {port} is for the system's own services: choose server.port above 1023") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"port {port} is in use by {holder(port)}: end it, or set server.port and send sites new kits"
            ) from None
        raise UserError(
            f"server.bind = {bind!r} is not possible here ({error.strerror}): use 0.0.0.0 for all addresses"
        ) from None


def _environment(home: Path) -> dict[str, str]:
    path = os.pathsep.join([str(Path(find_program("flower-superlink")).parent), os.environ.get("PATH", os.defpath)])
    inherited = {key: value for key, value in os.environ.items() if key != "FLWR_LOG_LEVEL"}  # we read its log
    return {
        **heap.keeping(),
        **inherited,
        "PATH": path,  # the SuperLink starts its helpers by name
        "FLWR_HOME": str(home),  # also how we know our processes again
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PYTHONUNBUFFERED": "1",
        "GRPC_VERBOSITY": "info",  # with the next: who was refused by TLS; the guard keeps these lines only
        "GRPC_TRACE": "handshaker",
    }


def find_program(name: str) -> str:
    """Where a command of Flower is that was installed with us."""
    places = os.pathsep.join([str(Path(sys.executable).parent), sysconfig.get_path("scripts")])
    found = shutil.which(name, path=places) or shutil.which(name)
    if found is None:
        raise UserError(f"{name} is not installed here: install fedloge with its dependencies (pip install .)")
    return found


def _home(run: Path) -> Path:
    return run.resolve() / "flwr"
