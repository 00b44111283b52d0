"""A real SuperLink, started and asked as the server does it: TLS, keys of sites, runs without code, nothing left."""

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from flwr.client.grpc_rere_client.node_auth_client_interceptor import NodeAuthClientInterceptor
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.proto.fleet_pb2_grpc import FleetStub

from common import deployment, keys, pki, register
from common.errors import UserError
from common.kit import Kit
from server import superlink
from server.flower_link import Control, NoLink, bundle, open_link
from server.superlink import Doors, SuperLink, processes
from tests.network.standin import environment
from tests.network.superlink import free_port

CLASSES = 'name = "test"\n[images]\nclasses = ["cat", "dog"]\n'

pytestmark = pytest.mark.timeout(400)  # a machine that may be busy


def until(condition: Callable[[], object], seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def federation(folder: Path) -> Path:
    folder.mkdir()
    pki.init(folder, "localhost", "test")
    (folder / "federation.toml").write_text(CLASSES)
    (folder / "run").mkdir()
    return folder


def invite(folder: Path, name: str) -> Kit:
    return pki.issue(folder, name, None, deployment.load(folder / "federation.toml"))


@contextmanager
def fleet(kit: Kit, port: int, ca: bytes, name: str = "localhost") -> Iterator[grpc.Channel]:
    options = [("grpc.ssl_target_name_override", name)]
    with grpc.secure_channel(f"127.0.0.1:{port}", grpc.ssl_channel_credentials(ca), options) as channel:
        key = kit.private_key()
        yield grpc.intercept_channel(channel, NodeAuthClientInterceptor(key, key.public_key()))


def activate(kit: Kit, port: int, ca: bytes, name: str = "localhost") -> int:
    request = ActivateNodeRequest(public_key=public(kit), heartbeat_interval=10)
    with fleet(kit, port, ca, name) as channel:
        return int(FleetStub(channel).ActivateNode(request, timeout=20).node_id)


def public(kit: Kit) -> bytes:
    return keys.spki(kit.private_key().public_key())


class Running:
    def __init__(self, folder: Path, link: SuperLink, doors: Doors) -> None:
        self.folder, self.link, self.doors = folder, link, doors
        self.ca = (folder / "pki" / "ca.crt").read_bytes()
        self.control = Control(folder, doors.control)
        self.lines: list[str] = []

    def says(self, text: str) -> bool:
        self.lines += self.link.said()
        return any(text in line for line in self.lines)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    place = tmp_path_factory.mktemp("link")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", environment(place / "standin")["PYTHONPATH"])
        folder = federation(place / "federation")
        link = SuperLink(folder, "127.0.0.1", free_port())
        try:
            running = Running(folder, link, link.start())
            yield running
            running.control.close()
        finally:
            link.stop()
    assert processes(folder / "run") == {}
    assert superlink.read_link(folder / "run") is None


def test_its_doors_are_known_and_speak_tls_only(running: Running) -> None:
    assert superlink.read_link(running.folder / "run") == running.doors
    assert running.control.nodes() == {}
    for port in (running.doors.fleet, running.doors.control):
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(grpc.FutureTimeoutError):
            grpc.channel_ready_future(channel).result(timeout=2)


def test_keys_are_registered_and_unregistered(running: Running) -> None:
    kit = invite(running.folder, "north")
    control, key = running.control, public(kit)
    assert control.register(key)
    assert control.register(key)  # once more does no harm
    [(node, seen)] = control.nodes().items()
    assert (seen.public_key, seen.online) == (key, False)
    assert activate(kit, running.doors.fleet, running.ca) == node
    assert control.nodes()[node].online
    with_names = open_link(running.folder)
    assert {n: (s.name, s.online) for n, s in with_names.nodes().items()} == {node: ("north", True)}
    register.revoke(running.folder, "north")
    assert with_names.nodes()[node].name is None  # at once, before the SuperLink knows
    control.unregister(key)
    assert (control.nodes(), with_names.nodes()) == ({}, {})
    assert not control.register(key)  # not with this SuperLink
    with pytest.raises(grpc.RpcError, match="No SuperNode found"):
        activate(kit, running.doors.fleet, running.ca)
    with_names.close()


def test_what_is_no_key_is_refused(running: Running) -> None:
    with pytest.raises(NoLink, match="public key"):
        running.control.register(b"no key")


def test_refused_connections_are_in_its_log(running: Running, tmp_path: Path) -> None:
    stranger = invite(federation(tmp_path / "other"), "stranger")
    port = running.doors.fleet
    with pytest.raises(grpc.RpcError, match="No SuperNode found"):
        activate(stranger, port, running.ca)
    until(lambda: running.says("Activation failed: No SuperNode found"))
    with pytest.raises(grpc.RpcError, match="CERTIFICATE_VERIFY_FAILED"):
        activate(stranger, port, stranger.ca)
    until(lambda: running.says(f"with ipv4:127.0.0.1:{port} failed"))
    with pytest.raises(grpc.RpcError):
        activate(stranger, port, running.ca, "other.example.org")
    until(lambda: running.says("No match found for server name: other.example.org"))
    log = (running.folder / "run" / "logs" / "superlink.log").read_text()
    assert "Activation failed" in log
    assert "ListNodes" not in log  # one line a poll would bury the rest


def test_a_run_carries_no_code_and_starts_what_is_installed(running: Running) -> None:
    run = running.folder / "run"
    (run / "overrides.json").write_text('["federation.rounds=2"]')
    (run / "hold").touch()
    number = running.control.start_run({"federation": str(running.folder)})
    until(lambda: (run / "starts").exists() and (run / "starts").read_text())
    assert not running.control.look_at(number).finished
    until(lambda: superlink.serverapp(run))
    assert (run / "starts").read_text() == f"{superlink.serverapp(run)}\n"
    (run / "hold").unlink()
    until(lambda: running.control.look_at(number).finished)
    assert running.control.look_at(number).completed
    (run / "fail").touch()
    number = running.control.start_run({"federation": str(running.folder)})
    until(lambda: running.control.look_at(number).finished)
    seen = running.control.look_at(number)
    assert not seen.completed
    assert "made to fail" in seen.details
    running.control.stop_run(number)  # has ended already


def test_a_bundle_is_a_name_and_nothing_else() -> None:
    small = bundle({"federation": "somewhere"})
    assert len(small.content) < 1000
    assert small.hash_str == bundle({"federation": "elsewhere"}).hash_str


def test_a_taken_port_is_named_with_who_has_it(tmp_path: Path) -> None:
    folder = federation(tmp_path / "federation")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for bind in ("127.0.0.1", "0.0.0.0"):
            with pytest.raises(UserError, match=rf"port {port} is in use by .*\(pid {os.getpid()}\)"):
                SuperLink(folder, bind, port).start()
    with pytest.raises(UserError, match=r"server.bind = '192.0.2.1'"):
        SuperLink(folder, "192.0.2.1", port).start()
    with pytest.raises(UserError, match=r"server.bind = 'no such host'"):
        SuperLink(folder, "no such host", port).start()
    assert processes(folder / "run") == {}


def test_a_superlink_that_cannot_start_says_why(tmp_path: Path) -> None:
    folder = federation(tmp_path / "federation")
    (folder / "pki" / "server.key").write_text("damaged")
    link = SuperLink(folder, "127.0.0.1", free_port())
    with pytest.raises(UserError, match=r"the SuperLink does not start \(.+\): see .*superlink.log"):
        link.start()
    assert not link.alive
    with pytest.raises(NoLink, match="no server is running"):
        open_link(folder)


def test_what_a_killed_guard_leaves_is_ended_by_the_next_start(tmp_path: Path) -> None:
    folder = federation(tmp_path / "federation")
    link = SuperLink(folder, "127.0.0.1", free_port())
    link.start()
    try:
        [guard] = [pid for pid, name in processes(folder / "run").items() if name == "guard.py"]
        os.kill(guard, signal.SIGKILL)
        until(lambda: not link.alive)
        until(lambda: "flower-superlink" not in processes(folder / "run").values())  # the kernel's doing
        link.start()
        assert link.alive
        programs = ["flower-superexec", "flower-superlink"]
        until(
            lambda: sorted(processes(folder / "run").values())[:2] == programs
        )  # doors open before the first is there
    finally:
        link.stop()
    assert processes(folder / "run") == {}
