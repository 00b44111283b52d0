"""What comes out of a SuperLink, made into records and reasons: a site may have made it up."""

import json
import re

from flwr.app import Array, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.constant import HEAD_BODY_DIVIDER
from flwr.supercore.inflatable.inflatable_object import get_object_body, get_object_head_values_from_object_content
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from common.wire import check_objects

REASONS = {
    ErrorCode.MESSAGE_UNAVAILABLE: "has not answered in time",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "has not answered in time",
    ErrorCode.NODE_UNAVAILABLE: "went offline",
    ErrorCode.CLIENT_APP_CRASHED: "its process ended before it had answered",
}
RAISED = re.compile(r"<class '([\w.]+)'>:<'(.*)'>", re.DOTALL)  # how Flower writes down an exception of a ClientApp
TEXT = 300  # characters of a reason that came from a site


class Unreadable(Exception):
    """A reply of which nothing can be made; the text is the reason."""


def opened(message: str, contents: dict[str, bytes], limit: int) -> RecordDict:
    """The content of the message object called `message`. `contents` are its objects, and are used up."""
    try:
        check_objects(contents, limit)
        found = inflate_object_from_contents(message, contents, objects={**_arrays(contents)})
        if not isinstance(found, Message):
            raise TypeError("it is no message")
        return found.content
    except Exception as error:  # Flower's readers raise what they like
        raise Unreadable(f"its reply cannot be read: {line(str(error)) or type(error).__name__}") from None


def _arrays(contents: dict[str, bytes]) -> dict[str, Array]:
    """Every Array among the objects, put together with one copy of its values where Flower makes three."""
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


def reason(code: int, text: str) -> str:
    """Why there is no reply, from a Flower error."""
    if code in REASONS:
        return REASONS[code]
    raised = RAISED.fullmatch(text)
    return line(raised[2] if raised else text) or f"failed with Flower's error {code}"


def line(text: str) -> str:
    """What a site wrote, fit for a log."""
    return "".join(c if c.isprintable() else " " for c in text[: 2 * TEXT])[:TEXT].strip()
