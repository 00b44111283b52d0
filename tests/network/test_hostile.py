"""A hostile site in a real federation: whatever it sends, nothing of it counts, nothing breaks, and it is named."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from client.member import Member
from common import deployment, parts
from common.deployment import Deployment
from server import superlink
from server.federate import federate
from server.fleet import LocalFleet
from server.status import Board
from tests.members import Handler, Ticket
from tests.network.hostile_site import COUNTS, LIES
from tests.network.study import Study
from tests.network.superlink import until

HOSTILE = "mallory"  # before the others by name, so they wait to be folded until its reply is judged
HONEST = ["north", "south"]
ROUNDS = {name: number for number, name in enumerate(LIES, 1)}
LAST = f"round-{len(LIES):06d}.safetensors"
EVERY = 3  # rounds, and then a survey, the last of which it answers with nothing
SURVEYS = dict(zip(range(EVERY, len(LIES), EVERY), COUNTS.values(), strict=True))
HUGE = [name for name in LIES if name.startswith("1 GB")]
MEGABYTES = 128  # that a process may grow by what is refused, of 1 GB: it reads two objects of up to 16 at a time
pytestmark = pytest.mark.timeout(1700)  # 29 rounds of five processes, and 1 GB over TLS, on a machine that may be busy


@dataclass
class Watched:
    """What was seen of the ServerApp while it ran."""

    study: Study
    processes: set[int] = field(default_factory=set)
    runs: set[str] = field(default_factory=set)
    peaks: dict[int, int] = field(default_factory=dict)  # memory in MB, by round
    superlink: int = 0

    def look(self) -> None:
        found = superlink.processes(self.study.run)
        status = self.study.status()
        for pid, program in found.items():
            if program == "flwr-serverapp":
                self.processes.add(pid)
                self.peaks[status.get("round", 0)] = peak(pid)
            elif program == "flower-superlink":
                self.superlink = max(self.superlink, peak(pid))
        if status.get("run"):
            self.runs.add(status["run"])

    def said(self, round: int) -> list[str]:
        """What the ServerApp said of a round."""
        began = re.compile(rf"\S+ \S+ round {round}: (.*)")  # not only somewhere in the line, as what is sent is in it
        return [found[1] for line in self.study.log("serverapp") if (found := began.fullmatch(line))]


def peak(pid: int) -> int:
    """The most memory a process has had, in MB."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", (Path("/proc") / str(pid) / "status").read_text())
    except OSError:
        return 0
    return int(found[1]) >> 10 if found else 0


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """A federation that has come to its end by itself."""
    settings = {
        "federation.rounds": len(LIES),
        "federation.min_clients": 3,
        "federation.quorum": 0.6,  # of three: two
        "federation.grace": 300.0,  # no round closes before the hostile reply is there
        "evaluation.every": EVERY,
        "evaluation.last": 1,
        "evaluation.statistics": True,
    }
    with Study(tmp_path_factory.mktemp("hostile") / "place", settings, (HOSTILE, *HONEST)) as study:
        children: dict[str, subprocess.Popen[bytes]] = {"server": study.serve("--json")}
        until((study.run / "link.json").exists, "the server to be open")
        children |= {name: study.join(name) for name in HONEST}
        kit = study.folder / "kits" / f"{HOSTILE}.kit"
        children[HOSTILE] = study.start(HOSTILE, sys.executable, "-m", "tests.network.hostile_site", kit)
        seen = Watched(study)
        end = time.monotonic() + 1500

        def over() -> bool:
            seen.look()
            died = [name for name, child in children.items() if child.poll() not in (None, 0)]
            assert not died, study.said(died[0])
            return all(child.poll() == 0 for child in children.values())

        until(over, "the end of the federation", end - time.monotonic())
        yield seen


