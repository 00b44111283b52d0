"""Orders, replies and cards arrive bit for bit through Flower, cost few objects, and nothing hostile gets past."""

import json
import tracemalloc
import warnings
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from flwr.supercore.inflatable.inflatable_object import add_header_to_object_body, get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models import resnet18

from common import frame, statistics, wire
from common.codec import Change, Wire
from common.config import FrameConfig
from common.messages import SCHEMA, Order, Reply
from common.objects import check_objects
from common.packed import fixed_digest
from common.parts import Tensors, tensors
from server import rounds
from server.fleet import LocalFleet
from tests.fakes import Tiny, tiny

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
LINES = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), max_size=8)
FLOATS = st.floats(allow_nan=False)
VALUES = st.none() | st.integers(-(2**53) + 1, 2**53 - 1) | st.floats(-1e15, 1e15)
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
MANY = settings(QUICK, max_examples=300)
DIGEST = "0123456789abcdef" * 4


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Any bit pattern there is: infinities, NaNs with a payload and minus zero too."""
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return raw.view(dtype).view(shape)


@st.composite
def groups(draw: st.DrawFn, dtypes: list[torch.dtype] = DTYPES) -> Tensors:
    dtype = draw(st.sampled_from(dtypes))
    shapes = draw(st.dictionaries(LINES, st.lists(st.integers(0, 3), max_size=4).map(tuple), max_size=4))
    return {name: random_bits(shape, dtype, draw(st.integers(0, 2**32))) for name, shape in shapes.items()}


PART_SETS = st.dictionaries(LINES | st.just("backbone"), groups(), max_size=4)
ORDERS = st.builds(
    Order, st.integers(0, 10**6), st.just(DIGEST), PART_SETS, PART_SETS, train=st.booleans(), judge=st.booleans()
)
REPLIES = st.builds(
    Reply,
    client=st.just("north"),
    round=st.integers(0, 10**6),
    model=st.just(DIGEST),
    examples=st.integers(-(2**63), 2**63 - 1),
    shared=PART_SETS,
    sums=groups([torch.float32]),
    metrics=st.dictionaries(LINES, FLOATS, max_size=3),
    judged=st.dictionaries(LINES, st.dictionaries(LINES, st.dictionaries(LINES, VALUES, max_size=3), max_size=2)),
)


def same(a: Tensors, b: Tensors) -> bool:
    def plain(t: Tensor) -> tuple[object, ...]:
        return t.dtype, t.shape, t.detach().contiguous().reshape(-1).view(torch.uint8).tolist()

    return a.keys() == b.keys() and all(plain(a[name]) == plain(b[name]) for name in a)


def alike(a: dict[str, Tensors], b: dict[str, Tensors]) -> bool:
    return a.keys() == b.keys() and all(same(a[part], b[part]) for part in a)


def objects(record: RecordDict) -> dict[str, bytes]:
    return {name: part.deflate() for name, part in get_all_nested_objects(record).items()}


def by_objects(record: RecordDict) -> RecordDict:
    """As Flower sends it between processes."""
    contents = objects(record)
    check_objects(contents, sum(map(len, contents.values())))
    inflated = inflate_object_from_contents(record.object_id, contents)
    assert isinstance(inflated, RecordDict)
    return inflated


def by_proto(record: RecordDict) -> RecordDict:
    return recorddict_from_proto(ProtoRecordDict.FromString(recorddict_to_proto(record).SerializeToString()))


WAYS = st.sampled_from([lambda record: record, by_objects, by_proto])
Way = Callable[[RecordDict], RecordDict]


@QUICK
@given(ORDERS, WAYS, st.booleans(), st.sampled_from(["", '{"a": "\x7f"}']))
def test_an_order_arrives_bit_for_bit(order: Order, way: Way, with_fixed: bool, text: str) -> None:
    got = wire.decode_order(way(wire.encode_order(order, text, holds="" if with_fixed else fixed_digest(order.fixed))))
    assert (got.settings, got.wire) == (text, "fp32")
    assert got.fixed_digest == fixed_digest(order.fixed)
    assert (got.fixed_digest == "") == (order.fixed == {})
    assert alike(got.order.shared, order.shared)
    assert alike(got.order.fixed, order.fixed if with_fixed else {})
    assert replace(got.order, shared={}, fixed={}) == replace(order, shared={}, fixed={})


@QUICK
@given(REPLIES, WAYS)
def test_a_reply_arrives_bit_for_bit(reply: Reply, way: Way) -> None:
    got = wire.decode_reply(way(wire.encode_reply(reply)), "north")
    assert alike(got.shared, reply.shared)
    assert same(got.sums, reply.sums)
    assert replace(got, shared={}, sums={}) == replace(reply, shared={}, sums={})


@QUICK
@given(PART_SETS, groups([torch.float32]), WAYS)
def test_bf16_rounds_the_backbone_and_nothing_else(parts: dict[str, Tensors], backbone: Tensors, way: Way) -> None:
    shared = {**parts, "backbone": backbone}
    rounded = {name: t.to(torch.bfloat16).to(torch.float32) for name, t in backbone.items()}
    order = Order(1, DIGEST, shared, {"backbone": backbone})
    got = wire.decode_order(way(wire.encode_order(order, "", wire="bf16")))
    assert got.wire == "bf16"
    assert got.order.model == DIGEST
    assert alike(got.order.shared, {**shared, "backbone": rounded})
    assert alike(got.order.fixed, order.fixed)
    reply = Reply("north", 1, DIGEST, 1, shared, sums=backbone)
    back = wire.decode_reply(way(wire.encode_reply(reply, "bf16")), "north", "bf16")
    assert alike(back.shared, {**shared, "backbone": rounded})
    assert same(back.sums, backbone)


@QUICK
@given(groups([torch.float64, torch.float16, torch.bfloat16]))
def test_bf16_leaves_other_dtypes_as_they_are(backbone: Tensors) -> None:
    reply = Reply("north", 1, DIGEST, 1, {"backbone": backbone})
    assert alike(wire.decode_reply(wire.encode_reply(reply, "bf16"), "north", "bf16").shared, reply.shared)


@QUICK
@given(ORDERS, REPLIES, st.binary(max_size=20), WAYS)
def test_changes_arrive_as_they_were(order: Order, reply: Reply, data: bytes, way: Way) -> None:
    changes = {"backbone": Change("int8", data, "0a"), "b": Change("topk", data[::-1], "")}
    sent = replace(order, changes=changes, base=DIGEST, reference="r")
    got = wire.decode_order(way(wire.encode_order(sent, "", wire="topk")))
    assert (got.wire, got.order.changes, got.order.base, got.order.reference) == ("topk", changes, DIGEST, "r")
    answer = wire.decode_reply(way(wire.encode_reply(replace(reply, changes=changes), "int8")), "north", "int8")
    assert answer.changes == changes
    assert alike(answer.shared, reply.shared)


FRAME = FrameConfig(norm=1.0, sparsity=0.6, seed=3)


def framed() -> Order:
    built = frame.build(frame.FrameSpec(24, 10, norm=1.0, sparsity=0.6, seed=3))
    return Order(1, DIGEST, {}, {"frame": {"weight": built.weight}})


@pytest.mark.parametrize("way", [by_objects, by_proto])
def test_a_frame_travels_without_its_zeros(way: Way) -> None:
    order = framed()
    record = wire.encode_order(order, "", frame=FRAME)
    assert len(record["parts"]["fixed/frame"].data) == 4 * 96
    got = wire.decode_order(way(record))
    assert alike(got.order.fixed, order.fixed)
    assert "places" not in wire.encode_order(order, "", holds=fixed_digest(order.fixed), frame=FRAME)["order"]


def test_a_frame_that_is_not_zero_where_its_settings_say_travels_whole() -> None:
    dense = {"frame": {"weight": torch.randn(10, 24)}}
    record = wire.encode_order(Order(1, DIGEST, {}, dense), "", frame=FRAME)
    assert len(record["parts"]["fixed/frame"].data) == 4 * 240
    assert alike(wire.decode_order(record).order.fixed, dense)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"places": [24, 10]}, "not its free values and three numbers"),
        ({"places": [24, 10, True]}, "not its free values and three numbers"),
        ({"places": [24.0, 10.0, 3.0]}, "not its free values and three numbers"),
        ({"places": [25, 10, 3]}, "expected"),
        ({"places": [24, 10, 4]}, "do not match their digest"),
        ({"places": [2**40, 10, 3]}, "too few"),
        ({"places": [0, 10, 3]}, "dim"),
        ({"sparsity": 1.5}, "sparsity"),
        ({"sparsity": float("nan")}, "sparsity"),
        ({"sparsity": None}, "sparsity is not of type float"),
        ({"places": None}, "'sparsity' is not expected|digest"),
    ],
)
def test_a_frame_that_does_not_fit_its_places_is_refused(fields: dict[str, Any], reason: str) -> None:
    record = wire.encode_order(framed(), "", frame=FRAME)
    about = {name: value for name, value in {**record["order"], **fields}.items() if value is not None}
    with pytest.raises(ValueError, match=reason) as refused:
        wire.decode_order(RecordDict({"order": ConfigRecord(about), "parts": record["parts"]}))
    assert one_line(refused)


def test_bf16_halves_the_bytes() -> None:
    reply = Reply("north", 1, DIGEST, 1, {"backbone": {"w": torch.randn(100)}, "head": {"w": torch.randn(10)}})
    sizes = {name: len(array.data) for name, array in wire.encode_reply(reply, "bf16")["parts"].items()}
    assert sizes == {"shared/backbone": 200, "shared/head": 40}


def test_any_layout_can_be_sent() -> None:
    part = {
        "channels last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "transposed": torch.randn(3, 4).t(),
        "expanded": torch.randn(1, 3).expand(4, 3),
        "strided": torch.randn(10)[::3],
        "live": torch.randn(3, requires_grad=True),
    }
    got = wire.decode_reply(wire.encode_reply(Reply("north", 1, DIGEST, 1, {"p": part})), "north").shared["p"]
    assert same(got, part)
    assert not any(t.requires_grad for t in got.values())


@pytest.mark.parametrize("other", [torch.float64, torch.int64, torch.complex64, torch.bool])
def test_a_part_of_other_dtypes_is_not_sent(other: torch.dtype) -> None:
    part = {"b": torch.zeros(1, dtype=other)} | ({"a": torch.zeros(1)} if other is torch.float64 else {})
    with pytest.raises(ValueError, match="one floating-point dtype"):
        wire.encode_reply(Reply("north", 1, DIGEST, 1, {"p": part}))


def test_decoding_copies_nothing_and_warns_of_nothing() -> None:
    record = wire.encode_reply(Reply("north", 1, DIGEST, 1, {"p": {"a": torch.randn(5), "b": torch.randn(7)}}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = wire.decode_reply(record, "north").shared["p"]
    start = torch.frombuffer(record["parts"]["shared/p"].data, dtype=torch.float32).data_ptr()
    assert [t.data_ptr() - start for t in got.values()] == [0, 20]


def test_the_server_names_the_client() -> None:
    record = wire.encode_reply(Reply("east", 1, DIGEST, 1, {}))
    assert wire.decode_reply(record, "north").client == "north"
    assert b"east" not in b"".join(objects(record).values())


def resnet() -> dict[str, Tensors]:
    backbone = {name: torch.randn(t.shape) for name, t in tensors(resnet18(num_classes=10)).items()}
    return {"backbone": backbone, "global_head": {name: backbone.pop(name) for name in ("fc.weight", "fc.bias")}}


def test_the_number_of_objects_does_not_depend_on_the_number_of_tensors() -> None:
    shared = resnet()
    assert len(shared["backbone"]) == 100
    flat = {part: {"all": torch.cat([t.reshape(-1) for t in group.values()])} for part, group in shared.items()}
    fixed = {"frame": {"W": torch.randn(512, 10)}}
    orders = [wire.encode_order(Order(1, DIGEST, s, fixed), "{}") for s in (shared, flat)]
    counts = {len(get_all_nested_objects(Message(record, 1, wire.TRAIN))) for record in orders}
    # message, content, order, parts; three arrays; chunks of 5 MiB: nine of the backbone, one of each other part
    assert counts == {4 + 3 + 11}
    replies = [wire.encode_reply(Reply("north", 1, DIGEST, 1, s)) for s in (shared, flat)]
    assert {len(get_all_nested_objects(record)) for record in replies} == {3 + 2 + 10}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_honest_reply_weighs_no_more_than_reply_bytes(dtype: Wire) -> None:
    order = Order(1, DIGEST, resnet(), {})
    judged = {kind: {f"{i}": {"top1": 1 / 3} for i in range(100)} for kind in ("generic", "personal")}
    sums = {"n": torch.randn(10), "weight": torch.randn(10, 512)}
    bound = wire.reply_bytes(order, {name: tuple(t.shape) for name, t in sums.items()})
    reply = Reply("north", 1, DIGEST, 1, order.shared, sums, {f"loss{i}": 1 / 3 for i in range(50)}, judged)
    contents = objects(wire.encode_reply(reply, dtype))
    assert sum(map(len, contents.values())) < bound < 48e6
    check_objects(contents, bound)
    assert wire.reply_bytes(replace(order, train=False), {}) < 1e6
    bare = objects(wire.encode_reply(replace(reply, shared={}, sums={})))
    assert sum(map(len, bare.values())) < wire.reply_bytes(replace(order, train=False), {})


# ---- class statistics ----


def test_a_survey_travels_exactly_and_weighs_little() -> None:
    about = torch.randn(512, dtype=torch.float64)
    order = Order(4, DIGEST, resnet(), {}, train=False, centre=about)
    came = wire.decode_order(by_objects(wire.encode_order(order, "{}"))).order
    assert came.centre is not None
    assert torch.equal(came.centre, about)
    assert (came.train, came.judge) == (False, False)
    shapes = statistics.shapes(100, 512)
    sums = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    contents = objects(wire.encode_reply(Reply("north", 4, DIGEST, 1, {}, sums), "bf16"))  # heads are never rounded
    assert sum(map(len, contents.values())) < wire.reply_bytes(order, shapes) < 8 * (100 + 51_200 + 512**2) + 2**20
    reply = wire.decode_reply(by_objects(wire.encode_reply(Reply("north", 4, DIGEST, 1, {}, sums))), "north")
    assert same(reply.sums, sums)


@pytest.mark.parametrize(
    ("order", "told"),
    [
        (Order(1, DIGEST, {}, {}, centre=torch.zeros(3).double()), "and for something else"),
        (Order(1, DIGEST, {}, {}, train=False, judge=True, centre=torch.zeros(3).double()), "and for something else"),
        (Order(1, DIGEST, {}, {}, train=False, centre=torch.tensor([torch.nan])), "centre"),
        (Order(1, DIGEST, {}, {}, train=False, centre=torch.zeros(3, 3)), "centre"),
    ],
)
def test_a_survey_that_makes_no_sense_is_refused(order: Order, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        wire.decode_order(wire.encode_order(order, "{}"))


# ---- what must not get past ----

GOOD = Reply(
    "north", 3, DIGEST, 7,
    shared={"backbone": {"b": torch.randn(2, 3), "w": torch.randn(6)}, "head": {"w": torch.randn(4, 2)}},
    sums={"n": torch.randn(4)},
    metrics={"loss": 0.5},
    judged={"generic": {"plain": {"top1": 0.5, "ece": None, "samples": 12}}},
)  # fmt: skip


def reply_with(fields: dict[str, Any] | None = None, parts: dict[str, Any] | None = None) -> RecordDict:
    """The good reply with other fields and arrays; None takes one out. An array is given as its changed fields."""
    record = wire.encode_reply(GOOD)
    about, arrays = dict(record["reply"]), dict(record["parts"])
    for into, changes in ((about, fields or {}), (arrays, parts or {})):
        for name, value in changes.items():
            if value is None:
                del into[name]
            elif into is arrays and isinstance(value, dict):
                into[name] = Array(**{k: value.get(k, getattr(into[name], k)) for k in FIELDS})
            else:
                into[name] = value
    return RecordDict({"reply": ConfigRecord(about), "parts": ArrayRecord(arrays)})


FIELDS = ("dtype", "shape", "stype", "data")
SPARE = wire.encode_reply(GOOD)["parts"]["shared/head"]


def claim(entries: object, count: int = 8, dtype: str = "float32", data: bytes = b"") -> RecordDict:
    """A head whose manifest says something else than what comes with it; everything else about it is right."""
    text = entries if isinstance(entries, str) else json.dumps(entries)
    data = data or SPARE.data
    described = [text, f"{zlib.crc32(data, zlib.crc32(text.encode())):08x}"]
    changed = {"shape": (count,), "data": data, "dtype": dtype}
    return reply_with({"shared/head": described}, {"shared/head": changed})


def described(part: str) -> list[str]:
    return list(wire.encode_reply(GOOD)["reply"][part])


BAD = {
    "nothing": (RecordDict(), "holds no reply"),
    "an order": (wire.encode_order(Order(1, DIGEST, {}, {}), ""), "holds no reply"),
    "a card": (wire.encode_card(wire.Card("north", "1", "", 3, "")), "holds no reply"),
    "no arrays": (RecordDict({"reply": wire.encode_reply(GOOD)["reply"]}), "does not hold"),
    "one record more": (RecordDict({**wire.encode_reply(GOOD), "more": ConfigRecord()}), "does not hold"),
    "retyped parts": (RecordDict({**reply_with(), "parts": MetricRecord({"a": 1})}), "ArrayRecord"),
    "retyped reply": (RecordDict({**reply_with(), "reply": ArrayRecord({})}), "holds no reply"),
    "another schema": (
        reply_with({"schema": SCHEMA + 1, "more": 1}),
        rf"other version of fedloge: schema {SCHEMA + 1} instead of {SCHEMA}",
    ),
    "schema as text": (reply_with({"schema": "1"}), "schema is not of type int"),
    "round as flag": (reply_with({"round": True}), "round is not of type int"),
    "round as float": (reply_with({"round": 3.0}), "round is not of type int"),
    "no round": (reply_with({"round": None}), "round is not of type int"),
    "no model": (reply_with({"model": None}), "model is not of type str"),
    "endless model": (reply_with({"model": "0" * 201}), "longer than 200"),
    "model for a terminal": (reply_with({"model": "\x1b[2J"}), "not printable"),
    "examples as float": (reply_with({"examples": 7.0}), "examples is not of type int"),
    "a field more": (reply_with({"mo\nre": 1}), r"'mo\\nre' is not expected"),
    "metric as int": (reply_with({"metrics/loss": 1}), "metrics/loss is not of type float"),
    "metric as list": (reply_with({"metrics/loss": [1.0]}), "metrics/loss is not of type float"),
    "metric for a log": (reply_with({"metrics/a\nb": 1.0}), r"the name 'metrics/a\\nb' is"),
    "many metrics": (reply_with({f"metrics/{i}": 1.0 for i in range(101)}), "more than 100"),
    "many parts": (reply_with(parts={f"shared/{i}": SPARE for i in range(17)}), "at most 16"),
    "a part without a manifest": (reply_with(parts={"shared/more": SPARE}), "no flat array with a manifest"),
    "a manifest without a part": (reply_with(parts={"shared/head": None}), "'shared/head' is not expected"),
    "a part for a log": (reply_with({"a\nb": ["", ""]}, {"a\nb": SPARE}), "not printable"),
    "a fixed part": (
        reply_with({"fixed/head": described("shared/head")}, {"fixed/head": SPARE}), "'fixed/head' is not expected",
    ),
    "a part named as a field": (reply_with(parts={"round": SPARE}), "round is no flat array"),
    "a manifest alone": (reply_with({"shared/head": described("shared/head")[:1]}), "no flat array with a manifest"),
    "manifest and number": (reply_with({"shared/head": [1, 2]}), "no flat array with a manifest"),
    "manifest as text": (reply_with({"shared/head": "[]"}), "no flat array with a manifest"),
    "numpy's format": (reply_with(parts={"shared/head": {"stype": "numpy.ndarray"}}), "no flat array"),
    "another dtype": (reply_with(parts={"shared/head": {"dtype": "float64"}}), "not the 8 values of float32"),
    "a rounded head": (reply_with(parts={"shared/head": {"dtype": "bfloat16"}}), "not the 8 values of float32"),
    "a backbone said to be rounded": (
        reply_with(parts={"shared/backbone": {"dtype": "bfloat16"}}), "not the 12 values of bfloat16",
    ),
    "no such dtype": (reply_with(parts={"shared/head": {"dtype": "object"}}), "not the 8 values of float32"),
    "another shape": (reply_with(parts={"shared/head": {"shape": (4, 2)}}), "no flat array"),
    "no shape": (reply_with(parts={"shared/head": {"shape": ()}}), "no flat array"),
    "negative shape": (reply_with(parts={"shared/head": {"shape": (-8,)}}), "not the 8 values"),
    "too many bytes": (reply_with(parts={"shared/head": {"data": bytes(33)}}), "not the 8 values"),
    "too few bytes": (reply_with(parts={"shared/head": {"data": b""}}), "not the 8 values"),
    "other bytes": (reply_with(parts={"shared/head": {"data": bytes(32)}}), "do not match their checksum"),
    "another checksum": (
        reply_with({"shared/head": [described("shared/head")[0], "0" * 8]}), "shared/head: its values do not match",
    ),
    "other names": (
        reply_with({"shared/head": [described("shared/head")[0].replace("w", "v"), described("shared/head")[1]]}),
        "do not match their checksum",
    ),
    "no manifest": (claim(""), "shared/head: the manifest is not valid JSON"),
    "bottomless manifest": (claim("[" * 100_000), "not valid JSON"),
    "endless manifest": (claim("[" + " " * 2**18 + "]"), "manifest is longer"),
    "a name for a terminal": (claim([["\x1b[2J", [8], "float32"]]), "not printable"),
    "an endless name": (claim([["w" * 201, [8], "float32"]]), "longer than 200"),
    "names out of order": (claim([["w", [4], "float32"], ["v", [4], "float32"]]), "in order"),
    "a name twice": (claim([["w", [4], "float32"], ["w", [4], "float32"]]), "different"),
    "two dtypes": (claim([["v", [4], "float32"], ["w", [2], "float64"]]), "one floating-point dtype"),
    "integers": (claim([["w", [8], "int32"]], dtype="int32"), "one floating-point dtype"),
    "a layout as dtype": (claim([["w", [8], "strided"]], dtype="strided"), "one floating-point dtype"),
    "a module as dtype": (claim([["w", [8], "_dynamo"]], dtype="_dynamo"), "an entry of the manifest"),
    "negative lengths": (claim([["w", [-2, -4], "float32"]]), "an entry of the manifest"),
    "a length as float": (claim([["w", [8.0], "float32"]]), "an entry of the manifest"),
    "a giant": (claim([["w", [2**62], "float32"]]), "shape of w is too large"),
    "a giant in bytes": (claim([["w", [2**47], "float32"]]), "not the 140737488355328 values"),
    "a product around zero": (claim([["w", [2**32, 2**32], "float32"]], 0), "too large"),
    "an empty giant": (claim([["v", [8], "float32"], ["w", [0, 2**62, 2**62], "float32"]]), "too large"),
    "a number without end": (claim(f'[["w", [{"9" * 4000}], "float32"]]'), "too large"),
    "dimensions without end": (claim([["w", [1] * 1000 + [8], "float32"]]), "too large"),
    "judged no JSON": (reply_with({"judged": "{"}), "not valid JSON"),
    "judged bottomless": (reply_with({"judged": "[" * 60_000}), "not valid JSON"),
    "judged endless": (reply_with({"judged": " " * 2**16 + "{}"}), "judged is longer"),
    "judged a list": (reply_with({"judged": "[]"}), "three tables deep"),
    "judged flat": (reply_with({"judged": '{"generic": 1}'}), "three tables deep"),
    "judged less flat": (reply_with({"judged": '{"generic": {"plain": 1}}'}), "three tables deep"),
    "judged deep": (reply_with({"judged": '{"generic": {"plain": {"top1": {}}}}'}), "other than numbers"),
    "judged text": (reply_with({"judged": '{"generic": {"plain": {"top1": "1"}}}'}), "other than numbers"),
    "judged a flag": (reply_with({"judged": '{"generic": {"plain": {"top1": true}}}'}), "other than numbers"),
    "judged NaN": (reply_with({"judged": '{"generic": {"plain": {"top1": NaN}}}'}), "other than numbers"),
    "judged infinite": (reply_with({"judged": '{"generic": {"plain": {"top1": -1e999}}}'}), "other than numbers"),
    "judged huge": (reply_with({"judged": f'{{"a": {{"b": {{"c": {"9" * 400}}}}}}}'}), "other than numbers"),
    "judged for a log": (reply_with({"judged": '{"generic": {"a\\nb": {"top1": 1}}}'}), "not printable"),
    "judged as bytes": (reply_with({"judged": b"{}"}), "judged is not of type str"),
}  # fmt: skip


def one_line(refused: pytest.ExceptionInfo[ValueError]) -> bool:
    text = str(refused.value)
    return text.isprintable() and 0 < len(text) < 400


@pytest.mark.parametrize("way", [lambda record: record, by_objects, by_proto], ids=["as is", "objects", "proto"])
@pytest.mark.parametrize("case", BAD)
def test_a_bad_reply_is_refused_for_what_it_is(case: str, way: Way) -> None:
    record, reason = BAD[case]
    with pytest.raises(ValueError, match=reason) as refused:
        wire.decode_reply(way(record), "north")
    assert type(refused.value) is ValueError
    assert one_line(refused)


def test_what_the_bad_replies_are_made_from_is_good() -> None:
    assert alike(wire.decode_reply(reply_with(), "north").shared, GOOD.shared)
    assert wire.decode_reply(claim([["v", [2], "float32"], ["w", [2, 3, 1], "float32"]]), "north").shared["head"]


def test_nothing_is_allocated_by_what_a_reply_claims() -> None:
    giants = [case for case in BAD if "giant" in case or "end" in case or case == "a product around zero"]
    assert len(giants) > 6
    for case in giants:
        tracemalloc.start()
        with pytest.raises(ValueError):  # noqa: PT011 - which one is tested above
            wire.decode_reply(BAD[case][0], "north")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4e6, case


ANY_CONFIG = (
    st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=20) | st.binary(max_size=20)
    | st.lists(st.text(max_size=20), max_size=3) | st.lists(st.integers(-9, 9), max_size=3)
)  # fmt: skip
ANY_ARRAY = st.builds(
    Array,
    st.sampled_from(["float32", "float64", "bfloat16", "object", ""]),
    st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 8), max_size=3).map(tuple),
    st.sampled_from([wire.RAW, "numpy.ndarray", ""]),
    st.binary(max_size=40),
)


@MANY
@given(st.data())
def test_a_mutated_reply_is_refused_or_read(data: st.DataObject) -> None:
    record = reply_with()
    for _ in range(data.draw(st.integers(1, 3))):
        into: Any = record[data.draw(st.sampled_from(["reply", "parts"]))]
        name = data.draw(st.sampled_from([*into, "more"]) | st.text(max_size=20))
        what = data.draw(st.sampled_from(["set", "drop", "rename"]))
        if what == "set":
            into[name] = data.draw(ANY_CONFIG if isinstance(into, ConfigRecord) else ANY_ARRAY)
        elif name in into:
            value = into.pop(name)
            if what == "rename":
                into[data.draw(st.text(max_size=20))] = value
    refuses_or_reads(record)


@MANY
@given(st.data())
def test_a_reply_of_random_bytes_is_refused_or_read(data: st.DataObject) -> None:
    content = bytearray(recorddict_to_proto(reply_with()).SerializeToString())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        record = recorddict_from_proto(ProtoRecordDict.FromString(bytes(content)))
    except Exception:  # Flower's and protobuf's own refusals are many
        return
    refuses_or_reads(record)


@MANY
@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                 lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3))
)  # fmt: skip
def test_any_json_is_refused_or_read(value: object) -> None:
    refuses_or_reads(reply_with({"judged": json.dumps(value)}))
    refuses_or_reads(reply_with({"judged": json.dumps({"a": {"b": value}})}))
    refuses_or_reads(claim(value))
    refuses_or_reads(claim([["w", value, "float32"]]))


def refuses_or_reads(record: RecordDict) -> None:
    for decode in (lambda r: wire.decode_reply(r, "north"), wire.decode_order, wire.decode_card):
        refusal, got = outcome(decode, record)
        assert refusal.isprintable()
        if not refusal:
            assert isinstance(got, Reply)
            assert all(t.numel() <= 12 for group in got.shared.values() for t in group.values())


def outcome(function: Callable[..., object], *given: object) -> tuple[str, object]:
    """The refusal of a function that may refuse, or what it gives."""
    try:
        return "", function(*given)
    except ValueError as error:
        return str(error), None


ORDER = Order(3, DIGEST, GOOD.shared, {"frame": {"W": torch.randn(3, 2)}}, judge=True)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"schema": 1}, f"other version of fedloge: schema 1 instead of {SCHEMA}"),
        ({"schema": None}, "schema is not"),
        ({"train": 1}, "train is not of type bool"),
        ({"judge": None}, "judge is not of type bool"),
        ({"round": "3"}, "round is not of type int"),
        ({"model": b"3"}, "model is not of type str"),
        ({"settings": None}, "settings is not of type str"),
        ({"settings": "a" * (2**22 + 1)}, "settings is longer"),
        ({"wire": "fp8"}, "wire is 'fp8' instead of one of fp32, bf16, int8, topk"),
        ({"wire": None}, "wire is not of type str"),
        ({"base": None}, "base is not of type str"),
        ({"reference": "\x1b"}, "not printable"),
        ({"fixed": ""}, "fixed parts do not match"),
        ({"fixed": DIGEST}, "fixed parts do not match"),
        ({"more": 1}, "'more' is not expected"),
        ({"fixed/frame": None}, "no flat array with a manifest"),
    ],
)
def test_a_bad_order_is_refused_for_what_it_is(fields: dict[str, Any], reason: str) -> None:
    record = wire.encode_order(ORDER, "{}")
    about = {name: value for name, value in {**record["order"], **fields}.items() if value is not None}
    with pytest.raises(ValueError, match=reason) as refused:
        wire.decode_order(RecordDict({"order": ConfigRecord(about), "parts": record["parts"]}))
    assert one_line(refused)


@QUICK
@given(
    st.builds(
        wire.Card, LINES, LINES, LINES, st.integers(0, 10**9), LINES,
        st.none() | st.lists(st.integers(0, 10**6), max_size=4).map(tuple),
    ),
    WAYS,
)  # fmt: skip
def test_a_card_arrives_as_it_was(card: wire.Card, way: Way) -> None:
    record = wire.encode_card(card)
    assert len(get_all_nested_objects(record)) == 2
    assert wire.decode_card(way(record)) == card


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"schema": 1, "name": 1}, rf"schema 1 instead of {SCHEMA} \('0.1.0' instead of {wire.VERSION}\)"),
        ({"name": None}, "name is not of type str"),
        ({"name": "a\nb"}, "not printable"),
        ({"version": 1}, "version is not of type str"),
        ({"classes": "a" * 201}, "longer than 200"),
        ({"holds": None}, "holds is not of type str"),
        ({"examples": -1}, "not numbers of images"),
        ({"examples": True}, "examples is not of type int"),
        ({"counts": "12"}, "counts is not of type list"),
        ({"counts": [1, -1]}, "not numbers of images"),
        ({"counts": [1.0]}, "not numbers of images"),
        ({"counts": [True]}, "not numbers of images"),
        ({"counts": [0] * (10**6 + 1)}, "not numbers of images"),
        ({"more": 1}, "'more' is not expected"),
    ],
)
def test_a_bad_card_is_refused_for_what_it_is(fields: dict[str, Any], reason: str) -> None:
    about = {**wire.encode_card(wire.Card("north", "0.1.0", DIGEST, 30, "", (10, 20)))["card"], **fields}
    card = ConfigRecord({name: value for name, value in about.items() if value is not None})
    with pytest.raises(ValueError, match=reason) as refused:
        wire.decode_card(RecordDict({"card": card}))
    assert one_line(refused)
    with pytest.raises(ValueError, match=r"other version|card"):
        wire.decode_card(RecordDict({"card": card, "more": ConfigRecord()}))


# ---- before anything is inflated ----


def with_array(listed: object, children: dict[str, bytes], record: RecordDict) -> dict[str, bytes]:
    """The record's objects and an Array that says it is put together from `children` in the order `listed`."""
    body = json.dumps({"dtype": "float32", "shape": [8], "stype": wire.RAW, "arraychunk_ids": listed}).encode()
    head = f"Array {','.join(children)} {len(body)}".encode()
    return {**objects(record), **children, "f" * 64: head + b"\x00" + body}


