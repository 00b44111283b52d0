"""`fedloge server` runs a federation and keeps it running; `fedloge status` says how it stands, from anywhere."""

import argparse
import fcntl
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from common import files
from common.errors import UserError
from common.register import registry
from fedloge import live
from fedloge.live import Screen, View
from fedloge.table import aligned, percent
from server import status as board
from server.status import Status

EXAMPLE = """example: fedloge server study --rounds 50 --min-clients 3
  stop it with Ctrl-C and start it again whenever you like:
  it goes on after the last finished round"""
FLAGS = {
    "rounds": (int, "N", "rounds in all"),
    "min-clients": (int, "N", "sites that must be online before a round starts"),
    "quorum": (float, "Q", "share of a round's sites whose replies make it count"),
    "deadline": (float, "S", "seconds after which a round is closed"),
    "grace": (float, "S", "seconds a round stays open after its quorum is in"),
}
LOCK = "server.lock"
OVERRIDES = "overrides.json"  # in the run folder: what was set on the command line, for the ServerApp
GLANCE = 0.5  # seconds; `fedloge status` holds the lock for a moment to see whether somebody does
LOG_BYTES = 2_000_000  # of server.log; the one before it is kept
SPACE = 100_000_000  # bytes that must be free on the disk of the folder beyond the checkpoints

log = logging.getLogger(__name__)


