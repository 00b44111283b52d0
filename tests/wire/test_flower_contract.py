"""What the project relies on inside Flower, most of it private there: names, parameters, fields, constants and texts.

A new Flower that breaks one of these breaks it here, in a second and by name, and not in somebody's federation. What
the names do is shown against a real SuperLink in tests/network.
"""

import ast
import importlib
import importlib.metadata
import inspect
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.client.grpc_rere_client.node_auth_client_interceptor import NodeAuthClientInterceptor
from flwr.common import constant
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto import appio_pb2, fleet_pb2, heartbeat_pb2, message_pb2, node_pb2
from flwr.proto.fleet_pb2_grpc import FleetStub
from flwr.server.superlink.fleet.grpc_rere import fleet_servicer, node_auth_server_interceptor
from flwr.server.superlink.fleet.message_handler import message_handler
from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState
from flwr.supercore.grpc import GRPC_MAX_MESSAGE_LENGTH, create_channel
from flwr.supercore.inflatable import inflatable_object, inflatable_utils
from flwr.supercore.interceptors import RuntimeVersionClientInterceptor
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from google.protobuf.message import Message as Proto

from client import fleet_api, node
from common import wire

ROOT = Path(__file__).parents[2]
PACKAGES = ("client", "common", "server", "fedloge")


def used() -> Iterator[tuple[str, str]]:
    """Every (module of Flower, name in it) that a module of ours imports."""
    for path in sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py")):
        for statement in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(statement, ast.ImportFrom) and (statement.module or "").partition(".")[0] == "flwr":
                yield from ((str(statement.module), alias.name) for alias in statement.names)


def test_flower_is_the_one_that_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"flwr=={importlib.metadata.version('flwr')}" in project["dependencies"]


def test_every_name_that_is_imported_exists() -> None:
    found = sorted(set(used()))
    assert ("flwr.proto.fleet_pb2_grpc", "FleetStub") in found
    missing = [f"{module}.{name}" for module, name in found if not hasattr(importlib.import_module(module), name)]
    assert missing == []


@pytest.mark.parametrize(
    ("called", "parameters"),
    [
        (Context.__init__, ["run_id", "node_id", "node_config", "state", "run_config"]),
        (Error.__init__, ["code", "reason"]),
        (NodeAuthClientInterceptor.__init__, ["private_key", "public_key"]),
        (RuntimeVersionClientInterceptor.__init__, ["component_name"]),
        (public_key_to_bytes, ["public_key"]),
        (message_to_proto, ["message"]),
        (message_from_proto, ["message_proto"]),
        (remove_content_from_message, ["message"]),
        (inflatable_object.get_object_tree, ["obj"]),
        (inflatable_object.get_all_nested_objects, ["obj"]),
        (inflatable_object.iterate_object_tree, ["tree"]),
        (inflatable_object.no_object_id_recompute, []),
        (inflatable_utils.inflate_object_from_contents, ["object_id", "object_contents"]),
        (create_channel, ["server_address", "insecure"]),
    ],
)
def test_parameters_are_what_we_give(called: Any, parameters: list[str]) -> None:
    taken = [p for p in inspect.signature(called).parameters.values() if p.name != "self"]
    assert [p.name for p in taken[: len(parameters)]] == parameters
    needed = [p.name for p in taken if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    assert set(needed) <= set(parameters)


def test_the_fleet_api_has_the_calls_we_make() -> None:
    with grpc.insecure_channel("localhost:1") as channel:  # nothing is sent before a call
        offered = vars(FleetStub(channel))
    assert offered.keys() >= {
        "ActivateNode", "DeactivateNode", "SendNodeHeartbeat", "PullMessages", "PushMessages", "PullObject",
        "PushObject", "ConfirmMessageReceived",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        (fleet_pb2.ActivateNodeRequest, {"public_key", "heartbeat_interval"}),
        (fleet_pb2.ActivateNodeResponse, {"node_id"}),
        (fleet_pb2.DeactivateNodeRequest, {"node_id"}),
        (heartbeat_pb2.SendNodeHeartbeatRequest, {"node", "heartbeat_interval"}),
        (heartbeat_pb2.SendNodeHeartbeatResponse, {"success"}),
        (fleet_pb2.PullMessagesRequest, {"node"}),
        (fleet_pb2.PullMessagesResponse, {"messages_list", "message_object_trees"}),
        (
            fleet_pb2.PushMessagesRequest,
            {"node", "messages_list", "message_object_trees", "clientapp_runtime_list"},
        ),
        (fleet_pb2.PushMessagesResponse, {"results", "objects_to_push"}),
        (message_pb2.PullObjectRequest, {"node", "run_id", "object_id"}),
        (message_pb2.PullObjectResponse, {"object_found", "object_available", "object_content"}),
        (message_pb2.PushObjectRequest, {"node", "run_id", "object_id", "object_content"}),
        (message_pb2.PushObjectResponse, {"stored"}),
        (message_pb2.ConfirmMessageReceivedRequest, {"node", "run_id", "message_object_id"}),
        (message_pb2.ObjectTree, {"object_id", "children"}),
        (message_pb2.Message, {"metadata", "error"}),
        (message_pb2.Metadata, {"message_id", "message_type", "run_id", "group_id", "created_at", "ttl"}),
        (appio_pb2.PullAppMessagesRequest, {"message_ids"}),
        (node_pb2.Node, {"node_id"}),
        (node_pb2.NodeInfo, {"node_id", "public_key", "status"}),
    ],
)
def test_messages_have_the_fields_we_use(message: type[Proto], fields: set[str]) -> None:
    assert fields <= {field.name for field in message.DESCRIPTOR.fields}


