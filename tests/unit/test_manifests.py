"""The files under docker/ for real machines: each is valid by the rules of what reads it, and its commands are ours.

tests/network/test_machines.py and test_proxy.py run what can be run of them.
"""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from fedloge import main

PLACE = Path(__file__).parents[2] / "docker"
UNITS = sorted((PLACE / "systemd").glob("*.service"))
VERBS = {verb for verbs in main.VERBS.values() for verb in verbs}
KUBERNETES = ("1.29", "1.37")  # the oldest and the newest the manifests are for
COMPOSE = {
    "compose.server.yml": {"FEDERATION": "/srv/study", "OWNER": "7:8"},
    "compose.client.yml": {
        "SITE": "north", "KIT": "/srv/kit", "DATA": "/srv/images", "STATE": "/srv/north", "OWNER": "7:8",
    },
}  # fmt: skip


def objects(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((PLACE / "kubernetes" / name).read_text(encoding="utf-8")))


def pod(name: str) -> dict[str, Any]:
    (made,) = [item for item in objects(name) if item["kind"] in ("StatefulSet", "Deployment")]
    assert made["spec"]["replicas"] == 1
    spec: dict[str, Any] = made["spec"]["template"]["spec"]
    return spec


def understood(words: list[str]) -> None:
    """Whether `fedloge` takes the command line."""
    main._parse(words)


# Kubernetes


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("name", ["server.yaml", "client.yaml"])
def test_manifests_are_what_the_api_takes(name: str, version: str) -> None:
    for item in objects(name):
        kubernetes_validate.validate(item, version, strict=True)


def test_the_schema_is_looked_at() -> None:
    (item,) = [item for item in objects("client.yaml") if item["kind"] == "Deployment"]
    item["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readynessProbe"):
        kubernetes_validate.validate(item, KUBERNETES[-1], strict=True)


@pytest.mark.parametrize("name", ["server.yaml", "client.yaml"])
def test_pods_may_do_no_more_than_they_need(name: str) -> None:
    spec = pod(name)
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["automountServiceAccountToken"] is False
    for container in [*spec.get("initContainers", []), *spec["containers"]]:
        allowed = container["securityContext"]
        assert allowed == {
            "readOnlyRootFilesystem": True, "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]},
        }  # fmt: skip
        volumes = {volume["name"] for volume in spec["volumes"]} | {"federation"}
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert "/tmp" in mounts
        assert set(mounts.values()) <= volumes


def test_commands_of_pods_are_ours() -> None:
    for name in ("server.yaml", "client.yaml"):
        (container,) = pod(name)["containers"]
        understood(container["args"])
        for probe in ("readinessProbe", "livenessProbe"):
            if "exec" in container.get(probe, {}):
                program, *words = container[probe]["exec"]["command"]
                assert program == "fedloge"
                understood(words)
    (init,) = pod("server.yaml")["initContainers"]
    (script,) = init["args"]
    assert script.startswith("test -e /federation/study || exec fedloge ")
    program, *words = shlex.split(script.partition("exec ")[2])
    understood(words)
    (given,) = [item for item in objects("server.yaml") if item["kind"] == "ConfigMap"]
    assert {word[1:] for word in words if word.startswith("$")} == given["data"].keys()


# systemd


