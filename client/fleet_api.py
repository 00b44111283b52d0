"""The Fleet API of a Flower SuperLink, called directly over TLS, every request signed with the site's key.

Heartbeats have a connection of their own: behind megabytes on their way through a slow line they would come so late
that the server takes the node for dead. Nothing is repeated here. What goes wrong is raised as one of a few exceptions
that say what can be done about it, with one line of text. The content of objects is as TLS brings it: parts of a model
have checksums of their own.
"""

import threading
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from flwr.client.grpc_rere_client.node_auth_client_interceptor import NodeAuthClientInterceptor
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
)
from flwr.proto.fleet_pb2_grpc import FleetStub
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.grpc import GRPC_MAX_MESSAGE_LENGTH
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.interceptors import RuntimeVersionClientInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from common.errors import UserError
from common.kit import Kit

BEAT = 10.0  # seconds, the least a SuperLink accepts; it takes a node for dead after twice that
CALL = 10.0  # seconds for an answer to a small request
PULL = 60.0  # for a message: a server that is late hands it out all the same, and never again
TRANSFER = 600.0  # seconds for one object (5 MB) on a slow line; a dead line is noticed by the keepalive
SMALL, LARGE = 8, 2  # objects under way at a time: round trips are saved, but not at the cost of the server's memory
OPTIONS = [
    ("grpc.max_send_message_length", GRPC_MAX_MESSAGE_LENGTH),
    ("grpc.max_receive_message_length", GRPC_MAX_MESSAGE_LENGTH),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),  # gRPC's own goes up to two minutes
    ("grpc.min_reconnect_backoff_ms", 10_000),  # for one try; one that began during a cut knocks ever more rarely
    ("grpc.dns_min_time_between_resolutions_ms", 5_000),  # the server may have moved
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
]


class FleetError(Exception):
    """What a call came to, in one line."""


class Unreachable(FleetError):
    """Nobody answered, or not in time: try again."""


class Faulty(FleetError):
    """The server failed at it: try again, but not for ever."""


class ClockOff(FleetError):
    """The clocks of both sides differ too much for a signature to count."""


class Forgotten(FleetError):
    """The node id is not, or no longer, the one of this key: activate again."""


class Unknown(FleetError):
    """The key is not registered."""


class Taken(FleetError):
    """A node with this key is online already."""


class Gone(FleetError):
    """The run is over or the message is not wanted any more: drop it."""


