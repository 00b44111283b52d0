"""Orders, replies and cards as Flower records, and back.

A record holds one ConfigRecord, named for what it is (`order`, `reply`, `card`), and for an order or a reply one
ArrayRecord `parts` with one flat Array per part, because Flower's cost is per object. See packed.py for what is in one.

Values arrive bit for bit as they were sent. How the shared backbone, and nothing else, travels is the federation's
choice, because methods check heads and priors against statistics, which a rounded head would not match: "fp32" as it
is; "bf16" rounded to bfloat16, and float32 again at both ends; "int8" and "topk" as a change (codec.py), where both
ends have what it is from. `Order.model` is therefore a name for the server's own parts, to be echoed, and no digest of
what a site holds. A frame travels as the values at the places that its settings leave free. What arrives is guarded by
each part's checksum. That is enough beside Flower and TLS: objects are named by their SHA-256, which the SuperLink
verifies on upload (and nobody on the way out of it).

What is decoded comes from the network. Anything that is not as it should be raises ValueError with one printable line.
"""

import importlib.metadata
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from common.codec import CODED, PART, WIRES, Change, Wire
from common.config import FrameConfig
from common.fields import end, judgement, line, metrics, take, text
from common.messages import SCHEMA, Order, Reply
from common.objects import flat
from common.packed import Packed, check_name, part_digest, shown
from common.packed_frame import with_zeros, without_zeros
from common.parts import Manifest, Tensors

TRAIN = "train"  # types of Flower messages
JUDGE = "evaluate"
CARD = "query.card"
OVER = "query.over"

VERSION = importlib.metadata.version("fedloge")  # sites of another are refused

RAW = "fedloge.raw"  # the `stype` of our Arrays
CHANGE = "fedloge.change"  # that of a change
CENTRE = "centre"  # the part, and the name in it, of what features are taken about
ROUNDED = f"shared/{PART}"  # what bf16 is for
FRAME = "fixed/frame"  # what is sent without its zeros
PARTS = 16  # nothing honest comes near this and the next ones
CLASSES = 10**6
SETTINGS = 2**22  # characters
OVERHEAD = 2**19  # bytes of a reply beside its values and manifests


@dataclass(frozen=True)
class Received:
    """An order as it reached a site."""

    order: Order  # its fixed parts are those that were sent
    settings: str
    fixed_digest: str  # of the method's fixed parts, sent or not; empty when it has none
    wire: Wire  # how the reply shall travel


@dataclass(frozen=True)
class Card:
    """What a site says of itself before it is given anything to do."""

    name: str
    version: str  # of fedloge
    classes: str  # digest of its list of classes
    examples: int  # training images
    holds: str  # digests of the fixed parts it has at hand, or empty
    counts: tuple[int, ...] | None = None  # training images per class, if the site has opted in
    reference: str = ""  # name of the backbone that it has kept, or empty
    schema: int = SCHEMA


def encode_order(
    order: Order, settings: str, *, holds: str = "", wire: Wire = "fp32", frame: FrameConfig | None = None
) -> RecordDict:
    """Without the fixed parts that the site `holds` by their digests. `frame` says where the frame is zero."""
    parts = {f"shared/{part}": t for part, t in order.shared.items()}
    digests = {part: part_digest(part, t) for part, t in order.fixed.items()}
    parts |= {f"fixed/{part}": t for part, t in order.fixed.items() if digests[part] not in holds.split()}
    if order.centre is not None:
        parts[CENTRE] = {CENTRE: order.centre}
    about = {
        "schema": order.schema,
        "round": order.round,
        "model": order.model,
        "train": order.train,
        "judge": order.judge,
        "fixed": " ".join(sorted(digests.values())),
        "settings": settings,
        "base": order.base,
        "reference": order.reference,
    }
    if frame is not None and FRAME in parts:
        parts[FRAME], more = without_zeros(parts[FRAME], frame)
        about |= more
    return _pack("order", about, parts, order.changes, wire)