def settings(unit: Path) -> dict[str, str]:
    return dict(re.findall(r"^(\w+)=(.*)$", unit.read_text(encoding="utf-8"), re.M))


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_units_restart_what_a_restart_can_mend(unit: Path) -> None:
    found = settings(unit)
    assert (found["Restart"], found["RestartPreventExitStatus"]) == ("on-failure", "2")
    assert found["User"] not in ("", "root")
    assert (found["KillMode"], found["NoNewPrivileges"], found["ProtectSystem"]) == ("mixed", "yes", "strict")
    program, *words = shlex.split(found["ExecStart"].replace("${DATA}", "data"))
    assert program.endswith("/fedloge")
    understood(words)


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_units_are_what_systemd_takes(unit: Path, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed (Debian: systemd)")
    program = shutil.which("true")
    text = unit.read_text(encoding="utf-8").replace("/opt/fedloge/.venv/bin/fedloge", str(program))
    (tmp_path / unit.name).write_text(text, encoding="utf-8")
    words = ["systemd-analyze", "verify", "--man=no", str(tmp_path / unit.name)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    about = [line for line in done.stderr.splitlines() if unit.name.partition(".")[0].rstrip("@") in line]
    assert (done.returncode, about) == (0, [])


# Compose


@pytest.fixture(scope="module")
def compose() -> list[str]:
    """The command, which needs no engine to read a file."""
    for words in (["docker", "compose"], ["docker-compose"]):
        if (
            shutil.which(words[0])
            and not subprocess.run([*words, "version"], capture_output=True, check=False).returncode
        ):
            return words
    pytest.skip("docker compose is not installed (Debian: docker-compose)")


def read(compose: list[str], name: str, given: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    known = {key for table in COMPOSE.values() for key in table}
    environment = {key: value for key, value in os.environ.items() if key not in known} | given
    words = [*compose, "-f", str(PLACE / name), "config"]
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", COMPOSE)
def test_compose_files_say_what_is_missing(compose: list[str], name: str) -> None:
    for missing in COMPOSE[name]:
        done = read(compose, name, {key: value for key, value in COMPOSE[name].items() if key != missing})
        assert done.returncode != 0, missing
        said = re.search(rf"\$\{{{missing}:\?([^}}]+)\}}", (PLACE / name).read_text(encoding="utf-8"))
        assert said is not None, missing
        assert said[1] in done.stderr


@pytest.mark.parametrize("name", COMPOSE)
def test_compose_files_run_us_and_nothing_more(compose: list[str], name: str) -> None:
    done = read(compose, name, COMPOSE[name])
    assert done.returncode == 0, done.stderr
    services = yaml.safe_load(done.stdout)["services"]
    for service in services.values():
        understood(service["command"])
        assert service["user"] == "7:8"
        assert (service["read_only"], service["cap_drop"], service["tmpfs"]) == (True, ["ALL"], ["/tmp"])
        assert service["restart"] == "on-failure"
        assert service["logging"]["options"]["max-size"] == "10m"
        assert {"mem_limit", "pids_limit"} <= service.keys()
        mounts = {volume["target"]: volume.get("read_only", False) for volume in service["volumes"]}
        assert mounts in ({"/federation": False}, {"/kit": True, "/data": True, "/state": False})
        understood(service["healthcheck"]["test"][2:])
    if "client-gpu" in services:
        assert services["client-gpu"]["profiles"] == ["gpu"]
        assert "profiles" not in services["client"]


# The pages


@pytest.mark.parametrize("page", ["services.md", "network.md", "deploy.md"])
def test_commands_of_the_pages_are_ours(page: str) -> None:
    text = (PLACE.parent / "docs" / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:console|sh deploy)\n(.*?)^```", text, re.M | re.S)
    spoken = [words for words in re.findall(r"`(fedloge [^`]+)`", text) if len(words.split()) > 2]
    lines = [line for block in blocks for line in block.splitlines()] + spoken
    found = 0
    for line in lines:
        words = shlex.split(line.replace("<north.csr", "").partition(" >")[0])
        for number, word in enumerate(words[:-1]):
            if word.rpartition("/")[2] in ("fedloge", "fedloge-server") and words[number + 1] in VERBS:
                given = words[number + 1 :]
                understood([*given, "--data", "images"] if given[0] == "client" and "--data" not in given else given)
                found += 1
    assert found >= {"services.md": 9, "network.md": 2, "deploy.md": 9}[page], found


@pytest.mark.parametrize("page", ["services.md", "network.md", "deploy.md"])
def test_files_that_the_pages_name_are_there(page: str) -> None:
    text = (PLACE.parent / "docs" / page).read_text(encoding="utf-8")
    for name in re.findall(r"\bdocker/[\w./@-]*\w", text):
        assert (PLACE.parent / name).exists(), name
