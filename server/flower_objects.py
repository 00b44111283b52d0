"""What comes out of a SuperLink, made into records and reasons: a site may have made it up."""

import re

from flwr.app import RecordDict
from flwr.common.constant import ErrorCode

from common.objects import check_objects, inflated

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
        return inflated(message, contents).content
    except Exception as error:  # Flower's readers raise what they like
        raise Unreadable(f"its reply cannot be read: {line(str(error)) or type(error).__name__}") from None


def reason(code: int, text: str) -> str:
    """Why there is no reply, from a Flower error."""
    if code in REASONS:
        return REASONS[code]
    raised = RAISED.fullmatch(text)
    return line(raised[2] if raised else text) or f"failed with Flower's error {code}"


def line(text: str) -> str:
    """What a site wrote, fit for a log."""
    return "".join(c if c.isprintable() else " " for c in text[: 2 * TEXT])[:TEXT].strip()
