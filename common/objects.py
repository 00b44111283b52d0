"""Flat arrays as objects of Flower messages, with one copy of their values each way.

Flower sends an Array as pieces, each named by the SHA-256 of its content. By itself it copies the values twice to
name a piece, twice more to send it, and three times to put an Array together.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from flwr.app import Array, ArrayRecord, Message
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
from flwr.supercore.constant import HEAD_BODY_DIVIDER, HEAD_VALUE_DIVIDER
from flwr.supercore.inflatable.inflatable_object import get_object_body, get_object_head_values_from_object_content
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from common import heap

BARE = 2**21 + 2**19  # bytes that no object without values comes near: fields and manifests


class _Piece(ArrayChunk):
    """Named once, from where its values are, and copied only to be sent."""

    __qualname__ = ArrayChunk.__qualname__  # what Flower calls the kind of an object

    def __init__(self, data: memoryview) -> None:
        super().__init__(data)
        head = f"{ArrayChunk.__qualname__}{HEAD_VALUE_DIVIDER}{HEAD_VALUE_DIVIDER}{len(data)}"
        self._head = head.encode() + HEAD_BODY_DIVIDER
        name = hashlib.sha256(self._head)
        name.update(data)
        self._name = name.hexdigest()

    @property
    def object_id(self) -> str:
        return self._name

    def deflate(self) -> bytes:
        return b"".join((self._head, self.data))


def flat(dtype: str, count: int, stype: str, data: bytes) -> Array:
    """One of `count` values in one dimension. `data` must not change any more."""
    array = Array(dtype, (count,), stype, data)
    view, size = memoryview(data), FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
    pieces = [_Piece(view[begin : begin + size]) for begin in range(0, len(view), size)]
    array.__dict__["_chunks"] = [(piece.object_id, piece) for piece in pieces]  # where Flower keeps its own
    return array


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
                sound = kind == ArrayChunk.__qualname__ or len(contents[name]) <= BARE
            if not sound:
                raise ValueError
    except (ValueError, LookupError, TypeError, RecursionError):
        raise ValueError("its Flower objects do not hang together") from None
    if total > limit:
        raise ValueError(f"its arrays would be {total} bytes, more than {limit}")


def inflated(message_id: str, contents: dict[str, bytes]) -> Message:
    """The message of that id, made from the contents of its objects, which are used up. Whatever is wrong with them,
    an exception of any kind says so."""
    arrays, values = _arrays(contents)
    message = inflate_object_from_contents(message_id, contents, objects={**arrays})
    if not isinstance(message, Message):
        raise TypeError("what came is not a message")
    for record in message.content.values() if message.has_content() else ():
        for array in record.values() if isinstance(record, ArrayRecord) else ():
            array.data = values[array.data]
    return message


def _arrays(contents: dict[str, bytes]) -> tuple[dict[str, Array], dict[bytes, bytes]]:
    """Every Array among the objects, by its name, with its name for values; and the values. They are put into it last,
    because Flower makes records only of Arrays whose values are bytes, which cannot be filled piece by piece."""
    arrays: dict[str, Array] = {}
    pieces: dict[str, list[str]] = {}
    for name, content in contents.items():
        kind, children, _ = get_object_head_values_from_object_content(content)
        if kind == Array.__qualname__:
            about = json.loads(get_object_body(content, Array))
            arrays[name] = Array(about["dtype"], tuple(about["shape"]), about["stype"], name.encode())
            pieces[name] = [children[i] for i in about["arraychunk_ids"]]
    uses = Counter(piece for listed in pieces.values() for piece in listed)
    values = {name.encode(): _joined(listed, contents, uses) for name, listed in pieces.items()}
    for name in arrays:
        del contents[name]
    return arrays, values


def _joined(pieces: Sequence[str], contents: dict[str, bytes], uses: Counter[str]) -> bytes:
    """The values of the pieces. Each goes after its last use, so that a large model is there once and not twice."""
    whole = np.empty(sum(len(_values(contents[piece])) for piece in pieces), np.uint8)
    end = freed = 0
    for piece in pieces:
        values = _values(contents[piece])
        begin, end = end, end + len(values)
        whole[begin:end] = np.frombuffer(values, np.uint8)
        uses[piece] -= 1
        if not uses[piece]:
            freed += len(values)
            del values, contents[piece]
        if len(whole) > heap.KEPT and freed > heap.KEPT // 8:
            heap.trim()
            freed = 0
    return whole.data  # type: ignore[return-value]  # all that is done with bytes here can be done with it


def _values(piece: bytes) -> memoryview:
    return memoryview(piece)[piece.index(HEAD_BODY_DIVIDER) + 1 :]
