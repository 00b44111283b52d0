"""Flower's own node as a child: started with what it needs, started again when it ends, and ended with the federation.

A script stands in for `flower-supernode`, which has its say in tests/network.
"""

import stat
import sys
import tomllib
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from client.reach import Diagnosis
from common import keys, pki
from common.config import parse
from common.deployment import Deployment, ImagesConfig, ServerConfig
from common.errors import UserError
from common.kit import open_kit
from fedloge import supernode
from fedloge.supernode import SuperNode

PLAN = Deployment(parse({"name": "study"}), ImagesConfig(("cat", "dog")), ServerConfig(port=9321))
SCRIPT = """#!{python}
import os, sys, time
from pathlib import Path
state = Path({state!r})
with (state / "starts").open("a") as file:
    file.write(" ".join(sys.argv[1:]) + " " + os.environ["FLWR_HOME"] + os.linesep)
if len((state / "starts").read_text().splitlines()) == 1:
    print("could not be activated")
    sys.exit(1)
(state / "over").touch()
print("INFO :      Sending: query.over message (ID: 1)")
print("INFO :      Sent successfully", flush=True)
time.sleep(600)
"""


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    operator, state = tmp_path / "operator", tmp_path / "state of north"
    operator.mkdir()
    state.mkdir()
    pki.init(operator, "localhost", "study")
    pki.issue(operator, "north", None, PLAN)
    script = tmp_path / "script"
    script.write_text(SCRIPT.format(python=sys.executable, state=str(state)))
    script.chmod(0o755)
    monkeypatch.setattr(supernode, "find_program", lambda _: str(script))
    monkeypatch.setattr(supernode, "diagnose", lambda *_: Diagnosis("ok", ""))
    monkeypatch.setattr(supernode, "AGAIN", 0.0)
    return state


def node(state: Path, said: list[str], **config: bool | int | float | str) -> SuperNode:
    kit = open_kit(state.parent / "operator" / "kits" / "north.kit")
    return SuperNode(kit, state, config, said.append)


def test_it_is_started_again_until_the_federation_is_over(state: Path) -> None:
    said: list[str] = []
    looked: list[None] = []
    node(state, said).run((state / "over").exists, lambda: looked.append(None))
    starts = (state / "starts").read_text().splitlines()
    assert len(starts) == 2
    assert "--superlink localhost:9321 --root-certificates" in starts[0]
    assert starts[0].endswith(str(state / "flwr"))
    assert said == [
        f"flower-supernode ended (could not be activated): it is started again; its log is {state}/supernode.log",
        "the federation is over",
    ]
    assert looked


def test_its_files_hold_what_it_reads(state: Path) -> None:
    config: dict[str, bool | int | float | str] = {
        "data": '/data/"a" \\ é', "threads": 2, "share-counts": True
    }  # fmt: skip
    node(state, [], **config)
    assert tomllib.loads((state / "supernode.toml").read_text()) == config
    secret = state / "supernode.key"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    kit = open_kit(state.parent / "operator" / "kits" / "north.kit")
    read = load_ssh_private_key(secret.read_bytes(), None)
    assert keys.spki(read.public_key()) == keys.spki(kit.private_key().public_key())  # type: ignore[arg-type]
    assert (state / "ca.crt").read_bytes() == kit.ca


def test_a_server_that_is_not_the_one_of_the_kit_is_refused(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supernode, "diagnose", lambda *_: Diagnosis("tls", "another authority", lasting=True))
    with pytest.raises(UserError, match="another authority"):
        node(state, []).run(lambda: False, lambda: None)
    assert not (state / "starts").exists()
