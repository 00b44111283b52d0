"""The app of a site as a node calls it: a member of its node_config, messages in and out, and errors without paths."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from client import app as site_app
from client.refusal import Refusal
from common import pki
from common.config import parse
from common.deployment import Deployment, ImagesConfig, ServerConfig
from common.errors import UserError
from common.messages import Order, class_digest
from common.methods.method import ServerState
from common.net import build
from common.packed import fixed_digest
from common.wire import CARD, JUDGE, OVER, TRAIN, VERSION, decode_card, decode_reply, encode_ask, encode_order

Config = dict[str, bool | int | float | str]
CLASSES = ("cat", "dog")
PLAN = Deployment(
    parse({"model": {"name": "mlp", "width": 8}, "train": {"epochs": 1}, "frame": {"norm": 1.0, "sparsity": 0.3}}),
    ImagesConfig(CLASSES, size=6, channels=1),
    ServerConfig(),
)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Of a site with a kit and twenty images."""
    operator = tmp_path / "operator"
    operator.mkdir()
    pki.init(operator, "localhost", "study")
    pki.issue(operator, "north", None, PLAN)
    pixels = np.random.RandomState(0).randint(0, 256, (20, 6, 6)).astype(np.uint8)
    np.savez(tmp_path / "north.npz", images=pixels, labels=np.arange(20) % 2, classes=np.array(CLASSES))
    return {
        "kit": str(operator / "kits" / "north.kit"),
        "data": str(tmp_path / "north.npz"),
        "state": str(tmp_path / "north"),
        "device": "cpu",
        "threads": 1,
    }


def ask(config: Config, kind: str, content: RecordDict | None = None) -> RecordDict:
    message = Message(content or RecordDict(), dst_node_id=1, message_type=kind)
    message.metadata.__dict__["_message_id"] = "0" * 64
    context = Context(1, 2, node_config=config, state=RecordDict(), run_config={})
    reply = site_app.app(message, context)
    assert reply.metadata.reply_to_message_id == message.metadata.message_id
    return reply.content


def start() -> ServerState:
    return PLAN.config.method.init(build(PLAN.config.method, PLAN.task), PLAN.task)


def order(train: bool = True) -> Order:
    method, state = PLAN.config.method, start()
    shared, fixed = ({p: t for p, t in state.parts.items() if p in kind} for kind in (method.shared, method.fixed))
    return Order(1, "the model", shared, fixed, train=train, judge=not train)


def test_messages_go_in_and_come_out(config: Config, tmp_path: Path) -> None:
    card = decode_card(ask(config, CARD))
    assert (card.name, card.classes, card.examples, card.holds) == ("north", class_digest(CLASSES), 16, "")
    assert card.counts is None

    first = decode_reply(ask(config, TRAIN, encode_order(order(), PLAN.settings())), "north")
    assert (first.client, first.round, first.model, first.examples) == ("north", 1, "the model", 16)
    assert sorted(first.shared) == ["backbone", "global_head"]
    assert decode_card(ask(config, CARD)).holds == fixed_digest(order().fixed)

    last = decode_reply(
        ask(config, JUDGE, encode_order(order(False), PLAN.settings(), holds=fixed_digest(order().fixed))), "north"
    )
    assert last.shared == {}
    assert set(last.judged) == {"generic", "personal"}
    assert (tmp_path / "north" / "models" / "personal.safetensors").exists()

    assert len(ask(config, OVER)) == 0
    assert (tmp_path / "north" / "over").exists()


def test_a_process_has_one_member_that_is_told_to_whoever_opened_it(config: Config) -> None:
    seen: list[object] = []
    member = site_app.opened(config, seen.append)
    assert site_app.opened(dict(reversed(config.items()))) is member
    ask(config, TRAIN, encode_order(order(), PLAN.settings()))
    assert len(seen) == 1


def test_counts_go_out_if_the_site_says_so(config: Config) -> None:
    assert decode_card(ask({**config, "share-counts": True}, CARD)).counts == (8, 8)


def test_a_server_of_another_version_is_said_with_both_versions(
    config: Config, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(config, CARD, encode_ask())
    assert caplog.messages == []
    monkeypatch.setattr("common.wire.VERSION", "9.9")
    ask(config, CARD, encode_ask())
    assert [message.partition(":")[0] for message in caplog.messages] == [
        f"the server runs fedloge 9.9, this site {VERSION}"
    ]


def missing(config: Config) -> tuple[Config, RecordDict]:
    return {**config, "data": str(config["data"]) + "x"}, RecordDict()


def foreign(config: Config) -> tuple[Config, RecordDict]:
    return {**config, "kit": config["data"]}, RecordDict()


def no_order(config: Config) -> tuple[Config, RecordDict]:
    return config, RecordDict({"order": ConfigRecord({"schema": 1})})


def no_settings(config: Config) -> tuple[Config, RecordDict]:
    return config, encode_order(order(), "/etc")


def no_fixed(config: Config) -> tuple[Config, RecordDict]:
    return config, encode_order(order(), PLAN.settings(), holds=fixed_digest(order().fixed))


@pytest.mark.parametrize("wrong", [missing, foreign, no_order, no_settings, no_fixed])
def test_errors_that_reach_the_server_hold_no_path(
    config: Config, wrong: Callable[[Config], tuple[Config, RecordDict]]
) -> None:
    config, content = wrong(config)
    with pytest.raises(Refusal) as found:
        ask(config, TRAIN, content)
    text = str(found.value)
    assert text
    assert "/" not in text
    assert "\n" not in text


def test_the_site_itself_learns_what_is_wrong(config: Config) -> None:
    with pytest.raises(UserError, match=str(config["data"])):
        site_app.made({**config, "data": str(config["data"]) + "x"})
