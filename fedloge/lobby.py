"""`fedloge lobby`: how the containers of docker-compose.yml become one federation on one machine.

They share folders. Every replica of the client leaves a ticket, which it holds by a lock; `provision` waits until
their number stands still and deals as many sites: a kit and a share of the images each. A replica then claims a site
by a lock that goes with its process, so one that is started anew, after whatever end, takes a site that is free, with
the state that belongs to it. Nothing is dealt twice: a second start finds the federation there and goes on with it.

    LOBBY/tickets/    dealt (JSON: sites, wishes), provision (locked while it works), over (once the server has ended)
    OPERATOR/         federation/ and data/test.npz: the server's alone
    SITES/NAME/       site.kit, train.npz, test.npz, state/, claim (locked by who plays this site)
"""

import argparse
import fcntl
import json
import logging
import os
import shlex
import shutil
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from common import files
from common.errors import UserError
from fedloge import main

EXAMPLE = "example: fedloge lobby client --help; on machines of their own use `fedloge server` and `fedloge client`"
FOLDER = (  # what is otherwise than in demo.toml for a folder of images
    "data.source=folder", "data.size=32", "data.augment=crop-flip", "data.imbalance=1", "model.name=cnn",
)  # fmt: skip
STILL = 6.0  # seconds for which no replica came
LATEST = 90.0  # seconds after which those that are there are enough
GONE = 20.0  # seconds without a provision after which none is awaited
FAREWELL = 30.0  # seconds a site has to end by itself after the server has
TICK = 0.2
PORT = 9092

log = logging.getLogger(__name__)


