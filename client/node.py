"""The resident node of a site: takes messages from the server and answers them with a Flower ClientApp in-process.

It lives as long as the federation, through restarts of the server and cuts of the network (see membership.py). The
app is the one given to it: no code is ever fetched or run for the server. What a killed node owed is known by its
folder (see outbox.py), so the next start gives it at once: the reply it had, or word that there will be none.
"""

import fcntl
import hashlib
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from flwr.app import Context, Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import PullMessagesResponse, PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from google.protobuf.message import DecodeError

from client.fleet_api import Faulty, FleetApi, Forgotten, Gone, Unreachable, pieces
from client.membership import Membership
from client.outbox import Outbox
from common import files, heap
from common.errors import UserError
from common.kit import Kit
from common.objects import inflated

log = logging.getLogger(__name__)

OVER = "query.over"  # the last message (common.wire's; that one loads torch, and a killed node shall be back before)
SHORT, QUICK, IDLE = 0.02, 0.2, 1.0  # seconds between two questions for a message
HASTE, CALM = 0.2, 0.02  # of the time that it has not come yet: so much later it is noticed, up to QUICK, up to IDLE
PATIENT, LONG = 10.0, 2.0  # times the server took to answer: one with very many sites is asked less often, up to LONG
FAULTS = 10  # failures of the server, not of the network, after which a message is given up
LONGEST = 300  # characters of an error that go to the server

App = Callable[[Message, Context], Message]