def decode_order(record: RecordDict) -> Received:
    about, parts, changes = _unpack(record, "order")
    if FRAME in parts and "places" in about:
        parts[FRAME] = with_zeros(parts[FRAME], take(about, "places", list), take(about, "sparsity", float))
    shared, fixed = _taken(parts, "shared/"), _taken(parts, "fixed/")
    named = line(about, "fixed")
    if not {part_digest(part, t) for part, t in fixed.items()} <= set(named.split()):
        raise ValueError("the fixed parts do not match their digests")
    order = Order(
        round=take(about, "round", int),
        model=line(about, "model"),
        shared=shared,
        fixed=fixed,
        train=take(about, "train", bool),
        judge=take(about, "judge", bool),
        centre=_centre(parts),
        changes=changes,
        base=line(about, "base"),
        reference=line(about, "reference"),
    )
    if order.changes and not order.base:
        raise ValueError("it holds a change from nothing")
    if order.centre is not None and (order.train or order.judge):
        raise ValueError("it asks for statistics and for something else")
    received = Received(order, text(about, "settings", SETTINGS), named, _wire(about))
    end(about, parts)
    return received


def encode_reply(reply: Reply, wire: Wire = "fp32") -> RecordDict:
    parts = {f"shared/{part}": t for part, t in reply.shared.items()}
    if reply.sums:
        parts["sums"] = reply.sums
    about = {
        "schema": reply.schema,
        "round": reply.round,
        "model": reply.model,
        "examples": reply.examples,
        "judged": json.dumps(reply.judged),
        **{f"metrics/{name}": float(value) for name, value in reply.metrics.items()},
    }
    return _pack("reply", about, parts, reply.changes, wire)


def decode_reply(record: RecordDict, client: str, wire: Wire = "fp32") -> Reply:
    """The reply of `client`, who is known by the key it came with. What it says is for the fold to judge."""
    about, parts, changes = _unpack(record, "reply")
    if (theirs := _wire(about)) != wire:
        raise ValueError(f"it travels as {theirs}, and federation.wire is {wire}")
    reply = Reply(
        client=client,
        round=take(about, "round", int),
        model=line(about, "model"),
        examples=take(about, "examples", int),
        shared=_taken(parts, "shared/"),
        sums=parts.pop("sums", {}),
        metrics=metrics(about),
        judged=judgement(about),
        changes=changes,
    )
    end(about, parts)
    return reply


def encode_ask() -> RecordDict:
    """The question for a card."""
    return RecordDict({"ask": ConfigRecord({"version": VERSION})})


def decode_ask(record: RecordDict) -> str:
    """The version of fedloge that the server runs."""
    found = record.get("ask")
    return line(dict(found), "version") if isinstance(found, ConfigRecord) else "of an unknown version"


def encode_card(card: Card) -> RecordDict:
    about = vars(card) | {"counts": list(card.counts or ())}
    if card.counts is None:
        del about["counts"]
    return RecordDict({"card": ConfigRecord(about)})


def decode_card(record: RecordDict) -> Card:
    about = _about(record, "card")
    counts = tuple(take(about, "counts", list)) if "counts" in about else None
    card = Card(
        name=line(about, "name"),
        version=line(about, "version"),
        classes=line(about, "classes"),
        examples=take(about, "examples", int),
        holds=line(about, "holds"),
        counts=counts,
        reference=line(about, "reference"),
    )
    many = (card.examples, *(counts or ()))
    if len(many) > CLASSES or any(type(count) is not int or count < 0 for count in many):
        raise ValueError("examples or counts are not numbers of images")
    end(about)
    return card


def reply_bytes(order: Order, statistics: Mapping[str, tuple[int, ...]]) -> int:
    """More than the Flower objects of an honest reply weigh together, before and after they are inflated."""
    width = 4 if order.centre is None else 8  # class statistics are float64
    total = OVERHEAD + width * sum(math.prod(shape) for shape in statistics.values())
    if order.train:
        for part in order.shared.values():
            total += sum(t.nbytes for t in part.values()) + len(Manifest.of(part).as_json())
    return total + total // 64  # heads of objects and names of chunks, should a site cut smaller ones


