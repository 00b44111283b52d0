"""`fedloge server` and `fedloge status` as an operator has them: real processes, and what kills them."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import NamedTuple

import pytest

from common import register
from fedloge import main, provision, supervisor
from server import superlink
from server.flower_link import open_link
from server.superlink import processes
from tests.network.standin import environment
from tests.network.superlink import free_port
from tests.network.test_link import invite, until

FEDLOGE = [sys.executable, "-m", "fedloge"]
pytestmark = pytest.mark.timeout(400)  # a machine that may be busy


class Federation:
    """A folder with two sites, and the server that runs on it."""

    def __init__(self, place: Path) -> None:
        self.folder = place / "study"
        self.run = self.folder / "run"
        self.port = free_port()
        self.servers: list[subprocess.Popen[str]] = []
        provision.create(self.folder, "study", "localhost", self.port, {"images.classes": ("cat", "dog")})
        for name in ("north", "south"):
            invite(self.folder, name)

    def start(self, *words: str) -> subprocess.Popen[str]:
        command = [*FEDLOGE, "server", str(self.folder), *words]
        pipe = subprocess.PIPE
        before = signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # where Ctrl-C is ignored, children ignore it too
        try:
            server = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
        finally:
            signal.signal(signal.SIGINT, before)
        self.servers.append(server)
        return server

    def wait_for_round(self, number: int) -> None:
        until(lambda: (status := self.status()) and status["round"] == number and status["phase"] == "training")

    def status(self) -> dict[str, object]:
        try:
            table: dict[str, object] = json.loads((self.run / "status.json").read_text())
        except (OSError, ValueError):
            return {}
        return table

    def process(self, program: str) -> int:
        until(lambda: program in processes(self.run).values())
        return next(pid for pid, name in processes(self.run).items() if name == program)

    def hold(self, yes: bool) -> None:
        self.run.mkdir(exist_ok=True)
        (self.run / "hold").touch() if yes else (self.run / "hold").unlink()

    def starts(self) -> int:
        path = self.run / "starts"
        return len(path.read_text().splitlines()) if path.exists() else 0


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


class Here:
    """The command in this process: quick, and good for all that starts no server."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *words: object) -> Outcome:
        self._capsys.readouterr()
        code = main.run([str(word) for word in words])
        return Outcome(code, *self._capsys.readouterr())


@pytest.fixture
def fedloge(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Iterator[Here]:
    caplog.set_level(logging.INFO)  # the command would, were it not for pytest's own handlers
    before = signal.getsignal(signal.SIGTERM)
    yield Here(capsys)
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def federation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Federation]:
    monkeypatch.setenv("PYTHONPATH", environment(tmp_path / "standin")["PYTHONPATH"])
    made = Federation(tmp_path)
    try:
        yield made
    finally:
        for server in made.servers:
            server.kill()
            server.communicate(timeout=60)
        until(lambda: not processes(made.run))


def test_a_federation_runs_to_its_end_and_says_what_came_out(federation: Federation, fedloge: Here) -> None:
    done = fedloge("server", federation.folder, "--rounds", 3)
    assert done.code == 0, done.err
    assert "personal  the sites' own images  phi   70.0" in done.out
    assert "round 3 of 3: 1 reply, missing b" in done.err
    assert str(federation.run / "metrics.json") in done.err
    assert processes(federation.run) == {}
    assert "round 3 of 3" in (federation.run / "logs" / "server.log").read_text()
    assert "standing in" in (federation.run / "logs" / "serverapp.log").read_text()

    again = fedloge("server", federation.folder, "--rounds", 3, "--json")  # nothing is run again
    assert (again.code, json.loads(again.out)["rounds"]) == (0, 3)
    assert federation.starts() == 1
    table = json.loads(fedloge("status", federation.folder, "--json").out)
    assert (table["running"], table["phase"], table["round"]) == (False, "finished", 3)
    assert table["registered"] == {"north": "unknown", "south": "unknown"}


def test_a_finished_federation_goes_on_when_it_is_given_more(federation: Federation, fedloge: Here) -> None:
    (federation.run / "checkpoints").mkdir(parents=True)
    (federation.run / "checkpoints" / "round-000001.safetensors").touch()
    (federation.run / "metrics.json").write_text('{"rounds": 1}')
    more = fedloge("server", federation.folder, "--set", "federation.rounds=2")
    assert more.code == 0, more.err
    assert "round 2 of 2" in more.err
    assert "round 1 of 2" not in more.err


@pytest.mark.parametrize(
    ("program", "told"),
    [
        ("flwr-serverapp", "the ServerApp was killed"),
        ("flower-superlink", "the SuperLink died"),
        ("guard.py", "the SuperLink died"),
    ],
)
def test_whatever_is_killed_is_started_again(federation: Federation, fedloge: Here, program: str, told: str) -> None:
    federation.hold(True)

    def kill() -> None:
        federation.wait_for_round(1)
        os.kill(federation.process(program), signal.SIGKILL)
        until(lambda: federation.starts() == 2)
        federation.hold(False)

    with ThreadPoolExecutor() as pool:
        killed = pool.submit(kill)
        done = fedloge("server", federation.folder, "--rounds", 2)
        killed.result()
    assert done.code == 0, done.err
    assert f"{told}: starting again after round 0" in done.err
    assert federation.starts() == 2