def add_verbs(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = verbs.add_parser("server", help="run a federation, or go on with it", epilog=EXAMPLE, formatter_class=raw)
    parser.add_argument("dir", type=Path, metavar="DIR", help="the folder `fedloge init` made")
    for name, (kind, metavar, meaning) in FLAGS.items():
        parser.add_argument(f"--{name}", type=kind, metavar=metavar, help=f"{meaning} (default: federation.toml)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the file")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.set_defaults(run=serve)
    parser = verbs.add_parser("status", help="how a federation stands", epilog="example: fedloge status study --json")
    parser.add_argument("dir", type=Path, metavar="DIR", help="the folder of the federation")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print it as one JSON object")
    well = "only say whether it is well, and end with 0 or 1; DIR may also be what a site keeps"
    form.add_argument("--healthy", action="store_true", help=well)
    parser.set_defaults(run=report)


def serve(options: argparse.Namespace) -> None:
    from common import deployment
    from server import run_folder

    folder: Path = options.dir
    registry(folder)  # a folder of another kind is named as such
    plan = deployment.load(folder / "federation.toml", _overrides(options))
    _ = plan.task  # says what is missing
    run, rounds = folder / "run", plan.config.federation.rounds
    with _alone(run):
        result = run_folder.finished(run, rounds)
        if result is None or not _told(run):
            files.write(run / OVERRIDES, json.dumps(_overrides(options)) + "\n")  # also shows that we may write there
            _check_space(run, plan.config.run.keep)
            with _logged(run / "logs") as screen:
                _supervise(folder, plan, screen)
            result = run_folder.finished(run, rounds)
        if result is None:
            raise UserError(f"{run}: the federation has finished, but its metrics.json is missing: start it again")
    places = {"metrics": str(run / "metrics.json"), "models": str(run / "models")}
    if options.json:
        print(json.dumps({**result, **places, "folder": str(folder)}))
        return
    print(outcome(result))
    judged = result.get("mean_of_rounds") or []
    means = f" (means over rounds {', '.join(map(str, judged))})" if len(judged) > 1 else ""
    print(f"\nmodel of all: {places['models']}; personal models: at the sites\nfigures: {places['metrics']}{means}",
          file=sys.stderr)  # fmt: skip


def _supervise(folder: Path, plan: Any, screen: Screen) -> None:
    from fedloge.supervisor import Supervisor

    status = Supervisor(folder, plan, screen.show).run()
    if status.phase == "gave-up":
        raise UserError(status.message)


def _told(run: Path) -> bool:
    """Whether the sites know that it is over; a server that was killed just before leaves them waiting for it."""
    last = board.read(run)
    return last is not None and last.phase == "finished"


def report(options: argparse.Namespace) -> None:
    folder: Path = options.dir
    if options.healthy:
        from fedloge import health

        print(health.of(folder, time.time()))
        return
    view = _seen(folder)
    if view is None:
        raise UserError(f"{folder}: no server has run here yet: start `fedloge server {folder}`")
    if options.json:
        state = {name: "online" if name in view.online else "absent" for name in view.sites}
        known = state if view.running else dict.fromkeys(state, "unknown")
        about = {"name": view.name, "address": view.address, "running": view.running}
        print(json.dumps({**about, **asdict(view.status), "registered": known, "shut_out": dict(view.shut_out)}))
        return
    print("\n".join(live.table(view, time.time())))
    if view.status.updated:
        print(f"  as of       {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(view.status.updated))}")


def _seen(folder: Path) -> View | None:
    """How the federation stands, as far as one can tell from outside. None if no server ever ran."""
    from common import deployment

    sites = registry(folder)
    plan = deployment.load(folder / "federation.toml")
    run = folder / "run"
    running, found = server_process(run) is not None, board.read(run)
    if found is None and not running:
        return None
    status = found or Status()
    online = {name for name, site in status.sites.items() if site.get("online")} if running else set()
    if running:
        online = _online(folder, online)
    return View(
        plan.config.name, f"{plan.server.host}:{plan.server.port}", running, status,
        sites=tuple(name for name, site in sites.items() if not site.objection),
        online=frozenset(online & sites.keys()),
        shut_out={name: site.objection for name, site in sites.items() if site.objection},
    )  # fmt: skip


def _online(folder: Path, otherwise: set[str]) -> set[str]:
    """The SuperLink knows best who is online; while it starts, the last status does."""
    from server.flower_link import NoLink, open_link

    try:
        link = open_link(folder)
    except NoLink:
        return otherwise
    try:
        return {seen.name for seen in link.nodes().values() if seen.name and seen.online}
    except NoLink:
        return otherwise
    finally:
        link.close()


def outcome(result: dict[str, Any]) -> str:
    """What came out, for people: the method's own models, then every site."""
    rows = [("model", "judged on", "", "top-1")]
    local: dict[str, dict[str, float]] = {}
    for kind, where in (("generic", "the test set"), ("generic_local", "the sites' own images"),
                        ("personal", "the sites' own images")):  # fmt: skip
        for name, figures in list((result[kind] or {}).items())[:1]:
            rows.append((kind.partition("_")[0], where, name, percent(figures["top1"])))
            local[kind] = figures.get("per_site") or {}
    text = aligned(rows)
    sites = sorted(local.get("generic_local", {}).keys() | local.get("personal", {}).keys())
    if not sites:
        return text
    table = [(site, *(percent(local.get(k, {}).get(site)) for k in ("generic_local", "personal"))) for site in sites]
    return f"{text}\n\n{aligned([('site', 'generic', 'personal'), *table])}"


def server_process(run: Path) -> int | None:
    """The process that serves this folder; None when there is none."""
    try:
        with (run / LOCK).open("r", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(file.read() or 0)
    except (OSError, ValueError):
        pass
    return None


@contextmanager
def _alone(run: Path) -> Iterator[None]:
    """One server a folder; the lock goes with its process, however that ends."""
    run.mkdir(exist_ok=True)
    with (run / LOCK).open("a+", encoding="utf-8") as file:
        end = time.monotonic() + GLANCE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                file.seek(0)
                if time.monotonic() > end:
                    raise UserError(
                        f"{run.parent}: another server is running on this folder (pid {file.read() or '?'}): "
                        f"see `fedloge status {run.parent}`, or end it first"
                    ) from None
            time.sleep(0.05)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        files.sweep(run)
        yield


def _overrides(options: argparse.Namespace) -> list[str]:
    """Flags are overrides like any other."""
    given = {name.replace("-", "_"): getattr(options, name.replace("-", "_")) for name in FLAGS}
    return [f"federation.{key}={value}" for key, value in given.items() if value is not None] + list(options.set)


def _check_space(run: Path, keep: int) -> None:
    sizes = [path.stat().st_size for path in run.glob("checkpoints/round-*.safetensors")]
    needed = SPACE + (keep + 1) * max(sizes, default=0) - sum(sizes)
    if (free := shutil.disk_usage(run).free) < needed:
        raise UserError(f"{run}: its disk has {free >> 20} MB free, and {needed >> 20} MB are needed: make room")


class _LogFile(RotatingFileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """A full disk is said where it matters, by who writes checkpoints."""


@contextmanager
def _logged(folder: Path) -> Iterator[Screen]:
    """What is logged goes to server.log and, around the table, to the screen."""
    folder.mkdir(parents=True, exist_ok=True)
    screen = Screen()
    file = _LogFile(folder / "server.log", maxBytes=LOG_BYTES, backupCount=1, encoding="utf-8", delay=True)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
    root = logging.getLogger()
    before, root.handlers = root.handlers, [screen, file]
    try:
        yield screen
    except (UserError, KeyboardInterrupt) as error:  # on the screen the command says it
        file.handle(root.makeRecord(__name__, logging.ERROR, "", 0, str(error) or "stopped by hand", (), None))
        raise
    finally:
        root.handlers = before
        with suppress(OSError):
            file.close()
        screen.close()
