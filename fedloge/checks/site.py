"""What a site needs to take part: a kit that is good, a server that is reached and knows it, room, a device, data.

Nothing is changed by looking, neither at the server nor in the state folder, so a client may be running meanwhile.
"""

import argparse
import fcntl
import os
import shutil
import socket
import tempfile
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UserError
from common.register import now, when
from fedloge.checks import images, machine
from fedloge.checks.findings import Findings
from fedloge.site import foreign, node_config

if TYPE_CHECKING:
    from client.probe import Standing
    from common.kit import Kit

SOON = 30  # days before its end at which a certificate should be renewed
NEEDED, SAFE = 200_000_000, 2_000_000_000  # bytes on the disk; what the model takes is known once the server is met
NEAR = 3.0  # seconds before a difference of clocks becomes too large
PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")  # as gRPC looks for them


def check_site(findings: Findings, options: argparse.Namespace) -> None:
    from common.kit import open_kit, whole_kit

    kit = findings.attempt("kit", lambda: whole_kit(options.path))
    opened = kit and findings.attempt("kit", lambda: open_kit(options.path, options.key))
    if opened:
        _check_validity(findings, opened)
    if kit is None:
        findings.skip("server", "without a kit there is none to look for")
    else:
        reached = findings.attempt("server", lambda: _check_reach(findings, kit))
        if opened and reached:
            findings.attempt("key", lambda: _check_standing(findings, opened))
        else:
            reason = "the server is not reached" if opened else "the kit cannot be used"
            findings.skip("key", f"not shown to the server, as {reason}")
            findings.skip("clock", f"not compared with the server's, as {reason}")
    state = findings.attempt("state", lambda: _check_state(findings, options, kit))
    if state:
        findings.attempt("disk", lambda: machine.check_room(findings, state, NEEDED, SAFE))
    findings.attempt("device", lambda: machine.check_device(findings, options.device, trains=True))
    if options.data is None:
        findings.skip("data", "name it with --data to have it looked at")
    elif kit is None:
        findings.skip("data", "the classes of the federation are in the kit")
    else:
        findings.attempt("data", lambda: _check_data(findings, kit, options, state))
    findings.attempt("software", lambda: machine.check_software(findings))


def _check_validity(findings: Findings, kit: "Kit") -> None:
    days = (kit.expires - now()).days
    text = f"{kit.name} in {kit.federation}, valid until {when(kit.expires)} ({days} days)"
    if days < SOON:
        findings.warn("kit", f"{text}: ask the operator for `fedloge invite DIR {kit.name} --renew` in time")
    else:
        findings.passed("kit", text)


def _check_reach(findings: Findings, kit: "Kit") -> bool:
    """Name, port and TLS, up to the first that fails. Whether it is worth while to ask for more."""
    from client.reach import diagnose

    proxy = _proxy(kit.host)
    found = diagnose(kit.host, kit.port, kit.ca)
    passed = {"name": _addresses(kit), "port": f"{kit.address} is open", "tls": found.text}
    for step, text in passed.items():
        if step != found.step:
            findings.passed(step, text)
            continue
        if proxy:  # the client does not take the way that was tried
            findings.warn(step, f"{found.text} - but connections go through {proxy} here; see `key`")
        else:
            findings.fail(step, found.text)
        rest = list(passed)[list(passed).index(step) + 1 :]
        for after in rest:
            findings.skip(after, f"not looked at, as the {step} comes first")
        return bool(proxy)
    return True


def _proxy(host: str) -> str:
    """The proxy through which gRPC would connect, if there is one."""
    if urllib.request.proxy_bypass_environment(host):  # type: ignore[attr-defined]
        return ""
    return next((f"the proxy of {name}" for name in PROXIES if os.environ.get(name)), "")


