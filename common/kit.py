"""What a site holds: its key, the request it sends to the operator, and the kit it gets back.

A kit is one small text file: where the server is, the authority of the federation, the site's name and certificate,
the class list and, if the operator made it, the key. All but the key is signed by the authority and the key must be
the certificate's, so a kit that was changed anywhere is refused. Whether the authority is the right one shows in its
fingerprint, which people compare. Opening a kit parses text and executes nothing.
"""

import base64
import json
import re
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding

from common import files, keys
from common.errors import UsageError, UserError
from common.register import key_fingerprint, now, when

FORMAT = 1
LARGEST = 2**24  # bytes; the kit of a federation of 10,000 classes has a fiftieth of it
NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,62}")
FIELDS = {"kit": int, "federation": str, "fingerprint": str, "host": str, "port": int, "name": str, "classes": list,
          "ca": str, "certificate": str, "signature": str}  # fmt: skip


@dataclass(frozen=True)
class Kit:
    federation: str  # its name, for people
    fingerprint: str  # SHA-256 of the authority's certificate: which federation it is
    host: str
    port: int
    name: str  # of the site
    classes: tuple[str, ...]
    ca: bytes  # PEM: by it the site knows the server
    certificate: bytes  # PEM: the site's name and public key, signed by the authority
    signature: bytes = field(repr=False)  # of the authority, over all but the key
    key: bytes | None = field(default=None, repr=False)  # PEM

    @property
    def address(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def expires(self) -> datetime:
        return x509.load_pem_x509_certificate(self.certificate).not_valid_after_utc

    def private_key(self) -> ec.EllipticCurvePrivateKey:
        if self.key is None:
            raise UserError(f"the kit of {self.name} holds no key: open it together with {self.name}.key")
        return keys.read(self.key, f"the key of {self.name}")

    def write(self, path: Path) -> None:
        """With a key in it the file is its owner's alone."""
        table = {**_content(self), "signature": base64.b64encode(self.signature).decode()}
        if self.key is not None:
            table["key"] = self.key.decode()
        text = json.dumps(table, indent=1, ensure_ascii=False) + "\n"
        files.write(path, text, files.OPEN if self.key is None else files.SECRET)


def seal(kit: Kit, authority: ec.EllipticCurvePrivateKey) -> bytes:
    """The signature that belongs into the kit."""
    return keys.sign(authority, _canonical(_content(kit)))


def whole_kit(path: Path) -> Kit:
    """A kit as the operator made it, whether or not it is valid now and its key is at hand."""
    table = _read(path)
    kit = _kit(table, path)
    signed = {name: value for name, value in table.items() if name not in ("key", "signature")}
    try:
        ca = x509.load_pem_x509_certificate(kit.ca)
        certificate = x509.load_pem_x509_certificate(kit.certificate)
        verifier, _ = keys.public(ca), keys.public(certificate)
        foreign = not keys.issued_by(certificate, ca)
    except keys.BROKEN:
        raise _damaged(path, "a certificate in it cannot be read") from None
    if foreign:
        raise UserError(f"{path}: its certificate is from another federation: ask the operator for a new kit")
    if keys.fingerprint(ca) != kit.fingerprint or not keys.verifies(verifier, kit.signature, _canonical(signed)):
        raise UserError(
            f"{path}: was changed after the operator made it: do not use it, ask the operator for a new one"
        )
    return kit


def open_kit(path: Path, key_path: Path | None = None) -> Kit:
    """A kit that is whole, valid now and has its key: from `key_path`, from inside, or from beside the file."""
    kit = whole_kit(path)
    certificate = x509.load_pem_x509_certificate(kit.certificate)
    moment = now()
    if moment > certificate.not_valid_after_utc:
        raise UserError(
            f"{path}: expired on {when(certificate.not_valid_after_utc)}: "
            f"ask the operator for a new one, made by `fedloge invite DIR {kit.name} --renew`"
        )
    if moment < certificate.not_valid_before_utc:
        raise UserError(
            f"{path}: is not valid before {when(certificate.not_valid_before_utc)}, and it is {when(moment)} "
            "by the clock of this machine: set the clock"
        )
    key, where = _key(kit, path, key_path)
    if not keys.verifies(keys.public(certificate), keys.sign(key, b"mine"), b"mine"):
        raise UserError(
            f"{where}: is not the key of {kit.name} in {path}: use the one `fedloge join` made for this kit"
        )
    return replace(kit, key=keys.pem(key).encode())


def join(name: str, folder: Path) -> tuple[str, Path, Path]:
    """Make NAME.key and NAME.csr; gives the fingerprint of the key and both paths. A key that is there is kept."""
    check_name(name)
    key_path, request_path = folder / f"{name}.key", folder / f"{name}.csr"
    if key_path.exists():
        key = keys.read(key_path.read_bytes(), str(key_path))
    else:
        key = keys.new()
        files.write(key_path, keys.pem(key), files.SECRET)
    request = x509.CertificateSigningRequestBuilder().subject_name(keys.common_name(name)).sign(key, SHA256())
    files.write(request_path, request.public_bytes(Encoding.PEM).decode())
    return key_fingerprint(keys.spki(key.public_key())), key_path, request_path


def check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is no name of a site: use up to 63 of a-z, 0-9, '.' and '-', beginning with a letter or digit"
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): name the kit the operator sent") from None
    try:
        table = json.loads(content) if len(content) <= LARGEST else None
    except (ValueError, RecursionError):
        table = None
    if not isinstance(table, dict) or "kit" not in table:
        raise _damaged(path, "it is not the text of one")
    return table


