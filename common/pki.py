"""The authority of a federation: it certifies the server, and makes the kits of the sites.

`DIR/pki` holds the authority and the server's certificate, `DIR/kits` the kits. The authority's certificate is the
identity of the federation and stays as long as it lives; the server's is renewed whenever that is needed. Every file
is complete or not there.
"""

import ipaddress
import re
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_public_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common import files, keys
from common.deployment import Deployment
from common.errors import UsageError, UserError
from common.kit import Kit, check_name, seal
from common.register import Site, check, enter, key_fingerprint, named, now, registry, when

AUTHORITY_YEARS = 10
SERVER_YEARS = 3
RENEW_BEFORE = timedelta(days=30)
SLACK = timedelta(hours=1)  # certificates begin in the past, for clocks that are behind
HERE = ("localhost", "127.0.0.1", "::1")  # the operator's own tools connect to these
LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")


@dataclass(frozen=True)
class Authority:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def init(folder: Path, host: str, federation: str) -> str:
    """A new authority with a server certificate and an empty register, in an empty folder; gives its fingerprint."""
    names = server_names(host)
    for place, mode in ((folder / "pki", 0o700), (folder / "kits", 0o700), (folder / "sites", 0o777)):
        place.mkdir(mode=mode)
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, federation),
            x509.NameAttribute(NameOID.COMMON_NAME, "fedloge authority"),
        ]
    )
    key = keys.new()
    end = now() + timedelta(days=365 * AUTHORITY_YEARS)
    builder = _builder(subject, key.public_key(), end).issuer_name(subject)
    usage = _usage(key_cert_sign=True, crl_sign=True)
    certificate = (
        builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, SHA256())
    )
    files.write(folder / "pki" / "ca.key", keys.pem(key), files.SECRET)
    files.write(folder / "pki" / "ca.crt", certificate.public_bytes(Encoding.PEM).decode())
    _certify_server(folder, Authority(certificate, key), keys.new(), names)
    return keys.fingerprint(certificate)


def issue(
    folder: Path,
    name: str,
    csr: bytes | None,
    deployment: Deployment,
    *,
    days: int = 365,
    renew: bool = False,
    path: Path | None = None,
) -> Kit:
    """A kit for site `name`, written to `path` (DIR/kits/NAME.kit), and its entry in the register.

    With the site's request the kit has no key; without, one is made and put into it. A renewal without a request
    keeps the key of a site that made its own.
    """
    check_name(name)
    if len(deployment.images.classes) < 2:
        raise UserError(f"{folder / 'federation.toml'}: images.classes must list all classes before sites are invited")
    known = registry(folder).get(name)
    if known and not renew:
        raise UserError(f"site {name} is there already: use another name, or --renew to replace its kit")
    if renew and not known:
        raise UserError(f"there is no site {name} to renew: {named(folder)}")
    authority = open_authority(folder)
    most = (authority.certificate.not_valid_after_utc - now()).days
    if not 1 <= days <= most:
        raise UsageError(f"--days {days}: use 1 to {most}, when the federation's authority ends")
    end = now() + timedelta(days=days)
    key = None
    if csr is not None:
        public = _requested(csr, name)
    elif known and known.holder == "site":
        public = _public(known, folder)
    else:
        key = keys.new()
        public = key.public_key()
    holder: Literal["site", "operator"] = "site" if key is None else "operator"
    site = Site(name, keys.spki(public), key_fingerprint(keys.spki(public)), holder, issued=now(), expires=end)
    check(folder, site)
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])
    builder = _builder(keys.common_name(name), public, end).add_extension(usage, critical=False)
    unsigned = Kit(
        federation=deployment.config.name,
        fingerprint=keys.fingerprint(authority.certificate),
        host=deployment.server.host,
        port=deployment.server.port,
        name=name,
        classes=deployment.images.classes,
        ca=authority.certificate.public_bytes(Encoding.PEM),
        certificate=_signed(builder, authority).public_bytes(Encoding.PEM),
        signature=b"",
        key=None if key is None else keys.pem(key).encode(),
    )
    kit = replace(unsigned, signature=seal(unsigned, authority.key))
    kit.write(path or folder / "kits" / f"{name}.kit")  # first: a name is taken only when its kit is there
    enter(folder, site)
    return kit


def server_files(folder: Path) -> tuple[Path, Path, Path]:
    """The authority's certificate, the server's, and the server's key."""
    return folder / "pki" / "ca.crt", folder / "pki" / "server.crt", folder / "pki" / "server.key"


def ready_server(folder: Path, host: str) -> str:
    """See that the server has a certificate for `host` which does not end soon; gives why it was renewed, or ""."""
    reason = server_objection(folder, host)
    if reason:
        renew_server(folder, host)
    return reason


