"""What `fedloge status PATH --healthy` says of a server and of a site, and how it ends."""

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from client.outbox import HEARD, Outbox
from common.errors import UserError
from fedloge import health
from fedloge.serve import LOCK

NOW = 2_000_000_000.0
ROUND = {"phase": "training", "round": 3, "rounds": 9, "updated": NOW}
THERE = {"north": {"online": True}, "south": {"online": True}, "west": {"online": False}}


@contextmanager
def serving(folder: Path, age: float = 100.0, **status: Any) -> Iterator[Path]:
    """A federation whose server started `age` seconds ago and has this status."""
    run = folder / "run"
    run.mkdir()
    (folder / "federation.toml").write_text("")
    if status:
        (run / "status.json").write_text(json.dumps(status))
    with (run / LOCK).open("w") as lock:
        lock.write(str(os.getpid()))
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.utime(run / LOCK, (NOW - age, NOW - age))
        yield folder


@pytest.mark.parametrize(
    ("age", "status", "said"),
    [
        (10.0, {}, "starting"),
        (10.0, {**ROUND, "updated": NOW - 20, "deadline": NOW - 900}, "starting"),  # of the server before this one
        (100.0, {"phase": "waiting", "updated": NOW, "sites": THERE}, "waiting for sites, 2 sites online"),
        (100.0, {**ROUND, "deadline": NOW + 5}, "training, round 3 of 9, 0 sites online"),
        (100.0, {**ROUND, "deadline": NOW - 50}, "training, round 3 of 9, 0 sites online"),
        (100.0, ROUND, "training, round 3 of 9, 0 sites online"),  # closed, and what follows takes its time
        (100.0, {**ROUND, "phase": "finished"}, "finished, round 3 of 9, 0 sites online"),
    ],
)
def test_a_server_that_moves_is_well(tmp_path: Path, age: float, status: dict[str, Any], said: str) -> None:
    with serving(tmp_path, age, **status):
        assert health.of(tmp_path, NOW) == said


@pytest.mark.parametrize(
    ("age", "status", "said"),
    [
        (200.0, {}, "has said nothing yet"),
        (200.0, {**ROUND, "updated": NOW - 300}, "has said nothing yet"),
        (100.0, {**ROUND, "deadline": NOW - 70}, "training, round 3 of 9, which should have ended 1 min ago"),
        (100.0, {"phase": "gave-up", "message": "no quorum", "updated": NOW}, "given up: no quorum"),
    ],
)
def test_a_server_that_hangs_is_not(tmp_path: Path, age: float, status: dict[str, Any], said: str) -> None:
    with serving(tmp_path, age, **status), pytest.raises(UserError, match=said):
        health.of(tmp_path, NOW)


def test_a_server_whose_process_is_gone_is_not(tmp_path: Path) -> None:
    with serving(tmp_path, **ROUND):
        pass
    with pytest.raises(UserError, match="no server is running"):
        health.of(tmp_path, NOW)


def test_a_site_is_well_while_the_server_answers_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no server has answered a site here yet"):
        health.of(tmp_path, NOW)
    Outbox(tmp_path, "north").heard()
    heard = (tmp_path / HEARD).stat().st_mtime
    assert health.of(tmp_path, heard + 59) == "the server answered 59 s ago"
    for wrong in (61, -61):  # silence, or a clock that was set back
        with pytest.raises(UserError, match="has not answered for 1 min"):
            health.of(tmp_path, heard + wrong)
    os.utime(tmp_path / HEARD, (1.0, 1.0))
    Outbox(tmp_path, "north").heard()
    assert (tmp_path / HEARD).stat().st_mtime > 1.0
    (tmp_path / "over").touch()
    assert health.of(tmp_path, heard + 10**6) == "the federation is over"


def test_the_command_says_one_line_and_ends_with_0_or_1_without_torch(tmp_path: Path) -> None:
    ask = [sys.executable, "-X", "importtime", "-m", "fedloge", "status", str(tmp_path), "--healthy"]
    ill = subprocess.run(ask, capture_output=True, text=True, check=False)
    assert (ill.returncode, ill.stdout) == (1, "")
    assert "fedloge: " in ill.stderr
    assert "torch" not in ill.stderr
    Outbox(tmp_path, "north").heard()
    well = subprocess.run(ask, capture_output=True, text=True, check=False)
    assert well.returncode == 0
    assert well.stdout.startswith("the server answered ")
