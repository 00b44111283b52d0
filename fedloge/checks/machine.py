"""What either side needs of its machine: software, a device, a folder to write to and room on its disk."""

import importlib.metadata
import os
import platform
import re
import shutil
import tempfile
from itertools import zip_longest
from pathlib import Path

from common.errors import UserError
from fedloge.checks.findings import Findings

TIGHT = 1 << 30  # bytes of a GPU's memory below which other programs are in the way
REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+) *(==|>=) *([0-9.]+)$")


def check_software(findings: Findings) -> None:
    """The versions this project was installed to work with; that of Flower is the only one that works."""
    versions = {"Python": platform.python_version()}
    wrong = []
    for requirement in importlib.metadata.requires("fedloge") or ():
        if (found := REQUIREMENT.match(requirement)) is None:  # of an extra
            continue
        name, relation, wanted = found.groups()
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{name} is not installed: pip install '{name}{relation}{wanted}'")
            continue
        if not _fits(versions[name], relation, wanted):
            wrong.append(f"{name} is {versions[name]}, not {relation}{wanted}: pip install '{name}{relation}{wanted}'")
    for text in wrong:
        findings.fail("software", text)
    if not wrong:
        findings.passed("software", ", ".join(f"{name} {version}" for name, version in versions.items()))


def _fits(version: str, relation: str, wanted: str) -> bool:
    have, want = ([int(part) for part in re.findall(r"\d+", text.partition("+")[0])] for text in (version, wanted))
    if relation == "==":
        return version.partition("+")[0] == wanted
    return next((a > b for a, b in zip_longest(have, want, fillvalue=0) if a != b), True)


def check_device(findings: Findings, wish: str, *, trains: bool) -> None:
    """`trains`: whether a GPU makes much of a difference here."""
    import torch

    from client.devices import wished
    from common.config import RunConfig
    from common.net import best_device

    try:
        device = wished(wish)[0] if trains else best_device(RunConfig(device=wish).device)
    except UserError as error:
        raise UserError(str(error).replace("run.device", "--device") if trains else str(error)) from None
    if device.type == "cpu":
        cores = f"CPU, {os.cpu_count()} cores"
        if not trains or wish == "cpu":
            findings.passed("device", cores)
            return
        built = "torch sees none" if torch.version.cuda else "this torch is built without CUDA"
        findings.warn("device", f"{cores}: no GPU is used ({built}); training takes longer, nothing else changes")
        return
    try:
        torch.ones(8, device=device).sum().item()
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError as error:
        why = str(error).partition("\n")[0]
        raise UserError(f"{device} cannot be used ({why}): mend the driver, or use --device cpu") from None
    text = f"{device}, {torch.cuda.get_device_name(device)}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    if free < TIGHT:
        findings.warn("device", f"{text}: other programs use its memory (see nvidia-smi)")
    else:
        findings.passed("device", text)


def check_writable(findings: Findings, name: str, folder: Path, mend: str) -> None:
    place = existing(folder)
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise UserError(f"{place}: cannot be written ({error.strerror}): {mend}") from None
    findings.passed(name, f"{folder} can be written" if place == folder else f"{folder} can be made")


def check_room(findings: Findings, folder: Path, needed: int, wanted: int) -> None:
    """It fails below `needed` bytes; below `wanted` it may become tight."""
    place = existing(folder)
    free = shutil.disk_usage(place).free
    said = f"{size(free)} free on the disk of {place}"
    if free < needed:
        findings.fail("disk", f"{said}, and {size(needed)} are needed: make room, or use a folder on another disk")
    elif free < wanted:
        findings.warn("disk", f"{said}: it may become tight, {size(wanted)} are safe")
    else:
        findings.passed("disk", said)


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there; UserError where a file is in the way."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise UserError(f"{place}: is a file, not a folder: name another folder")
    return place


def size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
