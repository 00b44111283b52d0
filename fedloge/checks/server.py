"""What an operator needs to serve: settings that work, certificates, an address and a port, room, sites.

Nothing is changed by looking, so the server may be running meanwhile.
"""

import stat
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from common import deployment
from common.deployment import Deployment
from common.errors import UserError
from common.register import now, registry, when
from fedloge.checks import address, images, machine
from fedloge.checks.findings import Findings
from fedloge.serve import SPACE

if TYPE_CHECKING:
    from common.net import Net

SOON = timedelta(days=30)  # before its end a certificate or kit should be renewed


def check_server(findings: Findings, folder: Path) -> None:
    plan = findings.attempt("settings", lambda: _settings(findings, folder))
    net = findings.attempt("model", partial(_model, findings, plan)) if plan else None
    if plan and net:
        findings.attempt("frame", partial(_check_frame, findings, plan, net))
    elif plan:
        findings.skip("frame", "the model comes first")
    findings.attempt("authority", lambda: _check_authority(findings, folder))
    findings.attempt("secrets", lambda: _check_secrets(findings, folder))
    if plan:
        findings.attempt("certificate", partial(_check_certificate, findings, folder, plan))
        findings.attempt("name", partial(address.check_name, findings, plan))
        findings.attempt("port", partial(address.check_port, findings, folder, plan))
        findings.attempt("test set", partial(_check_test, findings, plan))
        findings.attempt("device", partial(machine.check_device, findings, plan.config.run.device, trains=False))
    else:
        for name in ("certificate", "name", "port", "test set", "device"):
            findings.skip(name, "the settings come first")
    findings.attempt("folder", lambda: _check_folder(findings, folder))
    findings.attempt("disk", lambda: _check_disk(findings, folder, plan, net))
    findings.attempt("sites", lambda: _check_sites(findings, folder, plan))
    if plan:
        findings.attempt("kits", partial(_check_kits, findings, folder, plan))
    findings.warn(
        "clock",
        f"it is {when(now())} here; nobody else was asked: keep the clock set by a time service (NTP), as sites "
        "are refused whose clocks are more than 5 s ahead of it or 5 minutes behind",
    )
    findings.attempt("software", lambda: machine.check_software(findings))


def _settings(findings: Findings, folder: Path) -> Deployment:
    plan = deployment.load(folder / "federation.toml")
    classes = plan.task.classes
    config = plan.config
    findings.passed(
        "settings",
        f"{config.name}: method {config.method.name}, {len(classes)} classes, images of {plan.images.size} pixels, "
        f"{config.federation.rounds} rounds",
    )
    return plan


def _model(findings: Findings, plan: Deployment) -> "Net":
    from common.net import build

    net = build(plan.config.method, plan.task)
    values = sum(t.numel() for group in net.parts().values() for t in group.values())
    findings.passed(
        "model",
        f"{plan.config.model.name}, {net.feature_dim} features, {values:,} values; a site sends and gets "
        f"{machine.size(_traffic(plan, net))} a round",
    )
    return net


def _traffic(plan: Deployment, net: "Net") -> int:
    """Bytes of the parts that are shared: what travels, and most of what a checkpoint holds."""
    shared = plan.config.method.shared
    return sum(t.nbytes for part, group in net.parts().items() if part in shared for t in group.values())


def _check_frame(findings: Findings, plan: Deployment, net: "Net") -> None:
    """Whether there is one, without the minutes it may take to build."""
    from common import frame
    from common.methods.fedloge import FedLoGe
    from common.methods.fedloge_plus import FedLoGePlus

    if not isinstance(plan.config.method, (FedLoGe, FedLoGePlus)):  # nobody else builds one by these settings
        return
    if "frame" not in net.by_part:
        classes, dim = len(plan.images.classes), net.feature_dim
        findings.passed(
            "frame", f"none: no simplex of {classes} classes in {dim} dimensions; a head is learned instead"
        )
        return
    spec = frame.FrameSpec(dim=net.feature_dim, classes=len(plan.images.classes), **asdict(plan.config.frame))
    solver = frame.choose_solver(spec, frame.mask(spec.dim, spec.classes, spec.sparsity, spec.seed))
    exact = "the exact simplex" if solver == "gram" else f"the best that solver {solver} finds"
    findings.passed("frame", f"{spec.classes} classes in {spec.dim} dimensions, {spec.sparsity:.0%} zeros: {exact}")


