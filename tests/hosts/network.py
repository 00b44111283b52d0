"""Several machines on one: each with its own address, a name for the server, and a cable to spoil or to pull.

What does it all is switch.py, a process that ends with the one that started it. Needs root and /dev/net/tun.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SWITCH = Path(__file__).parent / "switch.py"
NET = "10.77.0"  # each network has this one to itself


@dataclass(frozen=True)
class Line:
    """What one direction of a cable does to the frames in it."""

    delay: float = 0.0  # seconds
    jitter: float = 0.0  # seconds at most on top of them, another number for each frame
    loss: float = 0.0  # share of the frames
    rate: float = (
        0.0  # bits a second; 0: no limit. A quarter of a second's worth waits at 2 Mbit/s, what is more is lost
    )


CLEAN = Line()
FAR = Line(delay=0.1, jitter=0.02)
LOSSY = Line(loss=0.05)
SLOW = Line(rate=2e6)
DEAD = Line(loss=1.0)


class Network:
    """Use it as a context. `folder` gets the file in which all machines look up names."""

    def __init__(self, folder: Path) -> None:
        self.addresses: dict[str, str] = {}
        self.called = ""  # the machine that has a name beside its address
        self.names = folder / "hosts"
        self._places: dict[str, dict[str, str]] = {}
        self._next = 0

    def __enter__(self) -> "Network":
        self.names.write_text("127.0.0.1 localhost\n", encoding="utf-8")
        self._switch = subprocess.Popen(
            [sys.executable, "-I", str(SWITCH), str(self.names)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a Ctrl-C is the test's: the network goes when the test has ended
        )
        self._answer()
        return self

    @property
    def switch(self) -> int:
        """The process that everything lives in."""
        return self._switch.pid

    def __exit__(self, *_: object) -> None:
        self._switch.communicate()
        assert self._switch.returncode == 0

    def plug(self, *machines: str) -> None:
        for name in machines:
            self.addresses[name] = self._free()
            self._places[name] = self._ask(plug=name, address=self.addresses[name])

    def on(self, machine: str) -> list[object]:
        """The words before a command that start it on a machine, where the test is."""
        place = self._places[machine]
        return ["nsenter", f"--mount={place['mount']}", f"--net={place['net']}", "env", "-C", Path.cwd()]

    def call(self, name: str, machine: str) -> None:
        """From now on `name` is the address of that machine, as if a name server were told so."""
        self.called = machine
        self.names.write_text(f"127.0.0.1 localhost\n{self.addresses[machine]} {name}\n", encoding="utf-8")

    def move(self, machine: str) -> None:
        """Give it an address that nobody has had, in place of the one it has."""
        self.addresses[machine] = self._free()
        self._ask(address=self.addresses[machine], of=machine)

    def cable(self, machine: str, out: Line = CLEAN, into: Line = CLEAN) -> None:
        """From now on the machine's cable is like this."""
        self._ask(cable=machine, out=asdict(out), into=asdict(into))

    def cables(self, machines: Sequence[str], line: Line) -> None:
        """Both directions of all of them."""
        for machine in machines:
            self.cable(machine, line, line)

    def pull(self, machine: str) -> None:
        """Its card does not notice that the cable is out, like behind a switch that loses its uplink."""
        self.cable(machine, DEAD, DEAD)

    def counts(self, machine: str) -> dict[str, Any]:
        """Frames that its cable carried and lost, for "out" and "into"; and those "waiting" anywhere."""
        return self._ask(count=machine)

    def _free(self) -> str:
        self._next += 1
        return f"{NET}.{self._next}"

    def _ask(self, **command: object) -> dict[str, Any]:
        assert self._switch.stdin is not None
        self._switch.stdin.write(json.dumps(command) + "\n")
        self._switch.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._switch.stdout is not None
        line = self._switch.stdout.readline()
        assert line, "the switch has ended"
        answer: dict[str, Any] = json.loads(line)
        return answer


def objection() -> str:
    """Why there can be no network here; empty if there can be."""
    if shutil.which("nsenter") is None:
        return "nsenter is not installed (util-linux)"
    plug = json.dumps({"plug": "a machine", "address": f"{NET}.1"}) + "\n"
    tried = subprocess.run(
        [sys.executable, "-I", str(SWITCH), os.devnull], input=plug, capture_output=True, text=True, check=False
    )
    return tried.stderr.strip().rpartition("\n")[2]
