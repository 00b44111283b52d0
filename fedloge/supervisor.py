"""Keeps a federation going: a SuperLink, the registered sites, and a run whose ServerApp lives.

Once a second it looks at all of them. Whatever died is started again, and the new run goes on from the last
checkpoint; after RESTARTS starts without a finished round in between it gives up. A site that is invited or revoked
meanwhile is registered or shut out at once. It never trains, folds or judges anything: that is the ServerApp's.
"""

import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

from common import pki
from common.deployment import Deployment
from common.errors import UserError
from common.register import Site, registry
from fedloge.live import View, events, round_line
from server import status as board
from server.flower_link import Control, NodeSeen, NoLink
from server.guard import COLOURS, Log
from server.status import Status
from server.superlink import PROC, Doors, SuperLink, alive, end_strays, serverapp

log = logging.getLogger(__name__)

TICK = 1.0  # seconds between two looks
RESTARTS = 5  # in a row without a finished round
SILENCE = 15.0  # seconds the SuperLink may leave questions unanswered
APPEARS = 60.0  # seconds until the process of a new run must be there
FAREWELL = 120.0  # seconds the ServerApp may take to tell the sites that it is over
SETTLING = 5.0  # seconds after its start in which the SuperLink may refuse sites, as it is still told their keys
AGAIN = 600.0  # seconds until the same refusal is told again
ROOM = 1 << 20  # bytes that must be free beyond the next checkpoint: on a full disk no start helps
TAIL = 65536  # bytes at the end of events.jsonl that are looked at for new rounds

UNKNOWN_KEY = re.compile(r"Activation failed: No SuperNode found")
NO_TLS = re.compile(r"TLS handshake of ipv[46]:(\S+):\d+ with ipv[46]:\S+:(\d+) failed: (.*)")
OTHER_NAME = re.compile(r"No match found for server name: (\S+)")


class Failed(Exception):
    """Something we watch is dead; `link` says whether that is the SuperLink."""

    def __init__(self, reason: str, link: bool = False) -> None:
        super().__init__(reason)
        self.link = link


