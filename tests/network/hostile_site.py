"""A site with a real kit that sends what it must not: `python -m tests.network.hostile_site KIT`.

It shows a good card and hears the end like any site. Every order to train it answers with the next of `LIES`, every
one to count with the next of `COUNTS`, each of which is an answer that would be good but for what its name says.
"""

import hashlib
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from client.fleet_api import BEAT, FleetApi, FleetError, Taken
from common.kit import open_kit
from common.messages import Order, Reply, class_digest
from common.statistics import Sums
from common.wire import CARD, JUDGE, OVER, VERSION, Card, decode_order, encode_card, encode_reply

IMPOSSIBLE = {"personal": {"phi": {"top1": 7.0, "balanced": 0.5, "macro_f1": 0.5, "ece": 0.5}}}


class Site:
    def __init__(self, kit: Path) -> None:
        self.kit = open_kit(kit)
        self.api = FleetApi(self.kit)
        self.sent: list[tuple[PushMessagesRequest, RecordDict]] = []  # honestly put together, to be sent once more
        self._done, self._beating = threading.Event(), threading.Lock()

    def run(self) -> None:
        self._insist(self.api.activate)
        threading.Thread(target=self._beat, daemon=True).start()
        lies, counts = enumerate(LIES.items(), 1), iter(COUNTS.values())
        kind = ""
        while kind != OVER:
            if (order := self._order()) is None:
                time.sleep(0.05)
                continue
            kind = order.metadata.message_type
            if kind == CARD:
                self.send(Message(encode_card(self._card()), reply_to=order))
            elif kind == JUDGE and ordered(order).centre is not None:
                lie, _ = next(counts, (lambda reply: replace(reply, sums={}), ""))
                self.send(Message(encode_reply(lie(counted(order))), reply_to=order))
            elif kind == JUDGE:
                self.send(Message(encode_reply(replace(trained(order), shared={}, judged=IMPOSSIBLE)), reply_to=order))
            elif kind == OVER:
                self.send(Message(RecordDict(), reply_to=order))
            else:
                number, (name, (lie, _)) = next(lies)
                began = time.monotonic()
                try:
                    outcome = lie(self, order) or "sent"
                except FleetError as error:  # the server is not interested any more, which is what we are here for
                    outcome = f"broken off: {error}"
                print(f"lie {number}, {name}: {outcome}, in {time.monotonic() - began:.1f} s", flush=True)
        self._done.set()

    def send(self, reply: Message) -> None:
        """As an honest site does."""
        reply.metadata.__dict__["_message_id"] = reply.object_id
        contents = {name: part.deflate() for name, part in get_all_nested_objects(reply).items()}
        request = self.announcement(reply, get_object_tree(reply))
        if not reply.has_error():
            self.sent.append((request, reply.content))
        self.give(request, contents.__getitem__)

    def announcement(self, reply: Message, tree: ObjectTree) -> PushMessagesRequest:
        return PushMessagesRequest(
            messages_list=[message_to_proto(remove_content_from_message(reply))], message_object_trees=[tree]
        )

    def give(self, request: PushMessagesRequest, content: Callable[[str], bytes]) -> None:
        taken, lacking = self.api.announce(request)
        assert taken
        self.api.upload(request.messages_list[0].metadata.run_id, list(lacking), content)

    def forge(self, order: Message, root: bytes, children: dict[str, "Content"]) -> None:
        """A reply whose message object is `root`, with these objects below it."""
        reply = Message(RecordDict(), reply_to=order)
        name = hashlib.sha256(root).hexdigest()
        reply.metadata.__dict__["_message_id"] = name
        tree = ObjectTree(object_id=name, children=[ObjectTree(object_id=child) for child in children])
        self.give(self.announcement(reply, tree), lambda wanted: root if wanted == name else children[wanted]())

    @contextmanager
    def away(self) -> Iterator[None]:
        """Offline, for the server. A heartbeat after the farewell would bring the site back, as it does if this
        fails."""
        with self._beating:
            self.api.deactivate()
            yield
            with suppress(Taken):  # by a heartbeat whose answer was not waited for any longer
                self.api.activate()

    def _order(self) -> Message | None:
        pulled = self.api.pull()
        if pulled is None:
            return None
        head = message_from_proto(pulled.messages_list[0]).metadata
        contents: dict[str, bytes] = {}
        names = [part.object_id for part in iterate_object_tree(pulled.message_object_trees[0])]
        self.api.fetch(head.run_id, names, contents, time.time() + 60)
        self.api.confirm(head.run_id, head.message_id)
        order = inflate_object_from_contents(head.message_id, contents)
        assert isinstance(order, Message)
        order.metadata.__dict__["_message_id"] = head.message_id
        return order

    def _card(self) -> Card:
        return Card(self.kit.name, VERSION, class_digest(self.kit.classes), 10, "")

    def _beat(self) -> None:
        while not self._done.wait(0.2 * BEAT):  # one may get lost while the server takes in 1 GB
            with self._beating, suppress(FleetError):
                self.api.heartbeat()

    def _insist(self, call: Callable[[], None]) -> None:
        """Until the server is there."""
        while True:
            try:
                return call()
            except FleetError:
                time.sleep(0.2)