def test_constants() -> None:
    assert constant.HEARTBEAT_MIN_INTERVAL == fleet_api.BEAT  # less is refused, more is noticed later
    assert constant.HEARTBEAT_PATIENCE == 2
    assert constant.ErrorCode.CLIENT_APP_RAISED_EXCEPTION == 2
    assert constant.ErrorCode.NODE_UNAVAILABLE == 5
    assert constant.ErrorCode.CLIENT_APP_CRASHED == 8
    assert constant.SUPERLINK_NODE_ID == 1
    assert GRPC_MAX_MESSAGE_LENGTH == 2**31 - 1
    assert node.OVER == wire.OVER


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (node_auth_server_interceptor, 'context.abort(grpc.StatusCode.UNAUTHENTICATED, "Invalid node ID")'),
        (node_auth_server_interceptor, '_unary_unary_rpc_terminator("Invalid timestamp")'),
        (message_handler, 'raise ValueError("No SuperNode found with the given public key.")'),
        (message_handler, "_validate_heartbeat_interval(request.heartbeat_interval)\n    if not state.activate_node("),
        (message_handler, "could not be activated."),
        (message_handler, "results={str(message_id): 0}"),
        (fleet_servicer, "context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(e))"),
        (fleet_servicer, 'grpc.StatusCode.INVALID_ARGUMENT, "Invalid heartbeat interval"'),
        (fleet_servicer, "abort_grpc_context(e.message, context)"),
    ],
)
def test_refusals_are_worded_as_we_read_them(module: ModuleType, text: str) -> None:
    assert text in inspect.getsource(module)


@pytest.mark.parametrize(
    ("code", "details", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, "failed to connect to all addresses", fleet_api.Unreachable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "", fleet_api.Unreachable),
        (grpc.StatusCode.PERMISSION_DENIED, "Run is finished.", fleet_api.Gone),
        (grpc.StatusCode.UNAUTHENTICATED, "Invalid node ID", fleet_api.Forgotten),
        (grpc.StatusCode.UNAUTHENTICATED, "Invalid timestamp", fleet_api.ClockOff),
        (grpc.StatusCode.UNAUTHENTICATED, "Invalid signature", fleet_api.Faulty),
        (
            grpc.StatusCode.FAILED_PRECONDITION,
            "No SuperNode found with the given public key.",
            fleet_api.Unknown,
        ),
        (grpc.StatusCode.FAILED_PRECONDITION, "SuperNode with node ID 5 could not be activated.", fleet_api.Taken),
        (grpc.StatusCode.UNKNOWN, "Exception calling application: 7\nTraceback", fleet_api.Faulty),
    ],
)
def test_what_a_refusal_means(code: grpc.StatusCode, details: str, kind: type[fleet_api.FleetError]) -> None:
    meaning = fleet_api.meaning(code, details)
    assert type(meaning) is kind
    assert str(meaning)
    assert "\n" not in str(meaning)


def test_an_id_is_the_digest_of_a_content_that_does_not_hold_it() -> None:
    """Replies are written down as objects, and read and announced by another process."""
    content = RecordDict({"arrays": ArrayRecord({"flat": Array(np.arange(6.0))})})
    made = Message(content, 7, "train", ttl=60)
    made.metadata.__dict__["_src_node_id"] = constant.SUPERLINK_NODE_ID
    with inflatable_object.no_object_id_recompute():
        made.metadata.__dict__["_message_id"] = made.object_id
        parts = inflatable_object.get_all_nested_objects(made)
        contents = {object_id: part.deflate() for object_id, part in parts.items()}
        tree = inflatable_object.get_object_tree(made)
    assert tree.object_id == made.metadata.message_id
    assert {part.object_id for part in inflatable_object.iterate_object_tree(tree)} == contents.keys()
    assert all(inflatable_object.get_object_id(content) == object_id for object_id, content in contents.items())

    again = inflatable_utils.inflate_object_from_contents(tree.object_id, contents)
    assert contents == {}, "what is inflated is not kept twice"
    assert isinstance(again, Message)
    assert np.array_equal(again.content["arrays"]["flat"].numpy(), np.arange(6.0))

    head = message_from_proto(message_to_proto(remove_content_from_message(made)))
    failed = Message(Error(8, "stopped"), reply_to=head)
    assert failed.metadata.reply_to_message_id == made.metadata.message_id
    assert failed.metadata.created_at + failed.metadata.ttl == pytest.approx(made.metadata.created_at + 60)


def test_a_heartbeat_of_a_node_that_was_killed_is_welcome() -> None:
    """An activation is refused then; and after a farewell the SuperLink answers for the node, in place of its reply."""
    state = InMemoryLinkState(_Everybody(), InMemoryObjectStore())  # type: ignore[arg-type]
    node_id = state.create_node("", "", b"key", 0)
    assert state.activate_node(node_id, fleet_api.BEAT)
    assert not state.activate_node(node_id, fleet_api.BEAT)
    assert state.acknowledge_node_heartbeat(node_id, fleet_api.BEAT)
    assert state.deactivate_node(node_id)
    assert state.acknowledge_node_heartbeat(node_id, fleet_api.BEAT)
    assert state.get_node_info(node_ids=[node_id])[0].status == "online"
    assert not state.acknowledge_node_heartbeat(node_id + 1, fleet_api.BEAT)


class _Everybody:
    """The federation manager, as far as it is asked here."""

    linkstate: object
