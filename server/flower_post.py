"""Messages to nodes and their answers, through the Grid of a ServerApp. What is in them is none of its business.

Flower's own Grid waits for all objects of every reply it is told of, seconds at a time, holds them all, and tells an
answer that cannot be had from one that is slow by giving up after two hours. Here one reply is in hand at a time, and
while it is folded the first few objects of the next one come; one that stalls steps back while another is there as a
whole, and one that cannot come any more, is larger than it may be or falls apart is an answer without content. Whatever
ends, the SuperLink is told to forget both message and reply, so its memory does not grow with replies that nobody reads
or messages that nobody fetches.

Of Flower it uses names that are private to it; tests guard them, and the version is pinned.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
from flwr.app import Message, RecordDict
from flwr.proto.appio_pb2 import PullAppMessagesRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest
from flwr.proto.serverappio_pb2_grpc import ServerAppIoStub
from flwr.supercore.grpc import create_channel
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.interceptors import AppIoTokenClientInterceptor, RuntimeVersionClientInterceptor
from flwr.supercore.retry import wrap_stub
from flwr.superlink.grid import GrpcGrid

from server.flower_objects import REASONS, Unreadable, line, opened, reason
from server.flower_push import push

log = logging.getLogger(__name__)

OBJECT = 16 << 20  # bytes of one object, refused before they are read; Flower cuts arrays into pieces of 5 MB
PIECE = 64 << 10  # no site cuts them smaller than this
PULLS = 2  # objects under way at a time; more gains nothing
LOOK = 0.05  # seconds between two looks for more replies while one is in hand and comes, and none after it
SHORT, LONG = 0.01, 0.2  # seconds between two questions: the longer nothing happens, the longer
STALL = 1.0  # seconds a reply may keep others waiting by not coming
STUCK = 600.0  # seconds after which one that does not come any further is given up; 10 MB on a very slow line
LATE = "too late"


@dataclass(frozen=True)
class Letter:
    """A message that was sent."""

    id: str
    node: int
    name: str  # whom it is for
    kind: str
    limit: int  # bytes an answer may have


@dataclass(frozen=True)
class Answer:
    letter: Letter
    content: RecordDict | None  # None: `error` says why
    error: str = ""


@dataclass(eq=False)
class _Arrival:
    """A reply that was announced. Its objects are uploaded after that, the message itself last."""

    letter: Letter
    message: str
    objects: list[str]
    contents: dict[str, bytes] = field(default_factory=dict)
    size: int = 0
    waited: float = 0.0  # seconds, since it is in hand
    moved: float = 0.0  # when it last came a step further

    @property
    def missing(self) -> list[str]:
        return [name for name in self.objects if name not in self.contents]


class Post:
    def __init__(self, grid: GrpcGrid, clock: Callable[[], float] = time.monotonic) -> None:
        self._grid = grid
        self._run_id = grid.run.run_id
        self._clock = clock
        self._narrow, self._channel = _narrow(grid)
        self._pool = ThreadPoolExecutor(PULLS, "pull")
        self._aside = ThreadPoolExecutor(1, "forget")  # nobody waits for it
        self._open: dict[str, Letter] = {}  # those not answered, by id
        self._dropped: set[str] = set()  # those of them whose answer is not wanted any more
        self._arrivals: deque[_Arrival] = deque()  # the first is in hand
        self._answers: deque[Answer] = deque()
        self._pause = SHORT
        self._looked_after = 0.0
        self._looked = -LOOK
        self._pulls: dict[str, Future[bytes]] = {}  # objects under way, by name

    def online(self) -> set[int]:
        return set(self._grid.get_node_ids())

    def send(
        self, contents: Mapping[int, RecordDict], names: Mapping[int, str], kind: str, ttl: float, limit: int
    ) -> list[Letter]:
        """Send to every node its content, once uploaded if it is the same object for many. Nodes that the SuperLink
        does not take messages for are left out."""
        messages = [Message(record, node, kind, ttl=ttl) for node, record in contents.items()]
        taken = push(self._grid, messages, self._pool)
        letters = []
        for message in messages:
            name, node = message.metadata.message_id, message.metadata.dst_node_id
            if name in taken:
                letters.append(Letter(name, node, names[node], kind, limit))
            else:
                self._forget(name)
        self._open |= {letter.id: letter for letter in letters}
        self._pause = SHORT
        return letters

    def drop(self, letter: Letter) -> None:
        """The answer is not wanted any more. When it comes it is said to be `LATE`, and nothing of it is read."""
        if letter.id in self._open:
            self._dropped.add(letter.id)
        for arrival in [a for a in self._arrivals if a.letter is letter]:
            self._end(arrival, LATE)

    def owing(self) -> Counter[int]:
        """How many dropped letters each node has still to answer."""
        return Counter(self._open[name].node for name in self._dropped)

    def next(self, timeout: float) -> Answer | None:
        """The next answer, or None when there was none within `timeout` seconds."""
        until = self._clock() + timeout
        while True:
            enough = len(self._arrivals) > 1 or (self._arrivals and self._clock() < self._looked + LOOK)
            if self._pause > SHORT or not enough:
                self._look()
            moved = not self._answers and self._pull()
            if self._answers:
                self._pause = SHORT
                self._ask()
                return self._answers.popleft()
            if moved:
                self._pause = SHORT
            elif (left := until - self._clock()) > 0:
                time.sleep(min(self._pause, left))
                if self._arrivals:
                    self._arrivals[0].waited += self._pause
                self._pause = min(1.25 * self._pause, LONG)  # a fifth of the time waited so far
            if self._clock() >= until:
                return None

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._aside.shutdown()
        self._channel.close()

    def _look(self) -> None:
        """Ask for all open letters at once which are answered."""
        self._looked = self._clock()
        if not self._open:
            return
        try:
            found = self._grid._stub.PullMessages(PullAppMessagesRequest(message_ids=list(self._open)))
        except grpc.RpcError as error:  # what it was about to give is lost, and said to be so when asked for again
            log.warning("the SuperLink failed at giving replies: %s", line(error.details() or ""))
            return
        for proto, tree in zip(found.messages_list, found.message_object_trees, strict=True):
            letter = self._open.pop(proto.metadata.reply_to_message_id, None)
            name = proto.metadata.message_id
            if letter is None:
                self._forget(name)
                continue
            objects = list(dict.fromkeys(node.object_id for node in iterate_object_tree(tree)))
            arrival = _Arrival(letter, name, objects, moved=self._clock())
            failed = proto.HasField("error")
            if letter.id in self._dropped:
                self._dropped.discard(letter.id)
                self._end(arrival, "" if failed and proto.error.code in REASONS else LATE)
            elif failed:
                self._end(arrival, reason(proto.error.code, proto.error.reason))
            elif len(objects) > PIECE // 1024 + letter.limit // PIECE:
                self._end(arrival, f"its reply is cut into {len(objects)} pieces")
            else:
                self._arrivals.append(arrival)

    def _pull(self) -> bool:
        """Get on with the reply in hand. Whether anything came of it."""
        if not self._arrivals:
            return False
        arrival = self._arrivals[0]
        try:
            if not self._fetch(arrival):
                return self._look_after()
            if not arrival.missing:
                self._end(arrival, content=opened(arrival.message, arrival.contents, arrival.letter.limit))
        except Unreadable as error:
            self._end(arrival, str(error))
        return True

    def _fetch(self, arrival: _Arrival) -> bool:
        """Take the next few objects, as far as they are there. While one is waited for, the next is on its way."""
        moved = False
        for name in arrival.missing[:PULLS]:
            self._ask()
            content = self._pulls.pop(name).result()
            if content:
                moved = True
                arrival.contents[name] = content
                arrival.size += len(content)
                arrival.moved = self._clock()
            if arrival.size > arrival.letter.limit:
                raise Unreadable(f"its reply is larger than {arrival.letter.limit} bytes")
        return moved

    def _ask(self) -> None:
        """Have the next few objects of the reply in hand pulled, and forget those of others."""
        wanted = self._arrivals[0].missing[:PULLS] if self._arrivals else []
        self._pulls = {name: self._pulls.get(name) or self._pool.submit(self._object, name) for name in wanted}

    def _look_after(self) -> bool:
        """The reply in hand does not come: see whether another one has, and which will not come any more."""
        now = self._clock()
        if now < self._looked_after + LONG:
            return False
        self._looked_after = now
        online = None if now < self._arrivals[0].moved + STALL else self.online()
        for arrival in list(self._arrivals):
            if online is not None and arrival.letter.node not in online and not self._complete(arrival):
                self._end(arrival, "went offline while it was sending its reply")
            elif now > arrival.moved + STUCK and not self._complete(arrival):
                self._end(arrival, f"nothing more of its reply has come for {STUCK:.0f} seconds")
        if len(self._arrivals) < 2:
            return False
        first = self._arrivals[0]
        if first.contents and first.waited < STALL:
            return False
        for arrival in list(self._arrivals)[1:]:
            if self._complete(arrival):
                first.contents, first.size, first.waited = {}, 0, 0.0  # one reply in hand, not two
                self._arrivals.remove(arrival)
                self._arrivals.popleft()
                self._arrivals.appendleft(arrival)
                self._arrivals.append(first)
                return True
        return False

    def _complete(self, arrival: _Arrival) -> bool:
        """Honest nodes upload the message itself last; another one's next object shows that it holds something back."""
        try:
            return all(self._object(name) for name in (arrival.message, *arrival.missing[:1]))
        except Unreadable:
            return False

    def _object(self, name: str) -> bytes:
        """Its content; empty as long as it is not there."""
        request = PullObjectRequest(node=self._grid.node, run_id=self._run_id, object_id=name)
        try:
            found = self._narrow.PullObject(request)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise Unreadable(f"an object of its reply is larger than {OBJECT} bytes") from None
            raise Unreadable(f"the SuperLink failed at giving its reply: {line(error.details() or '')}") from None
        if not found.object_found:
            raise Unreadable("its reply is gone from the SuperLink")
        content: bytes = found.object_content
        return content

    def _end(self, arrival: _Arrival, error: str = "", content: RecordDict | None = None) -> None:
        """It is answered. An empty answer to a letter that was dropped is not worth a word."""
        if arrival in self._arrivals:
            self._arrivals.remove(arrival)
        self._forget(arrival.message)
        self._forget(arrival.letter.id)  # a node that took the message has had it forgotten; one that did not, has not
        if error or content is not None:
            self._answers.append(Answer(arrival.letter, content, error))

    def _forget(self, message: str) -> None:
        """Have the SuperLink free its objects, soon."""
        request = ConfirmMessageReceivedRequest(node=self._grid.node, run_id=self._run_id, message_object_id=message)

        def confirm() -> None:
            try:
                self._grid._stub.ConfirmMessageReceived(request)
            except grpc.RpcError as error:
                log.warning("the SuperLink failed at forgetting a message: %s", line(error.details() or ""))

        self._aside.submit(confirm)


def _narrow(grid: GrpcGrid) -> tuple[Any, Any]:
    """The API of the grid on a connection through which nothing large can come."""
    interceptors = [
        RuntimeVersionClientInterceptor(component_name="flwr-serverapp"),
        AppIoTokenClientInterceptor(token=grid._token),
    ]
    channel = create_channel(grid._addr, grid._insecure, grid._cert, OBJECT, interceptors)
    stub = ServerAppIoStub(channel)
    wrap_stub(stub, grid._retry_invoker)
    return stub, channel
