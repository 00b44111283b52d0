"""How containers become one federation: tickets are counted, sites are dealt once and claimed by one process each."""

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from common.kit import open_kit
from fedloge import lobby, main

HOLD = "import sys; from pathlib import Path; from fedloge import lobby; c = lobby.claimed(Path(sys.argv[1])); \
print(c.__enter__(), flush=True); sys.stdin.read()"

FOLLOW = "import sys, threading; from pathlib import Path; from fedloge import lobby; lobby.FAREWELL = 0.1; \
print('trying', flush=True); lobby._follow(Path(sys.argv[1])); threading.Event().wait()"


class Place:
    """The shared folders, and the command on them."""

    def __init__(self, folder: Path) -> None:
        self.folders = {name: folder / name for name in ("lobby", "operator", "sites", "runs")}
        for path in self.folders.values():
            path.mkdir()
        self.tickets = self.folders["lobby"] / "tickets"
        self.tickets.mkdir()

    def call(self, role: str, *words: str) -> int:
        wanted = {"provision": ("operator", "sites"), "server": ("operator",), "client": ("sites",)}[role]
        places = [f"--{name}={self.folders[name]}" for name in wanted]
        places += [] if role == "client" else [f"--results={self.folders['runs']}"]
        return main.run(["lobby", "--lobby", str(self.folders["lobby"]), role, *places, *words])

    def site(self, name: str) -> Path:
        return self.folders["sites"] / name


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    for name, value in (("STILL", 0.3), ("LATEST", 3.0), ("GONE", 0.5), ("TICK", 0.02)):
        monkeypatch.setattr(lobby, name, value)
    return Place(tmp_path)


@pytest.fixture
def two(place: Place) -> Iterator[None]:
    """Two replicas that wait, and a ticket whose replica is dead."""
    (place.tickets / "dead").touch()
    with ExitStack() as held:
        for name in ("a", "b"):
            assert held.enter_context(lobby.claimed(place.tickets / name))
        yield


@pytest.mark.usefixtures("two")
def test_as_many_sites_are_dealt_as_there_are_replicas_and_only_once(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert place.call("provision", "--least", "2", "--set=federation.rounds=3") == 0
    names = ["site-000", "site-001"]
    assert sorted(path.name for path in place.folders["sites"].iterdir()) == names
    for name in names:
        kit = open_kit(place.site(name) / "site.kit")
        assert (kit.name, kit.address) == (name, "server:9092")
        assert sorted(path.name for path in place.site(name).iterdir()) == ["site.kit", "test.npz", "train.npz"]
    assert list((place.folders["operator"] / "federation" / "kits").iterdir()) == []  # the server has no site's key
    assert "rounds = 3 " in (place.folders["operator"] / "federation" / "federation.toml").read_text()

    before = (place.site("site-000") / "site.kit").read_text()
    caplog.clear()
    assert place.call("provision", "--least", "9", "--set=federation.rounds=4") == 0
    assert [m.partition(":")[0] for m in caplog.messages] == [
        "the federation of 2 sites is there already", "DATA and SET are those it began with"
    ]  # fmt: skip
    assert (place.site("site-000") / "site.kit").read_text() == before


@pytest.mark.usefixtures("two")
def test_a_deal_that_was_cut_off_is_made_anew(place: Place) -> None:
    (place.folders["operator"] / "federation").mkdir()
    (place.folders["sites"] / "site-007").mkdir()
    assert place.call("provision") == 0
    assert sorted(path.name for path in place.folders["sites"].iterdir()) == ["site-000", "site-001"]


@pytest.mark.usefixtures("two")
def test_a_folder_of_images_is_shared_out(place: Place, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(12):
            pixels = np.random.RandomState(i).randint(0, 256, (9, 9, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    assert place.call("provision", f"--data={tmp_path / 'images'}", "--set=partition.kind=iid data.size=8") == 0
    shares = [np.load(place.site(name) / "train.npz") for name in ("site-000", "site-001")]
    assert [share["images"].shape[1:] for share in shares] == [(8, 8, 3)] * 2
    assert sum(len(share["labels"]) for share in shares) == 20  # the rest is the test set
    assert open_kit(place.site("site-001") / "site.kit").classes == ("cat", "dog")


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data=/nowhere"], "/nowhere: no such folder"),
        (["--set=federation.rouds=3"], "rouds"),
        (["--owner=me"], "OWNER = 'me' is not possible"),
    ],
)
def test_wrong_wishes_are_one_line_and_nothing_is_dealt(
    place: Place, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert place.call("provision", *words) != 0
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fedloge: ")]
    assert said in line
    assert lobby.dealt(place.folders["lobby"]) is None


@pytest.mark.usefixtures("two")
def test_those_who_came_are_enough_at_last_and_nobody_is_not(
    place: Place, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    assert lobby.replicas(place.tickets, 3) == 2
    assert "2 clients have come, not 3" in caplog.text
    with pytest.raises(UserError, match="no client has come"):
        lobby.replicas(tmp_path / "empty", 1)


def test_a_site_is_free_again_when_its_process_was_killed(tmp_path: Path) -> None:
    path = tmp_path / "claim"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"True\n"
    with lobby.claimed(path) as mine:
        assert not mine
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with lobby.claimed(path) as mine:
        assert mine


def test_a_replica_takes_the_next_free_site_and_one_too_many_ends(
    place: Place, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    caplog.set_level(logging.INFO)
    ran: list[list[str]] = []
    monkeypatch.setattr(lobby, "_run", lambda words: ran.append(list(words)))
    monkeypatch.setattr(lobby, "_follow", lambda _: None)  # it would end us
    (place.folders["lobby"] / "dealt").write_text(json.dumps({"sites": ["north", "south"], "wishes": []}))
    for name in ("north", "south"):
        place.site(name).mkdir()
    link = tmp_path / "link"
    with lobby.claimed(place.site("north") / "claim"):
        assert place.call("client", "--link", str(link)) == 0
        assert ran[0][:2] == ["client", str(place.site("south") / "site.kit")]
        assert link.readlink() == place.site("south") / "state"
        with lobby.claimed(place.site("south") / "claim"):
            assert place.call("client") == 0
    assert len(ran) == 1
    assert "all 2 sites of this federation have their client" in caplog.messages[-1]

    (place.folders["lobby"] / "over").touch()
    assert place.call("client") == 0
    assert len(ran) == 1
    assert "the federation is over" in caplog.messages[-1]


def test_a_client_that_has_not_heard_of_the_end_is_ended(tmp_path: Path) -> None:
    client = subprocess.Popen([sys.executable, "-c", FOLLOW, tmp_path / "over"], stdout=subprocess.PIPE)
    assert client.stdout is not None
    assert client.stdout.readline() == b"trying\n"
    assert client.poll() is None
    (tmp_path / "over").touch()
    assert client.wait() == -signal.SIGTERM


@pytest.mark.parametrize("role", ["server", "client"])
def test_nobody_waits_for_a_provision_that_has_failed(
    place: Place, role: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert place.call(role) == 0
    assert caplog.messages == ["nothing was dealt: provision says why"]


def test_a_server_whose_results_nobody_would_get_does_not_begin(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (place.folders["lobby"] / "dealt").write_text(json.dumps({"sites": ["north"], "wishes": []}))
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    assert place.call("server") == 1
    assert "may not write here: set OWNER" in capsys.readouterr().err


def test_sites_share_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [lobby.gpu(i) for i in range(4)] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no GPU"):
        lobby.gpu(0)