class Supervisor:
    """For one folder, whose lock the caller holds."""

    def __init__(self, folder: Path, deployment: Deployment, show: Callable[[View], None]) -> None:
        server = deployment.server
        self._folder, self._name, self._show = folder, deployment.config.name, show
        self._host, self._address = server.host, f"{server.host}:{server.port}"
        self._run = folder / "run"
        self._link = SuperLink(folder, server.bind, server.door)
        self._doors: Doors | None = None
        self._control: Control | None = None
        self._opened = 0.0  # when the SuperLink was started
        self._run_id = 0
        self._began = 0.0  # when the run was started
        self._app: int | None = None  # process of the ServerApp
        self._over_since: float | None = None
        self._unheard_since: float | None = None
        self._restarts, self._round = 0, self._rounds_done()
        self._told = self._round  # rounds before are not told again
        self._sites: dict[str, Site] = {}
        self._locked_out: set[bytes] = set()  # keys that the SuperLink does not take back
        self._view: View | None = None
        self._refusals = Refusals()

    def run(self) -> Status:
        """Until the federation is finished or given up; gives its last status."""
        try:
            self._start(link=True)
            while True:
                time.sleep(TICK)
                try:
                    if (status := self._look()) is not None:
                        return status
                except Failed as failure:
                    self._restart(failure)
        finally:
            self._stop()

    def _start(self, *, link: bool) -> None:
        if link:
            self._stop()
            if reason := pki.ready_server(self._folder, self._host):  # it may have ended while the server ran
                log.warning("the server's certificate was renewed: %s", reason)
            self._doors, self._opened = self._link.start(), time.monotonic()
            log.info("%s: open for sites on port %d", self._name, self._doors.fleet)
            self._control = Control(self._folder, self._doors.control)
            self._locked_out.clear()
            self._admit(set())
        end_strays(self._run, ("flwr-serverapp",))  # of a run that failed: it may take seconds to end
        assert self._control is not None
        self._run_id = self._control.start_run({"federation": str(self._folder.resolve())})
        self._began, self._app, self._over_since, self._unheard_since = time.monotonic(), None, None, None
        printed = self._control.printed(self._run_id)
        Thread(target=_keep, args=(printed, Log(self._run / "logs" / "serverapp.log")), daemon=True).start()

    def _stop(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        self._link.stop()

    def _restart(self, failure: Failed) -> None:
        done = self._rounds_done()
        sizes = [path.stat().st_size for path in self._run.glob("checkpoints/round-*.safetensors")]
        if shutil.disk_usage(self._run).free < max(sizes, default=0) + ROOM:
            raise UserError(f"{self._run}: its disk is full: make room, then start again to go on after round {done}")
        self._restarts = 1 if done > self._round else self._restarts + 1
        self._round = done
        if self._restarts > RESTARTS:
            raise UserError(
                f"the server failed {self._restarts} times without finishing a round, at last because {failure}: "
                f"see {self._run / 'logs'}, then start it again to go on"
            )
        log.warning("%s: starting again after round %d", failure, done)
        try:
            if not failure.link and self._control is not None:
                self._control.stop_run(self._run_id)
            self._start(link=failure.link)
        except NoLink as error:
            log.warning("%s: the SuperLink is started anew", error)
            self._start(link=True)

    def _look(self) -> Status | None:
        """One look at everything. Gives the status once the federation has come to its end."""
        self._relay(self._link.said())
        if not self._link.alive:
            raise Failed("the SuperLink died", link=True)
        assert self._control is not None
        try:
            nodes = self._control.nodes()
            run = self._control.look_at(self._run_id)
            self._admit({seen.public_key for seen in nodes.values()})
        except NoLink as error:
            self._unheard_since = self._unheard_since or time.monotonic()
            if time.monotonic() - self._unheard_since > SILENCE:
                raise Failed(str(error), link=True) from None
            return None
        self._unheard_since = None
        gone = run.finished or self._app_died()
        status = self._status()  # read last: what is dead writes no more
        self._tell(status, nodes)
        over = status.phase in ("finished", "gave-up")
        if over:
            self._over_since = self._over_since or time.monotonic()
        if over and (gone or time.monotonic() - (self._over_since or 0.0) > FAREWELL):
            return status
        if gone and not run.finished:  # it may have come to its end, or to that of the SuperLink, since we asked
            try:
                run = self._control.look_at(self._run_id)
            except NoLink:
                return None  # the next look says why
        if run.finished:
            raise Failed(run.details or "the ServerApp ended too early")
        if gone:
            raise Failed("the ServerApp was killed")
        return None

    def _app_died(self) -> bool:
        if self._app is not None:
            return not alive(self._app)
        if not PROC.exists():  # its end shows in the run, a minute later
            return False
        appeared = self._status().run != ""  # asked before we look for its process: it may start in between
        self._app = serverapp(self._run)
        if self._app is None and not appeared and time.monotonic() - self._began > APPEARS:
            raise Failed("the ServerApp does not start", link=True)
        return self._app is None and appeared  # it lived and died between two looks

    def _status(self) -> Status:
        """That of our run: the file may still be that of the one before."""
        found = board.read(self._run)
        return found if found is not None and found.run == str(self._run_id) else Status()

    def _admit(self, registered: set[bytes]) -> None:
        """Have those registered who may take part, and nobody else."""
        assert self._control is not None
        try:
            self._sites = registry(self._folder)
        except UserError as error:  # a damaged entry: the others stay as they are
            if self._refusals.due("registry"):
                log.warning("%s", error)
        wanted = {site.public_key: name for name, site in self._sites.items() if not site.objection}
        # An expired key stays, though nobody asks its site for anything: an unregistered one could not be renewed.
        kept = {site.public_key for site in self._sites.values() if not site.revoked}
        for key in registered - kept:
            self._control.unregister(key)
        for key in wanted.keys() - registered - self._locked_out:
            if not self._control.register(key):
                self._locked_out.add(key)
                log.warning("%s: its key was shut out before; it can join when this server is restarted", wanted[key])

    def _tell(self, status: Status, nodes: dict[int, NodeSeen]) -> None:
        online = {seen.public_key for seen in nodes.values() if seen.online}
        view = View(
            self._name, self._address, True, status,
            sites=tuple(name for name, site in self._sites.items() if not site.objection),
            online=frozenset(name for name, site in self._sites.items() if site.public_key in online),
            shut_out={name: site.objection for name, site in self._sites.items() if site.objection},
        )  # fmt: skip
        for entry in new_rounds(self._run, self._told):
            self._told = int(entry["round"])
            log.info("%s", round_line(entry, status.rounds or self._told))
        for event in events(self._view, view):
            log.info("%s", event)
        self._view = view
        self._show(view)

    def _relay(self, lines: list[str]) -> None:
        settling = time.monotonic() < self._opened + SETTLING
        for line in lines:
            if settling and UNKNOWN_KEY.search(line):
                continue
            for warning in self._refusals.warnings(line, self._doors.fleet if self._doors else 0):
                log.warning("%s", warning)

    def _rounds_done(self) -> int:
        saved = sorted(self._run.glob("checkpoints/round-*.safetensors"))
        return int(saved[-1].stem.removeprefix("round-")) if saved else 0


def _keep(printed: Iterator[str], log: Log) -> None:
    """Write what the ServerApp prints to its log; Flower itself would throw it away."""
    rest = ""
    for piece in printed:
        *lines, rest = (rest + piece).split("\n")
        for line in lines:
            if text := COLOURS.sub("", line).rstrip():
                log.write(text)


class Refusals:
    """Turns what the SuperLink says of refused connections into warnings, each kind once in AGAIN seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: dict[str, float] = {}
        self._more: dict[str, int] = {}

    def warnings(self, line: str, port: int) -> list[str]:
        text = _refusal(line, port)
        if text is None or not self.due(text):
            return []
        more = self._more.pop(text, 0)
        return [f"{text} ({more} times more since the last time)" if more else text]

    def due(self, text: str) -> bool:
        now = self._clock()
        if len(self._last) > 1000:  # somebody tries many ports: forget, rather than grow
            self._last.clear()
            self._more.clear()
        if now - self._last.get(text, -AGAIN) < AGAIN:
            self._more[text] = self._more.get(text, 0) + 1
            return False
        self._last[text] = now
        return True


def _refusal(line: str, port: int) -> str | None:
    if UNKNOWN_KEY.search(line):
        return "a site was refused: its key is not registered here, or was revoked or has expired"
    if found := OTHER_NAME.search(line):
        return (
            f"somebody connected to this server as {found[1]!r}, which its certificate does not cover: "
            "if sites use this name, set server.host to it and invite them again"
        )
    if (found := NO_TLS.search(line)) and int(found[2]) == port:
        return (
            f"a connection from {found[1]} broke off while TLS began ({found[3]}): a site that does not accept our "
            "certificate (`fedloge check KIT` there says why), or not a site at all"
        )
    return None


def new_rounds(run: Path, after: int) -> list[dict[str, Any]]:
    """Events of the rounds later than `after`, in their order."""
    try:
        with (run / "events.jsonl").open("rb") as file:
            file.seek(max(file.seek(0, 2) - TAIL, 0))
            lines = file.read().splitlines()
    except OSError:
        return []
    found = {}
    for line in lines:
        try:
            entry = json.loads(line)
            if int(entry["round"]) > after:
                found[int(entry["round"])] = entry
        except (ValueError, KeyError, TypeError):  # cut off at the beginning, or still being written
            continue
    return [found[number] for number in sorted(found)]