Content = Callable[[], bytes]
Lie = Callable[[Site, Message], str | None]


@dataclass(frozen=True)
class Made:
    """Content of an object that is made when it is asked for."""

    size: int
    number: int
    name: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", hashlib.sha256(self()).hexdigest())

    def __call__(self) -> bytes:
        return b"ArrayChunk  %d\0" % (self.size + 8) + self.number.to_bytes(8, "big") + bytes(self.size)


def ordered(order: Message) -> Order:
    return decode_order(order.content).order


def trained(message: Message) -> Reply:
    """A reply like those of honest sites, though nothing was trained."""
    order = ordered(message)
    return Reply("", order.round, order.model, 10, order.shared, metrics={"loss 0": 0.5})


def counted(message: Message) -> Reply:
    """Class statistics like those of honest sites: of ten images of the first two classes."""
    order = ordered(message)
    assert order.centre is not None
    f = torch.randn(10, len(order.centre), generator=torch.Generator().manual_seed(1))
    sums = Sums.nothing(len(order.shared["global_head"]["bias"]), len(order.centre))
    sums.add(f, torch.arange(10) % 2)
    return Reply("", order.round, order.model, 10, {}, sums=sums.tensors())


def saying(change: Callable[[Reply], Reply]) -> Lie:
    """Something else in the reply."""
    return lambda site, order: site.send(Message(encode_reply(change(trained(order))), reply_to=order))


def head(change: Callable[[dict[str, torch.Tensor]], object]) -> Lie:
    """Something else in the global head."""

    def changed(reply: Reply) -> Reply:
        tensors = {name: t.clone() for name, t in reply.shared["global_head"].items()}
        change(tensors)
        return replace(reply, shared={**reply.shared, "global_head": tensors})

    return saying(changed)


def poisoned(value: float) -> Lie:
    return head(lambda tensors: tensors["weight"].view(-1)[7:8].fill_(value))


def swapped(name: str, t: torch.Tensor) -> Lie:
    return head(lambda tensors: tensors.update({name: t}))


def writing(change: Callable[[RecordDict], object]) -> Lie:
    """Something else in the record of the reply."""

    def lie(site: Site, order: Message) -> None:
        record = encode_reply(trained(order))
        change(record)
        site.send(Message(record, reply_to=order))

    return lie


def about(key: str, value: Any) -> Lie:
    return writing(lambda record: record.update({"reply": ConfigRecord({**record["reply"], key: value})}))


def flip(record: RecordDict) -> None:
    """One bit of the values, after the checksum was made."""
    array = record["parts"]["shared/backbone"]
    data = bytes([array.data[0] ^ 1]) + array.data[1:]
    record["parts"] = ArrayRecord(
        {**record["parts"], "shared/backbone": Array(array.dtype, array.shape, array.stype, data)}
    )


def noise(many: int) -> bytes:
    return (
        torch.randint(0, 256, (many,), generator=torch.Generator().manual_seed(1), dtype=torch.uint8).numpy().tobytes()
    )


