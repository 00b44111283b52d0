"""What a resident node keeps on disk: its node id, and the message under way with its reply.

A message is noted when it comes (`order`); its reply is there complete or not at all (`reply`, and one file per
object in `objects/`), then the message was answered; `tried` says that the server may have heard of the reply. So a
client that was killed knows what it owes: an error for a message without a reply, or the upload of the reply it has.
Beside them lies `heard`, which is as old as the last answer of the server.
Files survive a killed process; after a power cut a damaged one is found by its content and counts as not there.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common import files
from common.errors import UserError

HEARD = "heard"


class Outbox:
    """Under `folder`, a site's state folder; `owner` tells whose node id and messages these are."""

    def __init__(self, folder: Path, owner: str) -> None:
        self._known = folder / "node.json"
        self._folder = folder / "outbox"
        self._objects = self._folder / "objects"
        self._owner = owner

    def node_id(self) -> int | None:
        """The node id of this owner before, if there was one."""
        try:
            known = json.loads(self._known.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        match known:
            case {"node": int() as node, "owner": self._owner}:
                return node
        return None

    def remember(self, node_id: int) -> None:
        files.write(self._known, json.dumps({"node": node_id, "owner": self._owner}))

    def heard(self) -> None:
        """The server has answered just now."""
        with suppress(OSError):  # nothing is lost by it
            (self._folder.parent / HEARD).touch()

    def left(self) -> None:
        """The server has been told that this client goes."""
        with suppress(OSError):
            (self._folder.parent / HEARD).unlink(missing_ok=True)

    def heard_within(self, seconds: float) -> bool:
        try:
            return time.time() - (self._folder.parent / HEARD).stat().st_mtime < seconds
        except OSError:
            return False

    def begin(self, order: bytes) -> None:
        """A message has come."""
        self.clear()
        with _writing(self._folder):
            self._objects.mkdir(parents=True, exist_ok=True)
            _replace(self._folder / "order", order)

    def put(self, object_id: str, content: bytes) -> None:
        with _writing(self._objects):
            (self._objects / object_id).write_bytes(content)

    def finish(self, reply: bytes) -> None:
        """The reply whose objects were put is complete."""
        with _writing(self._folder):
            _replace(self._folder / "reply", reply)

    def order(self) -> bytes | None:
        return _content(self._folder / "order")

    def reply(self) -> bytes | None:
        return _content(self._folder / "reply")

    def object(self, object_id: str) -> bytes | None:
        return _content(self._objects / object_id)

    def whole(self, object_ids: Iterable[str]) -> bool:
        """Whether the objects are all there and undamaged: an id is the digest of the content."""
        return all(_digest(self.object(object_id)) == object_id for object_id in object_ids)

    @property
    def tried(self) -> bool:
        return (self._folder / "tried").exists()

    def try_now(self) -> None:
        with _writing(self._folder):
            (self._folder / "tried").touch()

    def clear(self) -> None:
        """Nothing is owed any more. The order goes last: half a reply would have no sense without it."""
        with _writing(self._folder):
            for name in ("reply", "tried"):
                (self._folder / name).unlink(missing_ok=True)
            for path in self._objects.glob("*"):
                path.unlink()
            (self._folder / "order").unlink(missing_ok=True)


def _digest(content: bytes | None) -> str | None:
    return None if content is None else hashlib.sha256(content).hexdigest()


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _replace(path: Path, content: bytes) -> None:
    """The whole file or the one before, whenever the process is killed."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}): check its folder and disk") from None
