"""Orders, replies and cards as Flower records, and back.

A record holds one ConfigRecord, named for what it is (`order`, `reply`, `card`), and for an order or a reply one
ArrayRecord `parts` with one flat Array per part, because Flower's cost is per object. See packed.py for what is in one.

Values arrive bit for bit as they were sent. With bf16 the shared backbone, and nothing else, travels rounded to
bfloat16 and is float32 again at both ends: methods check heads and priors against statistics, which a rounded head
would not match. `Order.model` is therefore a name for the server's own parts, to be echoed, and no digest of what a
site holds. What arrives is guarded by each part's checksum. That is enough beside Flower and TLS: objects are named by
their SHA-256, which the SuperLink verifies on upload (and nobody on the way out of it).

What is decoded comes from the network. Anything that is not as it should be raises ValueError with one printable line.
"""

import importlib.metadata
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar, cast

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.app.message.arraychunk import ArrayChunk
from flwr.supercore.inflatable.inflatable_object import get_object_body, get_object_head_values_from_object_content

from common.messages import SCHEMA, Judgement, Order, Reply
from common.packed import MANIFEST, Packed, check_name, fixed_digest, shown
from common.parts import Manifest, Tensors

TRAIN = "train"  # types of Flower messages
JUDGE = "evaluate"
CARD = "query.card"
OVER = "query.over"

VERSION = importlib.metadata.version("fedloge")  # sites of another are refused

RAW = "fedloge.raw"  # the `stype` of our Arrays
ROUNDED = "shared/backbone"  # what bf16 is for
PARTS = 16  # nothing honest comes near this and the next ones
METRICS = 100
CLASSES = 10**6
JUDGED = 2**16  # characters
SETTINGS = 2**22  # characters
OVERHEAD = 2**19  # bytes of a reply beside its values and manifests

Dtype: TypeAlias = Literal["fp32", "bf16"]
T = TypeVar("T")


@dataclass(frozen=True)
class Received:
    """An order as it reached a site."""

    order: Order  # its fixed parts are {} when they were not sent
    settings: str
    fixed_digest: str  # of the method's fixed parts, sent or not; empty when it has none
    dtype: Dtype  # how the reply shall travel


@dataclass(frozen=True)
class Card:
    """What a site says of itself before it is given anything to do."""

    name: str
    version: str  # of fedloge
    classes: str  # digest of its list of classes
    examples: int  # training images
    holds: str  # digest of the fixed parts it has at hand, or empty
    counts: tuple[int, ...] | None = None  # training images per class, if the site has opted in
    schema: int = SCHEMA


def encode_order(order: Order, settings: str, *, with_fixed: bool, dtype: Dtype = "fp32") -> RecordDict:
    parts = {f"shared/{part}": t for part, t in order.shared.items()}
    if with_fixed:
        parts |= {f"fixed/{part}": t for part, t in order.fixed.items()}
    about = {
        "schema": order.schema,
        "round": order.round,
        "model": order.model,
        "train": order.train,
        "judge": order.judge,
        "fixed": fixed_digest(order.fixed),
        "settings": settings,
        "dtype": dtype,
    }
    return _pack("order", about, parts, dtype)


def decode_order(record: RecordDict) -> Received:
    about, parts = _unpack(record, "order")
    shared, fixed = _taken(parts, "shared/"), _taken(parts, "fixed/")
    named = _line(about, "fixed")
    if fixed and fixed_digest(fixed) != named:
        raise ValueError("the fixed parts do not match their digest")
    dtype = _line(about, "dtype")
    if dtype not in ("fp32", "bf16"):
        raise ValueError(f"dtype is {shown(dtype)} instead of fp32 or bf16")
    order = Order(
        round=_take(about, "round", int),
        model=_line(about, "model"),
        shared=shared,
        fixed=fixed,
        train=_take(about, "train", bool),
        judge=_take(about, "judge", bool),
    )
    received = Received(order, _text(about, "settings", SETTINGS), named, cast(Dtype, dtype))
    _end(about, parts)
    return received


