"""Which step of reaching the server fails: its name, its port, or TLS, and what to do about it.

The same steps a client takes, one by one and without Flower, so that each failure has a text of its own. Nothing is
sent to the server beyond the TLS handshake.
"""

import socket
import ssl
from dataclasses import dataclass
from typing import Literal

EXPIRED, EARLY = 10, 9  # X509_V_ERR_*, as OpenSSL numbers them
OTHER_NAME = (62, 64)  # a host name, an address


@dataclass(frozen=True)
class Diagnosis:
    step: Literal["name", "port", "tls", "ok"]  # the first that fails
    text: str  # cause and mend, one line
    lasting: bool = False  # a certificate that will not be right by trying again


def diagnose(host: str, port: int, ca: bytes, timeout: float = 5.0) -> Diagnosis:
    """Try to reach the server that the authority `ca` (PEM) certifies as `host`."""
    where = f"{host}:{port}"
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=ca.decode("ascii"))
        context.set_alpn_protocols(["h2"])
    except (ValueError, ssl.SSLError):
        return Diagnosis("tls", "the kit's authority cannot be read: ask the operator for a new kit", lasting=True)
    try:
        socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not a host name"
        return Diagnosis("name", f"{host} is not found ({why}): check the network, the name and its DNS entry")
    try:
        connection = socket.create_connection((host, port), timeout)
    except ConnectionRefusedError:
        return Diagnosis("port", f"nothing listens at {where}: is the server running, and is this its port?")
    except TimeoutError:
        return Diagnosis("port", f"{where} does not answer: is a firewall in between, or the machine down?")
    except OSError as error:
        return Diagnosis("port", f"{where} cannot be reached ({error.strerror}): check the network")
    with connection:
        return _handshake(connection, context, host, where)


def _handshake(connection: socket.socket, context: ssl.SSLContext, host: str, where: str) -> Diagnosis:
    try:
        with context.wrap_socket(connection, server_hostname=host) as secured:
            if secured.selected_alpn_protocol() == "h2":
                return Diagnosis("ok", f"{where} answers, and its certificate is right")
        text = f"{where} speaks TLS but not gRPC: is this the port of the server, without a web proxy in between?"
        return Diagnosis("tls", text)
    except ssl.SSLCertVerificationError as error:
        return Diagnosis("tls", _wrong(error, host, where), lasting=True)
    except ssl.SSLError:
        return Diagnosis("tls", f"{where} does not speak TLS: is this the port that sites connect to?")
    except TimeoutError:
        return Diagnosis("tls", f"{where} takes the connection but does not answer: is the server busy or stopped?")
    except OSError as error:
        text = f"{where} ends the connection ({error.strerror}): is it the server, without a proxy in between?"
        return Diagnosis("tls", text)


def _wrong(error: ssl.SSLCertVerificationError, host: str, where: str) -> str:
    if error.verify_code == EXPIRED:
        return (
            f"the certificate of {where} has expired: the operator must renew it "
            "(if it has not, the clock of this machine is wrong)"
        )
    if error.verify_code == EARLY:
        return f"the certificate of {where} is not valid yet: set the clock of this machine, or the server's"
    if error.verify_code in OTHER_NAME:
        return f"the certificate of {where} is not made out to {host}: the operator must make it for this name"
    return (
        f"{where} is not the server of this kit: its certificate is from another authority "
        "(another federation, a server set up anew, or somebody in between): ask the operator"
    )