def server_objection(folder: Path, host: str) -> str:
    """Why the server's certificate should be renewed; empty if it is fine."""
    ca_path, path, key_path = server_files(folder)
    ca = _root(ca_path)
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        key = keys.read(key_path.read_bytes(), str(key_path))
        names = set(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
        certificate.verify_directly_issued_by(ca)
        fits = keys.public(certificate) == key.public_key()
        begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    except keys.BROKEN:
        return "it is missing, damaged or of another authority"
    if not fits:
        return "it is not of the server's key"
    if missing := set(server_names(host)) - names:
        return f"it does not cover {', '.join(sorted(str(name.value) for name in missing))}"
    if begin > now():
        return "it is not valid yet by this machine's clock"
    return f"it ends on {when(end)}" if end < now() + RENEW_BEFORE else ""


def renew_server(folder: Path, host: str) -> None:
    """A new server certificate. The authority stays, so kits stay valid if the address in them is right."""
    authority, key_path = open_authority(folder), server_files(folder)[2]
    try:  # the same key, so that certificate and key fit each other whenever this is cut short
        key = keys.read(key_path.read_bytes(), str(key_path))
    except (OSError, UserError):
        key = keys.new()
    _certify_server(folder, authority, key, server_names(host))


def server_names(host: str) -> list[x509.GeneralName]:
    """What the server's certificate covers; UsageError where no site could connect to `host`."""
    return list(dict.fromkeys(_general(name) for name in (host, *HERE)))


def _general(host: str) -> x509.GeneralName:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        labels = host.lower().split(".")
        if len(host) > 253 or not all(LABEL.fullmatch(label) for label in labels) or labels[-1].isdigit():
            raise UsageError(
                f"{host!r} is neither a host name nor an IP address: name the one sites connect to, "
                "like fl.example.org (other scripts as xn--...)"
            ) from None
        return x509.DNSName(host.lower())
    if address.is_unspecified or address.is_multicast or "%" in host:
        raise UsageError(f"{host}: no site can connect to this address: name the one sites use")
    return x509.IPAddress(address)


def _certify_server(
    folder: Path, authority: Authority, key: ec.EllipticCurvePrivateKey, names: list[x509.GeneralName]
) -> None:
    end = min(now() + timedelta(days=365 * SERVER_YEARS), authority.certificate.not_valid_after_utc)
    builder = (
        _builder(keys.common_name("fedloge server"), key.public_key(), end)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    )
    _, certificate_path, key_path = server_files(folder)
    files.write(key_path, keys.pem(key), files.SECRET)
    files.write(certificate_path, _signed(builder, authority).public_bytes(Encoding.PEM).decode())


def _builder(subject: x509.Name, public: ec.EllipticCurvePublicKey, end: datetime) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder().subject_name(subject).public_key(public)
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now() - SLACK).not_valid_after(end)
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)


def _signed(builder: x509.CertificateBuilder, authority: Authority) -> x509.Certificate:
    """The certificate of something that is no authority itself."""
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(keys.public(authority.certificate))
    return (
        builder.issuer_name(authority.certificate.subject)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(), critical=True)
        .add_extension(issuer, critical=False)
        .sign(authority.key, SHA256())
    )


def _usage(key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True, key_cert_sign=key_cert_sign, crl_sign=crl_sign, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def open_authority(folder: Path) -> Authority:
    """With its key: UserError if that is not at hand, or if the two are damaged, not of each other or out of date."""
    path = folder / "pki" / "ca.key"
    try:
        pem = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): the authority's key is needed for this") from None
    authority = Authority(_root(folder / "pki" / "ca.crt"), keys.read(pem, str(path)))
    if keys.public(authority.certificate) != authority.key.public_key():
        raise UserError(f"{path}: is not the key of {path.with_suffix('.crt')}: restore both from the same backup")
    if now() > authority.certificate.not_valid_after_utc:
        end = when(authority.certificate.not_valid_after_utc)
        raise UserError(f"{folder}: its authority ended on {end}: make a new federation with `fedloge init`")
    return authority


def _root(path: Path) -> x509.Certificate:
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        certificate.verify_directly_issued_by(certificate)  # its every bit is the federation's identity
        keys.public(certificate)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): restore it from a backup") from None
    except keys.BROKEN:
        raise UserError(f"{path}: is damaged: restore it from a backup") from None
    return certificate


def _requested(csr: bytes, name: str) -> ec.EllipticCurvePublicKey:
    if b"PRIVATE KEY" in csr:
        raise UserError(
            "this is a private key, not a request, and it should not have left its site: "
            f"remove it on both sides, run `fedloge join {name}` there again and send only {name}.csr"
        )
    try:
        request = x509.load_pem_x509_csr(csr)
        valid = request.is_signature_valid
        found = [str(a.value) for a in request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    except keys.BROKEN:
        raise UserError(f"the request is damaged or none: ask the site for the {name}.csr of `fedloge join`") from None
    try:
        public = keys.public(request)
    except keys.BROKEN:
        raise UserError("the request's key is not on P-256 or P-384: ask for one made by `fedloge join`") from None
    if not valid:
        raise UserError("the request is not signed by its own key: ask the site to run `fedloge join` again")
    if found != [name]:
        raise UserError(
            f"the request is for {', '.join(map(repr, found)) or 'no name'}, not for {name}: invite it by that name"
        )
    return public


def _public(site: Site, folder: Path) -> ec.EllipticCurvePublicKey:
    try:
        key = load_pem_public_key(site.public_key)
    except keys.BROKEN:
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise UserError(f"{folder / 'sites' / site.name}.json: holds no key of ours: renew it by a request (--csr)")
    return key
