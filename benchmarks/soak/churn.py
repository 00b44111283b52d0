"""The federation that is soaked: a server, a site that stays, and sites that come and go."""

from collections.abc import Callable
from pathlib import Path

from benchmarks.soak.watch import Watch
from server import superlink
from tests.chaos.arena import Arena

EXPERIMENT = ["partition.clients=4", "train.epochs=1", "evaluation.every=10"]
POLICY = ("--rounds", 10_000_000, "--min-clients", 2, "--quorum", 0.5, "--grace", 5)
STAYS, DIES, LEAVES, DATA = "site-000", "site-001", "site-002", "site-003"  # guests have the images of the last one
PAUSE = 5  # rounds between two changes


class Churn(Arena):
    def __init__(self, place: Path) -> None:
        super().__init__(place, EXPERIMENT)
        self.changes: dict[str, int] = {"killed": 0, "left": 0, "came back": 0, "invited": 0}
        self._guests = 0
        self._last = 0  # the round of the last change

    def begin(self) -> None:
        self.serve(*POLICY)
        for name in (STAYS, DIES, LEAVES):
            self.join(name)
        self.go_on(0, "the first round")

    def turn(self) -> None:
        """The next change, if it is time for one: each thing is undone before it is done again."""
        if self.done() < self._last + PAUSE:
            return
        steps: tuple[Callable[[], None], ...] = (
            self._kill, self._invite, self._back, self._leave, self._part, self._back,
        )  # fmt: skip
        steps[sum(self.changes.values()) % len(steps)]()
        self._last = self.done()

    def look(self, watch: Watch) -> None:
        """Write down how all of it is."""
        programs = superlink.processes(self.run)
        found = {name: pid for pid, name in programs.items() if name != "guard.py"}
        found |= {name: pid for name in self.running if (pid := self.command(name)) is not None}
        guard = self.running[STAYS].pid
        folders = {"run": self.run, "checkpoints": self.run / "checkpoints", f"state of {STAYS}": self.site(STAYS)}
        watch.look({**found, f"guard of {STAYS}": guard}, folders, self.done(), len(self.running) - 1)

    def end(self) -> None:
        """Two rounds more, and the end as it should be."""
        assert self.terminate("server") == 1
        for name in (DIES, LEAVES):
            if name not in self.running:
                self.join(name)
        self.serve("--rounds", self.done() + 2, "--min-clients", len(self.running), *POLICY[4:])
        self.finish()

    def _kill(self) -> None:
        self.kill(DIES)
        self.changes["killed"] += 1

    def _leave(self) -> None:
        assert self.terminate(LEAVES) == 1
        self.changes["left"] += 1

    def _back(self) -> None:
        for name in (DIES, LEAVES):
            if name not in self.running:
                self.join(name)
        self.changes["came back"] += 1

    def _invite(self) -> None:
        self._guests += 1
        self.invite(self._guest)
        self.join(self._guest, data=DATA)
        self.changes["invited"] += 1

    def _part(self) -> None:
        """The guest goes."""
        assert self.terminate(self._guest) == 1
        self.changes["left"] += 1

    @property
    def _guest(self) -> str:
        return f"guest-{self._guests:04d}"
