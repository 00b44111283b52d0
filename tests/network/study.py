"""A whole federation for tests: `fedloge server` and its sites as processes of their own, on small real data.

Use it as a context: nothing that it started is left afterwards, whatever happens. Every process runs under
server/guard.py as in `fedloge demo`, so all of them are gone even if the test itself is killed.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import deployment, pki
from common.deployment import Deployment
from common.kit import Kit
from fedloge import provision
from server import guard
from server.superlink import processes
from tests.members import CLASSES, NAMES, SMALL, images
from tests.network.superlink import free_port, until

ROOT = Path(__file__).parents[2]
FEDLOGE = (sys.executable, "-m", "fedloge")
SETTINGS: dict[str, Any] = {
    "seed": SMALL["seed"],
    **{f"{section}.{key}": value for section in ("model", "frame", "train", "evaluation", "run")
       for key, value in SMALL[section].items()},
    "images.classes": CLASSES,
    "images.size": 8,
    "images.channels": 1,
    "federation.fold": "name",
    "server.bind": "127.0.0.1",
}  # fmt: skip


class Study:
    def __init__(self, place: Path, settings: Mapping[str, Any], names: tuple[str, ...] = NAMES) -> None:
        """Provision it in the new folder `place`. Site number k gets the images of `tests.members.NAMES[k]`."""
        self.place = place
        self.folder = place / "study"
        self.run = self.folder / "run"
        self.logs = place / "logs"
        self.logs.mkdir(parents=True)
        self.data = images(place / "data")
        given = {"method.name": "fedloge", **SETTINGS, "server.test": str(self.data / "test.npz"), **settings}
        provision.create(self.folder, "study", "localhost", free_port(), given)
        self.plan: Deployment = deployment.load(self.folder / "federation.toml")
        self.port = self.plan.server.port
        self.sites = dict(zip(names, NAMES, strict=False))
        self.kits = {name: self.invite(name) for name in names}
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "Study":
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children.values():
            assert child.stdin is not None
            child.stdin.close()  # the guard ends what it runs
        for child in self._children.values():
            try:
                child.wait(30)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        until(lambda: not processes(self.run), "the end of what the server started")
        until(lambda: not self.alive(), "the end of every process")

    def invite(self, name: str) -> Kit:
        return pki.issue(self.folder, name, None, self.plan)

    def redirect(self, name: str, *, host: str = "localhost", port: int = 0) -> Kit:
        """Its kit, but for a server at another address."""
        server = replace(self.plan.server, host=host, port=port or self.port)
        self.kits[name] = pki.issue(self.folder, name, None, replace(self.plan, server=server), renew=True)
        return self.kits[name]

    def serve(self, *words: object) -> subprocess.Popen[bytes]:
        return self.start("server", *FEDLOGE, "server", self.folder, *words)

    def join(self, name: str, *words: object) -> subprocess.Popen[bytes]:
        """`fedloge client` of a site."""
        kit, data = self.folder / "kits" / f"{name}.kit", self.data / f"{self.sites[name]}.npz"
        given = ("--data", data, "--state", self.state(name), "--device", "cpu", "--threads", "1", *words)
        return self.start(name, *FEDLOGE, "client", kit, *given)

    def start(self, name: str, *command: object) -> subprocess.Popen[bytes]:
        """Any command under a guard; what it prints is in `said(name)`."""
        words = [sys.executable, "-I", guard.__file__, self.logs / f"{name}.log", *command]
        child = subprocess.Popen(
            [str(word) for word in words], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        self._children[name] = child
        return child

    def state(self, name: str) -> Path:
        return self.place / "sites" / name

    def said(self, name: str) -> str:
        return _text(self.logs / f"{name}.log")

    def log(self, name: str = "server") -> list[str]:
        """Lines of run/logs/NAME.log."""
        return _text(self.run / "logs" / f"{name}.log").splitlines()

    def status(self) -> dict[str, Any]:
        try:
            table: dict[str, Any] = json.loads((self.run / "status.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return table

    def events(self) -> list[dict[str, Any]]:
        """One for every finished round."""
        lines = _text(self.run / "events.jsonl").split("\n")[:-1]  # the last is being written
        return [json.loads(line) for line in lines]

    def finish(self, child: subprocess.Popen[bytes], name: str, seconds: float = 300.0) -> None:
        """Wait until it ends, and well."""
        until(lambda: child.poll() is not None, f"the end of {name}", seconds)
        assert child.returncode == 0, self.said(name)

    def alive(self) -> list[str]:
        """Command lines of all processes that have to do with this federation."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if str(self.place) in line:
                found.append(line)
        return found


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
