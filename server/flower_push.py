"""Messages given to a SuperLink, through the Grid of a ServerApp, a few of their objects at a time.

Flower's own Grid makes the contents of all objects before the first one is sent: another copy of the model.
"""

from collections.abc import Sequence
from concurrent.futures import Executor

from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.appio_pb2 import PushAppMessagesRequest
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.superlink.grid import GrpcGrid


def push(grid: GrpcGrid, messages: Sequence[Message], pool: Executor) -> set[str]:
    """The ids of the messages that the SuperLink takes. What many have in them is uploaded once."""
    if not messages:
        return set()
    run_id, objects, request = grid.run.run_id, dict[str, InflatableObject](), PushAppMessagesRequest()
    with no_object_id_recompute():
        for message in messages:
            message.metadata.__dict__ |= {"_run_id": run_id, "_src_node_id": grid.node.node_id}
            message.metadata.__dict__["_message_id"] = message.object_id
            objects |= get_all_nested_objects(message)
            request.messages_list.append(message_to_proto(remove_content_from_message(message)))
            request.message_object_trees.append(get_object_tree(message))
    response = grid._stub.PushMessages(request)

    def give(name: str) -> None:
        content = objects[name].deflate()
        grid._stub.PushObject(PushObjectRequest(node=grid.node, run_id=run_id, object_id=name, object_content=content))

    lacking = set(response.objects_to_push)
    for _ in pool.map(give, [name for name in objects if name in lacking]):  # in the order in which sites pull them
        pass
    return set(response.message_ids)
