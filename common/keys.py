"""Keys and certificates: the one kind of key this project uses, and what is asked of either.

Elliptic-curve keys, made on P-256 (a site signs every request with its key; P-384, which costs more, is accepted).
"""

import hashlib

from cryptography import x509
from cryptography.exceptions import InvalidSignature
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

from common.errors import UserError

BROKEN = Exception  # parsing damaged keys and certificates raises nearly anything, KeyError included
CURVES = (ec.SECP256R1, ec.SECP384R1)


def new() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def openssh(key: ec.EllipticCurvePrivateKey) -> str:
    """The only form that flower-supernode reads."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()).decode()


def spki(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def read(pem: bytes, where: str) -> ec.EllipticCurvePrivateKey:
    """`where` names the key in messages."""
    try:
        key = load_pem_private_key(pem, password=None)
    except TypeError:
        raise UserError(f"{where}: is protected by a password: store it without one") from None
    except BROKEN:
        raise UserError(f"{where}: is damaged or not a private key: put the right file there") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, CURVES):
        raise UserError(f"{where}: is not an elliptic-curve key on P-256 or P-384: put the right file there")
    return key


def public(of: x509.Certificate | x509.CertificateSigningRequest) -> ec.EllipticCurvePublicKey:
    """The key of a certificate or a request; ValueError if it is of another kind than ours."""
    key = of.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, CURVES):
        raise ValueError("the key is not on P-256 or P-384")
    return key


def sign(key: ec.EllipticCurvePrivateKey, content: bytes) -> bytes:
    return key.sign(content, ec.ECDSA(SHA256()))


def verifies(key: ec.EllipticCurvePublicKey, signature: bytes, content: bytes) -> bool:
    try:
        key.verify(signature, content, ec.ECDSA(SHA256()))
    except InvalidSignature:
        return False
    return True


def issued_by(certificate: x509.Certificate, ca: x509.Certificate) -> bool:
    """Whether it says it is from this authority; ExtensionNotFound where it says nothing."""
    named = certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
    return named == ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest


def fingerprint(certificate: x509.Certificate) -> str:
    return hashlib.sha256(certificate.public_bytes(Encoding.DER)).hexdigest()


def common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