def encode_reply(reply: Reply, dtype: Dtype = "fp32") -> RecordDict:
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
    return _pack("reply", about, parts, dtype)


def decode_reply(record: RecordDict, client: str) -> Reply:
    """The reply of `client`, who is known by the key it came with. What it says is for the fold to judge."""
    about, parts = _unpack(record, "reply")
    reply = Reply(
        client=client,
        round=_take(about, "round", int),
        model=_line(about, "model"),
        examples=_take(about, "examples", int),
        shared=_taken(parts, "shared/"),
        sums=parts.pop("sums", {}),
        metrics=_metrics(about),
        judged=_judgement(_text(about, "judged", JUDGED)),
    )
    _end(about, parts)
    return reply


def encode_ask() -> RecordDict:
    """The question for a card."""
    return RecordDict({"ask": ConfigRecord({"version": VERSION})})


def decode_ask(record: RecordDict) -> str:
    """The version of fedloge that the server runs."""
    found = record.get("ask")
    return _line(dict(found), "version") if isinstance(found, ConfigRecord) else "of an unknown version"


def encode_card(card: Card) -> RecordDict:
    about = vars(card) | {"counts": list(card.counts or ())}
    if card.counts is None:
        del about["counts"]
    return RecordDict({"card": ConfigRecord(about)})


def decode_card(record: RecordDict) -> Card:
    about = _about(record, "card")
    counts = tuple(_take(about, "counts", list)) if "counts" in about else None
    card = Card(
        name=_line(about, "name"),
        version=_line(about, "version"),
        classes=_line(about, "classes"),
        examples=_take(about, "examples", int),
        holds=_line(about, "holds"),
        counts=counts,
    )
    many = (card.examples, *(counts or ()))
    if len(many) > CLASSES or any(type(count) is not int or count < 0 for count in many):
        raise ValueError("examples or counts are not numbers of images")
    _end(about)
    return card


def reply_bytes(order: Order, statistics: Mapping[str, tuple[int, ...]]) -> int:
    """More than the Flower objects of an honest reply weigh together, before and after they are inflated."""
    total = OVERHEAD + 4 * sum(math.prod(shape) for shape in statistics.values())
    if order.train:
        for part in order.shared.values():
            total += sum(t.nbytes for t in part.values()) + len(Manifest.of(part).as_json())
    return total + total // 64  # heads of objects and names of chunks, should a site cut smaller ones


def check_objects(contents: Mapping[str, bytes], limit: int) -> None:
    """ValueError if pulled Flower objects would grow beyond `limit` bytes: ask before they are inflated.

    Flower puts an Array together from the chunks it lists, and a hostile one lists a chunk any number of times, or
    other Arrays in place of chunks.
    """
    total = 0
    try:
        heads = {name: get_object_head_values_from_object_content(content)[:2] for name, content in contents.items()}
        for name, (kind, children) in heads.items():
            if kind == Array.__qualname__:
                listed = json.loads(get_object_body(contents[name], Array))["arraychunk_ids"]
                total += sum(len(contents[children[i]]) for i in listed)
                sound = all(heads[child][0] == ArrayChunk.__qualname__ for child in children)
            else:
                sound = kind == ArrayChunk.__qualname__ or len(contents[name]) <= OVERHEAD + PARTS * MANIFEST
            if not sound:
                raise ValueError
    except (ValueError, LookupError, TypeError, RecursionError):
        raise ValueError("its Flower objects do not hang together") from None
    if total > limit:
        raise ValueError(f"its arrays would be {total} bytes, more than {limit}")