def random_values(site: Site, order: Message) -> None:
    arrays = ArrayRecord({"x": Array("float32", (1,), "numpy.ndarray", noise(5000))})
    site.send(Message(RecordDict({"reply": ConfigRecord({"y": noise(5000)}), "parts": arrays}), reply_to=order))


def random_message(site: Site, order: Message) -> None:
    site.forge(order, b"Message  5000\0" + noise(5000), {})


def other_content(site: Site, order: Message) -> str:
    """Objects that are not what their names say. The server takes none of them; we go away, and come back when the
    reply has been given up."""
    reply = Message(encode_reply(trained(order)), reply_to=order)
    reply.metadata.__dict__["_message_id"] = reply.object_id
    try:
        site.give(site.announcement(reply, get_object_tree(reply)), lambda _: noise(100))
    except FleetError as error:
        with site.away():
            end = time.monotonic() + 10  # the SuperLink may have said that we are gone, and not forget the reply
            while site.api.knows(order.metadata.run_id, reply.metadata.message_id) and time.monotonic() < end:
                time.sleep(0.1)
        return f"not taken: {error}"
    return "taken"


def bomb(site: Site, order: Message) -> None:
    """1 GB when it is put together: an Array that lists a chunk of 100 kB ten thousand times."""
    chunk = Made(10**5 - 8, 0)
    made: dict[str, Content] = {chunk.name: chunk}

    def wrap(kind: str, child: str, body: bytes) -> str:
        content = b"%s %s %d\0" % (kind.encode(), child.encode(), len(body)) + body
        name = hashlib.sha256(content).hexdigest()
        made[name] = lambda: content
        return name

    listed = str([0] * 10_000).encode()
    array = wrap(
        "Array",
        chunk.name,
        b'{"dtype": "float32", "shape": [1], "stype": "fedloge.raw", "arraychunk_ids": %s}' % listed,
    )
    arrays = wrap("ArrayRecord", array, b'{"shared/backbone": "%s"}' % array.encode())
    record = wrap("RecordDict", arrays, b'{"parts": "%s"}' % arrays.encode())
    body = Message(RecordDict(), reply_to=order).deflate().partition(b"\0")[2]
    root = made.pop(wrap("Message", record, body))()
    site.forge(order, root, made)


