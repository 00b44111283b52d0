"""`fedloge check` against a real SuperLink, and against all that can stand in its place."""

import json
import re
import signal
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from client import probe
from client.fleet_api import FleetApi
from common import deployment, keys, pki, register
from common.deployment import Deployment
from common.kit import open_kit
from fedloge import main, serve
from server.flower_link import Control
from server.superlink import SuperLink, processes
from tests.network.superlink import free_port
from tests.network.test_reach import listening, tls

Lines = list[tuple[str, str, str]]  # name, result, text
Check = Callable[..., tuple[int, Lines]]
pytestmark = pytest.mark.timeout(400)  # a machine that may be busy


class Federation:
    """A folder, its SuperLink, and the sites that are registered there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        words = ["--host", f"localhost:{free_port()}", "--classes", "cat,dog,fox"]
        assert main.run(["init", str(folder), *words]) == 0
        self.plan = deployment.load(folder / "federation.toml")
        self.port = self.plan.server.port
        self.log = folder / "run" / "logs" / "superlink.log"
        self._link = SuperLink(folder, "0.0.0.0", self.port)
        self.control: Control

    def start(self) -> None:
        (self.folder / "run").mkdir()
        self.control = Control(self.folder, self._link.start().control)

    def stop(self) -> None:
        self.control.close()
        self._link.stop()

    def invite(self, name: str, plan: Deployment | None = None, *, admit: bool = True) -> Path:
        pki.issue(self.folder, name, None, plan or self.plan)
        path = self.folder / "kits" / f"{name}.kit"
        if admit:
            assert self.control.register(self.key(path))
        return path

    def key(self, kit: Path) -> bytes:
        return keys.spki(open_kit(kit).private_key().public_key())

    def online(self, kit: Path) -> bool:
        (seen,) = [node for node in self.control.nodes().values() if node.public_key == self.key(kit)]
        return seen.online

    def elsewhere(self, name: str, port: int) -> Path:
        """The kit of a site that is sent to another port of this machine."""
        return self.invite(name, replace(self.plan, server=replace(self.plan.server, port=port)), admit=False)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    before = signal.getsignal(signal.SIGTERM)
    made = Federation(tmp_path_factory.mktemp("check") / "study")
    made.start()
    yield made
    made.stop()
    assert processes(made.folder / "run") == {}
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def check(capsys: pytest.CaptureFixture[str]) -> Check:
    def checked(*words: object) -> tuple[int, Lines]:
        capsys.readouterr()
        code = main.run(["check", *map(str, words), "--json"])
        table = json.loads(capsys.readouterr().out)
        assert table["ok"] == (code == 0)
        return code, [(line["name"], line["result"], line["text"]) for line in table["checks"]]

    return checked


@contextmanager
def tunnel() -> Iterator[tuple[int, list[str]]]:
    """A web proxy that connects to what it is asked for; its port, and what it was asked."""
    asked: list[str] = []
    ends: list[socket.socket] = []
    connect = socket.create_connection  # the machine of the proxy is not the site's

    def pump(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while content := source.recv(2**16):
                target.sendall(content)
            target.shutdown(socket.SHUT_WR)

    def serve(listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                asked.append(client.recv(4096).decode().splitlines()[0])
                port = int(re.findall(r":(\d+)", asked[-1])[0])
                target = connect(("127.0.0.1", port))
                ends.extend((client, target))
                client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                for pair in ((client, target), (target, client)):
                    threading.Thread(target=pump, args=pair, daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        yield listener.getsockname()[1], asked
        listener.shutdown(socket.SHUT_RDWR)
    for end in ends:
        end.close()


def found(lines: Lines, name: str, result: str) -> str:
    """The text of the one line of this name and result."""
    texts = [text for n, r, text in lines if (n, r) == (name, result)]
    assert len(texts) == 1, lines
    return texts[0]


def server_context(folder: Path) -> ssl.SSLContext:
    _, certificate, key = pki.server_files(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    context.set_alpn_protocols(["h2"])
    return context


def clock(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Of this machine, as far as the site's signatures go."""
    monkeypatch.setattr(probe, "now", lambda: datetime.now(UTC) + timedelta(seconds=seconds))