def test_objects_that_would_swell_are_refused_before_they_are_inflated() -> None:
    record = reply_with()
    whole = objects(record)
    chunk = {"c" * 64: add_header_to_object_body(bytes(1000), SPARE.slice_array()[0][1])}
    check_objects(with_array([0, 0], chunk, record), 10_000)
    with pytest.raises(ValueError, match=r"arrays would be \d+ bytes, more than 1000000"):
        check_objects(with_array([0] * 1000, chunk, record), 1_000_000)
    array = next(name for name, content in whole.items() if content.startswith(b"Array "))
    for listed, children in (
        ([1], chunk),
        ([0], {array: whole[array]}),  # an Array in place of a chunk
        (["0"], chunk),
        (7, chunk),
        (None, chunk),
        ([10**30], chunk),
    ):
        with pytest.raises(ValueError, match="do not hang together"):
            check_objects(with_array(listed, children, record), 10**9)
    for name in whole:
        if whole[name].startswith(b"ArrayChunk "):
            with pytest.raises(ValueError, match="do not hang together"):
                check_objects({other: whole[other] for other in whole if other != name}, 10**9)
    with pytest.raises(ValueError, match="do not hang together"):
        check_objects(objects(reply_with({"more": "a" * 10**7})), 10**9)


@MANY
@given(st.data())
def test_objects_of_random_bytes_are_refused_or_pass(data: st.DataObject) -> None:
    contents = objects(reply_with())
    name = data.draw(st.sampled_from(sorted(contents)))
    content = bytearray(contents[name])
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    contents[name] = data.draw(st.sampled_from([bytes(content), bytes(content[: len(content) // 2]), b""]))
    assert outcome(check_objects, contents, 10**6)[0].isprintable()


# ---- a federation over it ----


def over_the_wire(federation: Tiny, way: Wire) -> list[rounds.RoundReport]:
    def handler(name: str) -> Callable[[Order], Reply]:
        def handle(order: Order) -> Reply:
            received = wire.decode_order(by_objects(wire.encode_order(order, "{}", wire=way)))
            reply = federation.sites[name].handle(received.order)
            return wire.decode_reply(by_objects(wire.encode_reply(reply, received.wire)), name, way)

        return handle

    reports: list[rounds.RoundReport] = []
    config = federation.task.config
    fleet = LocalFleet({name: handler(name) for name in federation.sites})
    policy = type(config.federation)(rounds=2, quorum=1.0)
    hooks = rounds.Hooks(reports.append)
    rounds.run(fleet, federation.method, federation.state, federation.net, policy, config.seed, hooks)
    return reports


STATISTICIANS = [{"name": "fedloge", "count_aware": True}, {"name": "creff"}, {"name": "fedloge"}]


@pytest.mark.parametrize("method", STATISTICIANS, ids=str)
def test_rounds_over_the_wire_end_in_the_same_bits(method: dict[str, Any]) -> None:
    direct, wired = tiny(method).run(2), over_the_wire(tiny(method), "fp32")
    assert alike(wired[-1].state.parts, direct[-1].state.parts)
    assert same(wired[-1].state.extra, direct[-1].state.extra)
    assert wired[-1].metrics == direct[-1].metrics


@pytest.mark.parametrize("method", STATISTICIANS, ids=str)
def test_rounds_with_bf16_refuse_nobody(method: dict[str, Any]) -> None:
    reports = over_the_wire(tiny(method), "bf16")
    assert [report.refused for report in reports] == [{}, {}]
    parts = reports[-1].state.parts.values()
    assert {t.dtype for group in parts for t in group.values()} == {torch.float32}
