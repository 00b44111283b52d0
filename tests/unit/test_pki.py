"""Keys, certificates and kits: who is let in by them, and every way in which they can be wrong told apart."""

import base64
import json
import os
import socket
import ssl
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from common import files, keys, kit, pki, register
from common.config import parse
from common.deployment import Deployment, ImagesConfig, ServerConfig
from common.errors import UserError
from common.kit import Kit, open_kit

HOST = "fl.example.org"
PLAN = Deployment(parse({"name": "study"}), ImagesConfig(classes=("cat", "dög")), ServerConfig(host=HOST, port=9200))
Move = Callable[[timedelta], None]


def new(folder: Path, host: str = HOST) -> Path:
    folder.mkdir()
    pki.init(folder, host, "study")
    return folder


def request(name: str, key: Any = None, **more: Any) -> bytes:
    made = x509.CertificateSigningRequestBuilder(**more).subject_name(keys.common_name(name))
    return made.sign(key or keys.new(), SHA256()).public_bytes(Encoding.PEM)


def flipped(pem: bytes) -> bytes:
    """The same certificate or request with another signature."""
    begin, *lines, end = pem.splitlines(keepends=True)
    der = bytearray(base64.b64decode(b"".join(lines)))
    der[-1] ^= 1
    return begin + base64.encodebytes(der) + end


def refusal(call: Any, *arguments: Any, **more: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **more)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def federation(tmp_path: Path) -> Path:
    return new(tmp_path / "study")


@pytest.fixture
def move(monkeypatch: pytest.MonkeyPatch) -> Move:
    """Set the clock of all that makes and opens kits to this long from now."""

    def shifted(by: timedelta) -> None:
        for module in ("register", "kit", "pki"):
            monkeypatch.setattr(f"common.{module}.now", lambda: datetime.now(UTC).replace(microsecond=0) + by)

    return shifted


# --- the server's certificate ------------------------------------------------------------------------------------