def add_verbs(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = verbs.add_parser("lobby", help="the containers of docker-compose.yml", epilog=EXAMPLE)
    parser.add_argument("--lobby", type=Path, default=Path("/lobby"), help="folder of everybody (%(default)s)")
    roles = parser.add_subparsers(dest="role", metavar="ROLE", required=True)

    role = roles.add_parser(
        "provision",
        help="wait for the replicas and deal kits and images",
        epilog="example: fedloge lobby provision --least 4 --data /images",
    )
    role.add_argument("--operator", type=Path, default=Path("/operator"), help="the server's folder (%(default)s)")
    role.add_argument("--sites", type=Path, default=Path("/sites"), help="the sites' folder (%(default)s)")
    role.add_argument("--least", type=int, default=1, metavar="N", help="replicas to wait for")
    role.add_argument("--data", default="", metavar="DIR", help="a folder of images (default: the bundled digits)")
    role.add_argument("--set", default="", metavar="KEY=VALUE ...", help="override keys of demo.toml")
    role.add_argument("--results", type=Path, default=Path("/runs"), metavar="DIR", help="what comes out (%(default)s)")
    role.add_argument("--owner", default="", metavar="UID:GID", help="who plays server and sites (default: this user)")
    role.set_defaults(run=provision)

    role = roles.add_parser(
        "server", help="serve what was dealt", epilog="example: fedloge lobby server --results /runs"
    )
    role.add_argument("--operator", type=Path, default=Path("/operator"), help="the server's folder (%(default)s)")
    role.add_argument("--results", type=Path, default=Path("/runs"), metavar="DIR", help="what comes out (%(default)s)")
    role.set_defaults(run=serve)

    role = roles.add_parser(
        "client", help="claim a site and take part", epilog="example: fedloge lobby client --link /tmp/site"
    )
    role.add_argument("--sites", type=Path, default=Path("/sites"), help="the sites' folder (%(default)s)")
    role.add_argument("--link", type=Path, metavar="PATH", help="link that shall lead to the state of the site")
    role.add_argument("--gpu", action="store_true", help="train on a GPU: the next one for the next site")
    role.set_defaults(run=take_part)


def provision(options: argparse.Namespace) -> None:
    lobby: Path = options.lobby
    with _working(lobby):
        if options.owner:
            _hand_over(options)
        wishes = [*(FOLDER if options.data else ()), f"data.path={options.data}", *shlex.split(options.set)]
        found = dealt(lobby)
        if found is None:
            names = _deal(options, replicas(lobby / "tickets", options.least), wishes)
            files.write(lobby / "dealt", json.dumps({"sites": names, "wishes": wishes}))
            log.info("dealt: %d sites", len(names))
            return
        log.info("the federation of %d sites is there already: it goes on", len(found["sites"]))
        if found["wishes"] != wishes:
            log.warning("DATA and SET are those it began with: to change them, `docker compose down --volumes` first")


def serve(options: argparse.Namespace) -> None:
    results: Path = options.results
    if _await_deal(options.lobby) is None:
        return
    until = time.monotonic() + GONE  # provision may be about to hand it over
    while not os.access(results, os.W_OK):
        if time.monotonic() > until:
            raise UserError(f"{results}: user {os.getuid()} may not write here: set OWNER to the owner of the folder")
        time.sleep(TICK)
    _run(["server", str(options.operator / "federation")])
    from fedloge import report

    run = options.operator / "federation" / "run"
    for name in ("metrics.json", "events.jsonl"):
        shutil.copyfile(run / name, results / name)
    if (run / "models").exists():
        shutil.copytree(run / "models", results / "models", dirs_exist_ok=True, copy_function=shutil.copyfile)
    report.write(run, results / "report.html")
    files.write(options.lobby / "over", "")
    log.info("model of all, figures and report.html: %s", results)


def take_part(options: argparse.Namespace) -> None:
    lobby: Path = options.lobby
    with _ticket(lobby / "tickets"):
        names = _await_deal(lobby)
    if names is None:
        return
    if (lobby / "over").exists():
        log.info("the federation is over; the personal models are %s", options.sites / "NAME" / "state" / "models")
        return
    with ExitStack() as held:
        name = next((name for name in names if held.enter_context(claimed(options.sites / name / "claim"))), None)
        if name is None:
            log.info("all %d sites of this federation have their client: this replica is not needed", len(names))
            return
        place, state = options.sites / name, options.sites / name / "state"
        log.info("this replica is %s", name)
        if options.link is not None:
            options.link.unlink(missing_ok=True)
            options.link.symlink_to(state)
        threading.Thread(target=_follow, args=(lobby / "over",), daemon=True).start()
        _run([
            "client", str(place / "site.kit"), "--data", str(place / "train.npz"), "--test", str(place / "test.npz"),
            "--state", str(state), "--threads", "1", "--device", gpu(names.index(name)) if options.gpu else "cpu",
        ])  # fmt: skip


def replicas(tickets: Path, least: int, clock: Callable[[], float] = time.monotonic) -> int:
    """How many there are, once there are `least` and no other has come for a while; or at last, as many as came."""
    began = since = clock()
    last = 0
    log.info("waiting for %d clients or more", least)
    while clock() < began + LATEST:
        now = sum(_locked(path) for path in tickets.glob("*"))
        if now != last:
            last, since = now, clock()
        if last >= least and clock() >= since + STILL:
            return last
        time.sleep(TICK)
    if not last:
        raise UserError(f"no client has come in {LATEST:.0f} s: start some, and this again")
    log.warning("%d clients have come, not %d: the federation is theirs", last, least)
    return last


def dealt(lobby: Path) -> dict[str, list[str]] | None:
    """The names of the sites and the wishes they were dealt by, if they are there."""
    with suppress(FileNotFoundError):
        found: dict[str, list[str]] = json.loads((lobby / "dealt").read_text(encoding="utf-8"))
        return found
    return None


def gpu(number: int) -> str:
    """The device of the site of this number: every site its own while there are as many, then shared."""
    import torch

    if not torch.cuda.is_available():
        raise UserError("there is no GPU in this container: use the profile gpu on a machine that has one")
    return f"cuda:{number % torch.cuda.device_count()}"


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether the lock at `path` was free; it is held for as long as the context, and ends with the process."""
    with _opened(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _deal(options: argparse.Namespace, many: int, wishes: Sequence[str]) -> list[str]:
    """As many sites, each with its kit and its share; what an attempt before has left goes."""
    from common import config
    from fedloge import demo

    operator, sites = options.operator, options.sites
    for path in [*operator.iterdir(), *sites.iterdir()]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    experiment = config.load(demo.DEMO, [f"partition.clients={many}", *wishes])
    names = demo.provide(experiment, operator, "server", PORT)
    for name in names:
        place = sites / name
        place.mkdir()
        for path, new in (
            (operator / "federation" / "kits" / f"{name}.kit", "site.kit"),
            (operator / "data" / f"{name}.npz", "train.npz"),
            (operator / "data" / f"{name}-test.npz", "test.npz"),
        ):
            shutil.move(path, place / new)
    if options.owner:
        _hand_over(options)
    return names


def _hand_over(options: argparse.Namespace) -> None:
    """What root has made becomes the owner's, also the folder of results if the engine made it."""
    user, _, group = options.owner.partition(":")
    if not (user.isdecimal() and group.isdecimal()):
        raise UserError(f"OWNER = {options.owner!r} is not possible: write two numbers, like 1000:1000")
    for path in [options.results, *options.operator.rglob("*"), *options.sites.rglob("*")]:
        if path.lstat().st_uid == 0:
            os.chown(path, int(user), int(group), follow_symlinks=False)


def _await_deal(lobby: Path) -> list[str] | None:
    """The sites, once they are dealt; None if there is nobody who would."""
    seen = time.monotonic()
    while (found := dealt(lobby)) is None:
        if _locked(lobby / "provision"):
            seen = time.monotonic()
        elif time.monotonic() > seen + GONE:
            log.info("nothing was dealt: provision says why")
            return None
        time.sleep(TICK)
    return found["sites"]


def _follow(over: Path) -> None:
    """End this process some time after the server: a site that did not hear of the end would ask for ever."""
    while not over.exists():
        time.sleep(1.0)
    time.sleep(FAREWELL)
    os.kill(os.getpid(), signal.SIGTERM)


def _run(words: Sequence[str]) -> None:
    """`fedloge WORDS` in this process; its failure is ours."""
    if code := main.run(words):
        sys.exit(code)


@contextmanager
def _ticket(tickets: Path) -> Iterator[None]:
    tickets.mkdir(exist_ok=True)
    with suppress(PermissionError):  # not ours
        tickets.chmod(0o777)
    path = tickets / uuid.uuid4().hex
    with claimed(path):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def _working(lobby: Path) -> Iterator[None]:
    """The time in which others wait for a deal."""
    with claimed(lobby / "provision") as alone:
        if not alone:
            raise UserError(f"{lobby}: another provision is at work: wait for it")
        yield


def _locked(path: Path) -> bool:
    """Whether somebody holds the lock at `path`."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False


def _opened(path: Path) -> IO[str]:
    """The file of a lock, which anybody may take: replicas need not be one user."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    with suppress(PermissionError):  # not ours
        os.fchmod(descriptor, 0o666)
    return os.fdopen(descriptor, "r+", encoding="utf-8")
