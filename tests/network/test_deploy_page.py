"""docs/deploy.md is right: its commands, in its order, on a server's and a site's folder, lead to what it promises."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import pictures
from tests.network.superlink import free_port, until

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "deploy.md"
SETTINGS = {"size": 16, "rounds": 2, "every": 1}  # what an operator would edit
AT_SITE = ("join", "client")


def commands() -> list[list[str]]:
    blocks = re.findall(r"^```sh deploy\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


@pytest.fixture
def running() -> Iterator[dict[str, "subprocess.Popen[str]"]]:
    started: dict[str, subprocess.Popen[str]] = {}
    yield started
    for child in started.values():
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(20)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


@pytest.mark.timeout(300)
def test_two_machines(tmp_path: Path, running: dict[str, "subprocess.Popen[str]"]) -> None:
    operator, site = tmp_path / "operator", tmp_path / "site"
    operator.mkdir()
    pictures.write(site / "images")
    port = free_port()
    verbs = []
    for program, verb, *rest in commands():
        assert program == ".venv/bin/fedloge"
        verbs.append(verb)
        at_site = verb in AT_SITE or rest[0].endswith(".kit")
        words = [f"localhost:{port}" if word == "fl.example.org" else word for word in rest]
        if verb == "invite":
            shutil.copy(site / "north.csr", operator)
        command = [sys.executable, "-m", "fedloge", verb, *words]
        where = site if at_site else operator
        if verb in ("server", "client"):
            with (tmp_path / f"{verb}.log").open("w") as log:
                running[verb] = subprocess.Popen(command, cwd=where, stdout=log, stderr=log, text=True)
            if verb == "server":
                # a reader takes longer to get to the next command than a server to start
                until((operator / "study" / "run" / "status.json").exists, "the server to know its sites", 120)
            continue
        done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{verb}: {done.stdout}{done.stderr}"
        if verb == "init":
            path = operator / "study" / "federation.toml"
            text = path.read_text(encoding="utf-8")
            for key, value in SETTINGS.items():
                text, many = re.subn(rf"^{key} = \S+", f"{key} = {value}", text, flags=re.M)
                assert many == 1, key
            path.write_text(text.replace('"resnet18"', '"cnn"'), encoding="utf-8")
        if verb == "invite":
            shutil.copy(operator / "study" / "kits" / "north.kit", site)
    assert verbs == ["init", "join", "invite", "check", "server", "check", "client", "status"]
    for verb, child in running.items():
        said = tmp_path / f"{verb}.log"
        assert child.wait(200) == 0, said.read_text()
        assert "Traceback" not in said.read_text()
    promised = re.findall(r"`(study/run/\S+?|north/models/\S+?)`", PAGE.read_text(encoding="utf-8"))
    assert len(promised) == 3
    for name in promised:
        assert ((site if name.startswith("north/") else operator) / name).exists()
    assert str(site / "north" / "models" / "personal.safetensors") in (tmp_path / "client.log").read_text()
    page = [sys.executable, "-m", "fedloge", "report", "study/run"]
    done = subprocess.run(page, cwd=operator, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
