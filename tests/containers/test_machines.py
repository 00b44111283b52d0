"""docker/compose.server.yml and compose.client.yml: a server and a site that share nothing but an address."""

import ipaddress
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from common import deployment, pki
from fedloge import provision
from tests import pictures
from tests.containers.project import ROOT, Project, clone
from tests.network.superlink import free_port, until

OWNER = 4321  # nobody that the image or this machine knows
SETTINGS = {
    "method.name": "fedloge", "images.classes": pictures.CLASSES, "images.size": 16, "model.name": "cnn",
    "model.width": 8,
    "federation.rounds": 3, "evaluation.every": 1,
}  # fmt: skip


@pytest.fixture
def machines(images: dict[str, str], tmp_path: Path) -> Iterator[tuple[Project, dict[str, str]]]:
    """The variables of both compose files, for a federation that is to be reached at an address of this machine."""
    if os.geteuid():
        pytest.skip("files of another user take root")
    made = Project(clone(tmp_path / "clone"), images)
    asked = made.docker("network", "inspect", "bridge", "--format", "{{(index .IPAM.Config 0).Subnet}}")
    bridge = str(ipaddress.ip_network(asked.stdout.strip())[1])
    port = free_port()
    study, kit = tmp_path / "study", tmp_path / "kit"
    provision.create(study, "study", bridge, port, SETTINGS)
    pki.issue(study, "north", None, deployment.load(study / "federation.toml"))
    for folder in (kit, tmp_path / "state"):
        folder.mkdir()
    shutil.move(study / "kits" / "north.kit", kit)
    pictures.write(tmp_path / "images")
    for path in [tmp_path, *tmp_path.rglob("*")]:
        if not path.is_relative_to(made.folder):
            os.chown(path, OWNER, OWNER)
    given = {
        "FEDERATION": study, "PORT": port, "SITE": "north", "KIT": kit, "DATA": tmp_path / "images",
        "STATE": tmp_path / "state", "OWNER": f"{OWNER}:{OWNER}",
    }  # fmt: skip
    variables = {key: str(value) for key, value in given.items()}
    try:
        yield made, variables
    finally:
        for side in ("server", "client"):
            print(call(made, variables, side, "logs", check=False))
            call(made, variables, side, "down --volumes")


def call(project: Project, variables: dict[str, str], side: str, words: str, *, check: bool = True) -> str:
    command = f"docker compose -p {project_name(project, side)} -f docker/compose.{side}.yml {words}"
    return project.call(command, check=check, **variables).stdout


def project_name(project: Project, side: str) -> str:
    """Each side is a project of its own, as on a machine of its own."""
    return f"fedloge-{side}-{project.folder.parent.name.lower()}"


def test_two_machines(machines: tuple[Project, dict[str, str]]) -> None:
    project, variables = machines
    state, study = Path(variables["STATE"]), Path(variables["FEDERATION"])
    call(project, variables, "server", "up -d")
    until((study / "run" / "link.json").exists, "the server to be open", 300.0)
    call(project, variables, "client", "up -d client")
    (name,) = call(project, variables, "client", "ps -q").split()
    until(lambda: project.docker("inspect", "-f", "{{.State.Status}}", name).stdout == "exited\n", "the end", 300.0)
    assert project.docker("inspect", "-f", "{{.State.ExitCode}} {{.RestartCount}}", name).stdout == "0 0\n"
    said = call(project, variables, "client", "logs --no-color")
    assert "personal model: /state/models/personal.safetensors" in said
    assert re.search(r"connected to \S+ as north", said)
    assert (state / "models" / "personal.safetensors").stat().st_uid == OWNER
    until((study / "run" / "models" / "generic.safetensors").exists, "the generic model")


def test_the_page_starts_what_is_there() -> None:
    page = (ROOT / "docs" / "services.md").read_text(encoding="utf-8")
    used = set(re.findall(r"-f docker/(compose\.\w+\.yml)", page))
    assert used == {"compose.server.yml", "compose.client.yml"}