class FleetApi:
    """As one node: the one that `activate` or `resume` made it."""

    def __init__(self, kit: Kit) -> None:
        if not kit.ca:  # gRPC would take the authorities of the system
            raise UserError(f"the kit of {kit.name} has no authority in it: ask the operator for a new kit")
        key = kit.private_key()
        self.key = public_key_to_bytes(key.public_key())
        self._node = Node()
        self._closed = threading.Event()
        self._small, self._large = ThreadPoolExecutor(SMALL, "small"), ThreadPoolExecutor(LARGE, "large")
        credentials = grpc.ssl_channel_credentials(kit.ca)
        alone = [("grpc.use_local_subchannel_pool", 1)]  # without it equal channels share their connection
        self._channels = [grpc.secure_channel(kit.address, credentials, OPTIONS + alone) for _ in range(2)]
        interceptors = (
            RuntimeVersionClientInterceptor(component_name="SuperNode"),
            NodeAuthClientInterceptor(key, key.public_key()),
        )
        self._stub, self._heart = (
            FleetStub(grpc.intercept_channel(channel, *interceptors)) for channel in self._channels
        )

    @property
    def node_id(self) -> int:
        return self._node.node_id

    def activate(self) -> None:
        request = ActivateNodeRequest(public_key=self.key, heartbeat_interval=BEAT)
        self._node = Node(node_id=_call(self._stub.ActivateNode, request).node_id)

    def resume(self, node_id: int) -> None:
        """Be the node of before, which the server may still count as online: unlike an activation, a heartbeat is
        welcome then, and at no moment is the node offline, which would end what waits for its answer."""
        self._beat(Node(node_id=node_id))
        self._node = Node(node_id=node_id)

    def heartbeat(self) -> None:
        self._beat(self._node)

    def deactivate(self) -> None:
        _call(self._stub.DeactivateNode, DeactivateNodeRequest(node_id=self.node_id), timeout=3.0)

    def pull(self) -> PullMessagesResponse | None:
        """A message without its content and the tree of its objects. The server gives each message only once."""
        response: PullMessagesResponse = _call(self._stub.PullMessages, PullMessagesRequest(node=self._node), PULL)
        return response if response.messages_list else None

    def fetch(
        self, run_id: int, object_ids: Iterable[str], into: dict[str, bytes], until: float, large: Collection[str] = ()
    ) -> None:
        """Add the objects that `into` lacks. Those that the sender is still uploading are waited for until the
        time `until`. Those named `large` come a few at a time."""

        def take(object_id: str) -> None:
            into[object_id] = self._object(run_id, object_id, until)

        self._transfer(take, [object_id for object_id in object_ids if object_id not in into], large)

    def confirm(self, run_id: int, message_id: str) -> None:
        """The message is here with all its objects: the server may forget them. Nobody waits until it has heard that,
        as it forgets them with the answer at the latest."""
        request = ConfirmMessageReceivedRequest(node=self._node, run_id=run_id, message_object_id=message_id)
        self._small.submit(_call, self._stub.ConfirmMessageReceived, request)

    def announce(self, reply: PushMessagesRequest) -> tuple[bool, set[str]]:
        """Whether the server takes the reply, and which of its objects it lacks. It takes a reply once and in time."""
        reply.node.CopyFrom(self._node)
        response = _call(self._stub.PushMessages, reply)
        return reply.messages_list[0].metadata.message_id in response.results, set(response.objects_to_push)

    def knows(self, run_id: int, object_id: str) -> bool:
        """Whether the server has heard of an object, if only by its announcement."""
        request = PullObjectRequest(node=self._node, run_id=run_id, object_id=object_id)
        return bool(_call(self._stub.PullObject, request, TRANSFER).object_found)

    def upload(
        self, run_id: int, lacking: list[str], content: Callable[[str], bytes | None], large: Collection[str] = ()
    ) -> None:
        """Give the server what it lacks, in this order; what it has got is taken out of `lacking`."""

        def give(object_id: str) -> None:
            request = PushObjectRequest(node=self._node, run_id=run_id, object_id=object_id)
            if (found := content(object_id)) is None:
                raise Gone("a part of it is damaged")
            request.object_content = found
            if not _call(self._stub.PushObject, request, TRANSFER).stored:
                raise Gone("the server does not wait for it any more")
            lacking.remove(object_id)

        self._transfer(give, list(lacking), large)

    def close(self) -> None:
        self._closed.set()
        for pool in (self._small, self._large):
            pool.shutdown(wait=False, cancel_futures=True)
        for channel in self._channels:
            channel.close()

    def _beat(self, node: Node) -> None:
        request = SendNodeHeartbeatRequest(node=node, heartbeat_interval=BEAT)
        if not _call(self._heart.SendNodeHeartbeat, request, timeout=5.0).success:
            raise Forgotten("the server does not know this node")

    def _object(self, run_id: int, object_id: str, until: float) -> bytes:
        request = PullObjectRequest(node=self._node, run_id=run_id, object_id=object_id)
        pause = 0.01
        while True:
            response = _call(self._stub.PullObject, request, TRANSFER)
            if response.object_available:
                content: bytes = response.object_content
                return content
            if not response.object_found or time.time() > until:
                raise Gone("the server has it no more")
            if self._closed.wait(pause):
                raise Unreachable("the channel is closed")
            pause = min(2 * pause, 0.2)

    def _transfer(self, one: Callable[[str], None], object_ids: list[str], large: Collection[str]) -> None:
        """All objects, or the first failure once none is under way any more."""
        failed = threading.Event()

        def guarded(object_id: str) -> None:
            if failed.is_set():
                return
            try:
                one(object_id)
            except BaseException:
                failed.set()
                raise

        under_way = [
            (self._large if object_id in large else self._small).submit(guarded, object_id) for object_id in object_ids
        ]
        errors = [error for future in under_way if (error := future.exception())]
        if errors:
            raise errors[0]


def pieces(tree: ObjectTree) -> set[str]:
    """Those of a message's objects that may be large, 5 MB: the pieces of an array that was cut into several."""
    found: set[str] = set()
    for node in iterate_object_tree(tree):
        if len(node.children) > 1 and not any(child.children for child in node.children):
            found.update(child.object_id for child in node.children)
    return found


def _call(method: Callable[..., Any], request: Any, timeout: float = CALL) -> Any:
    try:
        return method(request, timeout=timeout)
    except grpc.RpcError as error:
        raise meaning(error.code(), error.details() or "") from None


def meaning(code: grpc.StatusCode, details: str) -> FleetError:
    """What the end of a call says to a node."""
    text = details.partition("\n")[0] or code.name
    unanswered = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)
    if code in unanswered:
        return Unreachable(text)
    if code is grpc.StatusCode.PERMISSION_DENIED:
        return Gone(text)
    for kind, where, words in (
        (Forgotten, grpc.StatusCode.UNAUTHENTICATED, "Invalid node ID"),
        (ClockOff, grpc.StatusCode.UNAUTHENTICATED, "Invalid timestamp"),
        (Unknown, grpc.StatusCode.FAILED_PRECONDITION, "No SuperNode found"),
        (Taken, grpc.StatusCode.FAILED_PRECONDITION, "could not be activated"),
    ):
        if code is where and words in details:
            return kind(text)
    return Faulty(f"{code.name}: {text}")
