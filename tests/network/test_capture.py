"""What is on the line between a site and the server: gRPC in HTTP/2 in TLS, and of a site only what it must give.

A site takes part in a real federation through somebody who keeps every byte. That one reads along twice: on the line,
as anybody could, and inside of TLS, for which it has to be given the server's own key.
"""

import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from common import parts, pki
from common.kit import Kit
from tests.network.study import Study
from tests.network.superlink import until
from tests.network.wiretap import APPLICATION, HANDSHAKE, PREFACE, Inside, Wiretap, records

NAME = "st-olavs-hospital"
CALLS = ("ActivateNode", "PullMessages", "PullObject", "ConfirmMessageReceived", "PushMessages", "PushObject")
pytestmark = pytest.mark.timeout(600)  # several processes that import torch, on a machine that may be busy


@dataclass(frozen=True)
class Captured:
    study: Study
    kit: Kit
    line: list[bytes]  # what went each way in every connection of the site, as anybody sees it
    inside: Inside
    offered: list[str | None]  # what a client of our own got when it asked for HTTP/2


def server_context(study: Study) -> ssl.SSLContext:
    """As the server of the federation."""
    _, certificate, key = pki.server_files(study.folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    context.set_alpn_protocols(["h2"])
    return context


def site_context(study: Study) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=pki.server_files(study.folder)[0])
    context.set_alpn_protocols(["h2"])
    return context


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Captured]:
    settings = {"federation.rounds": 2, "federation.min_clients": 1, "evaluation.every": 1}
    with (
        Study(tmp_path_factory.mktemp("capture") / "place", settings, (NAME,)) as study,
        Wiretap(study.port, server_context(study), site_context(study)) as inside,
        Wiretap(inside.port) as line,
    ):
        kit = study.redirect(NAME, port=line.port)
        server = study.serve("--json")
        until((study.run / "link.json").exists, "the server to be open")
        offered = [asked(study, study.port), asked(study, line.port)]
        mark = len(line.talks)
        site = study.join(NAME)
        for name, child in {"server": server, NAME: site}.items():
            study.finish(child, name, 400.0)
        assert [event["sites"] for event in study.events()] == [[NAME]] * 2
        ways = [bytes(way) for talk in line.talks[mark:] for way in (talk.up, talk.down)]
        yield Captured(study, kit, ways, Inside.of([talk for talk in inside.talks if talk.up]), offered)


def asked(study: Study, port: int) -> str | None:
    """The protocol that is agreed on inside of TLS."""
    context = site_context(study)
    with (
        socket.create_connection(("127.0.0.1", port), 30) as connection,
        context.wrap_socket(connection, server_hostname="localhost") as secured,
    ):
        assert secured.version() == "TLSv1.3"
        return secured.selected_alpn_protocol()


def test_on_the_line_there_is_nothing_but_tls(captured: Captured) -> None:
    seen = [list(records(way)) for way in captured.line]
    for way in seen:
        assert way[0][0] == HANDSHAKE
        assert {version for _, version, _ in way} <= {b"\x03\x01", b"\x03\x03"}  # as TLS 1.3 has it on its records
        assert {kind for kind, _, _ in way} <= {20, 21, HANDSHAKE, APPLICATION}
    assert all(b"\x02h2" in way[0][2] for way in seen[::2])  # what the site asks for is the last that one can read
    carried = sum(len(body) for way in seen for kind, _, body in way if kind == APPLICATION)
    assert carried > 0.9 * sum(map(len, captured.line))
    assert captured.offered == ["h2", "h2"]


def test_inside_of_tls_there_is_grpc_over_http2(captured: Captured) -> None:
    """`Inside` has seen to it that every connection begins with the preface of HTTP/2."""
    for call in CALLS:
        assert f"/flwr.proto.Fleet/{call}".encode() in captured.inside.headers
    assert b"application/grpc" in captured.inside.headers


def secrets(captured: Captured) -> dict[str, bytes]:
    """What an outsider must not see, and who can read inside of TLS does."""
    study = captured.study
    tensors, _ = parts.read(study.run / "checkpoints" / "round-000002.safetensors")
    found = {
        "preface": PREFACE,
        "calls": b"/flwr.proto.Fleet/",
        "name": NAME.encode(),
        "classes": b'"classes"',
        "settings": b'"federation"',
    }
    for name, t in tensors.items():
        if name.startswith(("part/backbone/", "part/global_head/", "part/frame/")):
            free = t[t != 0] if name.startswith("part/frame/") else t  # the zeros of a frame do not travel
            found[name] = free.numpy().tobytes()  # each is smaller than a chunk of an array, so it is in one piece
    assert len(found) == 5 + 7, sorted(tensors)
    return found


def test_what_is_said_is_for_the_two_of_them_only(captured: Captured) -> None:
    inside = PREFACE + captured.inside.headers + captured.inside.data
    for what, content in secrets(captured).items():
        assert content in inside, f"{what} should be inside, or this test looks for the wrong thing"
        assert not any(content in way for way in captured.line), what


def test_what_is_private_does_not_leave_the_site_even_inside_of_tls(captured: Captured) -> None:
    study, inside = captured.study, captured.inside.headers + captured.inside.data
    with np.load(study.data / f"{study.sites[NAME]}.npz") as data:
        images = data["images"]
    rows = {image[3:5].tobytes() for image in images if len(set(image[3:5].flat)) > 6}  # 16 pixels of each
    assert len(rows) > 50
    assert [row for row in rows if row in inside] == []
    kept = sorted(study.state(NAME).glob("store/*/round-*.safetensors"))
    assert len(kept) == 2
    for path in kept:
        tensors, _ = parts.read(path)
        assert tensors
        for name, t in tensors.items():
            assert t.numpy().tobytes() not in inside, f"{name} of {path}"
    assert captured.kit.key is not None
    scalar = captured.kit.private_key().private_numbers().private_value.to_bytes(32, "big")
    for secret in (captured.kit.key, scalar, str(study.place).encode(), f"{study.sites[NAME]}.npz".encode()):
        assert secret not in inside