@pytest.mark.parametrize("name", LIES)
def test_it_is_refused_and_logged_once_with_site_and_reason(watched: Watched, name: str) -> None:
    number, why = ROUNDS[name], LIES[name][1]
    event = watched.study.events()[number - 1]
    assert (event["round"], event["sites"], event["missing"]) == (number, HONEST, [])
    assert list(event["refused"]) == [HOSTILE]
    reason = event["refused"][HOSTILE]
    found = re.search(why, reason)
    assert found, reason
    assert found.groups() in ((), (str(number - 1), str(number)))
    assert reason.isprintable()
    said = [line for line in watched.said(number) if HOSTILE in line and "kept to themselves" not in line]
    assert len(said) == 1 + (number in SURVEYS)
    assert said[:1] in ([f"the reply of {HOSTILE} is refused: {reason}"], [f"{HOSTILE} failed: {reason}"])
    said = [line for line in watched.study.log() if f" round {number} of {len(LIES)}: " in line]
    assert len(said) == 1
    assert f": 2 replies, refused {HOSTILE} ({reason})" in said[0]


@pytest.mark.parametrize("number", SURVEYS)
def test_statistics_that_cannot_be_are_refused_and_logged_once(watched: Watched, number: int) -> None:
    said = watched.said(number)[1:]
    assert len(said) == 2
    assert re.fullmatch(f"the reply of {HOSTILE} is refused: {SURVEYS[number][1]}", said[0])
    assert said[1] == "class statistics of 2 of 3 sites; missing: nobody; kept to themselves: nobody"


def test_nothing_of_it_is_in_the_models(watched: Watched, tmp_path: Path) -> None:
    """They are those of a federation of the honest sites alone, to the bit."""
    study = watched.study
    plan: Deployment = deployment.load(study.folder / "federation.toml", ["federation.min_clients=2"])
    sites: dict[str, Any] = {}
    for name in HONEST:
        place = study.data / f"{study.sites[name]}.npz"
        ticket = Ticket(name, study.kits[name].fingerprint)
        sites[name] = Handler(Member(ticket, place, tmp_path / name, device="cpu"), plan.settings())
    torch.set_num_threads(1)
    federate(plan, tmp_path / "run", LocalFleet(sites), Board(tmp_path / "run"))
    pairs = [(study.run / "checkpoints" / LAST, tmp_path / "run" / "checkpoints" / LAST)]
    for name in HONEST:
        [real], [alone] = study.state(name).glob(f"store/*/{LAST}"), tmp_path.glob(f"{name}/store/*/{LAST}")
        pairs.append((real, alone))
    for real, alone in pairs:
        ours, theirs = parts.read(real)[0], parts.read(alone)[0]
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_what_cannot_be_is_left_out_of_the_figures(watched: Watched) -> None:
    study = watched.study
    for kind in ("generic_local", "personal"):
        for figures in study.events()[-1]["evaluation"][kind].values():
            assert sorted(figures["per_site"]) == HONEST
    said = [line for line in study.log("serverapp") if "what cannot be: left out" in line]
    assert [line.partition(HOSTILE)[1:] for line in said] == [
        (HOSTILE, " says of its personal model 'phi' what cannot be: left out")
    ]


def test_nothing_crashed_and_nothing_was_started_again(watched: Watched) -> None:
    study = watched.study
    assert (len(watched.processes), len(watched.runs)) == (1, 1)
    status = study.status()
    assert (status["phase"], status["round"]) == ("finished", len(LIES))
    assert status["quarantined"].keys() == {HOSTILE}
    logs = "\n".join([*study.log(), *study.log("serverapp"), *(study.said(name) for name in ("server", *HONEST))])
    for word in ("Traceback", "starting again", "Exception"):
        assert word not in logs
    for name in HONEST:
        assert (study.state(name) / "models" / "personal.safetensors").exists()


def test_memory_does_not_follow_what_is_sent(watched: Watched) -> None:
    first = ROUNDS[HUGE[0]]
    before = max(peak for number, peak in watched.peaks.items() if number < first)
    after = max(watched.peaks.values())
    print(f"ServerApp {before} MB before, {after} MB at most; SuperLink {watched.superlink} MB at most")
    print(watched.study.said(HOSTILE))
    assert before > 0
    assert after - before < MEGABYTES


def test_a_replay_is_not_even_taken(watched: Watched) -> None:
    said = watched.study.said(HOSTILE)
    assert "replayed: not taken, and sent anew" in said
    assert "other content: not taken: " in said