def _addresses(kit: "Kit") -> str:
    with suppress(OSError, UnicodeError):
        answers = socket.getaddrinfo(kit.host, kit.port, type=socket.SOCK_STREAM)
        return f"{kit.host} is {', '.join(sorted({str(answer[4][0]) for answer in answers}))}"
    return f"{kit.host} is found"


def _check_standing(findings: Findings, kit: "Kit") -> None:
    """Both what the server makes of the key, and of this machine's clock."""
    from client.fleet_api import FleetError
    from client.probe import ask

    try:
        standing = ask(kit)
    except FleetError as error:
        findings.skip("clock", "not compared with the server's, as it does not answer")
        raise UserError(
            f"the server at {kit.address} does not answer as it should ({error}): "
            "have both sides install the same version, and let nothing in between look into the connection"
        ) from None
    if standing.registered:
        findings.passed("key", f"the server at {kit.address} accepts the key of {kit.name}")
    elif standing.registered is None:
        findings.skip("key", "the server looks at it only when the clocks agree")
    else:
        findings.fail(
            "key",
            f"the server at {kit.address} does not know the key of {kit.name}: it was revoked, has expired or was "
            "replaced by that of a newer kit; ask the operator (a server that was just started needs some seconds)",
        )
    _check_clock(findings, standing)


def _check_clock(findings: Findings, standing: "Standing") -> None:
    from client.probe import AHEAD, BEHIND, FARTHEST

    allowed = f"{AHEAD:.0f} s ahead to {BEHIND / 60:.0f} minutes behind are allowed"
    mend = "set this machine's clock by a time service (NTP); if it is right, have the operator set the server's"
    ahead = standing.ahead
    if ahead is None:
        findings.fail("clock", f"more than {FARTHEST / 3600:.0f} hours from the server's, {allowed}: {mend}")
        return
    text = f"{_apart(ahead)} the server's"
    if not standing.in_time:
        findings.fail("clock", f"{text}, {allowed}: {mend}")
    elif not NEAR - BEHIND < ahead < AHEAD - NEAR:
        findings.warn("clock", f"{text}, {allowed}: {mend}")
    else:
        findings.passed("clock", text)


def _apart(ahead: float) -> str:
    if abs(ahead) < 1.5:
        return "agrees with"
    way = "ahead of" if ahead > 0 else "behind"
    seconds = abs(ahead)
    return f"{seconds:.0f} s {way}" if seconds < 120 else f"{seconds / 60:.0f} minutes {way}"


def _check_state(findings: Findings, options: argparse.Namespace, kit: "Kit | None") -> Path:
    state = Path(str(node_config(argparse.Namespace(**{**vars(options), "kit": options.path}))["state"]))
    if kit is not None and (objection := foreign(state, kit)):
        raise UserError(objection)
    machine.check_writable(findings, "state", state, "name another with --state, or mend its permissions")
    if _in_use(state):
        findings.warn("state", f"{state}: a client is running on it; another one needs another kit and folder")
    return state


def _in_use(state: Path) -> bool:
    with suppress(OSError), (state / "lock").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _check_data(findings: Findings, kit: "Kit", options: argparse.Namespace, state: Path | None) -> None:
    """As the client will take them, but what it writes down goes to a folder of ours."""
    from client import data
    from common.deployment import ImagesConfig

    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "splits.json"
        if state is not None and (state / record.name).exists():
            shutil.copyfile(state / record.name, record)
        try:
            site = data.load(options.data, options.test, kit.classes, kit.name, record)
        except UserError as error:
            raise UserError(str(error).replace(folder, str(state))) from None
    what = f"{len(site.train.labels)} images to train with, {len(site.test.labels)} to judge by,"
    images.check_counts(findings, "data", site.train.labels, kit.classes, what)
    for note in site.notes:
        findings.warn("data", note)
    if options.data.suffix.lower() != ".npz":  # an array is read as a whole
        wish = ImagesConfig(classes=kit.classes)
        for name, holding in (("training images", site.train), ("test images", site.test)):
            images.check_readable(findings, name, holding, wish)