def _check_authority(findings: Findings, folder: Path) -> None:
    from common import pki

    if not (folder / "pki" / "ca.key").exists():
        findings.warn("authority", "pki/ca.key is not here: sites cannot be invited nor certificates renewed without")
        return
    end = pki.open_authority(folder).certificate.not_valid_after_utc
    text = f"valid until {when(end)}"
    if end - now() < SOON:
        findings.warn("authority", f"{text}: the federation ends then, and a new one needs new kits at all sites")
    else:
        findings.passed("authority", text)


def _check_secrets(findings: Findings, folder: Path) -> None:
    """Private keys are their owner's alone."""
    found = [path for path in (folder / "pki" / "ca.key", folder / "pki" / "server.key") if path.exists()]
    found += sorted((folder / "kits").glob("*.kit"))
    bad = [path for path in found if stat.S_IMODE(path.stat().st_mode) & 0o077 and b"PRIVATE KEY" in path.read_bytes()]
    if bad:
        raise UserError(f"{images.listed([str(path) for path in bad])}: others can read this key: run chmod 600 on it")
    findings.passed("secrets", "private keys can be read by their owner alone")


def _check_certificate(findings: Findings, folder: Path, plan: Deployment) -> None:
    from common import pki

    if not (reason := pki.server_objection(folder, plan.server.host)):
        findings.passed("certificate", f"the server's is good for {plan.server.host} and valid for at least 30 days")
        return
    with suppress(UserError):
        pki.open_authority(folder)
        findings.warn("certificate", f"{reason}: `fedloge server {folder}` renews the server's when it starts")
        return
    raise UserError(f"{reason}, and without the authority's key it cannot be renewed: bring back pki/ca.key")


def _check_test(findings: Findings, plan: Deployment) -> None:
    from common.holding import gather

    if not plan.server.test:
        findings.skip("test set", "server.test names none: models are judged at the sites alone")
        return
    everything, apart = gather(Path(plan.server.test), plan.images.classes)
    found = everything if apart is None else apart
    images.check_counts(findings, "test set", found.labels, plan.images.classes, f"{len(found.labels)} images")
    images.check_readable(findings, "test images", found, plan.images)


def _check_folder(findings: Findings, folder: Path) -> None:
    machine.check_writable(findings, "folder", folder / "run", "mend the permissions of the folder")


def _check_disk(findings: Findings, folder: Path, plan: Deployment | None, net: "Net | None") -> None:
    """Room for one checkpoint more than are kept, and the model."""
    needed = SPACE
    if plan is not None and net is not None:
        state = _traffic(plan, net)
        there = sum(path.stat().st_size for path in (folder / "run" / "checkpoints").glob("round-*.safetensors"))
        needed += max(0, (plan.config.run.keep + 2) * state - there)
    machine.check_room(findings, folder, needed, 2 * needed)


def _check_sites(findings: Findings, folder: Path, plan: Deployment | None) -> None:
    sites = registry(folder)
    for site in sites.values():
        if site.objection:
            findings.warn("sites", f"{site.name}: {site.objection}: to let it in, `fedloge invite ... --renew`")
        elif site.expires - now() < SOON:
            findings.warn("sites", f"{site.name}: its kit ends on {when(site.expires)}: renew it in time")
    good = [name for name, site in sites.items() if not site.objection]
    asked = 1 if plan is None else plan.config.federation.min_clients
    if len(good) < asked:
        raise UserError(
            f"{len(good)} can take part and a round needs {asked} (federation.min_clients): "
            f"invite others with `fedloge invite {folder} NAME`, or lower it"
        )
    findings.passed("sites", f"{len(good)} can take part: {images.listed(good)}")


def _check_kits(findings: Findings, folder: Path, plan: Deployment) -> None:
    """Those that are still here: kits carry settings, and sites need new ones when these change."""
    from common.kit import whole_kit

    known = registry(folder)
    wanted = {"host": plan.server.host, "port": plan.server.port, "classes": plan.images.classes}
    good: list[str] = []
    old: list[str] = []
    for path in sorted((folder / "kits").glob("*.kit")):
        kit = whole_kit(path)
        if kit.name not in known or known[kit.name].objection or kit.expires != known[kit.name].expires:
            continue  # not in use any more
        changed = [key for key, value in wanted.items() if getattr(kit, key) != value]
        (old if changed else good).append(kit.name)
    if old:
        raise UserError(
            f"host, port or classes were changed after the kits of {images.listed(old)} were made: put them back, or "
            f"send new ones, `fedloge invite {folder} {old[0]} --renew`"
        )
    if good:
        findings.passed("kits", f"as the settings say, for {images.listed(good)}")
