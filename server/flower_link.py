"""What the operator's side asks of a SuperLink through its Control API: who may join, who is there, runs.

All of it goes over TLS to the loopback, verified by the federation's own authority. A run carries no code: its bundle
holds a pyproject.toml that names the ServerApp and the ClientApp, and both are what is installed on either side. A
SuperLink that cannot be asked is `NoLink`. The public key of a site is its identity: names come from the registry of
the folder, never from the site.
"""

import hashlib
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    StreamLogsRequest,
    UnregisterNodeRequest,
)
from flwr.proto.control_pb2_grpc import ControlStub
from flwr.supercore.fab import Fab

from common.errors import UserError
from common.register import registry
from server.superlink import read_link

ANSWER = 10.0  # seconds the SuperLink has to answer; it is on this machine
ONLINE, UNREGISTERED = "online", "unregistered"  # two of the states Flower gives a node
FINISHED, COMPLETED = "finished", "completed"  # and a run
PROJECT = """
[project]
name = "fedloge"
version = "{version}"

[tool.flwr.app]
publisher = "fedloge"

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.app:app"

[tool.flwr.app.config]
{config}
"""

Value = str | int | float | bool
T = TypeVar("T")


class NoLink(UserError):
    """The SuperLink cannot be reached or refuses what it is asked."""


@dataclass(frozen=True)
class NodeSeen:
    public_key: bytes
    online: bool


@dataclass(frozen=True)
class SiteSeen:
    name: str | None  # None: the key is nobody's, or of a site that may not take part any more
    online: bool


@dataclass(frozen=True)
class RunSeen:
    finished: bool
    completed: bool  # finished, and not by an error or by being stopped
    details: str  # of what failed


class Control:
    """The Control API of the SuperLink of one federation."""

    def __init__(self, folder: Path, port: int) -> None:
        credentials = grpc.ssl_channel_credentials((folder / "pki" / "ca.crt").read_bytes())
        name = [("grpc.ssl_target_name_override", "localhost")]  # the server certificate always has this name
        self._channel = grpc.secure_channel(f"127.0.0.1:{port}", credentials, options=name)
        self._stub = ControlStub(self._channel)

    def close(self) -> None:
        self._channel.close()

    def register(self, public_key: bytes) -> bool:
        """Let the site of this key join. False if it cannot any more: it was unregistered from this SuperLink."""
        try:
            self._ask(self._stub.RegisterNode, RegisterNodeRequest(public_key=public_key))
        except NoLink:  # it is registered already, or was once
            known = {bytes(node.public_key): node.status for node in self._list()}
            if public_key not in known:
                raise
            return bool(known[public_key] != UNREGISTERED)
        return True

    def unregister(self, public_key: bytes) -> None:
        """The site of this key is refused from now on."""
        for node in self._list():
            if node.public_key == public_key and node.status != UNREGISTERED:
                self._ask(self._stub.UnregisterNode, UnregisterNodeRequest(node_id=node.node_id))

    def nodes(self) -> dict[int, NodeSeen]:
        """Everybody who may join, by node id."""
        listed = [node for node in self._list() if node.status != UNREGISTERED]
        return {node.node_id: NodeSeen(bytes(node.public_key), node.status == ONLINE) for node in listed}

    def start_run(self, config: Mapping[str, Value]) -> int:
        """Start the installed ServerApp with this run config."""
        request = StartRunRequest(fab=fab_to_proto(bundle(config)), override_config=user_config_to_proto(dict(config)))
        answer = self._ask(self._stub.StartRun, request)
        if not answer.HasField("run_id"):
            raise NoLink("the SuperLink does not start the run: see run/logs/superlink.log")
        return int(answer.run_id)

    def look_at(self, run_id: int) -> RunSeen:
        answer = self._ask(self._stub.ListRuns, ListRunsRequest(run_id=run_id))
        status = answer.run_dict[run_id].status
        over = status.status == FINISHED
        return RunSeen(over, over and status.sub_status == COMPLETED, str(status.details))

    def printed(self, run_id: int) -> Iterator[str]:
        """What the ServerApp of a run prints, piece by piece, until it or the SuperLink ends."""
        with suppress(grpc.RpcError, ValueError):  # ValueError: we have closed the channel
            for piece in self._stub.StreamLogs(StreamLogsRequest(run_id=run_id)):
                yield piece.log_output

    def stop_run(self, run_id: int) -> None:
        if not self.look_at(run_id).finished:
            self._ask(self._stub.StopRun, StopRunRequest(run_id=run_id))

    def _list(self) -> list[Any]:
        return list(self._ask(self._stub.ListNodes, ListNodesRequest()).nodes_info)

    def _ask(self, method: Callable[..., T], request: Any) -> T:
        try:
            return method(request, timeout=ANSWER)
        except grpc.RpcError as error:
            raise NoLink(f"the SuperLink does not do what it is asked: {error.details()}") from None


class Link:
    """What the ServerApp knows of its sites beyond node ids."""

    def __init__(self, folder: Path, control: Control) -> None:
        self._folder = folder
        self._control = control

    def nodes(self) -> dict[int, SiteSeen]:
        """Everybody who may join, by node id; a name is the registry's, by the key the SuperLink verified."""
        names = {site.public_key: name for name, site in registry(self._folder).items() if not site.objection}
        return {node: SiteSeen(names.get(seen.public_key), seen.online) for node, seen in self._control.nodes().items()}

    def close(self) -> None:
        self._control.close()


def open_link(folder: Path) -> Link:
    """To the SuperLink that runs on this folder."""
    doors = read_link(folder / "run")
    if doors is None:
        raise NoLink(f"{folder}: no server is running on it: start `fedloge server {folder}`")
    return Link(folder, Control(folder, doors.control))


def bundle(config: Mapping[str, Value]) -> Fab:
    """A bundle without code. Flower takes only keys that the bundle declares, so those of `config` are, empty."""
    text = PROJECT.format(
        version=importlib.metadata.version("fedloge"), config="\n".join(f'{key} = ""' for key in config)
    )
    content, _ = build_fab_from_files({"pyproject.toml": text.encode()})
    return Fab(hashlib.sha256(content).hexdigest(), content, {})