def test_a_site_that_can_take_part(federation: Federation, check: Check) -> None:
    code, lines = check(federation.invite("north"))
    assert code == 0, lines
    where = f"localhost:{federation.port}"
    assert found(lines, "port", "PASS") == f"{where} is open"
    assert found(lines, "tls", "PASS") == f"{where} answers, and its certificate is right"
    assert found(lines, "key", "PASS") == f"the server at {where} accepts the key of north"
    assert found(lines, "clock", "PASS") == "agrees with the server's"


def test_a_running_client_is_not_disturbed(federation: Federation, check: Check) -> None:
    kit = federation.invite("busy")
    api = FleetApi(open_kit(kit))
    try:
        api.activate()
        nodes = federation.control.nodes()
        code, lines = check(kit)
        assert (code, found(lines, "key", "PASS")) == (0, f"the server at localhost:{federation.port} accepts the key "
                                                          "of busy")  # fmt: skip
        assert federation.control.nodes() == nodes
        assert federation.online(kit)
        api.heartbeat()
        api.deactivate()
        check(kit)
        assert not federation.online(kit), "a check does not bring a site online"
    finally:
        api.close()


def test_a_key_the_server_does_not_know(federation: Federation, check: Check) -> None:
    kit = federation.invite("stranger", admit=False)
    code, lines = check(kit)
    assert code == 1
    text = found(lines, "key", "FAIL")
    assert text.startswith(
        f"the server at localhost:{federation.port} does not know the key of stranger: it was revoked"
    )
    assert found(lines, "clock", "PASS")
    assert federation.control.register(federation.key(kit))
    assert check(kit)[0] == 0
    register.revoke(federation.folder, "stranger")
    federation.control.unregister(federation.key(kit))
    assert "it was revoked, has expired or was replaced" in found(check(kit)[1], "key", "FAIL")


@pytest.mark.parametrize(
    ("seconds", "result", "said"),
    [
        (600, "FAIL", "10 minutes ahead of the server's, 5 s ahead to 5 minutes behind are allowed: set this machine"),
        (-600, "FAIL", "10 minutes behind the server's, 5 s ahead"),
        (-3600, "FAIL", "60 minutes behind the server's"),
        (86400, "FAIL", "more than 2 hours from the server's, 5 s ahead to 5 minutes behind are allowed: set"),
        (-86400, "FAIL", "more than 2 hours from"),
        (-303, "WARN", "5 minutes behind the server's, 5 s ahead to 5 minutes behind are allowed"),
        (-30, "PASS", "seconds behind"),
    ],
)
def test_a_clock_that_is_off(
    federation: Federation, check: Check, monkeypatch: pytest.MonkeyPatch, seconds: float, result: str, said: str
) -> None:
    kit = federation.folder / "kits" / "clocks.kit"
    if not kit.exists():
        federation.invite("clocks")
    clock(monkeypatch, seconds)
    _, lines = check(kit)
    text = found(lines, "clock", result)
    if said == "seconds behind":
        assert re.fullmatch(r"(29|3[01]) s behind the server's", text)
    else:
        assert text.startswith(said)
    if abs(seconds) <= 7200:  # what the clocks differ by is found, and the key can be asked about all the same
        assert found(lines, "key", "PASS")
    else:
        assert found(lines, "key", "SKIP") == "the server looks at it only when the clocks agree"


def test_a_server_of_another_federation(federation: Federation, check: Check, tmp_path: Path) -> None:
    assert main.run(["init", str(tmp_path / "other"), "--host", "localhost", "--classes", "cat,dog"]) == 0
    with listening(server_context(tmp_path / "other")) as port:
        code, lines = check(federation.elsewhere("foreign", port))
    assert code == 1
    assert "is not the server of this kit: its certificate is from another authority" in found(lines, "tls", "FAIL")
    assert found(lines, "port", "PASS")
    assert found(lines, "key", "SKIP") == "not shown to the server, as the server is not reached"


def test_a_server_under_a_name_it_does_not_have(federation: Federation, check: Check) -> None:
    server = replace(federation.plan.server, host="127.0.0.2")  # it listens there as well
    kit = federation.invite("lost", replace(federation.plan, server=server), admit=False)
    text = found(check(kit)[1], "tls", "FAIL")
    assert text.startswith(f"the certificate of 127.0.0.2:{federation.port} is not made out to 127.0.0.2: the operator")