def weight(record: RecordDict) -> int:
    """Bytes of a message's content as it is handed to Flower."""
    fields = (len(part.deflate()) for part in record.values() if not isinstance(part, ArrayRecord))
    arrays = (array for part in record.values() if isinstance(part, ArrayRecord) for array in part.values())
    return sum(fields) + sum(len(array.data) for array in arrays)


def _pack(
    kind: str, about: dict[str, Any], parts: dict[str, Tensors], changes: Mapping[str, Change], wire: Wire
) -> RecordDict:
    about["wire"] = wire
    arrays = ArrayRecord()
    for name, part in parts.items():
        packed = Packed.of(part, rounded=wire == "bf16" and name == ROUNDED)
        about[name] = [packed.manifest, packed.checksum]
        arrays[name] = flat(packed.dtype, packed.count, RAW, packed.data)
    for name, change in changes.items():
        about[f"change/{name}"] = [change.coding, change.checksum]
        arrays[f"change/{name}"] = flat("uint8", len(change.data), CHANGE, change.data)
    return RecordDict({kind: ConfigRecord(about), "parts": arrays})


def _unpack(record: RecordDict, kind: str) -> tuple[dict[str, Any], dict[str, Tensors], dict[str, Change]]:
    about = _about(record, kind, "parts")
    arrays = record["parts"]
    if not isinstance(arrays, ArrayRecord) or len(arrays) > PARTS:
        raise ValueError(f"parts are not an ArrayRecord of at most {PARTS}")
    parts: dict[str, Tensors] = {}
    changes: dict[str, Change] = {}
    for name, array in arrays.items():
        check_name(name)
        described = about.pop(name, None)
        if len(array.shape) != 1 or not isinstance(described, list) or [type(t) for t in described] != [str, str]:
            raise ValueError(f"{name} is no flat array with a manifest and a checksum")
        if name.startswith("change/"):
            changes[name.removeprefix("change/")] = _change(name, array, *described)
        else:
            parts[name] = _part(name, array, *described)
    return about, parts, changes


def _part(name: str, array: Array, manifest: str, checksum: str) -> Tensors:
    if array.stype != RAW:
        raise ValueError(f"{name} is no flat array with a manifest and a checksum")
    packed = Packed(manifest, array.dtype, array.shape[0], array.data, checksum)
    try:
        return packed.part(rounded=name == ROUNDED)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _change(name: str, array: Array, coding: str, checksum: str) -> Change:
    if coding not in CODED or (array.stype, array.dtype, array.shape[0]) != (CHANGE, "uint8", len(array.data)):
        raise ValueError(f"{name} is no change coded as {' or '.join(CODED)}")
    check_name(checksum)
    return Change(cast(Any, coding), array.data, checksum)


def _wire(about: dict[str, Any]) -> Wire:
    wire = line(about, "wire")
    if wire not in WIRES:
        raise ValueError(f"wire is {shown(wire)} instead of one of {', '.join(WIRES)}")
    return cast(Wire, wire)


def _about(record: RecordDict, kind: str, *others: str) -> dict[str, Any]:
    """The fields of a record that holds exactly `kind` and `others`."""
    found = record.get(kind)
    if not isinstance(found, ConfigRecord):
        raise ValueError(f"holds no {kind}")
    about: dict[str, Any] = dict(found)
    schema = take(about, "schema", int)
    if schema != SCHEMA:  # first, because in another version anything else may differ
        named = f" ({shown(str(about['version']))} instead of {VERSION})" if "version" in about else ""
        raise ValueError(f"other version of fedloge: schema {schema} instead of {SCHEMA}{named}")
    if record.keys() != {kind, *others}:
        raise ValueError(f"does not hold {kind} and {others} only")
    return about


def _centre(parts: dict[str, Tensors]) -> Tensor | None:
    found = parts.pop(CENTRE, None)
    if found is None:
        return None
    if found.keys() != {CENTRE} or found[CENTRE].ndim != 1 or not found[CENTRE].isfinite().all():
        raise ValueError("its centre is no vector of finite numbers")
    return found[CENTRE].double()


def _taken(parts: dict[str, Tensors], group: str) -> dict[str, Tensors]:
    return {name.removeprefix(group): parts.pop(name) for name in sorted(parts) if name.startswith(group)}
