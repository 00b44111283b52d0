"""A real SuperLink for tests: TLS, node authentication, free ports, everything it writes in one folder.

It starts no ServerApp. Instead `run` claims a run as a ServerApp process does and gives the test the very Grid that a
ServerApp works with, so a test sends messages to nodes and sees what comes back.
"""

import datetime
import ipaddress
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto, run_from_proto
from flwr.proto.appio_pb2 import (
    ClaimTaskRequest,
    PullPendingTasksRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, StartRunRequest, UnregisterNodeRequest
from flwr.proto.control_pb2_grpc import ControlStub
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.serverappio_pb2_grpc import ServerAppIoStub
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import AppIoTokenClientInterceptor
from flwr.superlink.grid import GrpcGrid

DAY = datetime.timedelta(days=1)
BUNDLE = """
[project]
name = "driven"
version = "1.0.0"

[tool.flwr.app]
publisher = "tests"

[tool.flwr.app.components]
serverapp = "none:app"
clientapp = "none:app"

[tool.flwr.app.config]
"""


def until(condition: Callable[[], object], what: str, seconds: float = 90.0) -> None:
    """Wait until it holds; the machine may be busy, so generously."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for: {what}"
        time.sleep(0.05)


@dataclass(frozen=True)
class SiteKit:
    """What a node needs of a kit."""

    host: str
    port: int
    ca: bytes
    name: str
    key: bytes

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def private_key(self) -> ec.EllipticCurvePrivateKey:
        key = load_pem_private_key(self.key, None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return key

    def public_key(self) -> bytes:
        return self.private_key().public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def new_key() -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


class Authority:
    """Certifies servers."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tests")])
        builder = _builder(self._name, self._key.public_key(), -1, 30).issuer_name(self._name)
        made = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        self.pem = made.sign(self._key, SHA256()).public_bytes(Encoding.PEM)

    def certify(self, *names: str, begin: float = -1.0, end: float = 30.0) -> tuple[bytes, bytes]:
        """Certificate and key for a server of these names, valid between these days from now."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
        alternatives = x509.SubjectAlternativeName([_alternative(name) for name in names])
        builder = _builder(subject, key.public_key(), begin, end).issuer_name(self._name)
        certificate = builder.add_extension(alternatives, critical=False).sign(self._key, SHA256())
        secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return certificate.public_bytes(Encoding.PEM), secret


def _builder(subject: x509.Name, key: ec.EllipticCurvePublicKey, begin: float, end: float) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(subject).public_key(key)
    return (
        builder.serial_number(x509.random_serial_number())
        .not_valid_before(now + begin * DAY)
        .not_valid_after(now + end * DAY)
    )


def _alternative(name: str) -> x509.GeneralName:
    with suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(name))
    return x509.DNSName(name)


def free_port() -> int:
    """Not of those that the system gives to whoever asks for any: it is still free when a server starts later."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class SuperLink:
    """Use it as a context: nothing of it is left afterwards. It may be stopped and started again, on the same ports."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority()
        self.certificate = self.authority.certify("localhost")
        self.port, self._control_port, self._app_port = free_port(), free_port(), free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._channels: list[grpc.Channel] = []

    def __enter__(self) -> "SuperLink":
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def kit(self, name: str, *, host: str = "localhost", registered: bool = True) -> SiteKit:
        """A kit with a key of its own, known to the SuperLink or not."""
        made = SiteKit(host, self.port, self.authority.pem, name, new_key())
        if registered:
            self.register(made)
        return made

    def start(self, certificate: tuple[bytes, bytes] | None = None) -> None:
        pki = {"ca.crt": self.authority.pem}
        pki["server.crt"], pki["server.key"] = certificate or self.certificate
        for name, content in pki.items():
            (self.folder / name).write_bytes(content)
        command = [str(Path(sys.executable).with_name("flower-superlink")), "--enable-supernode-auth"]
        command += ["--ssl-ca-certfile", "ca.crt", "--ssl-certfile", "server.crt", "--ssl-keyfile", "server.key"]
        command += ["--isolation", "process", "--disable-runtime-dependency-installation"]
        for api, port in (("fleet", self.port), ("control", self._control_port), ("serverappio", self._app_port)):
            command += [f"--{api}-api-address", f"127.0.0.1:{port}"]
        quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_HOME": str(self.folder)}
        with (self.folder / "superlink.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=self.folder, env={**os.environ, **quiet}, stdout=log, stderr=log, start_new_session=True
            )
        until(self._answers, "the SuperLink to listen")

    def stop(self, how: signal.Signals = signal.SIGKILL) -> None:
        while self._channels:
            self._channels.pop().close()
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(30)
            self._process = None

    def log(self) -> str:
        return (self.folder / "superlink.log").read_text(encoding="utf-8", errors="replace")

    def register(self, kit: SiteKit) -> None:
        self._control.RegisterNode(RegisterNodeRequest(public_key=kit.public_key()), timeout=30)

    def unregister(self, kit: SiteKit) -> None:
        self._control.UnregisterNode(UnregisterNodeRequest(node_id=self.node(kit).node_id), timeout=30)

    def node(self, kit: SiteKit) -> NodeInfo:
        """What the SuperLink knows of the node with this key."""
        listed = self._control.ListNodes(ListNodesRequest(), timeout=30).nodes_info
        (found,) = [node for node in listed if node.public_key == kit.public_key()]
        return found

    def online(self, kit: SiteKit) -> bool:
        return bool(self.node(kit).status == "online")

    @contextmanager
    def run(self) -> Iterator[GrpcGrid]:
        """The Grid of a new run, as its ServerApp has it; the run is completed afterwards."""
        bundle, _ = build_fab_from_files({"pyproject.toml": BUNDLE.encode()})
        started = self._control.StartRun(StartRunRequest(fab=fab_to_proto(Fab("", bundle, {}))), timeout=30)
        address = f"127.0.0.1:{self._app_port}"
        with grpc.insecure_channel(address) as channel:
            open_stub = ServerAppIoStub(channel)
            tasks = open_stub.PullPendingTasks(PullPendingTasksRequest(), timeout=30).tasks
            (task,) = [task for task in tasks if task.run_id == started.run_id]
            token = open_stub.ClaimTask(ClaimTaskRequest(task_id=task.task_id), timeout=30).token
            # not the grid's own stub for what follows: that one repeats for ever what a lost SuperLink never answers
            stub = ServerAppIoStub(grpc.intercept_channel(channel, AppIoTokenClientInterceptor(token)))
            grid = GrpcGrid(address, insecure=True, token=token)
            grid.set_run(run_from_proto(stub.PullTaskInput(PullTaskInputRequest(), timeout=30).run))
            done = threading.Event()

            def beat() -> None:
                while not done.wait(5.0):
                    with suppress(grpc.RpcError, ValueError):
                        stub.SendTaskHeartbeat(SendTaskHeartbeatRequest(), timeout=5)

            heart = threading.Thread(target=beat, daemon=True)
            heart.start()
            try:
                yield grid
            finally:
                done.set()
                heart.join()
                with suppress(grpc.RpcError):  # a run is lost when the SuperLink is started again
                    stub.PushTaskOutput(PushTaskOutputRequest(sub_status="completed"), timeout=30)
                grid.close()

    @property
    def _control(self) -> ControlStub:
        credentials = grpc.ssl_channel_credentials(self.authority.pem)
        self._channels.append(grpc.secure_channel(f"localhost:{self._control_port}", credentials))
        return ControlStub(self._channels[-1])

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log()
        return all(_listening(port) for port in (self.port, self._control_port, self._app_port))


def _listening(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(5)
        return probe.connect_ex(("127.0.0.1", port)) == 0
