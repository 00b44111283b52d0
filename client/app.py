"""The Flower app of a site: `app` turns messages into calls of its `Member` and back.

The resident node calls it in its own process; a stock SuperNode starts a process for every message. Both give it the
same node_config: `kit`, `data`, `state` and, if wanted, `key`, `test`, `device`, `threads`, `share-counts` and
`keep-statistics`. An error that it raises is a `Refusal`, whose text goes to the server and holds no path.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.member import Member, Told
from client.refusal import Refusal, told
from common.kit import open_kit
from common.messages import class_digest
from common.wire import VERSION, Card, decode_ask, decode_order, encode_card, encode_reply

NodeConfig = Mapping[str, bool | int | float | str]

log = logging.getLogger(__name__)

app = ClientApp()

_members: dict[tuple[tuple[str, object], ...], Member] = {}


def opened(config: NodeConfig, notify: Callable[[Told], None] | None = None) -> Member:
    """The member of `config`, made at the first call in this process and told to `notify` from then on."""
    key = tuple(sorted(config.items()))
    if key not in _members:
        _members[key] = made(config)
    if notify is not None:
        _members[key].notify = notify
    return _members[key]


def made(config: NodeConfig) -> Member:
    """A new one. Its errors are for the site itself."""
    paths = {name: Path(str(config[name])) for name in ("kit", "key", "data", "test", "state") if name in config}
    if "threads" in config:
        torch.set_num_threads(int(config["threads"]))
    return Member(
        open_kit(paths["kit"], paths.get("key")),
        paths["data"],
        paths["state"],
        test=paths.get("test"),
        device=str(config.get("device", "auto")),
        share_counts=bool(config.get("share-counts", False)),
        keep_statistics=bool(config.get("keep-statistics", False)),
    )


@app.train()
@app.evaluate()
def answer(message: Message, context: Context) -> Message:
    member = _member(context)
    try:
        received = decode_order(message.content)
    except ValueError as error:
        raise Refusal(f"the order cannot be read ({error}): run the same version of fedloge on both sides") from None
    reply = member.answer(received.order, received.settings, received.fixed_digest, received.wire)
    return Message(encode_reply(reply, received.wire), reply_to=message)


@app.query("card")
def show_card(message: Message, context: Context) -> Message:
    member = _member(context)
    if (theirs := decode_ask(message.content)) != VERSION:
        log.warning("the server runs fedloge %s, this site %s: it takes part once both are the same", theirs, VERSION)
    card = Card(
        name=member.ticket.name,
        version=VERSION,
        classes=class_digest(member.ticket.classes),
        examples=member.examples,
        holds=member.holds,
        counts=member.counts,
        reference=member.reference,
    )
    return Message(encode_card(card), reply_to=message)


@app.query("over")
def end(message: Message, context: Context) -> Message:
    _member(context).over()
    return Message(RecordDict(), reply_to=message)


def _member(context: Context) -> Member:
    with told(Path(str(context.node_config.get("state", "")))):
        return opened(context.node_config)
