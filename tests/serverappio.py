"""Flower's own ServerAppIo API and state in this process, with nodes that a test makes do what it wants.

What a ServerApp talks to is real: gRPC on the loopback, the servicer, the in-memory state and object store of a
SuperLink. What a SuperLink's other end is, the handlers of the Fleet API, is called directly.
"""

import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

from flwr.app import Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node as ProtoNode
from flwr.server.superlink.fleet.message_handler import message_handler
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION, TaskType
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid import GrpcGrid
from flwr.superlink.servicer.serverappio import run_serverappio_api_grpc

TICK = 0.002  # seconds between two looks of a node for messages
HEARTBEAT = 1000.0  # seconds: nodes are online until a test says otherwise


class SuperLink:
    def __init__(self) -> None:
        objects = ObjectStoreFactory(FLWR_IN_MEMORY_DB_NAME)
        factory = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), objects)
        self.state, self.store = factory.state(), objects.store()
        self._server = run_serverappio_api_grpc("127.0.0.1:0", factory, objects, None)
        self.run_id = self.state.create_run(None, None, None, {}, NOOP_FEDERATION, None, None, TaskType.SERVER_APP)
        (run,) = self.state.get_run_info(run_ids=[self.run_id])
        token = self.state.claim_task(run.primary_task_id)
        assert token is not None
        assert self.state.activate_task(run.primary_task_id)
        self.state.task_token_store[run.primary_task_id].active_until += timedelta(days=1)  # nobody sends heartbeats
        self.grid = GrpcGrid(self._server.bound_address, insecure=True, token=token)
        self.grid.set_run(run)
        self.nodes: list[Node] = []

    def join(self, name: str, behave: "Behaviour") -> "Node":
        node = Node(self, name, behave)
        self.nodes.append(node)
        return node

    def names(self) -> dict[int, str]:
        """What a registry would say."""
        return {node.id: node.name for node in self.nodes}

    def close(self) -> None:
        for node in self.nodes:
            node.stop()
        self.grid.close()
        self._server.stop(None).wait()


@dataclass
class Upload:
    """A reply that is announced; its objects are not uploaded yet, in the order in which a node would."""

    node: "Node"
    missing: list[str]
    contents: dict[str, bytes]

    def go_on(self, many: int | None = None) -> None:
        for name in list(self.missing)[:many]:
            request = PushObjectRequest(
                node=self.node.proto, run_id=self.node.link.run_id, object_id=name, object_content=self.contents[name]
            )
            message_handler.push_object(request, self.node.link.state, self.node.link.store)
            self.missing.remove(name)


Behaviour = Callable[["Node", Message], None]
_keys = itertools.count()


@dataclass
class Node:
    link: SuperLink
    name: str
    behave: Behaviour
    id: int = 0
    taken: list[str] = field(default_factory=list)  # types of the messages it got

    def __post_init__(self) -> None:
        key = f"key-{next(_keys)}".encode()
        self.id = self.link.state.create_node("", self.name, key, HEARTBEAT)
        self.proto = ProtoNode(node_id=self.id)
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self.error: BaseException | None = None
        self.go_online()

    def go_online(self) -> None:
        assert self.link.state.activate_node(self.id, HEARTBEAT)
        self._stopped.clear()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def go_offline(self) -> None:
        """From its own behaviour, or from a test."""
        assert self.link.state.deactivate_node(self.id)
        self._stopped.set()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        if self.error is not None:
            raise self.error

    def take(self) -> Message | None:
        """A message with its content, as a node gets it."""
        found = message_handler.pull_messages(PullMessagesRequest(node=self.proto), self.link.state, self.link.store)
        if not found.messages_list:
            return None
        (proto,), (tree,) = found.messages_list, found.message_object_trees
        contents = {}
        for part in iterate_object_tree(tree):
            request = PullObjectRequest(node=self.proto, run_id=self.link.run_id, object_id=part.object_id)
            while not (
                answer := message_handler.pull_object(request, self.link.state, self.link.store)
            ).object_available:
                assert answer.object_found
                if self._stopped.wait(TICK):
                    return None
            contents[part.object_id] = answer.object_content
        message = inflate_object_from_contents(proto.metadata.message_id, contents)
        assert isinstance(message, Message)
        message.metadata.__dict__["_message_id"] = proto.metadata.message_id
        self.link.store.delete(proto.metadata.message_id)  # as ConfirmMessageReceived does
        self.taken.append(message.metadata.message_type)
        return message

    def announce(self, reply: Message) -> Upload:
        reply.metadata.__dict__["_message_id"] = reply.object_id
        contents = {name: part.deflate() for name, part in get_all_nested_objects(reply).items()}
        return self.announce_tree(reply, get_object_tree(reply), contents)

    def announce_tree(self, reply: Message, tree: ObjectTree, contents: dict[str, bytes]) -> Upload:
        """Any objects at all."""
        bare = message_to_proto(remove_content_from_message(reply))
        request = PushMessagesRequest(node=self.proto, messages_list=[bare], message_object_trees=[tree])
        response = message_handler.push_messages(request, self.link.state, self.link.store)
        order = [part.object_id for part in iterate_object_tree(tree)]
        wanted = set(response.objects_to_push)
        return Upload(self, [name for name in dict.fromkeys(order) if name in wanted], contents)

    def reply(self, to: Message, content: RecordDict) -> None:
        self.announce(Message(content, reply_to=to)).go_on()

    def _work(self) -> None:
        try:
            while not self._stopped.wait(TICK):
                message = self.take()
                if message is not None:
                    self.behave(self, message)
        except BaseException as error:
            self.error = error
