"""Where sites reach the server: its name, and its one port."""

import ipaddress
import socket
from contextlib import suppress
from pathlib import Path

from common.deployment import Deployment
from common.errors import UserError
from fedloge.checks.findings import Findings
from fedloge.serve import server_process


def check_name(findings: Findings, plan: Deployment) -> None:
    """What sites see may differ from what is seen here, so nothing of this is an error."""
    host = plan.server.host
    try:
        answers = socket.getaddrinfo(host, plan.server.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        findings.warn("name", f"{host} is not found from here: sites must find it, or be invited with another name")
        return
    addresses = sorted({str(answer[4][0]) for answer in answers})
    text = f"{host} is {', '.join(addresses)}"
    if all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses):
        findings.warn("name", f"{text}: only sites on this machine can connect to it")
    elif not any(map(_is_ours, addresses)):
        text += ", no address of this machine"
        findings.warn("name", f"{text}: whatever has it must pass port {plan.server.port} on to here, as it is")
    else:
        findings.passed("name", f"{text}, an address of this machine")


def check_port(findings: Findings, folder: Path, plan: Deployment) -> None:
    """Free, or taken by our own server, which must then answer."""
    from server.superlink import check_free, read_link

    process = server_process(folder / "run")
    if process is None:
        check_free(plan.server.bind, plan.server.door)
        findings.passed("port", f"{plan.server.door} on {plan.server.bind} is free")
        return
    doors = read_link(folder / "run")
    if doors is None:
        findings.warn("port", f"the server (pid {process}) is only starting: check again in a moment")
        return
    if doors.fleet != plan.server.door:
        key = "listen" if plan.server.listen else "port"
        raise UserError(
            f"the server that runs (pid {process}) listens at {doors.fleet}, and server.{key} is {plan.server.door}: "
            "start it again, or put the old port back"
        )
    _check_answer(findings, folder, plan, process)


def _check_answer(findings: Findings, folder: Path, plan: Deployment, process: int) -> None:
    from client.reach import diagnose
    from common.pki import HERE, server_files

    said = f"the server runs (pid {process}) and listens at {plan.server.door}"
    local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(plan.server.bind, plan.server.bind)
    if local not in HERE:  # its certificate does not cover an address of another kind
        findings.passed("port", said)
        return
    found = diagnose(local, plan.server.door, server_files(folder)[0].read_bytes())
    if found.step != "ok":
        raise UserError(f"{said}, but {found.text}")
    findings.passed("port", f"{said}; it answers")


def _is_ours(address: str) -> bool:
    """Only an address of this machine can be bound to."""
    with suppress(OSError):
        kind = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(kind, socket.SOCK_DGRAM) as probe:
            probe.bind((address, 0))
            return True
    return False
