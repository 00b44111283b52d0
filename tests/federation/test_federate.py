"""A federation from the server's side: what it leaves behind, and that stopping it anywhere changes nothing."""

import json
import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from client.member import Member
from common import files, parts
from common.deployment import Deployment
from common.errors import UserError
from common.messages import Order, Reply
from common.parts import digest
from server import checkpoint, federate, rounds, run_folder, status
from server.fleet import Exchange, Failure, LocalFleet
from server.status import Board
from tests.members import NAMES, Handler, Ticket, deployment, images, members


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The promise of equal bits is one for one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images(tmp_path_factory.mktemp("data"))


def fleet_of(sites: dict[str, Member], wish: Deployment) -> LocalFleet:
    return LocalFleet({name: Handler(member, wish.settings()) for name, member in sites.items()})


def run(wish: Deployment, folder: Path, sites: dict[str, Member], **more: Any) -> dict[str, Any]:
    return federate.federate(wish, folder, fleet_of(sites, wish), Board(folder), **more)


def events(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "bytes")} for line in lines]


def remains(folder: Path) -> dict[str, Any]:
    """Everything a finished federation is, at the server and at the sites; only times are left out."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("[!.]*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".safetensors":
            tensors, about = parts.read(path)
            found[name] = (digest(tensors), about)
        elif name.endswith("run/events.jsonl"):
            found[name] = events(path.parent)
        elif path.suffix == ".json" and path.name not in ("environment.json", "status.json"):
            found[name] = path.read_text(encoding="utf-8")
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Callable[[str], Path]:
    """The folder of an uninterrupted federation, made once for every method."""
    made: dict[str, Path] = {}

    def make(method: str) -> Path:
        if method not in made:
            made[method] = tmp_path_factory.mktemp("whole")
            run(deployment(data, method), made[method] / "run", members(data, made[method] / "sites"))
        return made[method]

    return make


# --- what it leaves behind -------------------------------------------------------------------------------------------


def test_a_federation_leaves_its_question_its_story_and_its_models(data: Path, tmp_path: Path) -> None:
    wish = deployment(data)
    farewells: list[bool] = []
    folder = tmp_path / "run"
    sites = members(data, tmp_path / "sites")
    result = run(wish, folder, sites, farewell=lambda: farewells.append((folder / "metrics.json").exists()))
    assert farewells == [True]
    assert json.loads((folder / "metrics.json").read_text()) == json.loads(json.dumps(result))
    assert json.loads((folder / "config.json").read_text())["images"]["classes"] == list("0123456789")
    assert [event["round"] for event in events(folder)] == [1, 2, 3]
    assert [event["sites"] for event in events(folder)] == [list(NAMES)] * 3
    assert ["evaluation" in event for event in events(folder)] == [False, True, True]
    assert (folder / "models" / "generic.safetensors").exists()
    for name in NAMES:
        assert (tmp_path / "sites" / name / "models" / "personal.safetensors").exists()
    assert result["mean_of_rounds"] == [2, 3]
    assert list(result["generic"]) == list(result["generic_local"]) == ["psi realigned", "psi", "frame"]
    assert list(result["personal"]) == ["phi+psi_k", "psi_k+psi", "phi", "psi", "frame"]
    assert result["personal"]["phi"]["sites"] == 3
    assert set(result["personal"]["phi"]["per_site"]) == set(NAMES)
    assert result["personal"]["phi"]["groups"] == {}
    assert result["never_trained"] == []
    assert result["groups"] == {}
    shown = status.read(folder)
    assert shown is not None
    assert (shown.phase, shown.round, shown.rounds, shown.judged_round) == ("finished", 3, 3, 3)
    last = result["evaluations"][-1]
    assert shown.generic == last["generic"]["psi realigned"]["top1"]
    assert shown.generic_local == last["generic_local"]["psi realigned"]["top1"]
    assert shown.personal == last["personal"]["phi+psi_k"]["top1"]


def test_heads_from_statistics_may_be_asked_for_when_all_is_done(data: Path, tmp_path: Path) -> None:
    """Nothing is trained again; what there was keeps its figures."""
    folder, sites = tmp_path / "run", members(data, tmp_path / "sites")
    before = run(deployment(data), folder, sites)
    wish = deployment(data, evaluation={"statistics": True, "last": 1})
    for member in sites.values():
        member.ended.unlink(missing_ok=True)
    after = run(wish, folder, sites)
    assert after["rounds"] == before["rounds"]
    last = before["evaluations"][-1]
    for kind in ("generic", "generic_local", "personal"):
        assert list(after[kind]) == [*last[kind], "statistics"]
        assert {name: after[kind][name] for name in last[kind]} == last[kind]
        assert after[kind]["statistics"]["top1"] > 0.5
    assert run(wish, folder, sites) == after  # and then it is done


def test_a_site_that_keeps_its_statistics_says_so_once_and_is_served(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    wish = deployment(data, "fedloge+", evaluation={"every": 1})
    sites = members(data, tmp_path / "sites")
    name = NAMES[0]
    sites[name] = Member(
        Ticket(name), data / f"{name}.npz", tmp_path / "sites" / name, device="cpu", keep_statistics=True
    )
    result = run(wish, tmp_path / "run", sites)
    assert next(iter(result["generic"])) == "statistics"
    assert next(iter(result["personal"])) == "mixed"
    assert set(result["personal"]["mixed"]["per_site"]) == set(NAMES)
    assert caplog.text.count("this site keeps its own to itself") == 1
    assert caplog.text.count("how many images of each class there are here and their mean features are sent") == 2
    assert f"kept to themselves: {name}" in caplog.text


def test_the_sites_figures_belong_to_the_round_they_judged(data: Path, tmp_path: Path) -> None:
    """They come with the next round; to the last ones they come at the end."""
    wish = deployment(data, evaluation={"every": 1})
    sites = members(data, tmp_path / "sites")
    run(wish, tmp_path / "run", sites)
    told = {name: [json.loads(line) for line in (tmp_path / "sites" / name / "events.jsonl").open()] for name in NAMES}
    for number, event in enumerate(events(tmp_path / "run")):
        own = {name: lines[number + 1]["personal"] for name, lines in told.items()}  # the first order is not judged
        assert event["evaluation"]["personal"]["phi+psi_k"]["per_site"] == own


def test_without_a_test_set_the_sites_figures_are_all(data: Path, tmp_path: Path) -> None:
    wish = deployment(data)
    wish = replace(wish, server=replace(wish.server, test=""))
    result = run(wish, tmp_path / "run", members(data, tmp_path / "sites"))
    assert result["generic"] == {}
    assert result["generic_local"]["psi"]["top1"] > 0
    shown = status.read(tmp_path / "run")
    assert shown is not None
    assert shown.generic is None
    assert shown.personal is not None


def test_a_test_set_that_cannot_be_read_is_said_before_anything_begins(data: Path, tmp_path: Path) -> None:
    wish = deployment(data)
    wish = replace(wish, server=replace(wish.server, test=str(tmp_path / "none.npz")))
    with pytest.raises(UserError, match=r"none\.npz: no such file"):
        run(wish, tmp_path / "run", {})
    shown = status.read(tmp_path / "run")
    assert shown is not None
    assert shown.phase == "gave-up"
    assert "none.npz" in shown.message


def test_sites_that_never_trained_are_named(data: Path, tmp_path: Path) -> None:
    wish = deployment(data, federation={"rounds": 2, "fraction": 0.4})
    result = run(wish, tmp_path / "run", members(data, tmp_path / "sites"))
    trained = {site for event in events(tmp_path / "run") for site in event["sites"]}
    assert len(trained) < 3
    assert result["never_trained"] == sorted(set(NAMES) - trained)


def test_what_a_site_says_that_cannot_be_is_left_out(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wish = deployment(data)
    sites = members(data, tmp_path / "sites")
    handlers: dict[str, Callable[[Order], Reply]] = {n: Handler(m, wish.settings()) for n, m in sites.items()}
    honest = handlers["west"]
    lies: list[dict[str, Any]] = [
        {"personal": {"phi+psi_k": {"samples": 3.0, "top1": 1e9, "balanced": 1.0, "macro_f1": 1.0, "ece": 0.0}}},
        {"personal": {"phi": {}}, "generic": {}, "other": {"x": {"top1": 1.0}}},
    ]
    handlers["west"] = lambda order: replace(honest(order), judged=lies.pop() if order.judge else {})
    board = Board(tmp_path / "run")
    result = federate.federate(wish, tmp_path / "run", LocalFleet(handlers), board)
    assert lies == []
    assert [e["personal"]["phi+psi_k"]["sites"] for e in result["evaluations"]] == [2, 2]
    assert "west says of its personal model 'phi+psi_k' what cannot be" in caplog.text


def test_a_round_has_a_deadline_only_while_it_is_open(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wish = deployment(data)
    sites = members(data, tmp_path / "sites")
    board = Board(tmp_path / "run")
    open_, closed = [], []

    def watched(handler: Handler) -> Callable[[Order], Reply]:
        return lambda order: (open_.append(board.status.deadline), handler(order))[1]

    add_line = run_folder.add_line
    monkeypatch.setattr(run_folder, "add_line", lambda *given: (closed.append(board.status.deadline), add_line(*given)))
    handlers = {name: watched(Handler(member, wish.settings())) for name, member in sites.items()}
    federate.federate(wish, tmp_path / "run", LocalFleet(handlers), board)
    assert open_
    assert None not in open_
    assert closed
    assert set(closed) == {None}


# --- checkpoints are written while the next round runs ---------------------------------------------------------------


@pytest.mark.parametrize("method", ["fedloge", "fedloge+", "creff"])
def test_a_checkpoint_is_written_while_the_next_round_runs(
    data: Path, tmp_path: Path, whole: Callable[[str], Path], caplog: pytest.LogCaptureFixture, method: str
) -> None:
    caplog.set_level(logging.INFO)
    wish = deployment(data, method)
    handlers = {n: Handler(m, wish.settings()) for n, m in members(data, tmp_path / "sites").items()}
    trained, asked_last, said = threading.Event(), sorted(NAMES)[-1], []
    save = checkpoint.save

    def late(folder: Path, found: checkpoint.Checkpoint, *rest: Any) -> Path:
        if found.state.round == 1:
            said.append(trained.wait(60))
            said.append("round 1 of" in caplog.text)
        return save(folder, found, *rest)

    def telling(order: Order) -> Reply:
        reply = handlers[asked_last](order)
        if order.round == 2:
            trained.set()
        return reply

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", late)
        fleet = LocalFleet({**handlers, asked_last: telling})
        federate.federate(wish, tmp_path / "run", fleet, Board(tmp_path / "run"))
    assert said == [True, False], "a round is said to be done before it is saved"
    assert [f"round {k} of 3" in caplog.text for k in (1, 2, 3)] == [True] * 3
    assert remains(tmp_path) == remains(whole(method)), "the next round changed what was being written"


def test_a_checkpoint_that_cannot_be_written_ends_the_next_round(
    data: Path, tmp_path: Path, whole: Callable[[str], Path]
) -> None:
    sites = members(data, tmp_path / "sites")
    tried: list[int] = []
    save = checkpoint.save

    def full(folder: Path, found: checkpoint.Checkpoint, *rest: Any) -> Path:
        tried.append(found.state.round)
        if found.state.round == 2:
            raise UserError(f"{folder}: cannot be written (No space left on device): check its folder and disk")
        return save(folder, found, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", full)
        with pytest.raises(UserError, match="No space left"):
            run(deployment(data), tmp_path / "run", sites)
    shown = status.read(tmp_path / "run")
    assert shown is not None
    assert shown.phase == "gave-up"
    assert tried == [1, 2]
    found = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert found is not None
    assert found.state.round == 1
    run(deployment(data), tmp_path / "run", members(data, tmp_path / "sites"))
    assert remains(tmp_path) == remains(whole("fedloge")), "sites two rounds ahead did not find their way back"


# --- stopped and started again ---------------------------------------------------------------------------------------


class Crash(BaseException):
    """Stands for a process that ends: nothing catches it."""


class Doom:
    """Lets the process die before or after the n-th thing that lasts."""

    def __init__(self, patch: pytest.MonkeyPatch, at: float) -> None:
        self.done = 0.0
        self._at = at
        for where, name in [
            (checkpoint, "save"), (parts, "save"), (run_folder, "add_line"), (run_folder, "amend_line"),
            (run_folder, "write_json"), (rounds, "final_judgement"), (federate, "save_generic"), (Member, "answer"),
        ]:  # fmt: skip
            patch.setattr(where, name, self._mortal(getattr(where, name)))

    def _mortal(self, act: Callable[..., Any]) -> Callable[..., Any]:
        def acting(*args: Any, **more: Any) -> Any:
            if (
                isinstance(args[0], Path) and args[0].name == status.NAME
            ):  # lasts for nothing, and is written when it suits
                return act(*args, **more)
            self._die()
            found = act(*args, **more)
            self._die()
            return found

        return acting

    def _die(self) -> None:
        self.done += 1
        if self.done == self._at:
            raise Crash


@contextmanager
def crash(prepare: Callable[[pytest.MonkeyPatch], object]) -> Iterator[None]:
    """What is inside runs until what `prepare` has patched ends it."""
    with pytest.MonkeyPatch.context() as patch:
        prepare(patch)
        with pytest.raises(Crash):
            yield


@pytest.mark.parametrize("method", ["fedloge", "fedloge+", "ditto", "creff"])
def test_a_crash_at_any_moment_changes_nothing(
    whole: Callable[[str], Path], data: Path, tmp_path: Path, method: str
) -> None:
    expected = remains(whole(method))
    with pytest.MonkeyPatch.context() as patch:
        counter = Doom(patch, math.inf)
        run(deployment(data, method), tmp_path / "all" / "run", members(data, tmp_path / "all" / "sites"))
    assert remains(tmp_path / "all") == expected
    step = 7 if method == "fedloge" else 23  # of the others samples; primes, so that all kinds of moments come
    for at in range(1, int(counter.done) + 1, step):
        folder = tmp_path / f"crash-{at}"
        with crash(partial(Doom, at=at)):
            run(deployment(data, method), folder / "run", members(data, folder / "sites"))
        assert not (folder / "run" / "metrics.json").exists() or at >= counter.done - 2
        run(deployment(data, method), folder / "run", members(data, folder / "sites"))  # all new processes
        found = remains(folder)
        assert found.keys() >= expected.keys()
        assert {name: found[name] for name in expected} == expected, f"crash {at} of {counter.done}"


def test_many_crashes_change_nothing_either(whole: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    sites = members(data, tmp_path / "sites")
    for at in range(20, 1000, 13):  # every start gets a little farther
        with pytest.MonkeyPatch.context() as patch:
            Doom(patch, at)
            try:
                run(deployment(data), tmp_path / "run", sites)
                break
            except Crash:
                continue
    expected = remains(whole("fedloge"))
    found = remains(tmp_path)
    assert {name: found[name] for name in expected} == expected


def test_after_the_last_round_a_resume_goes_straight_to_the_judgement(data: Path, tmp_path: Path) -> None:
    wish = deployment(data)
    sites = members(data, tmp_path / "sites")

    def crashing(*_: object) -> None:
        raise Crash

    with crash(lambda patch: patch.setattr(rounds, "final_judgement", crashing)):
        run(wish, tmp_path / "run", sites)
    shown = status.read(tmp_path / "run")
    assert shown is not None
    assert shown.phase == "training"
    asked: list[bool] = []
    handlers = {n: Handler(m, wish.settings()) for n, m in sites.items()}
    watched = {n: lambda order, h=h: (asked.append(order.train), h(order))[1] for n, h in handlers.items()}
    federate.federate(wish, tmp_path / "run", LocalFleet(watched), Board(tmp_path / "run"))
    assert asked == [False] * 3


def test_a_finished_federation_is_not_run_again_but_lets_the_sites_go(whole: Callable[[str], Path], data: Path) -> None:
    folder = whole("fedloge")
    before = remains(folder)
    gone: list[bool] = []
    board = Board(folder / "run")
    result = federate.federate(
        deployment(data), folder / "run", LocalFleet({}), board, farewell=lambda: gone.append(True)
    )
    assert gone == [True]
    assert result == json.loads((folder / "run" / "metrics.json").read_text())
    assert remains(folder) == before
    assert board.status.phase == "finished"
    assert board.status.personal is not None


def test_events_that_a_power_cut_took_come_back(data: Path, tmp_path: Path) -> None:
    sites = members(data, tmp_path / "sites")
    run(deployment(data), tmp_path / "run", sites)
    path = tmp_path / "run" / "events.jsonl"
    before = events(tmp_path / "run")
    path.write_text(path.read_text(encoding="utf-8").splitlines()[0] + '\n{"round": 2, "si\0\0')
    run(deployment(data, federation={"rounds": 4}), tmp_path / "run", sites)
    assert events(tmp_path / "run")[:3] == before


# --- settings that change --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "values", "key"),
    [
        ("model", {"width": 8}, "model.width"),
        ("frame", {"seed": 1}, "frame.seed"),
        ("frame", {"norm": 2.0}, "frame.norm"),
    ],
)
def test_what_is_learnt_from_what_cannot_change(
    data: Path, tmp_path: Path, section: str, values: dict[str, Any], key: str
) -> None:
    sites = members(data, tmp_path / "sites")
    run(deployment(data, federation={"rounds": 1}), tmp_path / "run", sites)
    before = remains(tmp_path)
    for other in (deployment(data, **{section: values}), deployment(data, "fedavg")):
        with pytest.raises(UserError) as caught:
            run(other, tmp_path / "run", sites)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=rf"holds a federation with {key} = "):
        run(deployment(data, **{section: values}), tmp_path / "run", sites)
    with pytest.raises(UserError, match=r"method\.name = 'fedloge', not 'fedavg'"):
        run(deployment(data, "fedavg"), tmp_path / "run", sites)
    wish = deployment(data)
    with pytest.raises(UserError, match=r"images\.mean"):
        run(replace(wish, images=replace(wish.images, mean=(0.1,), std=(1.0,))), tmp_path / "run", sites)
    assert remains(tmp_path) == before


def test_a_federation_of_a_version_whose_method_had_other_parts_is_refused(data: Path, tmp_path: Path) -> None:
    sites = members(data, tmp_path / "sites")
    run(deployment(data, federation={"rounds": 1}), tmp_path / "run", sites)
    found = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert found is not None
    less = {part: t for part, t in found.state.parts.items() if part != "frame"}
    checkpoint.save(tmp_path / "run" / "checkpoints", replace(found, state=replace(found.state, parts=less)), keep=1)
    with pytest.raises(UserError, match="was begun by a version of fedloge whose method fedloge has other parts here"):
        run(deployment(data), tmp_path / "run", sites)


def test_how_it_is_learnt_can_change_between_rounds_and_is_noted(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    sites = members(data, tmp_path / "sites")
    run(deployment(data, federation={"rounds": 1}), tmp_path / "run", sites)
    more = deployment(data, train={"lr": 0.02}, evaluation={"last": 1}, run={"keep": 2})
    more = replace(more, server=replace(more.server, port=4443))
    result = run(more, tmp_path / "run", sites)
    assert result["rounds"] == 3
    noted = [event.get("changed") for event in events(tmp_path / "run")]
    assert noted == [
        None,
        {"evaluation.last": [2, 1], "federation.rounds": [1, 3], "train.lr": [0.1, 0.02]},
        None,
    ]
    assert "changed since the last round: train.lr = 0.02, was 0.1" in caplog.text
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["lr"] == 0.02


def test_fewer_rounds_than_there_are_is_refused(data: Path, tmp_path: Path) -> None:
    sites = members(data, tmp_path / "sites")
    run(deployment(data, federation={"rounds": 2}), tmp_path / "run", sites)
    with pytest.raises(UserError, match=r"holds 2 rounds, more than federation\.rounds = 1"):
        run(deployment(data, federation={"rounds": 1}), tmp_path / "run", sites)


def test_an_end_that_comes_earlier_than_meant_has_its_figures(data: Path, tmp_path: Path) -> None:
    sites = members(data, tmp_path / "sites")
    save = checkpoint.save

    def crashing(folder: Path, found: checkpoint.Checkpoint, *rest: Any) -> Path:
        path = save(folder, found, *rest)
        if found.state.round == 3:
            raise Crash
        return path

    with crash(lambda patch: patch.setattr(checkpoint, "save", crashing)):
        run(deployment(data, federation={"rounds": 9}), tmp_path / "run", sites)
    result = run(deployment(data), tmp_path / "run", sites)
    assert result["rounds"] == 3
    assert result["mean_of_rounds"] == [2, 3]
    assert result["personal"]["phi"]["sites"] == 3


# --- sites that fail -------------------------------------------------------------------------------------------------


class Broken:
    """A fleet in which some sites always fail."""

    def __init__(self, fleet: LocalFleet, failing: Sequence[str]) -> None:
        self._fleet = fleet
        self._failing = failing

    def names(self, at_least: int, wait: float) -> list[str]:
        return self._fleet.names(at_least, wait)

    def broadcast(self, order: Order, names: Sequence[str], deadline: float) -> Exchange:
        return Halting(self._fleet.broadcast(order, names, deadline), self._failing)


class Halting:
    def __init__(self, exchange: Exchange, failing: Sequence[str]) -> None:
        self._exchange = exchange
        self._failing = failing

    def next(self, timeout: float) -> Reply | Failure | None:
        answer = self._exchange.next(timeout)
        if answer is not None and answer.client in self._failing:
            return Failure(answer.client, "its disk is full")
        return answer

    def close(self) -> None:
        self._exchange.close()


def test_giving_up_is_said_and_everything_is_kept(data: Path, tmp_path: Path) -> None:
    wish = deployment(data, federation={"failures": 2})
    sites = members(data, tmp_path / "sites")
    run(deployment(data, federation={"rounds": 1}), tmp_path / "run", sites)
    board = Board(tmp_path / "run")
    with pytest.raises(rounds.GaveUp) as caught:
        federate.federate(wish, tmp_path / "run", Broken(fleet_of(sites, wish), ["south"]), board)
    assert "south: its disk is full" in str(caught.value)
    shown = status.read(tmp_path / "run")
    assert shown is not None
    assert (shown.phase, shown.round, shown.message) == ("gave-up", 2, str(caught.value))
    assert shown.quarantined == {"south": {"round": 2, "reason": "its disk is full"}}
    latest = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert latest is not None
    assert latest.state.round == 1
    assert run(wish, tmp_path / "run", sites)["rounds"] == 3  # the site is mended


def test_a_quarantined_site_stays_named(data: Path, tmp_path: Path) -> None:
    wish = deployment(data, federation={"quorum": 0.5})
    sites = members(data, tmp_path / "sites")
    fleet = Broken(fleet_of(sites, wish), ["south"])
    result = federate.federate(wish, tmp_path / "run", fleet, Board(tmp_path / "run"))
    assert result["personal"]["phi"]["sites"] == 2
    board = Board(tmp_path / "run")
    federate.federate(
        deployment(data, federation={"quorum": 0.5, "rounds": 4}), tmp_path / "run", fleet_of(sites, wish), board
    )
    assert board.status.quarantined == {"south": {"round": 3, "reason": "its disk is full"}}


def test_two_servers_cannot_work_in_one_folder(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(federate, "PATIENCE", 0.3)
    with run_folder.locked(tmp_path), pytest.raises(UserError, match="another process is running this"):
        run(deployment(data), tmp_path, {})
    assert status.read(tmp_path) is None  # it is the other's


# --- the status ------------------------------------------------------------------------------------------------------


def test_the_status_is_written_seldom_but_the_last_word_is_always_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    write = files.replace
    monkeypatch.setattr(files, "replace", lambda path, content: (written.append(path), write(path, content)))
    board = Board(tmp_path, rounds=1000)
    for number in range(1000):
        board.show(round=number)
    while (found := status.read(tmp_path)) is None or found.round != 999:  # the suite's timeout is the deadline
        pass
    assert 0 < len(written) < 100
    board.show(phase="finished")
    board.flush()
    found = status.read(tmp_path)
    assert found is not None
    assert (found.phase, found.rounds) == ("finished", 1000)


@pytest.mark.parametrize("content", ["", "[]", "null", "{", '{"phase": "starting", "new": 1}'])
def test_a_status_that_cannot_be_read_is_none_and_unknown_keys_are_passed_over(tmp_path: Path, content: str) -> None:
    (tmp_path / status.NAME).write_text(content)
    found = status.read(tmp_path)
    assert (found is not None) == ("new" in content)


def test_a_full_disk_does_not_stop_the_status(tmp_path: Path) -> None:
    board = Board(tmp_path / "gone")
    board.show(round=1)
    assert board.status.round == 1
