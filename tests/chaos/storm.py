"""Federations under faults drawn from seeds: `python -m tests.chaos.storm --seeds 1-25 [--json FILE]`.

A federation of three sites, each behind a cable of its own, meets the faults of its seed one after the other
(schedule.py), now and then one in the recovery from the one before. At the end all sites are together again, the server
is stopped and gets two rounds more to finish, and invariants.py looks at what is left. The first seed that fails stops
it: its folder stays, and the command that replays it is named. Faults that need root, or Debian's libfaketime, are
left out where these are missing, and the table says so.
"""

import argparse
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stdout, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from common import deployment, pki
from server import superlink
from server.run_folder import environment
from tests.chaos import clocks, disks, invariants, schedule
from tests.chaos.arena import Arena
from tests.chaos.clocks import Clock
from tests.chaos.disks import SmallDisk
from tests.chaos.schedule import MOMENTS, PROGRAMS, Fault
from tests.network.relay import Relay

SITES = ("site-000", "site-001", "site-002")
EXPERIMENT = ["partition.clients=3", "model.width=300", "train.epochs=1", "evaluation.every=3"]
POLICY = ("--min-clients", 2, "--quorum", 0.5, "--grace", 2, "--deadline", 60, "--set", "run.keep=20")
TOGETHER = ("--min-clients", 3, "--quorum", 1)  # at the end: a site that is away then is not told of it
ENDLESS = 100_000  # rounds, until the last fault is survived
MORE = 2  # rounds after that
SERVER_DISK, SITE_DISK = 200_000_000, 8_000_000  # bytes; a server wants 100 MB to begin with
FULL = ("No space left on device", "its disk is full", "make room")


@dataclass(frozen=True)
class Outcome:
    seed: int
    faults: tuple[Fault, ...]
    rounds: int
    seconds: float
    failure: str = ""  # empty: survived with all invariants

    def row(self) -> str:
        first = f"{self.seed:4}  {self.rounds:6}  {self.seconds:7.0f}  {'failed' if self.failure else 'survived':8}  "
        faults = [str(fault) for fault in self.faults] or ["none"]
        return "\n".join(f"{start}{fault}" for start, fault in zip([first, *[" " * 31] * 9], faults, strict=False))


class Storm(Arena):
    def __init__(self, place: Path, faults: Sequence[Fault]) -> None:
        self._faults = faults
        self._clocks: dict[str, Clock] = {}
        self._disks: dict[str, SmallDisk] = {}
        self._relays: dict[str, Relay] = {}
        self._stack = ExitStack()
        self._filled: set[str] = set()  # those whose disk was full
        self._mark = 0  # rounds there were when the last fault was over
        self.newest: dict[str, int] = dict.fromkeys(SITES, 0)  # round of every site's personal head when last seen
        super().__init__(place, EXPERIMENT, on=lambda name: self._clocks[name].words if name in self._clocks else ())

    def __enter__(self) -> "Storm":
        try:
            plan = deployment.load(self.federation / "federation.toml")
            for name in self.names:
                self._relays[name] = self._stack.enter_context(Relay(plan.server.port))
                at_relay = replace(plan, server=replace(plan.server, port=self._relays[name].port))
                pki.issue(self.federation, name, None, at_relay, renew=True)
            for fault in self._faults:
                name = fault.target
                if fault.kind == "fill":
                    folder, size = (self.run, SERVER_DISK) if name == "server" else (self.site(name), SITE_DISK)
                    self._disks[name] = self._stack.enter_context(SmallDisk(folder, size))
                if fault.kind == "clock":
                    self._clocks[name] = Clock(self.place / f"clock-{name}")
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *details: object) -> None:
        try:
            super().__exit__(*details)
        finally:
            self._stack.close()

    def weather(self, say: Callable[[str], None]) -> None:
        """All of the faults, and the end of the federation."""
        for name in ("server", *self.names):
            self._again(name)
        self._until_all(1)
        for fault in self._faults:
            self._until_all(fault.after)
            say(str(fault))
            getattr(self, f"_{fault.kind}")(fault)
            self._mark = len(self.rounds())
            self._see_heads()
        self._until_all(1)
        assert self.terminate("server") == 1
        self.serve("--rounds", self.done() + MORE, *POLICY, *TOGETHER)
        self.finish()
        self._see_heads()

    def _kill(self, fault: Fault) -> None:
        if fault.target in PROGRAMS:
            self._moment(fault)
            os.kill(self.program(fault.target), signal.SIGKILL)
            return
        if fault.target == "everything":
            self._moment(fault)
            self.kill_all()
        elif fault.moment == MOMENTS[0]:
            self._moment(fault)
            self.kill(fault.target)
        else:
            self.kill_while(fault.target, self._condition(fault))
        if fault.target == "server":
            self.until(lambda: not superlink.processes(self.run), "the end of what the server started")
        time.sleep(fault.seconds)
        for name in sorted({"server", *self.names} - self.running.keys()):
            self._again(name)

    def _freeze(self, fault: Fault) -> None:
        if fault.moment != MOMENTS[0]:
            pids = [self.stop_while(fault.target, self._condition(fault))]
        else:
            self._moment(fault)
            pids = [self.program(fault.target) if fault.target in PROGRAMS else self._pid(fault.target)]
        self._stop(pids, fault.seconds)

    def _pause(self, fault: Fault) -> None:
        self._moment(fault)
        pids = [self.running[fault.target].pid, self._pid(fault.target)]
        if fault.target == "server":
            pids += superlink.processes(self.run)
        self._stop(pids, fault.seconds)

    def _break(self, fault: Fault) -> None:
        self._cut(fault, lambda relay: relay.cut_after(fault.amount))

    def _hang(self, fault: Fault) -> None:
        self._cut(fault, Relay.hold)

    def _cut(self, fault: Fault, cut: Callable[[Relay], None]) -> None:
        self._moment(fault)
        relays = [relay for name, relay in self._relays.items() if fault.target in (name, "everybody")]
        for relay in relays:
            cut(relay)
        time.sleep(fault.seconds)
        for relay in relays:
            relay.mend()

    def _fill(self, fault: Fault) -> None:
        self._moment(fault)
        disk, end = self._disks[fault.target], time.monotonic() + fault.seconds
        self._filled.add(fault.target)
        while time.monotonic() < end:
            disk.fill()
            time.sleep(0.05)
        disk.free()

    def over(self) -> list[str]:
        """A command that has ended as its disk was full said so, and is started again now that there is room."""
        for name in self._filled.intersection(super().over()):
            last = self.said(name).splitlines()[-1]
            if self.running[name].returncode == 1 and "fedloge: " in last and any(words in last for words in FULL):
                self.ended(name)
                self._again(name)
        return super().over()

    def _clock(self, fault: Fault) -> None:
        self._moment(fault)
        self._clocks[fault.target].step(fault.amount)
        time.sleep(fault.seconds)
        self._clocks[fault.target].step(0)

    def _again(self, name: str) -> None:
        if name == "server":
            self.serve("--rounds", ENDLESS, *POLICY)
        else:
            self.join(name)

    def _stop(self, pids: Sequence[int], seconds: float) -> None:
        for how in (signal.SIGSTOP, signal.SIGCONT):
            for pid in pids:
                with suppress(ProcessLookupError):  # the supervisor starts anew what is silent for long
                    os.kill(pid, how)
            if how == signal.SIGSTOP:
                time.sleep(seconds)

    def _moment(self, fault: Fault) -> None:
        """The target is there and, unless the fault comes at once, a round is open."""
        if fault.target in PROGRAMS:
            self.until(lambda: fault.target in superlink.processes(self.run).values(), f"{fault.target} to run")
        if fault.target in self.running:
            self.until(lambda: self.command(fault.target), f"{fault.target} to run")
        if fault.after:
            self.until(lambda: self.status().phase == "training", "an open round")
        time.sleep(fault.delay)

    def _condition(self, fault: Fault) -> Callable[[str], bool]:
        return {MOMENTS[1]: self.trains, MOMENTS[2]: self.uploads}[fault.moment]

    def _until_all(self, rounds: int) -> None:
        """That many rounds with all sites, since the last fault was over."""

        def there() -> bool:
            return sum(entry["sites"] == self.names for entry in self.rounds()[self._mark :]) >= rounds

        self.until(there, f"{rounds} rounds with all sites")

    def _see_heads(self) -> None:
        """A site may be one round ahead of what the server has, and has to do that one again; no more is ever lost."""
        for name in self.names:
            newest = max(self.heads(name), default=0)
            assert newest >= self.newest[name] - 1, f"{name} had the head of round {self.newest[name]}, now {newest}"
            self.newest[name] = newest


