"""Which faults a federation meets, against whom, and when: a function of the seed alone."""

import random
from collections.abc import Collection
from dataclasses import dataclass

FAULTS = 4  # of a seed
PROGRAMS = ("flwr-serverapp", "flower-superlink", "flower-superexec")
SITE = "site"  # one of them, by lot
TARGETS: dict[str, tuple[str, ...]] = {
    "kill": (SITE, "server", *PROGRAMS, "everything"),  # kill -9; a site or server is started again
    "freeze": (SITE, "server", *PROGRAMS[:2]),  # one process is stopped for some time
    "pause": (SITE, "server"),  # and here all of them that run on that machine
    "break": (
        SITE,
        "everybody",
    ),  # connections of sites break off, in the middle of an upload, and there are no new ones
    "hang": (SITE, "everybody"),  # connections of sites stay, and nothing comes through
    "fill": (SITE, "server"),  # the disk with the state folder, or with the run folder, is full
    "clock": (SITE, "server"),  # it is set, and some time later put right
}
MOMENTS = ("in a round", "while it trains", "while it uploads")  # the latter two are of sites
STEPS = (
    -900,
    -240,
    -20,
    20,
    240,
    900,
)  # seconds; a server takes signatures that are up to 305 old, and none of the future


@dataclass(frozen=True)
class Fault:
    kind: str
    target: str
    after: int = 0  # rounds in which all sites were, since the fault before; 0: it comes at once, into its recovery
    moment: str = MOMENTS[0]
    delay: float = 0.0  # seconds from that moment
    seconds: float = 0.0  # for which it lasts
    amount: int = 0  # break: bytes to the server that still pass; clock: the step in seconds

    @property
    def side(self) -> str:
        """The target, whichever site it is."""
        return SITE if self.target.startswith(SITE) else self.target

    def __str__(self) -> str:
        when = f" {self.moment}" if self.target.startswith(SITE) else ""
        lasts = f" for {self.seconds:g} s" if self.seconds else ""
        by = {"break": f" after {self.amount} bytes", "clock": f" by {self.amount:+d} s"}.get(self.kind, "")
        return f"{self.kind} {self.target}{by}{when}{lasts}"


def draw(seed: int, sites: Collection[str], without: Collection[str] = ()) -> tuple[Fault, ...]:
    """The faults of a seed, of different kinds as far as there are enough. Those of the kinds `without` are left out,
    and the others stay what they are."""
    chance = random.Random(seed)
    kinds = [*TARGETS, "kill"]  # it has the most targets
    chance.shuffle(kinds)
    faults = [_fault(chance, kind, sorted(sites)) for kind in kinds[:FAULTS]]
    return tuple(fault for fault in faults if fault.kind not in without)


def _fault(chance: random.Random, kind: str, sites: list[str]) -> Fault:
    target = chance.choice(TARGETS[kind])
    moment = chance.choice(MOMENTS if target == SITE and kind in ("kill", "freeze") else MOMENTS[:1])
    long = chance.random() < 0.2  # so long that the server takes a site for dead
    lasts = chance.uniform(21, 30) if long and kind in ("freeze", "pause", "hang", "break") else chance.uniform(1, 10)
    return Fault(
        kind=kind,
        target=chance.choice(sites) if target == SITE else target,
        after=chance.randint(0, 2),
        moment=moment,
        delay=round(chance.uniform(0, 0.5), 2) if moment == MOMENTS[0] else 0.0,
        seconds=0.0 if target in PROGRAMS and kind == "kill" else round(lasts, 1),
        amount={"break": chance.randrange(40_000), "clock": chance.choice(STEPS)}.get(kind, 0),
    )
