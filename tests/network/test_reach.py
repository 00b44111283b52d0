"""Every way of not reaching the server is told apart, with what to do about it."""

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from client.reach import Diagnosis, diagnose
from tests.network.superlink import Authority, free_port


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@contextmanager
def listening(context: ssl.SSLContext | None, answer: bytes = b"") -> Iterator[int]:
    """A server that does a TLS handshake, or without a context only says `answer`, and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(30)

        def serve() -> None:
            with suppress(OSError):
                connection, _ = server.accept()
                connection.settimeout(30)
                with connection:
                    if context is None:
                        connection.sendall(answer)
                        connection.recv(2**16)
                    else:
                        context.wrap_socket(connection, server_side=True).close()

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1]
        thread.join()


def tls(folder: Path, certificate: tuple[bytes, bytes], *protocols: str) -> ssl.SSLContext:
    paths = folder / "server.crt", folder / "server.key"
    for path, content in zip(paths, certificate, strict=True):
        path.write_bytes(content)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*paths)
    context.set_alpn_protocols(list(protocols) or ["h2"])
    return context


def test_a_server_that_is_right(authority: Authority, tmp_path: Path) -> None:
    for name, host in (("localhost", "localhost"), ("127.0.0.1", "127.0.0.1")):
        with listening(tls(tmp_path, authority.certify(name))) as port:
            assert diagnose(host, port, authority.pem) == Diagnosis(
                "ok", f"{host}:{port} answers, and its certificate is right"
            )


@pytest.mark.parametrize(
    ("name", "begin", "end", "said"),
    [
        ("localhost", -2, -1, "has expired"),
        ("localhost", 1, 2, "is not valid yet"),
        ("fl.example.org", -1, 1, "is not made out to localhost"),
        ("127.0.0.1", -1, 1, "is not made out to localhost"),
    ],
)
def test_a_certificate_that_is_wrong(
    authority: Authority, tmp_path: Path, name: str, begin: float, end: float, said: str
) -> None:
    with listening(tls(tmp_path, authority.certify(name, begin=begin, end=end))) as port:
        found = diagnose("localhost", port, authority.pem)
    assert (found.step, found.lasting) == ("tls", True)
    assert said in found.text
    assert f"localhost:{port}" in found.text


def test_an_address_that_is_not_in_the_certificate(authority: Authority, tmp_path: Path) -> None:
    with listening(tls(tmp_path, authority.certify("localhost"))) as port:
        found = diagnose("127.0.0.1", port, authority.pem)
    assert (found.step, found.lasting) == ("tls", True)
    assert "is not made out to 127.0.0.1" in found.text


def test_the_server_of_another_federation(authority: Authority, tmp_path: Path) -> None:
    with listening(tls(tmp_path, Authority().certify("localhost"))) as port:
        found = diagnose("localhost", port, authority.pem)
    assert (found.step, found.lasting) == ("tls", True)
    assert "from another authority" in found.text


def test_other_services(authority: Authority, tmp_path: Path) -> None:
    with listening(tls(tmp_path, authority.certify("localhost"), "http/1.1")) as port:
        found = diagnose("localhost", port, authority.pem)
    assert (found.step, found.lasting) == ("tls", False)
    assert "speaks TLS but not gRPC" in found.text
    with listening(None, b"SSH-2.0-OpenSSH_9.6\r\n") as port:
        found = diagnose("localhost", port, authority.pem)
    assert (found.step, found.lasting) == ("tls", False)
    assert "does not speak TLS" in found.text


def test_nobody_there(authority: Authority) -> None:
    port = free_port()
    found = diagnose("localhost", port, authority.pem)
    assert (found.step, found.lasting) == ("port", False)
    assert found.text == f"nothing listens at localhost:{port}: is the server running, and is this its port?"


def test_somebody_there_who_says_nothing(authority: Authority) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # the system takes the connection, nobody else does
        found = diagnose("localhost", server.getsockname()[1], authority.pem, timeout=0.5)
    assert (found.step, found.lasting) == ("tls", False)
    assert "takes the connection but does not answer" in found.text


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a..b", "x" * 70])
def test_a_name_that_is_not_found(authority: Authority, host: str) -> None:
    found = diagnose(host, 9092, authority.pem)
    assert (found.step, found.lasting) == ("name", False)
    assert found.text.startswith(f"{host} is not found")


@pytest.mark.parametrize("ca", [b"", b"nothing", b"\xff\xfe", b"-----BEGIN CERTIFICATE-----\nAAAA\n"])
def test_a_kit_without_a_readable_authority(ca: bytes) -> None:
    assert diagnose("localhost", 9092, ca).lasting