def left_out() -> dict[str, str]:
    """Kinds of faults that cannot be had here -> why."""
    reasons = {"fill": disks.why_not(), "clock": clocks.why_not()}
    return {kind: reason for kind, reason in reasons.items() if reason}


def run(seed: int, place: Path, say: Callable[[str], None] = lambda _: None) -> Outcome:
    """One federation, in the new folder `place`. What went wrong is in PLACE.log as well."""
    faults = schedule.draw(seed, SITES, without=left_out())
    began = time.monotonic()
    storm = Storm(place, faults)
    failure = details = ""
    try:
        with redirect_stdout(io.StringIO()) as logs, storm:
            storm.weather(say)
        failure = "; ".join(invariants.broken(place, storm.names, EXPERIMENT))
    except (AssertionError, OSError, ValueError) as error:
        failure, details = f"{type(error).__name__}: {error}".splitlines()[0], traceback.format_exc()
    if failure:
        place.with_name(f"{place.name}.log").write_text(f"{failure}\n{details}\n{logs.getvalue()}", encoding="utf-8")
    return Outcome(seed, faults, len(storm.rounds()), round(time.monotonic() - began, 1), failure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=seeds, default="1-25", metavar="A-B", help="one after the other (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what came out there as well")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    began = time.strftime("%Y-%m-%d")
    for kind, reason in left_out().items():
        say(f"left out: {kind}, as {reason}")
    say(f"{'seed':>4}  {'rounds':>6}  {'seconds':>7}  outcome   faults")
    outcomes: list[Outcome] = []
    for seed in options.seeds:
        folder = Path(tempfile.mkdtemp(prefix=f"storm-{seed}-"))
        outcomes.append(run(seed, folder / "arena"))
        say(outcomes[-1].row())
        if outcomes[-1].failure:
            say(f"seed {seed}: {outcomes[-1].failure}")
            say(f"folder: {folder}; again: python -m tests.chaos.storm --seeds {seed}")
            break
        shutil.rmtree(folder)
    if options.json:
        about = {"date": began, "environment": environment(), "left_out": left_out()}
        table = {**about, "seeds": [asdict(outcome) for outcome in outcomes]}
        options.json.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    survived = [outcome for outcome in outcomes if not outcome.failure]
    faced = Counter(f"{fault.kind} {fault.side}" for outcome in survived for fault in outcome.faults)
    say(f"survived: {len(survived)} of {len(options.seeds)} seeds; {sum(faced.values())} faults: "
        + ", ".join(f"{times} x {what}" for what, times in sorted(faced.items())))  # fmt: skip
    return int(len(survived) < len(options.seeds))


def seeds(text: str) -> list[int]:
    first, _, last = text.partition("-")
    return list(range(int(first), int(last or first) + 1))


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