def handshake(certificate: Path, key: Path, ca: bytes, name: str) -> str:
    """Connect over TLS on the loopback to a server of this certificate, by `name`; "" or why it was refused."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection, suppress(OSError):  # the client may hang up
            context.wrap_socket(connection, server_side=True).close()

    client = ssl.create_default_context(cadata=ca.decode())
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        try:
            with socket.create_connection(listener.getsockname(), timeout=20) as plain:
                client.wrap_socket(plain, server_hostname=name).close()
        except ssl.SSLCertVerificationError as error:
            return error.verify_message
        finally:
            thread.join()
    return ""


def as_server(folder: Path, name: str) -> str:
    ca, certificate, key = pki.server_files(folder)
    return handshake(certificate, key, ca.read_bytes(), name)


@pytest.mark.parametrize("host", ["fl.example.org", "FL.Example.Org", "fl_server", "localhost", "10.1.2.3", "fd00::7"])
def test_the_server_is_known_by_its_host_and_from_its_own_machine(host: str, tmp_path: Path) -> None:
    folder = new(tmp_path / "study", host)
    for name in (host, "localhost", "127.0.0.1", "::1"):
        assert as_server(folder, name) == "", name


def test_the_server_is_not_known_by_another_name(federation: Path) -> None:
    assert "Hostname mismatch" in as_server(federation, "www.example.org")
    assert "IP address mismatch" in as_server(federation, "10.1.2.3")


def test_a_server_of_another_authority_is_refused(federation: Path, tmp_path: Path) -> None:
    _, certificate, key = pki.server_files(new(tmp_path / "other"))
    assert "unable to get local issuer" in handshake(certificate, key, (federation / "pki/ca.crt").read_bytes(), HOST)


def test_an_expired_server_is_refused(tmp_path: Path, move: Move) -> None:
    move(-timedelta(days=365 * pki.SERVER_YEARS + 2))
    assert as_server(new(tmp_path / "study"), HOST) == "certificate has expired"


def test_a_site_cannot_pose_as_the_server(federation: Path, tmp_path: Path) -> None:
    site = pki.issue(federation, "localhost", None, PLAN)
    assert site.key is not None
    (tmp_path / "crt").write_bytes(site.certificate)
    (tmp_path / "key").write_bytes(site.key)
    assert "purpose" in handshake(tmp_path / "crt", tmp_path / "key", site.ca, "localhost")


@pytest.mark.parametrize(
    "host", ["", "a b", "-x.org", "x-.org", "a..b", "a.", "*.example.org", "1.2.3.4.5", "10.0.0.999", "0.0.0.0", "::",
             "224.0.0.1", "fe80::1%eth0", "http://x.org", "x:80", "müller.de", "x" * 64, "a." * 127 + "b"],
)  # fmt: skip
def test_a_host_no_site_can_connect_to_is_refused(host: str) -> None:
    assert repr(host) in (said := refusal(pki.server_names, host)) or host in said


def test_a_new_host_gets_a_new_certificate_and_nothing_else_changes(federation: Path) -> None:
    site = pki.issue(federation, "a", None, PLAN)
    assert pki.ready_server(federation, HOST) == ""
    before = {path: path.read_bytes() for path in (federation / "pki").iterdir()}
    assert pki.ready_server(federation, "new.example.org") == "it does not cover new.example.org"
    changed = {path.name for path, content in before.items() if path.read_bytes() != content}
    assert changed == {"server.crt"}
    ca, certificate, key = pki.server_files(federation)
    assert handshake(certificate, key, site.ca, "new.example.org") == ""
    assert "mismatch" in as_server(federation, HOST)
    assert pki.ready_server(federation, "new.example.org") == ""
    assert keys.fingerprint(x509.load_pem_x509_certificate(ca.read_bytes())) == site.fingerprint


def test_a_certificate_that_ends_soon_is_renewed(federation: Path, move: Move) -> None:
    move(timedelta(days=365 * pki.SERVER_YEARS - 31))
    assert pki.ready_server(federation, HOST) == ""
    move(timedelta(days=365 * pki.SERVER_YEARS - 29))
    assert pki.ready_server(federation, HOST).startswith("it ends on 20")
    assert pki.ready_server(federation, HOST) == ""
    move(-timedelta(days=1))
    assert pki.ready_server(federation, HOST) == "it is not valid yet by this machine's clock"


def test_nothing_outlives_the_authority(federation: Path, move: Move) -> None:
    move(timedelta(days=365 * (pki.AUTHORITY_YEARS - 1), hours=-1))  # so that a slow test has a whole year left
    pki.renew_server(federation, HOST)
    ca, server = (x509.load_pem_x509_certificate(path.read_bytes()) for path in pki.server_files(federation)[:2])
    assert server.not_valid_after_utc == ca.not_valid_after_utc
    assert "use 1 to 365" in refusal(pki.issue, federation, "a", None, PLAN, days=366)
    move(timedelta(days=365 * pki.AUTHORITY_YEARS + 1))
    assert "its authority ended on" in refusal(pki.issue, federation, "a", None, PLAN)
    assert "its authority ended on" in refusal(pki.ready_server, federation, HOST)


@pytest.mark.parametrize("damage", ["server.crt", "signature", "server.key", "both", "missing", "other key", "other"])
def test_damage_to_the_servers_files_is_mended(damage: str, federation: Path, tmp_path: Path) -> None:
    _, certificate, key = pki.server_files(federation)
    match damage:
        case "server.crt":
            certificate.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
        case "server.key":
            key.write_text("")
        case "both":
            certificate.write_bytes(b"\xff" * 9)
            key.write_bytes(b"\xff" * 9)
        case "missing":
            certificate.unlink()
            key.unlink()
        case "other key":
            key.write_text(keys.pem(keys.new()))
        case "signature":
            certificate.write_bytes(flipped(certificate.read_bytes()))
        case "other":
            _, theirs, their_key = pki.server_files(new(tmp_path / "other"))
            theirs.rename(certificate)
            their_key.rename(key)
    assert pki.ready_server(federation, HOST) != ""
    assert as_server(federation, HOST) == ""
    assert mode(key) == 0o600
    assert pki.ready_server(federation, HOST) == ""


@pytest.mark.parametrize(
    "damage", ["no key", "broken key", "foreign key", "no certificate", "broken certificate", "flipped certificate"]
)
def test_without_a_whole_authority_nothing_is_certified(damage: str, federation: Path) -> None:
    path = federation / "pki" / ("ca.key" if damage.endswith("key") else "ca.crt")
    match damage.partition(" ")[0]:
        case "no":
            path.unlink()
        case "broken":
            path.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
        case "flipped":
            path.write_bytes(flipped(path.read_bytes()))
        case "foreign":
            path.write_text(keys.pem(keys.new()))
    before = sorted(federation.rglob("*"))
    assert path.name in refusal(pki.ready_server, federation, "new.example.org")
    assert refusal(pki.issue, federation, "a", None, PLAN)
    assert sorted(federation.rglob("*")) == before


# --- kits ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new(tmp_path_factory.mktemp("lasting") / "study")


@pytest.fixture(scope="module")
def whole(lasting: Path) -> Path:
    """A kit with its key inside."""
    pki.issue(lasting, "whole", None, PLAN)
    return lasting / "kits" / "whole.kit"


def test_a_complete_kit_holds_all_a_site_needs(federation: Path) -> None:
    made = pki.issue(federation, "hospital-a.1", None, PLAN)
    path = federation / "kits" / "hospital-a.1.kit"
    opened = open_kit(path)
    assert opened == made
    assert (opened.federation, opened.name, opened.classes) == ("study", "hospital-a.1", ("cat", "dög"))
    assert (opened.host, opened.port, opened.address) == (HOST, 9200, f"{HOST}:9200")
    assert opened.ca == (federation / "pki" / "ca.crt").read_bytes()
    assert opened.fingerprint == x509.load_pem_x509_certificate(opened.ca).fingerprint(SHA256()).hex()
    assert keys.spki(opened.private_key().public_key()) == register.registry(federation)["hospital-a.1"].public_key
    assert mode(path) == 0o600
    assert "PRIVATE" not in repr(opened)
    assert path.stat().st_size < 4096


def test_an_address_of_colons_is_in_brackets(federation: Path) -> None:
    assert (
        pki.issue(federation, "a", None, replace(PLAN, server=ServerConfig(host="fd00::7"))).address == "[fd00::7]:9092"
    )


def test_a_certificate_says_who_and_for_how_long_and_no_more(federation: Path) -> None:
    made = pki.issue(federation, "a", None, PLAN, days=30)
    certificate = x509.load_pem_x509_certificate(made.certificate)
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(made.ca))
    assert certificate.subject == keys.common_name("a")
    assert certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert abs(made.expires - datetime.now(UTC) - timedelta(days=30)) < timedelta(minutes=5)
    assert register.registry(federation)["a"].expires == made.expires
    assert certificate.not_valid_before_utc < datetime.now(UTC) - timedelta(minutes=50)  # clocks that are behind


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1()], ids=["P-256", "P-384"])
@pytest.mark.parametrize("place", ["study.key", "a.key", "elsewhere"])
def test_a_kit_finds_the_key_that_stayed_at_the_site(
    curve: ec.EllipticCurve, place: str, federation: Path, tmp_path: Path
) -> None:
    key = ec.generate_private_key(curve)
    path = tmp_path / "study.kit"
    made = pki.issue(federation, "a", request("a", key), PLAN, path=path)
    assert made.key is None
    assert "PRIVATE" not in path.read_text()
    assert "together with a.key" in refusal(made.private_key)
    missing = refusal(open_kit, path)
    assert f"{tmp_path / 'study.key'} or {tmp_path / 'a.key'}" in missing
    assert "--key" in missing
    (tmp_path / place).write_text(keys.pem(key))
    opened = open_kit(path, tmp_path / place if place == "elsewhere" else None)
    assert replace(opened, key=None) == made
    assert opened.private_key().private_numbers() == key.private_numbers()


def test_a_named_key_goes_before_the_one_inside(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "other.key").write_text(keys.pem(keys.new()))
    assert f"{tmp_path / 'other.key'}: is not the key of whole" in refusal(open_kit, whole, tmp_path / "other.key")
    assert "there is no such key" in refusal(open_kit, whole, tmp_path / "none.key")
    assert "cannot be read" in refusal(open_kit, whole, tmp_path)


def test_a_key_that_is_none_says_what_it_is(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.key"
    key = keys.new()
    locked = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    big = rsa.generate_private_key(65537, 2048).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    other = ec.generate_private_key(ec.SECP521R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for content, said in (
        (b"", "damaged or not a private key"),
        (keys.spki(key.public_key()), "damaged or not a private key"),
        (locked, "protected by a password"),
        (big, "not an elliptic-curve key"),
        (other, "not an elliptic-curve key"),
    ):
        path.write_bytes(content)
        assert f"{path}: is " in refusal(open_kit, whole, path)
        assert said in refusal(open_kit, whole, path)


def changed(whole: Path, tmp_path: Path, **values: Any) -> Path:
    table = {**json.loads(whole.read_text()), **values}
    path = tmp_path / "changed.kit"
    path.write_text(json.dumps({name: value for name, value in table.items() if value is not ...}))
    return path


OTHERS = [0, -1, True, 1.5, "", "x", None, [], {}, ["cat"], {"kit": 1}, ..., "\ud800", 2**70]


@pytest.mark.parametrize("name", [*kit.FIELDS, "key", "more"])
def test_no_field_can_be_changed(name: str, whole: Path, tmp_path: Path) -> None:
    for value in OTHERS:
        if (name, value) in (("key", ...), ("more", ...)) or (name == "key" and value is None):
            continue
        refusal(open_kit, changed(whole, tmp_path, **{name: value}))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"host": "evil.example.org"}, "was changed"),
        ({"port": 9093}, "was changed"),
        ({"classes": ["dög", "cat"]}, "was changed"),
        ({"fingerprint": "0" * 64}, "was changed"),
        ({"federation": "other"}, "was changed"),
        ({"name": "other"}, "was changed"),
        ({"signature": base64.b64encode(b"x" * 70).decode()}, "was changed"),
        ({"extra": 1}, "was changed"),
        ({"kit": 2}, "another version"),
        ({"kit": "1"}, "damaged or not a kit"),
        ({"name": "../../x"}, "damaged or not a kit"),
        ({"port": "9092"}, "damaged or not a kit"),
        ({"ca": "-----BEGIN CERTIFICATE-----"}, "damaged or not a kit"),
        ({"signature": "?"}, "damaged or not a kit"),
        ({"key": "abc"}, "not a private key"),
        ({"key": None}, "no key in it"),
        ({"key": keys.pem(keys.new())}, "is not the key of whole"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_what_was_changed_is_told(values: dict[str, Any], said: str, whole: Path, tmp_path: Path) -> None:
    assert said in refusal(open_kit, changed(whole, tmp_path, **values))


def test_kits_of_two_federations_do_not_mix(whole: Path, tmp_path: Path) -> None:
    pki.issue(new(tmp_path / "other"), "whole", None, PLAN)
    theirs = json.loads((tmp_path / "other" / "kits" / "whole.kit").read_text())
    for mixed in (("certificate",), ("certificate", "key"), ("ca", "fingerprint"), ("ca", "fingerprint", "signature")):
        path = changed(whole, tmp_path, **{name: theirs[name] for name in mixed})
        assert "is from another federation" in refusal(open_kit, path), mixed
    path = changed(whole, tmp_path, **{name: theirs[name] for name in ("ca", "fingerprint", "certificate", "key")})
    assert "was changed" in refusal(open_kit, path)
    ours = keys.read((whole.parents[1] / "pki" / "ca.key").read_bytes(), "")  # even the authority cannot mix them
    opened = replace(open_kit(whole), certificate=theirs["certificate"].encode())
    replace(opened, signature=kit.seal(opened, ours)).write(path)
    assert "is from another federation" in refusal(open_kit, path)


@pytest.mark.filterwarnings("ignore:Parsed a serial number")  # one of the flips makes it negative
def test_a_flipped_bit_is_noticed_or_means_nothing(whole: Path, tmp_path: Path) -> None:
    content, path = whole.read_bytes(), tmp_path / "flipped.kit"
    original = open_kit(whole)
    same = 0
    for position in range(0, len(content), 3):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        same += opens_alike(path, original)
    assert same < len(content) / 100


@settings(max_examples=300, deadline=None, derandomize=True)
@given(position=st.integers(0, 2**16), byte=st.integers(0, 255), how=st.sampled_from(["put", "insert", "cut", "end"]))
def test_a_changed_byte_is_noticed_or_means_nothing(
    position: int, byte: int, how: str, whole: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = whole.read_bytes()
    position %= len(content)
    rest = {"put": position + 1, "insert": position, "cut": position + 1 + byte, "end": len(content)}[how]
    path = tmp_path_factory.getbasetemp() / "byte.kit"
    path.write_bytes(content[:position] + bytes([byte]) + content[rest:])
    opens_alike(path, open_kit(whole))


def opens_alike(path: Path, original: Kit) -> bool:
    """Refused in one line (False), or opened with the very content (True)."""
    try:
        opened = open_kit(path)
    except UserError as refused:
        lines = str(refused).splitlines()
        assert len(lines) == 1
        return False
    assert opened == original
    return True


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'{"kit": 1}', b"\xff\xfe", b"[" * 10**5, b'{"a": 1e999}', b"\0" * 99,
                b"-----BEGIN CERTIFICATE-----", b" " * (kit.LARGEST + 9)],
)  # fmt: skip
def test_what_is_no_kit_is_said_to_be_none(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.kit"
    path.write_bytes(content)
    assert refusal(open_kit, path).startswith(f"{path}: is damaged or not a kit")


def test_a_kit_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert refusal(open_kit, tmp_path).startswith(f"{tmp_path}: cannot be read")
    assert "No such file" in refusal(open_kit, tmp_path / "none.kit")


def test_a_kit_has_its_time(whole: Path, move: Move) -> None:
    expires = open_kit(whole).expires
    move(timedelta(days=364))
    open_kit(whole)
    move(timedelta(days=366))
    said = refusal(open_kit, whole)
    assert f"expired on {expires:%Y-%m-%d %H:%M} UTC" in said
    assert "`fedloge invite DIR whole --renew`" in said
    move(-timedelta(minutes=50))
    open_kit(whole)
    move(-timedelta(hours=2))
    assert "set the clock" in refusal(open_kit, whole)


# --- requests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("csr", "said"),
    [
        (b"", "damaged or none"),
        (b"hello", "damaged or none"),
        (b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----", "damaged or none"),
        (request("a")[:-60], "damaged or none"),
        (flipped(request("a")), "not signed by its own key"),
        (request("a", rsa.generate_private_key(65537, 2048)), "not on P-256 or P-384"),
        (request("a", ec.generate_private_key(ec.SECP521R1())), "not on P-256 or P-384"),
        (request("b"), "is for 'b', not for a"),
        (keys.pem(keys.new()).encode(), "a private key, not a request"),
    ],
    ids=["empty", "text", "no request", "cut", "signature", "rsa", "curve", "name", "key"],
)
def test_a_request_that_is_not_right_is_refused(csr: bytes, said: str, federation: Path) -> None:
    assert said in refusal(pki.issue, federation, "a", csr, PLAN)
    assert register.registry(federation) == {}
    assert list((federation / "kits").iterdir()) == []


def test_no_name_in_a_request_is_refused(federation: Path) -> None:
    nameless = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(keys.new(), SHA256())
    said = refusal(pki.issue, federation, "a", nameless.public_bytes(Encoding.PEM), PLAN)
    assert "the request is for no name" in said


@pytest.mark.parametrize("name", ["", "A", "-a", ".a", "a b", "a/b", "../a", "a_b", "ä", "a\n", "x" * 64])
def test_names_that_are_no_file_names_are_refused(name: str, federation: Path, tmp_path: Path) -> None:
    assert repr(name) in refusal(pki.issue, federation, name, None, PLAN)
    assert repr(name) in refusal(kit.join, name, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["study"]


def test_every_site_has_its_own_key(federation: Path) -> None:
    key = keys.new()
    pki.issue(federation, "a", request("a", key), PLAN)
    assert "is that of site a" in refusal(pki.issue, federation, "b", request("b", key), PLAN)
    assert list(register.registry(federation)) == ["a"]


def test_a_renewal_keeps_the_key_that_is_at_the_site(federation: Path) -> None:
    pki.issue(federation, "own", request("own"), PLAN, days=10)
    pki.issue(federation, "ours", None, PLAN)
    before = register.registry(federation)
    assert pki.issue(federation, "own", None, PLAN, renew=True).key is None
    assert pki.issue(federation, "ours", None, PLAN, renew=True).key is not None
    after = register.registry(federation)
    assert after["own"].public_key == before["own"].public_key
    assert after["own"].expires > before["own"].expires
    assert after["ours"].public_key != before["ours"].public_key
    pki.issue(federation, "ours", request("ours"), PLAN, renew=True)  # from now on the site holds it
    assert register.registry(federation)["ours"].holder == "site"


def test_a_revoked_key_does_not_come_back(federation: Path) -> None:
    key = keys.new()
    pki.issue(federation, "a", request("a", key), PLAN)
    register.revoke(federation, "a")
    assert "was revoked" in refusal(pki.issue, federation, "a", None, PLAN, renew=True)
    assert "was revoked" in refusal(pki.issue, federation, "a", request("a", key), PLAN, renew=True)
    assert "is that of site a" in refusal(pki.issue, federation, "b", request("b", key), PLAN)
    pki.issue(federation, "a", request("a"), PLAN, renew=True)
    assert register.registry(federation)["a"].objection == ""


# --- the register ----------------------------------------------------------------------------------------------------


def test_the_register_says_who_may_not_take_part(federation: Path, move: Move) -> None:
    for name in ("a", "b"):
        pki.issue(federation, name, None, PLAN)
    assert [site.objection for site in register.registry(federation).values()] == ["", ""]
    first = register.revoke(federation, "a")
    move(timedelta(days=366))
    assert register.revoke(federation, "a") == first  # once
    found = register.registry(federation)
    assert found["a"].objection.startswith("revoked on 20")
    assert found["b"].objection.startswith("expired on 20")


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: "",
        lambda text: text[:-9],
        lambda _: "[]",
        lambda text: text.replace('"a"', '"b"'),
        lambda text: text.replace('"operator"', '"nobody"'),
        lambda text: text.replace('"operator"', "[]"),
        lambda text: text.replace('"revoked": null', '"revoked": true'),
        lambda text: text.replace('"revoked": null', '"removed": null'),
        lambda text: text.replace('"issued": "20', '"issued": "x20'),
        lambda text: text.replace("+00:00", ""),
        lambda text: text.replace("MFkwEwYH", "MFkwEwYI"),
        lambda text: text.replace('"fingerprint": "', '"fingerprint": "0'),
    ],
)
def test_a_damaged_entry_is_named(damage: Callable[[str], str], federation: Path) -> None:
    pki.issue(federation, "a", None, PLAN)
    path = federation / "sites" / "a.json"
    text = path.read_text()
    assert damage(text) != text
    path.write_text(damage(text))
    assert refusal(register.registry, federation).startswith(f"{path}: is damaged")
    assert refusal(pki.issue, federation, "c", None, PLAN).startswith(f"{path}: is damaged")


def test_an_entry_of_a_key_that_is_none_cannot_be_renewed(federation: Path) -> None:
    pki.issue(federation, "a", request("a"), PLAN)
    site = register.registry(federation)["a"]
    odd = b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"
    register.enter(federation, replace(site, public_key=odd, fingerprint=register.key_fingerprint(odd)))
    assert "a.json: holds no key" in refusal(pki.issue, federation, "a", None, PLAN, renew=True)


def test_a_name_is_taken_only_when_its_kit_is_there(federation: Path, tmp_path: Path) -> None:
    said = refusal(pki.issue, federation, "a", None, PLAN, path=tmp_path / "none" / "a.kit")
    assert "cannot be written" in said
    assert register.registry(federation) == {}


def test_secrets_are_their_owners(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        kit.join("a", tmp_path)
        federation = new(tmp_path / "open")
    finally:
        os.umask(before)
    assert mode(tmp_path / "a.key") == 0o600
    assert (mode(federation / "pki"), mode(federation / "kits")) == (0o700, 0o700)
    assert [path.name for path in sorted((federation / "pki").iterdir()) if mode(path) & 0o077 == 0] == [
        "ca.key", "server.key",
    ]  # fmt: skip


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    files.write(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert refusal(files.write, path, "new") == (
        f"{path}: cannot be written (No space left on device): check its folder and disk"
    )
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("a.txt", "old")]


@pytest.fixture(autouse=True)
def no_leftovers(tmp_path: Path) -> Iterator[None]:
    yield
    assert list(tmp_path.rglob("*.tmp")) == []
