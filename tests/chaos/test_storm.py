"""Federations under drawn faults: two seeds that have every kind of fault between them, and what judges them."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from server import checkpoint
from tests.chaos import invariants, schedule, storm
from tests.chaos.schedule import MOMENTS, PROGRAMS, TARGETS
from tests.chaos.storm import EXPERIMENT, SITES, Outcome

SEEDS = (61, 96)
Change = Callable[[Path], object]


Weathered = Callable[[int], tuple[Outcome, Path]]

pytestmark = pytest.mark.timeout(900)  # the federation of a seed, on a machine that may be busy


@pytest.fixture(scope="session")
def weathered(tmp_path_factory: pytest.TempPathFactory) -> Weathered:
    """The outcome of a seed, and the folder of its federation."""

    @cache
    def face(seed: int) -> tuple[Outcome, Path]:
        place = tmp_path_factory.mktemp("storm") / "arena"
        return storm.run(seed, place), place

    return face


def test_the_faults_are_a_function_of_the_seed() -> None:
    drawn = [schedule.draw(seed, SITES) for seed in range(50)]
    assert drawn == [schedule.draw(seed, set(SITES)) for seed in range(50)]
    assert len(set(drawn)) == 50
    faults = [fault for of_seed in drawn for fault in of_seed]
    assert {(fault.kind, fault.side) for fault in faults} == {(kind, to) for kind in TARGETS for to in TARGETS[kind]}
    assert {fault.moment for fault in faults if fault.target in SITES} == set(MOMENTS)
    assert all(fault.target in (*SITES, *PROGRAMS, "server", "everything", "everybody") for fault in faults)
    assert all(fault.seconds > 0 for fault in faults if fault.kind != "kill")


def test_what_cannot_be_had_is_left_out_and_the_rest_stays() -> None:
    for seed in range(20):
        whole, less = schedule.draw(seed, SITES), schedule.draw(seed, SITES, without=["clock", "fill"])
        assert less == tuple(fault for fault in whole if fault.kind not in ("clock", "fill"))


def test_the_seeds_have_every_kind_of_fault() -> None:
    assert {fault.kind for seed in SEEDS for fault in schedule.draw(seed, SITES)} == set(TARGETS)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_federation_survives(seed: int, weathered: Weathered) -> None:
    outcome, place = weathered(seed)
    assert outcome.failure == "", place.with_name("arena.log").read_text(encoding="utf-8")
    assert outcome.rounds > len(outcome.faults)


def edit(path: Path, change: Callable[[list[str]], list[str]]) -> None:
    """Change the lines of a file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("".join(f"{line}\n" for line in change(lines)), encoding="utf-8")


def of_round(place: Path, number: int, **changes: object) -> None:
    """Change an event of the run, as if something else had happened, also where checkpoints tell of it."""
    edit(place / "federation/run/events.jsonl", lambda lines: [
        json.dumps({**json.loads(line), **changes}) if json.loads(line)["round"] == number else line for line in lines
    ])  # fmt: skip


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def newest(place: Path, pattern: str) -> Path:
    return max(place.glob(pattern))


def otherwise(place: Path, part: str, name: str, more: float) -> None:
    """The newest checkpoint as it were with a little more of one of the replies."""
    path = newest(place, CHECKPOINTS)
    found = checkpoint.read(path)
    found.state.parts[part][name][0] += more
    checkpoint.save(path.parent, found, keep=99)


def of_status(place: Path, phase: str) -> None:
    path = place / "federation/run/status.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), "phase": phase}), encoding="utf-8")


HEADS = "sites/site-001/store/*/round-*.safetensors"
CHECKPOINTS = "federation/run/checkpoints/round-*.safetensors"
DOCTORED: dict[str, Change] = {
    "not that of a finished federation": lambda p: of_status(p, "training"),
    "there is no result": lambda p: (p / "federation/run/metrics.json").unlink(),
    "site-002/over is missing": lambda p: (p / "sites/site-002/over").unlink(),
    "personal.safetensors is missing": lambda p: (p / "sites/site-000/models/personal.safetensors").unlink(),
    "order.partial is left": lambda p: (p / "sites/site-000/outbox/order.partial").touch(),
    ".link.json.0.tmp is left": lambda p: (p / "federation/run/.link.json.0.tmp").touch(),
    "site-000 still owes reply": lambda p: (p / "sites/site-000/outbox/reply").touch(),
    "not one line for every round": lambda p: edit(
        p / "federation/run/events.jsonl", lambda lines: lines[:-2] + lines[-1:]
    ),
    "round 2 counts a site twice": lambda p: of_round(p, 2, sites=["site-000", "site-000", "site-001"]),
    "round 3 counts a site twice": lambda p: of_round(p, 3, missing=["site-001"]),
    "round 1 was folded without a quorum": lambda p: of_round(p, 1, sites=["site-000"], missing=["a", "b"]),
    "there are checkpoints of the rounds": lambda p: min(p.glob(CHECKPOINTS)).unlink(),
    "cannot be read": lambda p: damage(newest(p, CHECKPOINTS)),
    "tells of other rounds": lambda p: shutil.copyfile(min(p.glob(CHECKPOINTS)), newest(p, CHECKPOINTS)),
    "hidden1.bias is not what the replies of its sites come to": lambda p: otherwise(
        p, "backbone", "hidden1.bias", 1e-6
    ),
    "head is not that of the statistics of any of the sites": lambda p: otherwise(p, "statistics", "bias", 10.0),
    "has personal heads of the rounds []": lambda p: [path.unlink() for path in p.glob(HEADS)],
    "was last in round": lambda p: newest(p, HEADS).unlink(),
    "site-001 trained in the rounds": lambda p: edit(p / "sites/site-001/events.jsonl", lambda lines: lines[::-1]),
    "is not what training made of the one before": lambda p: shutil.copyfile(min(p.glob(HEADS)), newest(p, HEADS)),
}


@pytest.mark.parametrize("said", DOCTORED)
def test_a_violation_is_noticed(said: str, weathered: Weathered, tmp_path: Path) -> None:
    place = tmp_path / "arena"
    shutil.copytree(weathered(SEEDS[0])[1], place)
    DOCTORED[said](place)
    found = invariants.broken(place, SITES, EXPERIMENT)
    assert any(said in line for line in found), found