def _kit(table: dict[str, Any], path: Path) -> Kit:
    if type(table["kit"]) is int and table["kit"] != FORMAT:
        raise UserError(f"{path}: is a kit of another version of fedloge: install the version the operator has")
    for name, kind in FIELDS.items():
        if type(table.get(name)) is not kind:
            raise _damaged(path, f"{name} is missing or wrong")
    if not NAME.fullmatch(table["name"]):  # file names are made of it
        raise _damaged(path, "name is wrong")
    key = table.get("key")
    try:
        signature = base64.b64decode(table["signature"], validate=True)
        texts = {name: table[name].encode() for name in ("ca", "certificate")}
        key = None if key is None else key.encode()
    except (ValueError, AttributeError):
        raise _damaged(path, "a field is not text") from None
    named = {name: table[name] for name in ("federation", "fingerprint", "host", "port", "name")}
    return Kit(**named, **texts, classes=tuple(table["classes"]), signature=signature, key=key)


def _key(kit: Kit, path: Path, key_path: Path | None) -> tuple[ec.EllipticCurvePrivateKey, Path]:
    if key_path is None and kit.key is not None:
        return keys.read(kit.key, f"{path}, its key"), path
    beside = list(dict.fromkeys([path.with_suffix(".key"), path.with_name(f"{kit.name}.key")]))
    for place in beside if key_path is None else [key_path]:
        try:
            return keys.read(place.read_bytes(), str(place)), place
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UserError(f"{place}: cannot be read ({error.strerror}): name a key that can with --key") from None
    if key_path is not None:
        raise UserError(f"{key_path}: there is no such key: name the one that `fedloge join {kit.name}` made")
    places = " or ".join(map(str, beside))
    raise UserError(
        f"{path}: has no key in it and there is none at {places}: "
        f"put the one that `fedloge join {kit.name}` made there, or name it with --key"
    )


def _content(kit: Kit) -> dict[str, Any]:
    texts = {"ca": kit.ca.decode(), "certificate": kit.certificate.decode()}
    values = {name: getattr(kit, name) for name in ("federation", "fingerprint", "host", "port", "name", "classes")}
    return {"kit": FORMAT, **values, **texts}


def _canonical(table: dict[str, Any]) -> bytes:
    return json.dumps(table, sort_keys=True, separators=(",", ":")).encode()


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path}: is damaged or not a kit ({reason}): ask the operator to send it again")