class Node:
    """One site as a node of a SuperLink, with `folder` as its memory. `notify` is told, in a line, whenever the
    standing of the connection changes."""

    def __init__(
        self,
        kit: Kit,
        folder: Path,
        app: App,
        node_config: Mapping[str, bool | int | float | str],
        notify: Callable[[str], None] = lambda _: None,
        patience: float = 30.0,
        spent: Callable[[], bool] = lambda: False,
    ) -> None:
        self._folder = folder
        self._app = app
        self._config = dict(node_config)
        self._api = FleetApi(kit)
        self._outbox = Outbox(folder, hashlib.sha256(self._api.key).hexdigest())
        self._membership = Membership(kit, self._api, self._outbox, notify, patience)
        self._insist = self._membership.insist
        self._spent = spent  # whether the app can answer nothing more in this process
        self._context: Context | None = None
        self._over = False
        self._doubt = False  # whether a message may have been lost on its way
        self._answered = time.monotonic()  # when the last reply was given
        self._came = 0.0  # seconds after the one before that the last message came
        self._slow = 0.0  # seconds the server took to answer the last question

    @property
    def known(self) -> bool:
        """Whether it was a node before, and may owe something."""
        return self._outbox.node_id() is not None

    def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Serve until the federation is over. A KeyboardInterrupt leaves it in good order, and passes on. `ready` is
        called once a killed node's debts are paid, so that no round waits for what it takes to get ready."""
        heap.keep()
        with only_one(self._folder):
            try:
                self._membership.start()
                self._turn(only_owed=True)
                ready()
                while not self._over and not self._spent():
                    self._turn()
            finally:
                # the SuperLink would drop the last reply if its node said farewell before it is collected
                self._membership.leave(farewell=not self._over and not self._spent())

    def _turn(self, only_owed: bool = False) -> None:
        """Ask for a message and see it through, or wait a moment."""
        try:
            reply = self._owed() or (None if only_owed else self._next())
            if reply is None and only_owed:
                return
            if reply is None:
                time.sleep(self._pause())
                return
            self._deliver(reply)
        except Forgotten as reason:
            log.warning("%s: joining again", reason)
            self._membership.join()
            self._doubt = False
            return
        self._outbox.clear()
        self._answered = time.monotonic()
        answer = reply.messages_list[0]
        self._over = answer.metadata.message_type == OVER
        if self._over and answer.HasField("error"):
            raise UserError(f"the federation is over, but its end failed here: {answer.error.reason}")
        if self._over:
            self._membership.say("the federation is over")
        else:  # every question costs both sides, and the next message will not come much sooner than the last did
            time.sleep(min(max(self._came / 2, SHORT), QUICK))

    def _pause(self) -> float:
        """Seconds until the next question for a message, when there was none."""
        waited = time.monotonic() - self._answered
        soon = min(max(HASTE * waited, SHORT), max(QUICK, CALM * waited), IDLE)
        return max(soon, min(PATIENT * self._slow, waited, LONG))

    def _owed(self) -> PushMessagesRequest | None:
        """What was under way when the node was killed or the server was lost: its reply, or word that there is none."""
        try:
            if kept := self._outbox.reply():
                reply: PushMessagesRequest = PushMessagesRequest.FromString(kept)
                tree = reply.message_object_trees[0]
                if self._outbox.whole(part.object_id for part in iterate_object_tree(tree)):
                    return reply
            if noted := self._outbox.order():
                head = message_from_proto(PullMessagesResponse.FromString(noted).messages_list[0])
                log.warning("%s was under way when this client was stopped: the server is told", _title(head))
                error = _failed(head, ErrorCode.CLIENT_APP_CRASHED, "the client was stopped in the middle of it")
                return self._keep(error, 0.0)
        except DecodeError:
            log.warning("%s: what was under way is damaged: dropped", self._folder)
            self._outbox.clear()
        return None

    def _next(self) -> PushMessagesRequest | None:
        """The reply to the next message, if there is one."""
        order = self._pulled()
        if order is None:
            return None
        self._came = time.monotonic() - self._answered
        self._outbox.begin(order.SerializeToString())
        began = time.monotonic()
        head = message_from_proto(order.messages_list[0])
        try:
            answer = self._answer(head, order.message_object_trees[0])
        except (Gone, Faulty) as reason:
            log.warning("%s is dropped: %s", _title(head), reason)
            self._outbox.clear()
            return None
        return self._keep(answer, time.monotonic() - began)

    def _pulled(self) -> PullMessagesResponse | None:
        """The next message. Where an answer was lost on its way there may have been one in it, which the server never
        gives again, and goes on waiting for."""

        def pull() -> PullMessagesResponse | None:
            asked = time.monotonic()
            try:
                order = self._api.pull()
            except Unreachable:
                self._doubt = True
                raise
            self._slow = time.monotonic() - asked
            return order

        order = self._insist(pull)
        if order is None and self._doubt:
            self._doubt = False
            self._membership.step_out()
        return order

    def _answer(self, head: Message, tree: ObjectTree) -> Message:
        """The app's reply, or the error that came instead of it."""
        run_id, message_id = head.metadata.run_id, head.metadata.message_id
        contents: dict[str, bytes] = {}
        object_ids, large = [part.object_id for part in iterate_object_tree(tree)], pieces(tree)
        self._insist(lambda: self._api.fetch(run_id, object_ids, contents, _expiry(head), large), FAULTS)
        self._api.confirm(run_id, message_id)
        log.info("%s: received", _title(head))
        try:
            # the message gets no name here, so that what the app drops of its content is gone
            message = inflated(message_id, contents)
            message.metadata.__dict__["_message_id"] = message_id  # the digest of the content, so it cannot be in it
            reply = self._app(message, self._context_of(run_id))
            if not isinstance(reply, Message) or reply.metadata.reply_to_message_id != message_id:
                raise TypeError("the app did not return a reply to the message")
            return reply
        except Exception as error:
            text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            text = " ".join(text.split())
            log.error("%s failed: %s", _title(head), text)
            log.debug("in detail", exc_info=True)
            return _failed(head, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, self._clean(text))

    def _keep(self, answer: Message, seconds: float) -> PushMessagesRequest:
        """Write the reply down before anybody hears of it."""
        with no_object_id_recompute():
            answer.metadata.__dict__["_message_id"] = answer.object_id
            reply = PushMessagesRequest(
                messages_list=[message_to_proto(remove_content_from_message(answer))],
                message_object_trees=[get_object_tree(answer)],
                clientapp_runtime_list=[seconds],
            )
            for object_id, part in get_all_nested_objects(answer).items():
                self._outbox.put(object_id, part.deflate())
        self._outbox.finish(reply.SerializeToString())
        return reply

    def _deliver(self, reply: PushMessagesRequest) -> None:
        """Announce the reply and give its objects; or drop it where nobody waits for it any more."""
        head = message_from_proto(reply.messages_list[0])
        run_id = head.metadata.run_id
        tree = reply.message_object_trees[0]
        wanted: set[str] = set()

        def announce() -> bool:
            # a reply is taken only once, and the answer to an earlier attempt may be lost; but the server knows it then
            known = self._outbox.tried and self._api.knows(run_id, head.metadata.message_id)
            self._outbox.try_now()
            taken, missing = self._api.announce(reply)
            wanted.update(missing)
            return taken or known

        try:
            if time.time() > _expiry(head) or not self._insist(announce, FAULTS):
                log.warning("%s: nobody waits for the reply any more: it is not sent", _title(head))
                return
            # in the order in which the server pulls them; the message object last: by it a reply that is whole is told
            names = dict.fromkeys(part.object_id for part in iterate_object_tree(tree))
            last = [head.metadata.message_id] if head.metadata.message_id in wanted else []
            lacking = [name for name in names if name in wanted and name not in last]
            large = pieces(tree)
            self._insist(lambda: self._api.upload(run_id, lacking, self._outbox.object, large), FAULTS)
            self._insist(lambda: self._api.upload(run_id, last, self._outbox.object), FAULTS)
            log.info("%s: answered", _title(head))
        except (Gone, Faulty) as reason:
            log.warning("%s: the reply is dropped: %s", _title(head), reason)

    def _context_of(self, run_id: int) -> Context:
        """One for a run, as Flower has it: what the app puts into its state lasts as long as run and process."""
        node_id = self._api.node_id
        if self._context is None or (self._context.run_id, self._context.node_id) != (run_id, node_id):
            self._context = Context(run_id, node_id, self._config, RecordDict(), run_config={})
        return self._context

    def _clean(self, text: str) -> str:
        """What looks like a path is cut out of an error that goes to the server."""
        for value in sorted(map(str, [self._folder, *self._config.values()]), key=len, reverse=True):
            if "/" in value:
                text = text.replace(value, "<path>")
        return re.sub(r"[^\s'\"]*[/\\][^\s'\"]*", "<path>", text)[:LONGEST]


def _failed(head: Message, code: int, reason: str) -> Message:
    return Message(Error(code, reason), reply_to=head)


def _expiry(head: Message) -> float:
    return head.metadata.created_at + head.metadata.ttl


def _title(head: Message) -> str:
    group = f" of round {head.metadata.group_id}" if head.metadata.group_id else ""
    return f"{head.metadata.message_type} message{group}"


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """One client at a time uses a state folder; the lock goes with the process, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("w")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}): name another folder") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another client is using this folder: stop it first") from None
        files.sweep(folder)
        yield