def test_a_serverapp_that_dies_before_anybody_saw_it_is_started_again(
    federation: Federation, fedloge: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = Event()

    def slow(run: Path) -> int | None:  # a machine so busy that the first look for the process comes too late
        killed.wait(60)
        return superlink.serverapp(run)

    def kill() -> None:
        federation.wait_for_round(1)
        os.kill(federation.process("flwr-serverapp"), signal.SIGKILL)
        killed.set()
        until(lambda: federation.starts() == 2)
        federation.hold(False)

    monkeypatch.setattr(supervisor, "serverapp", slow)
    federation.hold(True)
    with ThreadPoolExecutor() as pool:
        killing = pool.submit(kill)
        done = fedloge("server", federation.folder, "--rounds", 2)
        killing.result()
    assert done.code == 0, done.err
    assert "the ServerApp was killed: starting again after round 0" in done.err


def test_a_superlink_that_dies_while_it_is_looked_at_is_what_died(
    federation: Federation, fedloge: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(app: int) -> bool:  # a machine so busy that the SuperLink takes the ServerApp with it before we ask
        if (federation.run / "hold").exists():
            os.kill(federation.process("flower-superlink"), signal.SIGKILL)
            until(lambda: not superlink.alive(app))
            federation.hold(False)
        return superlink.alive(app)

    monkeypatch.setattr(supervisor, "alive", slow)
    federation.hold(True)
    done = fedloge("server", federation.folder, "--rounds", 2)
    assert done.code == 0, done.err
    assert "the SuperLink died: starting again after round 0" in done.err
    assert "the ServerApp was killed" not in done.err


def test_nothing_is_left_of_a_killed_server_and_the_next_one_goes_on(federation: Federation, fedloge: Here) -> None:
    federation.hold(True)
    server = federation.start("--rounds", "2")
    federation.wait_for_round(1)
    server.kill()
    server.wait()
    until(lambda: not processes(federation.run))
    seen = fedloge("status", federation.folder)
    assert seen.code == 0
    assert "not running (last: training), round 1 of 2" in seen.out
    federation.hold(False)
    assert fedloge("server", federation.folder, "--rounds", 2).code == 0


def test_while_it_runs_sites_come_and_go_and_no_other_server_starts(federation: Federation, fedloge: Here) -> None:
    federation.hold(True)
    server = federation.start("--rounds", "2")
    federation.wait_for_round(1)
    second = fedloge("server", federation.folder, "--rounds", 2)
    assert second.code == 1
    assert f"another server is running on this folder (pid {server.pid})" in second.err
    assert len(second.err.splitlines()) == 1

    link = open_link(federation.folder)

    def names() -> set[str | None]:
        return {seen.name for seen in link.nodes().values()}

    assert names() == {"north", "south"}
    register.revoke(federation.folder, "south")
    until(lambda: len(link.nodes()) == 1)
    invite(federation.folder, "west")
    until(lambda: names() == {"north", "west"})
    west = register.registry(federation.folder)["west"]
    register.enter(federation.folder, replace(west, expires=west.issued))
    assert names() == {"north", None}  # nobody asks it for anything, and yet it can be renewed
    register.enter(federation.folder, west)
    assert names() == {"north", "west"}
    link.close()
    table = json.loads(fedloge("status", federation.folder, "--json").out)
    assert (table["running"], table["phase"]) == (True, "training")
    assert table["registered"] == {"north": "absent", "west": "absent"}
    assert "revoked on" in table["shut_out"]["south"]
    assert server.poll() is None


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_cleanly_when_asked(federation: Federation, how: signal.Signals) -> None:
    federation.hold(True)
    server = federation.start("--rounds", "2")
    federation.wait_for_round(1)
    server.send_signal(how)
    _, err = server.communicate(timeout=60)
    assert (server.returncode, processes(federation.run)) == (1, {})
    assert "the same command goes on" in err.splitlines()[-1]
    assert "Traceback" not in err


def test_it_gives_up_when_starting_again_does_not_help(
    federation: Federation, fedloge: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "RESTARTS", 1)
    federation.run.mkdir()
    (federation.run / "fail").touch()
    done = fedloge("server", federation.folder, "--rounds", 2)
    assert done.code == 1
    assert federation.starts() == 2
    last = done.err.splitlines()[-1]
    assert "failed 2 times without finishing a round" in last
    assert "made to fail" in last
    assert processes(federation.run) == {}


def test_a_federation_that_gave_up_says_why(federation: Federation, fedloge: Here) -> None:
    federation.run.mkdir()
    (federation.run / "give-up").touch()
    done = fedloge("server", federation.folder, "--rounds", 1)
    assert (done.code, federation.starts()) == (1, 1)
    assert done.err.splitlines()[-1] == "fedloge: round 2 found no quorum 3 times in a row"
    assert "note        round 2 found no quorum" in fedloge("status", federation.folder).out


def test_what_cannot_work_is_said_in_one_line(federation: Federation, fedloge: Here, tmp_path: Path) -> None:
    def complaint(*words: object) -> str:
        done = fedloge(*words)
        assert done.code in (1, 2), done.out
        assert (done.out, len(done.err.splitlines())) == ("", 1), done.err
        return f"{done.code} {done.err.strip()}"

    folder = federation.folder
    assert "no server has run here yet: start `fedloge server" in complaint("status", folder)
    for verb in ("server", "status"):
        assert complaint(verb, tmp_path).startswith("1 ")
        assert "is not the folder of a federation" in complaint(verb, tmp_path / "missing")
    assert complaint("server", folder, "--rounds", 0).startswith("2 fedloge: federation.rounds")
    assert "federation.quorum" in complaint("server", folder, "--quorum", 1.5)
    assert "unknown key federation.quorums" in complaint("server", folder, "--set", "federation.quorums=1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", federation.port))
        taken.listen()
        assert f"port {federation.port} is in use by" in complaint("server", folder)
    assert "no server has run here yet" in complaint("status", folder)
    (federation.run / "logs").rename(tmp_path / "logs")
    (federation.run / "logs").touch()
    assert "logs" in complaint("server", folder)
    assert superlink.processes(federation.run) == {}
