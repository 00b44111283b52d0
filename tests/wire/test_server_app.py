"""The server's Flower app: a run of it is a federation's rounds, and what only the operator can mend is one line."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.serverapp import ServerApp

from common import deployment, parts
from common.messages import Reply, class_digest
from common.wire import CARD, OVER, VERSION, Card, decode_order, encode_card, encode_reply
from server import app as module
from server import checkpoint, spill, status
from server.federate import federate
from server.fleet import LocalFleet
from server.flower_link import NoLink
from server.fold import Fold
from tests.members import CLASSES, NAMES, Handler, images, members
from tests.serverappio import Node, SuperLink
from tests.wire.test_strategy import TOML


@dataclass(frozen=True)
class Seen:
    name: str | None


class Link:
    def __init__(self, link: SuperLink) -> None:
        self.link = link
        self.closed = False

    def nodes(self) -> dict[int, Seen]:
        return {node.id: Seen(node.name) for node in self.link.nodes}

    def close(self) -> None:
        self.closed = True


class Exit(Exception):
    pass


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "study"
    (made / "run").mkdir(parents=True)
    (made / "federation.toml").write_text(TOML)
    return made


@pytest.fixture
def link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SuperLink]:
    """Three members behind a SuperLink, and a Control API that knows their names."""
    logging.getLogger("flwr").setLevel(logging.WARNING)
    monkeypatch.setattr(torch, "set_num_threads", lambda many: None)  # noqa: ARG005 - those of the tests stay
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)  # and so does their log
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    made = SuperLink()
    sites = members(images(tmp_path / "data"), tmp_path / "sites")

    def behave(node: Node, message: Message) -> None:
        member = sites[node.name]
        if message.metadata.message_type == CARD:
            card = Card(node.name, VERSION, class_digest(CLASSES), member.examples, member.holds)
            node.reply(message, encode_card(card))
        elif message.metadata.message_type == OVER:
            member.over()
            node.reply(message, RecordDict())
        else:
            got = decode_order(message.content)
            node.reply(message, encode_reply(member.answer(got.order, got.settings, got.fixed_digest), got.wire))

    for name in NAMES:
        made.join(name, behave)
    monkeypatch.setattr(module, "open_link", lambda _: Link(made))

    def leave(code: int, message: str) -> NoReturn:
        raise Exit(code, message)

    monkeypatch.setattr(module, "flwr_exit", leave)
    yield made
    made.close()


def run(link: SuperLink, **config: Any) -> None:
    module.app(grid=link.grid, context=Context(7, 1, {}, RecordDict(), config))


def test_the_app_can_be_found_by_its_name() -> None:
    assert isinstance(module.app, ServerApp)
    assert "\napp = ServerApp()\n" in Path(module.__file__).read_text()  # Flower looks for a plain assignment


def test_a_run_is_the_whole_federation(link: SuperLink, folder: Path, tmp_path: Path) -> None:
    run(link, federation=str(folder))
    shown = status.read(folder / "run")
    assert shown is not None
    assert (shown.phase, shown.run, shown.round, shown.rounds) == ("finished", "7", 2, 2)
    assert sorted(shown.sites) == list(NAMES)
    assert (folder / "run" / "metrics.json").exists()
    assert all((tmp_path / "sites" / name / "over").exists() for name in NAMES)
    assert all((tmp_path / "sites" / name / "models" / "personal.safetensors").exists() for name in NAMES)


def test_a_large_model_is_out_of_the_way_while_replies_come(
    link: SuperLink, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what comes out is, to the bit, what comes out of a federation in whose memory it stays."""
    plan = deployment.load(folder / "federation.toml", ['federation.fold="name"'])
    (folder / "run" / module.OVERRIDES).write_text(r'["federation.fold=\"name\""]')
    sites = members(images(tmp_path / "others"), tmp_path / "at home")
    handlers = {name: Handler(member, plan.settings()) for name, member in sites.items()}
    federate(plan, tmp_path / "run", LocalFleet(handlers), status.Board(tmp_path / "run"))
    away = []
    real = Fold.add

    def add(self: Fold, reply: Reply) -> None:
        away.append(all(t.numel() == 0 for group in self._order.shared.values() for t in group.values()))
        real(self, reply)

    monkeypatch.setattr(Fold, "add", add)
    monkeypatch.setattr(spill, "LARGE", 1)
    run(link, federation=str(folder))
    assert away == [True] * 6
    ours, theirs = (checkpoint.latest(place / "checkpoints") for place in (folder / "run", tmp_path / "run"))
    assert ours is not None
    assert theirs is not None
    for part, group in theirs.state.parts.items():
        assert parts.digest(ours.state.parts[part]) == parts.digest(group)


def test_a_second_run_goes_on_by_what_the_command_line_says(link: SuperLink, folder: Path) -> None:
    run(link, federation=str(folder))
    (folder / "run" / module.OVERRIDES).write_text('["federation.rounds=4"]')
    run(link, federation=str(folder))
    found = checkpoint.latest(folder / "run" / "checkpoints")
    assert found is not None
    assert [entry["round"] for entry in found.history] == [1, 2, 3, 4]


@pytest.mark.parametrize("config", [{}, {"federation": ""}, {"federation": "study"}])
def test_a_run_without_a_federation_is_refused(link: SuperLink, config: dict[str, str]) -> None:
    with pytest.raises(Exit, match="the run has no federation: start it with `fedloge server DIR`"):
        run(link, **config)


def test_a_file_that_is_not_right_ends_the_federation_with_one_line(
    link: SuperLink, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "federation.toml").write_text(TOML + "\n[server]\nprot = 5\n")
    with pytest.raises(Exit, match=r"unknown key server\.prot"):
        run(link, federation=str(folder))
    shown = status.read(folder / "run")
    assert shown is not None
    assert (shown.phase, shown.run) == ("gave-up", "7")
    assert "unknown key server.prot" in shown.message
    assert "Traceback" not in caplog.text
    assert not (folder / "run" / "checkpoints").exists()


def test_a_superlink_that_cannot_be_asked_is_worth_another_run(
    link: SuperLink, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(_: Path) -> NoReturn:
        raise NoLink("no answer")

    monkeypatch.setattr(module, "open_link", closed)
    with pytest.raises(NoLink):
        run(link, federation=str(folder))
    assert status.read(folder / "run") is None


def test_giving_up_is_one_line_and_the_link_is_closed(
    link: SuperLink, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = TOML.replace("min_clients = 3", "min_clients = 4\nwait = 0.1\nfailures = 2")
    (folder / "federation.toml").write_text(text)
    opened = Link(link)
    monkeypatch.setattr(module, "open_link", lambda _: opened)
    with pytest.raises(Exit, match="found no quorum 2 times in a row"):
        run(link, federation=str(folder))
    shown = status.read(folder / "run")
    assert shown is not None
    assert shown.phase == "gave-up"
    assert opened.closed
    assert deployment.load(folder / "federation.toml").config.federation.min_clients == 4