def _pack(kind: str, about: dict[str, Any], parts: dict[str, Tensors], dtype: Dtype) -> RecordDict:
    arrays = ArrayRecord()
    for name, part in parts.items():
        packed = Packed.of(part, rounded=dtype == "bf16" and name == ROUNDED)
        about[name] = [packed.manifest, packed.checksum]
        arrays[name] = Array(packed.dtype, (packed.count,), RAW, packed.data)
    return RecordDict({kind: ConfigRecord(about), "parts": arrays})


def _unpack(record: RecordDict, kind: str) -> tuple[dict[str, Any], dict[str, Tensors]]:
    about = _about(record, kind, "parts")
    arrays = record["parts"]
    if not isinstance(arrays, ArrayRecord) or len(arrays) > PARTS:
        raise ValueError(f"parts are not an ArrayRecord of at most {PARTS}")
    return about, {name: _part(name, array, about.pop(name, None)) for name, array in arrays.items()}


def _part(name: str, array: Array, described: object) -> Tensors:
    check_name(name)
    flat = array.stype == RAW and len(array.shape) == 1
    if not (flat and isinstance(described, list) and [type(text) for text in described] == [str, str]):
        raise ValueError(f"{name} is no flat array with a manifest and a checksum")
    manifest, checksum = described
    packed = Packed(manifest, array.dtype, array.shape[0], array.data, checksum)
    try:
        return packed.part(rounded=name == ROUNDED)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _about(record: RecordDict, kind: str, *others: str) -> dict[str, Any]:
    """The fields of a record that holds exactly `kind` and `others`."""
    found = record.get(kind)
    if not isinstance(found, ConfigRecord):
        raise ValueError(f"holds no {kind}")
    about: dict[str, Any] = dict(found)
    schema = _take(about, "schema", int)
    if schema != SCHEMA:  # first, because in another version anything else may differ
        named = f" ({shown(str(about['version']))} instead of {VERSION})" if "version" in about else ""
        raise ValueError(f"other version of fedloge: schema {schema} instead of {SCHEMA}{named}")
    if record.keys() != {kind, *others}:
        raise ValueError(f"does not hold {kind} and {others} only")
    return about


def _take(about: dict[str, Any], name: str, kind: type[T]) -> T:
    value = about.pop(name, None)
    if type(value) is not kind:  # not isinstance: True is no number
        raise ValueError(f"{name} is not of type {kind.__name__}")
    return value


def _text(about: dict[str, Any], name: str, most: int) -> str:
    text = _take(about, name, str)
    if len(text) > most:
        raise ValueError(f"{name} is longer than {most} characters")
    return text


def _line(about: dict[str, Any], name: str) -> str:
    """A name or a digest."""
    text = _take(about, name, str)
    check_name(text)
    return text


def _taken(parts: dict[str, Tensors], group: str) -> dict[str, Tensors]:
    return {name.removeprefix(group): parts.pop(name) for name in sorted(parts) if name.startswith(group)}


def _metrics(about: dict[str, Any]) -> dict[str, float]:
    names = [name for name in about if name.startswith("metrics/")]
    if len(names) > METRICS:
        raise ValueError(f"{len(names)} metrics are more than {METRICS}")
    for name in names:
        check_name(name)
    return {name.removeprefix("metrics/"): _take(about, name, float) for name in names}


def _judgement(text: str) -> Judgement:
    try:
        judged = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("judged is not valid JSON") from None
    tables = [table for predictors in _table(judged).values() for table in _table(predictors).values()]
    for value in (value for table in tables for value in _table(table).values()):
        if not (value is None or (type(value) in (int, float) and abs(value) < 2**53)):  # NaN is below nothing
            raise ValueError("judged holds something other than numbers")
    return cast(Judgement, judged)


def _table(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("judged is not three tables deep")
    for name in value:
        check_name(name)
    return value


def _end(*left: Mapping[str, object]) -> None:
    """Nobody has asked for what was not taken."""
    for name in (name for group in left for name in group):
        raise ValueError(f"{shown(name)} is not expected")
