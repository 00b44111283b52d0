"""Whom a running server does not let in: each is told why in one line, and the operator finds each in server.log.

Server, SuperLink and supervisor are real, and a stand-in plays the ServerApp. That the node itself says the right
thing to each wrong certificate is in test_node.py; here it is what the server makes of them.
"""

import re
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.fleet_pb2_grpc import FleetStub

from client.fleet_api import FleetApi
from client.node import Node
from common import pki, register
from common.errors import UserError
from common.kit import Kit
from tests.network.standin import environment
from tests.network.study import FEDLOGE, Study
from tests.network.superlink import until

BROKE_OFF = (
    r"WARNING +a connection from 127\.0\.0\.1 broke off while TLS began \(.*{why}.*\): a site that does not accept"
)
UNKNOWN = r"WARNING +a site was refused: its key is not registered here, or was revoked or has expired"
SHORT = """
from datetime import timedelta
from common import pki
from fedloge.main import main

def certify(folder, host):
    '''A certificate that ends in a moment, when the server is about to use it.'''
    now = pki.now
    pki.now = lambda: now() - timedelta(days=365 * pki.SERVER_YEARS) + timedelta(seconds=60)
    pki.renew_server(folder, host)
    pki.now = now
    return ""

pki.ready_server = certify
main()
"""
pytestmark = pytest.mark.timeout(400)  # a machine that may be busy, and clients that wait before they give up


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Study]:
    monkeypatch.setenv("PYTHONPATH", environment(tmp_path / "standin")["PYTHONPATH"])
    with Study(tmp_path / "place", {}, ("north", "south")) as made:
        made.run.mkdir()
        (made.run / "hold").touch()  # it stays in round 1
        yield made


def serve(study: Study) -> None:
    study.serve("--rounds", "2")
    opened(study)


def opened(study: Study) -> None:
    until(lambda: study.status().get("phase") == "training", "the server to be open")


def refused(kit: Kit, folder: Path) -> str:
    """What a node with this kit says before it gives up, in one line."""
    with pytest.raises(UserError) as caught:
        Node(kit, folder, lambda message, _: message, {}, patience=1.0).run()
    text = str(caught.value)
    assert "\n" not in text
    return text


def logged(study: Study, pattern: str) -> str:
    """The line of server.log that has it: there must be one, and only one."""
    until(lambda: any(re.search(pattern, line) for line in study.log()), f"a line with {pattern!r}")
    (line,) = [line for line in study.log() if re.search(pattern, line)]
    return line


def failed_handshakes(study: Study) -> int:
    """Those at the door for sites, as superlink.log has them."""
    place = f":{study.port} failed: "
    return sum("TLS handshake of" in line and place in line for line in study.log("superlink"))


def test_each_is_refused_for_what_it_is_and_logged(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenSSL sends its reason in a way that the SuperLink cannot read in TLS 1.3, so server.log knows that a
    certificate was not accepted, and the site knows why."""
    serve(study)
    address = f"localhost:{study.port}"

    # a kit of another federation at the same address
    with Study(tmp_path / "other", {}, ("north",)) as other:
        text = refused(other.redirect("north", port=study.port), tmp_path / "foreign")
    assert text.startswith(f"{address} is not the server of this kit: its certificate is from another authority")
    logged(study, BROKE_OFF.format(why=""))

    # a name that is not in the certificate
    name, lookup, before = "fl.example.org", socket.getaddrinfo, failed_handshakes(study)
    with monkeypatch.context() as patch:
        patch.setattr(
            socket, "getaddrinfo", lambda host, *r, **k: lookup("localhost" if host == name else host, *r, **k)
        )
        text = refused(study.redirect("north", host=name), tmp_path / "misnamed")
    assert text.startswith(f"the certificate of {name}:{study.port} is not made out to {name}: the operator must")
    logged(study, f"somebody connected to this server as '{name}', which its certificate does not cover: if sites use")
    until(lambda: failed_handshakes(study) > before, "the handshake in superlink.log")

    # no TLS
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
        FleetStub(channel).PullMessages(PullMessagesRequest(), timeout=30)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    logged(study, BROKE_OFF.format(why="WRONG_VERSION_NUMBER"))

    # a key that this federation's own authority certified, but that is not in the register
    shutil.copytree(study.folder / "pki", tmp_path / "copy" / "pki")
    for place in ("sites", "kits"):
        (tmp_path / "copy" / place).mkdir()
    text = refused(pki.issue(tmp_path / "copy", "stranger", None, study.plan), tmp_path / "stranger")
    assert text.startswith(f"the server at {address} does not accept the key of stranger: it was revoked, or replaced")
    logged(study, UNKNOWN)

    # and nobody of them disturbed anything
    assert "starting again" not in "".join(study.log())
    assert study.status()["phase"] == "training"


def test_a_site_that_is_revoked_while_it_runs_ends_and_the_others_do_not(study: Study) -> None:
    serve(study)
    north, south = study.join("north"), study.join("south")
    for name in ("north", "south"):
        until(lambda name=name: f"connected to localhost:{study.port} as {name}" in study.said(name), f"{name} to join")
        logged(study, f"INFO +{name} is online")
    register.revoke(study.folder, "south")
    until(lambda: south.poll() is not None, "the end of the revoked site", 150.0)
    assert south.returncode == 1
    last = study.said("south").splitlines()[-1]
    assert f"fedloge: the server at localhost:{study.port} does not accept the key of south: it was revoked" in last
    assert "Traceback" not in study.said("south")
    logged(study, r"INFO +south is shut out: revoked on \d{4}-\d\d-\d\d")
    logged(study, UNKNOWN)
    assert north.poll() is None
    north.send_signal(signal.SIGTERM)


def test_a_server_whose_certificate_ends_while_it_runs(study: Study, tmp_path: Path) -> None:
    short = study.start("server", FEDLOGE[0], "-c", SHORT, "server", study.folder, "--rounds", "2")
    opened(study)
    certificate = x509.load_pem_x509_certificate(pki.server_files(study.folder)[1].read_bytes())
    until(lambda: register.now() > certificate.not_valid_after_utc, "the end of the certificate")
    text = refused(study.kits["north"], tmp_path / "north")
    assert text.startswith(f"the certificate of localhost:{study.port} has expired: the operator must renew it")
    logged(study, BROKE_OFF.format(why=""))
    assert short.poll() is None

    short.send_signal(signal.SIGTERM)  # what the message asks for: the operator starts it again
    until(lambda: short.poll() is not None, "the end of the server")
    (study.run / "status.json").unlink()
    serve(study)
    assert "the server's certificate was renewed: it ends on" in study.said("server")
    api = FleetApi(study.kits["north"])
    try:
        api.activate()
        logged(study, "INFO +north is online")
        api.deactivate()
    finally:
        api.close()
