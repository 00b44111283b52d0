"""Flat arrays as objects of Flower messages, with one copy of their values each way.

Flower sends an Array as pieces, each named by the SHA-256 of its content. By itself it copies the values twice to
name a piece, twice more to send it, and three times to put an Array together.
"""

import hashlib
import json

from flwr.app import Array, Message
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
from flwr.supercore.constant import HEAD_BODY_DIVIDER, HEAD_VALUE_DIVIDER
from flwr.supercore.inflatable.inflatable_object import get_object_body, get_object_head_values_from_object_content
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents


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


def inflated(message_id: str, contents: dict[str, bytes]) -> Message:
    """The message of that id, made from the contents of its objects, which are used up. Whatever is wrong with them,
    an exception of any kind says so."""
    message = inflate_object_from_contents(message_id, contents, objects={**_arrays(contents)})
    if not isinstance(message, Message):
        raise TypeError("what came is not a message")
    return message


def _arrays(contents: dict[str, bytes]) -> dict[str, Array]:
    """Every Array among the objects; what it was made of is taken out."""
    found, used = {}, set()
    for name, content in contents.items():
        kind, pieces, _ = get_object_head_values_from_object_content(content)
        if kind != Array.__qualname__:
            continue
        about = json.loads(get_object_body(content, Array))
        data = b"".join(_values(contents[pieces[i]]) for i in about["arraychunk_ids"])
        found[name] = Array(about["dtype"], tuple(about["shape"]), about["stype"], data)
        used |= {name, *pieces}
    for name in used:
        del contents[name]
    return found


def _values(piece: bytes) -> memoryview:
    return memoryview(piece)[piece.index(HEAD_BODY_DIVIDER) + 1 :]