def gigabyte(pieces: int) -> Lie:
    def lie(site: Site, order: Message) -> None:
        made = [Made((1 << 30) // pieces, number) for number in range(pieces)]
        site.forge(order, Message(RecordDict(), reply_to=order).deflate(), {one.name: one for one in made})

    return lie


def replay(site: Site, order: Message) -> str:
    """What was sent before: as it was, which the server does not take, and as the reply to this order."""
    request, record = site.sent[-1]
    taken, _ = site.api.announce(request)
    site.send(Message(record, reply_to=order))
    return "taken" if taken else "not taken, and sent anew"


def failing(text: str) -> Lie:
    return lambda site, order: site.send(Message(Error(2, text), reply_to=order))


LIES: dict[str, tuple[Lie, str]] = {
    "nan": (poisoned(math.nan), r"^weight has values that are not finite$"),
    "inf": (poisoned(math.inf), r"^weight has values that are not finite$"),
    "-inf": (poisoned(-math.inf), r"^weight has values that are not finite$"),
    "too large": (poisoned(1e30), r"^weight has values up to 1\.0e\+30, which are too large to be averaged$"),
    "shape": (swapped("weight", torch.ones(3, 3)), r"^part global_head: weight is float32\[3, 3\] instead of"),
    "broadcastable": (
        swapped("bias", torch.ones(1)), r"^part global_head: bias is float32\[1\] instead of float32\[10\]$",
    ),
    "dtype": (
        head(lambda tensors: tensors.update({name: t.double() for name, t in tensors.items()})),
        r"^part global_head: bias is float64\[10\] instead of float32\[10\]$",
    ),
    "missing key": (head(lambda tensors: tensors.pop("bias")), r"^part global_head: bias is missing$"),
    "extra key": (swapped("more", torch.ones(2)), r"^part global_head: more is not expected$"),
    "missing part": (
        saying(lambda reply: replace(reply, shared={"backbone": reply.shared["backbone"]})),
        r"^parts \['backbone'\] instead of \['backbone', 'global_head'\]$",
    ),
    "extra part": (
        saying(lambda reply: replace(reply, shared={**reply.shared, "local_head": {"weight": torch.ones(2)}})),
        r"^parts \['backbone', 'global_head', 'local_head'\] instead",
    ),
    "1 GB in one object": (gigabyte(1), r"^an object of its reply is larger than 16777216 bytes$"),
    "1 GB in objects of 15 MB": (gigabyte(70), r"^its reply is larger than \d+ bytes$"),
    "1 GB in objects of 5 MB": (gigabyte(205), r"^its reply is cut into 206 pieces$"),
    "1 GB when it is put together": (bomb, r"^its reply cannot be read: its arrays would be 1000\d+ bytes, more than"),
    "negative": (saying(lambda reply: replace(reply, examples=-5)), r"^-5 examples are not between 1 and 10000000$"),
    "zero": (saying(lambda reply: replace(reply, examples=0)), r"^0 examples are not between 1 and 10000000$"),
    "absurd": (saying(lambda reply: replace(reply, examples=2**62)), r"^\d{19} examples are not between 1 and"),
    "examples as text": (about("examples", "10"), r"^its reply is not one: examples is not of type int$"),
    "stale": (saying(lambda reply: replace(reply, round=reply.round - 1)), r"^for round (\d+), this is round (\d+)$"),
    "other model": (
        saying(lambda reply: replace(reply, model="0" * 64)), r"^trained from another model than the one sent$",
    ),
    "checksum": (writing(flip), r"^its reply is not one: shared/backbone: its values do not match their checksum$"),
    "metric": (
        saying(lambda reply: replace(reply, metrics={"loss 0": math.nan})),
        r"^its metric loss 0 is not a finite number$",
    ),
    "replayed": (replay, r"^for round (\d+), this is round (\d+)$"),
    "random values": (random_values, r"^its reply is not one: "),
    "random bytes": (random_message, r"^its reply cannot be read: "),
    "other content": (other_content, r"^(?:went offline|nothing more of its reply has come)"),
    "nothing": (
        lambda site, order: site.send(Message(RecordDict(), reply_to=order)), r"^its reply is not one: holds no reply$",
    ),
    "an error that looks like a log": (
        failing("x\n2026-01-01 00:00:00 round 9: \x1b[31mall is well" + 9999 * "!"),
        r"^x 2026-01-01 00:00:00 round 9:  \[31mall is well!+$",
    ),
}  # fmt: skip


def sums(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Reply], Reply]:
    """Something else in the class statistics."""
    return lambda reply: replace(reply, sums={**reply.sums, name: change(reply.sums[name].clone())})


COUNTS: dict[str, tuple[Callable[[Reply], Reply], str]] = {
    "nan": (sums("total", lambda t: t.index_fill(0, torch.tensor(0), math.nan)), "its statistics are not finite"),
    "too large": (sums("scatter", lambda t: 1e30 * t), r"its statistics have numbers above 1e\+24"),
    "shape": (sums("count", lambda t: t[:1]), "what it sends are no class statistics"),
    "dtype": (
        lambda reply: replace(reply, sums={name: t.float() for name, t in reply.sums.items()}),
        "what it sends are no class statistics",
    ),
    "missing key": (
        lambda reply: replace(reply, sums={"count": reply.sums["count"]}), "what it sends are no class statistics",
    ),
    "more images than it has": (
        sums("count", lambda t: 1000 * t), "its statistics are of 10000 images, its reply of 10",
    ),
    "a class mean that its scatter does not allow": (
        sums("total", lambda t: 1000 * t), "its scatter is smaller than that of its class means",
    ),
    "other model": (
        lambda reply: replace(reply, model="0" * 64), "its statistics are of another model than the one sent",
    ),
    "absurd": (lambda reply: replace(reply, examples=2**62), r"\d{19} examples are not between 1 and 10000000"),
}  # fmt: skip


if __name__ == "__main__":
    Site(Path(sys.argv[1])).run()