def test_a_certificate_that_has_expired(
    federation: Federation, check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pki/ca.crt", "pki/ca.key"):
        (tmp_path / "pki").mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((federation.folder / name).read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr("common.pki.now", lambda: register.now() - timedelta(days=4 * 365))
        pki.renew_server(tmp_path, "localhost")
    with listening(server_context(tmp_path)) as port:
        lines = check(federation.elsewhere("late", port))[1]
    assert "has expired: the operator must renew it" in found(lines, "tls", "FAIL")


def test_other_services(federation: Federation, check: Check, tmp_path: Path) -> None:
    with listening(None, b"SSH-2.0-OpenSSH_9.6\r\n") as port:
        lines = check(federation.elsewhere("plain", port))[1]
    assert "does not speak TLS: is this the port that sites connect to?" in found(lines, "tls", "FAIL")
    _, certificate, key = pki.server_files(federation.folder)
    with listening(tls(tmp_path, (certificate.read_bytes(), key.read_bytes()), "http/1.1")) as port:
        lines = check(federation.elsewhere("web", port))[1]
    assert "speaks TLS but not gRPC" in found(lines, "tls", "FAIL")


def test_a_server_that_speaks_grpc_of_its_own(federation: Federation, check: Check) -> None:
    """The right certificate and protocol, and then nothing sensible: the connection ends after every handshake."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        context = server_context(federation.folder)

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with suppress(OSError):
                        context.wrap_socket(connection, server_side=True).close()

        thread = threading.Thread(target=serve)
        thread.start()
        lines = check(federation.elsewhere("odd", listener.getsockname()[1]))[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert found(lines, "tls", "PASS")
    assert "does not answer as it should (" in found(lines, "key", "FAIL")
    assert found(lines, "clock", "SKIP") == "not compared with the server's, as it does not answer"


def test_through_a_proxy(federation: Federation, check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the only way out is a web proxy, gRPC takes it, and that the direct way is closed is no failure."""
    kit = federation.invite("inside")
    with tunnel() as (port, asked), monkeypatch.context() as patch:
        patch.setenv("https_proxy", f"http://127.0.0.1:{port}")
        assert check(kit)[0] == 0
        assert asked == [f"CONNECT localhost:{federation.port} HTTP/1.1"]
        patch.setattr("socket.create_connection", _refused)
        code, lines = check(kit)
        assert code == 0, lines
        assert found(lines, "port", "WARN").endswith(
            "but connections go through the proxy of https_proxy here; see `key`"
        )
        assert found(lines, "key", "PASS")
        patch.setenv("no_proxy", "localhost")
        assert found(check(kit)[1], "port", "FAIL")


def _refused(*_: object) -> socket.socket:
    raise ConnectionRefusedError


def test_the_folder_of_a_server_that_runs(federation: Federation, check: Check) -> None:
    federation.invite("one")
    with serve._alone(federation.folder / "run"):  # as `fedloge server` has it
        code, lines = check(federation.folder)
        text = found(lines, "port", "PASS")
        assert re.fullmatch(rf"the server runs \(pid \d+\) and listens at {federation.port}; it answers", text)
        assert code == 0 or found(lines, "kits", "FAIL")  # kits of other ports were made by other tests
        path = federation.folder / "federation.toml"
        before = path.read_text()
        other = free_port()
        path.write_text(before.replace(f"port = {federation.port}", f"port = {other}"))
        text = found(check(federation.folder)[1], "port", "FAIL")
        path.write_text(before)
        assert f"listens at {federation.port}, and server.port is {other}: start it again, or put" in text
        link = federation.folder / "run" / "link.json"
        link.rename(link.with_suffix(".away"))
        assert "is only starting: check again in a moment" in found(check(federation.folder)[1], "port", "WARN")
        link.with_suffix(".away").rename(link)
    text = found(check(federation.folder)[1], "port", "FAIL")  # without the lock it is somebody else's
    assert text.startswith(f"port {federation.port} is in use by ")


def test_a_server_that_runs_and_does_not_answer(federation: Federation, check: Check) -> None:
    _, certificate, _ = pki.server_files(federation.folder)
    ca = certificate.with_name("ca.crt")
    before = ca.read_bytes()
    with serve._alone(federation.folder / "run"):
        other = Federation(federation.folder.parent / "other")
        ca.write_bytes((other.folder / "pki" / "ca.crt").read_bytes())
        try:
            text = found(check(federation.folder)[1], "port", "FAIL")
        finally:
            ca.write_bytes(before)
    assert "; it answers" not in text
    assert "but 127.0.0.1:" in text
    assert "is not the server of this kit" in text
