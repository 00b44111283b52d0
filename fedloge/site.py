"""`fedloge client`: a site takes part in a federation."""

import argparse
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from common import files
from common.errors import UsageError, UserError
from common.register import grouped
from fedloge.table import percent

if TYPE_CHECKING:
    from client.member import Member, Told
    from common.kit import Kit

EXAMPLE = """example: fedloge client north.kit --data /data/xrays
It runs until the server says that the federation is over. Start it again after
any stop: it goes on where it was."""
DATA = "a folder with a subfolder of images for every class, a .csv or .parquet table, or an .npz file"
OF = "federation"  # in the state folder: the fingerprint of the one it belongs to
LOG_BYTES = 2_000_000  # of client.log; the one before it is kept
SCREEN = """federation   {federation}
             {fingerprint}
server       {server}
site         {site}
images       {train} to train with, {test} to judge by, of {present} of {classes} classes
device       {device}
state        {state}"""


def add_verbs(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = verbs.add_parser(
        "client", help="take part in a federation", epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kit", type=Path, metavar="KIT", help="the file the operator sent")
    parser.add_argument("--data", type=Path, required=True, metavar="PATH", help=DATA)
    parser.add_argument("--test", type=Path, metavar="PATH", help="images to judge by, for .npz files and tables")
    parser.add_argument("--key", type=Path, metavar="FILE", help="key of this site (default: in or beside the kit)")
    parser.add_argument("--state", type=Path, metavar="DIR", help="what this site keeps (default: NAME for NAME.kit)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, or cuda,cpu (%(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all; 1 gives the same bits)")
    parser.add_argument("--share-counts", action="store_true", help="tell the server how many images of each class")
    parser.add_argument(
        "--keep-statistics", action="store_true",
        help="send no class statistics (how many images of each class, their mean features) even if asked",
    )  # fmt: skip
    parser.add_argument(
        "--supernode", action="store_true", help="use Flower's own node: slower, and it runs the code the server sends"
    )
    parser.add_argument("--json", action="store_true", help="print the outcome as one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from common.kit import open_kit

    kit = open_kit(options.kit, options.key)
    config = node_config(options)
    state = Path(str(config["state"]))
    state.mkdir(parents=True, exist_ok=True)
    if objection := foreign(state, kit):
        raise UserError(objection)
    files.write(state / OF, f"{kit.fingerprint}\n")
    live = Live(sys.stderr)
    members: list[Member] = []

    def ready() -> None:
        """Look at the data; what is wrong with them is said before any training."""
        from client import app as site_app  # here, because torch takes seconds

        member = site_app.made(config) if options.supernode else site_app.opened(config, live.told)
        live.say(_screen(kit, member))
        for note in member.data.notes:
            live.say(f"note: {note}")
        member.ended.unlink(missing_ok=True)
        members.append(member)

    with _logged(state / "client.log", live, options.debug):
        if options.supernode:
            from fedloge.supernode import SuperNode

            ready()
            events = Events(state / "events.jsonl", live)
            SuperNode(kit, state, config, live.say).run(members[0].ended.exists, events.look)
        else:
            from client.node import Node

            node = Node(kit, state, _answer, config, live.say, spent=lambda: any(member.lost for member in members))
            if node.known:  # a round may wait for it
                node.run(ready)
            else:
                ready()
                node.run()
    if members[0].lost:
        _begin_anew(members[0])
    _conclude(options, kit, members[0], live.newest)


def _begin_anew(member: "Member") -> None:
    """The same command in place of this process, with a GPU of its own again, or none: then it says so and ends."""
    print(f"{member.device} failed: this client starts anew", file=sys.stderr, flush=True)
    os.execv(sys.executable, [*sys.orig_argv, "--device", str(member.device)])


def _answer(message: Any, context: Any) -> Any:
    """The app of the site, which is imported when there is something to answer."""
    from client import app as site_app

    return site_app.app(message, context)


def foreign(state: Path, kit: "Kit") -> str:
    """Why this kit and what is kept at `state` do not go together; empty if they do."""
    with suppress(OSError):
        if (state / OF).read_text(encoding="utf-8").strip() != kit.fingerprint:
            return (
                f"{state}: holds what a site keeps of another federation, its personal model among it: "
                f"name another folder for {kit.federation} with --state"
            )
    return ""


def node_config(options: argparse.Namespace) -> dict[str, bool | int | float | str]:
    """What the app needs to know, with paths that are good in any working directory."""
    if options.threads is not None and not 1 <= options.threads <= 1024:
        raise UsageError(f"--threads {options.threads} is not possible: use 1 to 1024")
    state = options.state or options.kit.with_suffix("")
    if state == options.kit:
        raise UsageError(
            f"{options.kit}: has no ending such as .kit: say with --state where to keep what is this site's"
        )
    paths = {"kit": options.kit, "key": options.key, "data": options.data, "test": options.test, "state": state}
    config: dict[str, bool | int | float | str] = {
        name: str(path.resolve()) for name, path in paths.items() if path is not None
    }
    config["device"] = options.device
    if options.threads is not None:
        config["threads"] = options.threads
    if options.share_counts:
        config["share-counts"] = True
    if options.keep_statistics:
        config["keep-statistics"] = True
    return config


class Live(logging.Handler):
    """What is shown while it runs: on a terminal one line that is written again and again with messages above it, in a
    log a line for every round. Should nobody be there to see it any more, the site goes on."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(logging.WARNING)  # what is worth less is in client.log
        self.newest: Told | None = None
        self._stream = stream
        self._terminal = stream.isatty()
        self._line = ""
        self._own = ""

    def told(self, now: "Told") -> None:
        self.newest = now
        known = {"generic": now.generic, "personal": now.personal}
        shares = [f"{kind} {percent(share)} %" for kind, share in known.items() if share is not None]
        if shares:  # not every round is judged
            self._own = f"  own accuracy: {', '.join(shares)}"
        loss = "" if now.loss is None else f"  loss {now.loss:.4f}"
        text = f"round {now.round}{loss}{self._own}" if now.trained else f"the end, after round {now.round}{self._own}"
        if self._terminal:
            self._line = text
            self._write("")
        else:
            self.say(text)

    def say(self, text: str) -> None:
        self._write(f"{text}\n")

    def emit(self, record: logging.LogRecord) -> None:
        self.say(self.format(record))

    def close(self) -> None:
        """What is printed next goes below the line."""
        line, self._line = self._line, ""
        if line:
            self.say(line)
        super().close()

    def _write(self, text: str) -> None:
        if self._terminal:  # a line that does not fit could not be written again in its place
            text = f"\r\x1b[K{text}{self._line[: shutil.get_terminal_size().columns - 1]}"
        with suppress(OSError, ValueError):
            self._stream.write(text)
            self._stream.flush()


class Events:
    """Follows events.jsonl, which the processes of a stock node write."""

    def __init__(self, path: Path, live: Live) -> None:
        self._path = path
        self._live = live
        self._place = path.stat().st_size if path.exists() else 0

    def look(self) -> None:
        from client.member import Told

        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._place)
            *whole, _ = file.read().split(b"\n")
        for line in whole:
            self._place += len(line) + 1
            event = json.loads(line)
            self._live.told(Told(**{name: event[name] for name in Told.__dataclass_fields__}))


def _screen(kit: "Kit", member: "Member") -> str:
    return SCREEN.format(
        federation=kit.federation,
        fingerprint=grouped(kit.fingerprint),
        server=kit.address,
        site=kit.name,
        train=member.examples,
        test=len(member.data.test.labels),
        present=int((member.data.counts > 0).sum()),
        classes=len(kit.classes),
        device=member.device,
        state=member.state,
    )


class _LogFile(RotatingFileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """A full disk is said by what cannot be kept, not by its log."""


@contextmanager
def _logged(path: Path, live: Live, debug: bool) -> Iterator[None]:
    """All there is goes to a file of its own, what matters to the terminal as well."""
    file = _LogFile(path, maxBytes=LOG_BYTES, backupCount=1, encoding="utf-8", delay=True)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
    root = logging.getLogger()
    before, root.handlers = root.handlers, [file, *(root.handlers if debug else [live])]
    try:
        yield
    except UserError as error:  # on the terminal the command says it
        file.handle(root.makeRecord(__name__, logging.ERROR, "", 0, str(error), (), None))
        raise
    finally:
        root.handlers = before
        file.close()
        live.close()


def _conclude(options: argparse.Namespace, kit: "Kit", member: "Member", end: "Told | None") -> None:
    there = member.model.exists()
    if options.json:
        outcome: dict[str, Any] = {
            "federation": kit.federation,
            "site": kit.name,
            "round": None if end is None else end.round,
            "generic_accuracy": None if end is None else end.generic,
            "personal_accuracy": None if end is None else end.personal,
            "personal_model": str(member.model) if there else None,
        }
        print(json.dumps(outcome))
    elif there:
        print(f"personal model: {member.model}")
    if not there:
        print("no personal model: this site never trained, or was not there at the end", file=sys.stderr)
