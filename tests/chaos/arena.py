"""A federation of real processes to be killed: a server and sites as `fedloge demo` provides them, in one folder.

Every command runs under a guard, so it ends with the test however that ends. Nothing here waits for a time to pass:
what a process is doing is read from the files that it keeps, and conditions are looked at until they hold.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from common import config, deployment, parts, pki
from common.parts import Tensors
from fedloge import demo
from server import guard, status, superlink
from server.status import Status

PROC = Path("/proc")
PATIENCE = 400.0  # seconds for anything that must happen; a start of all on a busy machine takes one
TICK = 0.05  # seconds between two looks
CLOSELY = 0.001  # where a moment would be missed
TAIL = 2_000  # characters of every log, when something waits in vain


class Arena:
    """Use it as a context. A command is called by its site's name, or "server"."""

    def __init__(
        self,
        place: Path,
        settings: Sequence[str],
        host: str = "localhost",
        on: Callable[[str], Sequence[object]] = lambda _: (),
    ) -> None:
        """Sites dial `host`; `on` gives the words before a command that start it on its machine."""
        self.place = place
        self.federation = place / "federation"
        self.run = self.federation / "run"
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        place.mkdir()
        (place / "logs").mkdir()
        self.names = demo.provide(config.load(demo.DEMO, settings), place, host)
        self._on = on

    def __enter__(self) -> "Arena":
        return self

    def __exit__(self, *_: object) -> None:
        print(self.logs())
        for process in self.running.values():
            process.kill()  # the kernel ends what a guard runs
            process.communicate()
        superlink.end_strays(self.run)  # no more than a second net: all of it ends with the server
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def serve(self, *flags: object) -> None:
        self._start("server", "server", self.federation, *flags)

    def join(self, name: str, data: str = "") -> None:
        """Start a site, on the data that were provided under another name if so wished."""
        images, test = (self.place / "data" / f"{data or name}{end}.npz" for end in ("", "-test"))
        kit, state = self.federation / "kits" / f"{name}.kit", self.site(name)
        self._start(name, "client", kit, "--data", images, "--test", test, "--state", state, "--threads", "1")

    def start(self) -> None:
        """The server, all sites, and their first round."""
        self.serve()
        for name in self.names:
            self.join(name)
        self.go_on(0, "the first round")

    def invite(self, name: str) -> None:
        pki.issue(self.federation, name, None, deployment.load(self.federation / "federation.toml"))

    def move(self, folder: Path) -> None:
        """Bring the folder of the server, which does not run, to another place. It is also found where it was."""
        self.federation.rename(folder)
        self.federation.symlink_to(folder)
        self.federation, self.run = folder, folder / "run"

    def kill(self, name: str) -> None:
        """SIGKILL for the command's process group. What else goes with it has to go by itself."""
        os.killpg(self._pid(name), signal.SIGKILL)
        assert self.ended(name) == [128 + signal.SIGKILL]

    def kill_while(self, name: str, moment: Callable[[str], bool]) -> None:
        """SIGKILL for a site while `moment` holds of it: where it does not any more once the site is stopped, the next
        one is waited for."""
        self.stop_while(name, moment)
        self.kill(name)

    def stop_while(self, name: str, moment: Callable[[str], bool]) -> int:
        """SIGSTOP likewise; gives the process."""
        pid = self._pid(name)
        while True:
            self.until(lambda: moment(name), f"the right moment to stop {name}", CLOSELY)
            os.kill(pid, signal.SIGSTOP)
            self.until(lambda: _stopped(pid), f"{name} to stop", CLOSELY)
            if moment(name):
                return pid
            os.kill(pid, signal.SIGCONT)

    def kill_all(self) -> None:
        """As when the power fails: the server, the sites and all they started."""
        while left := self.processes():
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.ended(*self.running)

    def terminate(self, name: str) -> int:
        """SIGTERM; gives the exit status."""
        os.kill(self._pid(name), signal.SIGTERM)
        [code] = self.ended(name)
        return code

    def ended(self, *names: str) -> list[int]:
        """The exit statuses of commands that are about to end."""
        processes = [self.running.pop(name) for name in names]
        self._wait(lambda: None not in [process.poll() for process in processes], f"{', '.join(names)} to end")
        for process in processes:
            process.communicate()
        return [process.returncode for process in processes]

    def finish(self) -> None:
        """The server comes to its end, tells the sites that are there so, and nothing is left."""
        there = sorted(self.running)
        assert self.ended(*there) == [0] * len(there)
        assert self.status().phase == "finished"
        for name in set(there) - {"server"}:
            assert (self.site(name) / "over").exists()
            assert (self.site(name) / "models" / "personal.safetensors").exists()
        self.until(lambda: not self.processes(), "every process to be gone")

    def go_on(self, after: int, what: str) -> None:
        """Wait for a round later than that."""
        self.until(lambda: self.done() > after, what)

    def until(self, condition: Callable[[], object], what: str, tick: float = TICK) -> None:
        """Wait for that, or for the end of a command, which nobody expects now."""
        self._wait(lambda: condition() or self.over(), what, tick)
        assert condition(), f"{', '.join(self.over())} ended, waiting for {what}\n{self.logs()}"

    def over(self) -> list[str]:
        """Commands that have ended by themselves."""
        return [name for name, process in self.running.items() if process.poll() is not None]

    def status(self) -> Status:
        return status.read(self.run) or Status()

    def rounds(self) -> list[dict[str, Any]]:
        """A line of events.jsonl each."""
        path = self.run / "events.jsonl"
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []  # the last is being written
        return [json.loads(line) for line in lines]

    def done(self) -> int:
        """Rounds that cannot be lost any more."""
        saved = sorted((self.run / "checkpoints").glob("round-*.safetensors"))
        return _round(saved[-1]) if saved else 0

    def site(self, name: str) -> Path:
        """Its state folder."""
        return self.place / "sites" / name

    def heads(self, name: str) -> list[int]:
        """Rounds after which the site keeps its personal head."""
        return sorted(_round(path) for path in self.site(name).glob("store/*/round-*.safetensors"))

    def trained(self, name: str, round: int) -> int:
        """How often the site trained in a round, to the end of it."""
        lines = (self.site(name) / "events.jsonl").read_text(encoding="utf-8").splitlines()
        return sum((event["round"], event["trained"]) == (round, True) for event in map(json.loads, lines))

    def trains(self, name: str) -> bool:
        """Whether it has an order with all its contents, and no reply yet."""
        return self._under_way(name) and not (self.site(name) / "outbox" / "reply").exists()

    def uploads(self, name: str) -> bool:
        """Whether it may have announced its reply, and has not given all of it."""
        return self._under_way(name) and (self.site(name) / "outbox" / "tried").exists()

    def online(self, name: str) -> bool:
        """What the ServerApp holds of a site."""
        return bool(self.status().sites.get(name, {}).get("online"))

    def said(self, name: str) -> str:
        return (self.place / "logs" / f"{name}.log").read_text(encoding="utf-8")

    def log(self, name: str) -> str:
        """That of a site, through all its starts."""
        path = self.site(name) / "client.log"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def logs(self) -> str:
        """The ends of all."""
        paths = [*self.run.glob("logs/*.log"), *self.place.glob("logs/*.log"), *self.place.glob("sites/*/client.log")]
        return "\n".join(f"--- {path.relative_to(self.place)}\n{path.read_text()[-TAIL:]}" for path in paths)

    def program(self, name: str) -> int:
        """A process that the server has started."""
        [pid] = [pid for pid, program in superlink.processes(self.run).items() if program == name]
        return pid

    def processes(self) -> dict[int, str]:
        return processes(self.place)

    def assert_equal(self, reference: Path) -> None:
        """All bits and figures are those of the simulation in `reference`, as far as this federation went."""
        last = f"round-{self.done():06d}.safetensors"
        pairs = [(self.run / "checkpoints" / last, reference / "checkpoints" / last)]
        for name in self.names:
            [kept] = self.site(name).glob(f"store/*/{last}")
            pairs.append((kept, reference / "sites" / name / last))
        for real, simulated in pairs:
            _assert_equal_tensors(parts.read(real)[0], parts.read(simulated)[0])
        result, wanted = (json.loads((run / "metrics.json").read_text()) for run in (self.run, reference))
        assert result["loss"] == wanted["loss"][: self.done()]
        assert len(result["evaluations"]) == self.done()
        for found, expected in zip(result["evaluations"], wanted["evaluations"], strict=False):
            assert _accuracies(found) == _accuracies(expected)

    def _start(self, name: str, *words: object) -> None:
        log = self.place / "logs" / f"{name}.log"
        command = [*self._on(name), sys.executable, "-I", guard.__file__, log, sys.executable, "-m", "fedloge", *words]
        self.running[name] = subprocess.Popen(
            [str(word) for word in command], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
        )

    def _wait(self, condition: Callable[[], object], what: str, tick: float = TICK) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end, f"waited in vain for {what}\n{self.logs()}"
            time.sleep(tick)

    def command(self, name: str) -> int | None:
        """The command itself, once its guard runs it."""
        guard_pid = str(self.running[name].pid)
        return next((int(path.parent.name) for path in PROC.glob("[0-9]*/stat") if _state(path)[1] == guard_pid), None)

    def _pid(self, name: str) -> int:
        self.until(lambda: self.command(name), f"{name} to run")
        pid = self.command(name)
        assert pid is not None
        return pid

    def _under_way(self, name: str) -> bool:
        """Whether the last that a site said is that a training order is here."""
        there = (self.site(name) / "outbox" / "order").exists()
        return there and self.log(name).endswith("train message: received\n")


def processes(place: Path) -> dict[int, str]:
    """Every process that has to do with this folder, by its command or its environment."""
    found = {}
    for entry in PROC.glob("[0-9]*"):
        with suppress(OSError):
            command = (entry / "cmdline").read_bytes()
            if os.fsencode(place) in command + (entry / "environ").read_bytes():
                found[int(entry.name)] = command.replace(b"\0", b" ").decode()
    return found


def _round(path: Path) -> int:
    return int(path.stem.removeprefix("round-"))


def _stopped(pid: int) -> bool:
    return all(_state(path)[0] == "T" for path in PROC.glob(f"{pid}/task/*/stat"))


def _state(stat: Path) -> list[str]:
    """Of a process or thread: its state, its parent, ..."""
    try:
        return stat.read_text().rpartition(")")[2].split()
    except OSError:  # it has just ended
        return ["", ""]


def _assert_equal_tensors(ours: Tensors, theirs: Tensors) -> None:
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def _accuracies(evaluation: dict[str, Any]) -> dict[str, dict[str, float]]:
    kinds = ("generic", "generic_local", "personal")
    return {kind: {predictor: of["top1"] for predictor, of in evaluation[kind].items()} for kind in kinds}
