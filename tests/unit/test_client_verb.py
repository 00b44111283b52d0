"""`fedloge client` and `fedloge shares` as their users meet them, up to where a server would be needed."""

import io
import json
import logging
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from client.member import Told
from common import pki
from common.config import parse
from common.deployment import Deployment, ImagesConfig, ServerConfig
from fedloge import main
from fedloge.site import Events, Live

PLAN = Deployment(parse({"name": "study"}), ImagesConfig(("cat", "dog")), ServerConfig())


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """The command takes SIGTERM over; pytest gets it back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


# --- the live line ---------------------------------------------------------------------------------------------------

STORY = (
    Told(1, True, 2.5, None, None),
    Told(2, True, 1.25, 0.5, 0.75),
    Told(3, True, 1.0, None, None),
    Told(3, False, None, 0.625, 1.0),
)


def test_in_a_log_every_round_is_a_line() -> None:
    stream = io.StringIO()
    live = Live(stream)
    for told in STORY:
        live.told(told)
    live.close()
    assert stream.getvalue().splitlines() == [
        "round 1  loss 2.5000",
        "round 2  loss 1.2500  own accuracy: generic 50.0 %, personal 75.0 %",
        "round 3  loss 1.0000  own accuracy: generic 50.0 %, personal 75.0 %",
        "the end, after round 3  own accuracy: generic 62.5 %, personal 100.0 %",
    ]


def test_on_a_terminal_one_line_is_written_again_below_what_is_said() -> None:
    stream = Terminal()
    live = Live(stream)
    live.say("connected")
    for told in STORY[:2]:
        live.told(told)
    live.emit(logging.makeLogRecord({"msg": "joining again", "levelno": logging.WARNING}))
    live.close()
    assert stream.getvalue().split("\r\x1b[K") == [
        "",
        "connected\n",
        "round 1  loss 2.5000",
        "round 2  loss 1.2500  own accuracy: generic 50.0 %, personal 75.0 %",
        "joining again\nround 2  loss 1.2500  own accuracy: generic 50.0 %, personal 75.0 %",
        "round 2  loss 1.2500  own accuracy: generic 50.0 %, personal 75.0 %\n",
    ]


def test_a_line_never_wraps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    stream = Terminal()
    Live(stream).told(STORY[1])
    assert stream.getvalue() == "\r\x1b[Kround 2  loss 1.250"


def test_a_terminal_that_is_gone_stops_nothing() -> None:
    stream = io.StringIO()
    live = Live(stream)
    stream.close()
    live.told(STORY[0])
    assert live.newest == STORY[0]


def test_what_other_processes_note_is_shown_once_and_whole(tmp_path: Path) -> None:
    path, stream = tmp_path / "events.jsonl", io.StringIO()
    path.write_text('{"of": "an earlier start"}\n')
    events = Events(path, Live(stream))
    line = json.dumps({**vars(STORY[1]), "examples": 3, "losses": {}, "seconds": 0.1})
    with path.open("a") as file:
        file.write(line[:10])
        file.flush()
        events.look()
        assert stream.getvalue() == ""
        file.write(line[10:] + "\n")
        file.flush()
        events.look()
        events.look()
    assert stream.getvalue().count("round 2") == 1


# --- what is refused before anybody is connected to ------------------------------------------------------------------


@pytest.fixture
def operator(tmp_path: Path) -> Path:
    folder = tmp_path / "operator"
    folder.mkdir()
    pki.init(folder, "localhost", "study")
    pki.issue(folder, "north", None, PLAN)
    return folder


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.startswith("fedloge: ")
    assert found.err.count("\n") == 1
    return found.err


def test_data_are_looked_at_first(operator: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kit, state = str(operator / "kits" / "north.kit"), str(tmp_path / "state")
    assert main.run(["client", kit, "--data", str(tmp_path / "none"), "--state", state]) == 1
    assert "no such file or folder: name a folder" in one_line(capsys)
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 8, 8), np.uint8), labels=np.arange(2), classes=["cat", "cow"])
    assert main.run(["client", kit, "--data", str(tmp_path / "a.npz"), "--state", state]) == 1
    assert "class 'cow' is not among the 2 known classes" in one_line(capsys)


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--threads", "0"], 2, "--threads 0 is not possible"),
        (["--device", "gpu"], 2, "run.device"),
        (["--key", "none.key"], 1, "none.key: there is no such key"),
    ],
)
def test_flags_that_cannot_work_are_refused(
    operator: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], code: int, said: str
) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 8, 8), np.uint8), labels=np.arange(2), classes=["cat", "dog"])
    kit = str(operator / "kits" / "north.kit")
    assert main.run(["client", kit, "--data", str(tmp_path / "a.npz"), *flags]) == code
    assert said in one_line(capsys)


def test_a_kit_needs_an_ending_or_a_state_folder(operator: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kit = operator / "kits" / "north.kit"
    bare = kit.rename(kit.with_name("north"))
    assert main.run(["client", str(bare), "--data", "x"]) == 2
    assert "--state" in one_line(capsys)


def test_what_a_site_keeps_is_of_one_federation(
    operator: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kit of another one by the same name would in the end put its personal model where that of the first is."""
    other, state, data = tmp_path / "other", tmp_path / "state", str(tmp_path / "none")
    other.mkdir()
    pki.init(other, "localhost", "more")
    pki.issue(other, "north", None, replace(PLAN, config=parse({"name": "more"})))
    first, second = (str(folder / "kits" / "north.kit") for folder in (operator, other))
    for _ in range(2):  # the second time it is known
        assert main.run(["client", first, "--data", data, "--state", str(state)]) == 1
        assert "no such file or folder: name a folder" in one_line(capsys)
    assert main.run(["client", second, "--data", data, "--state", str(state)]) == 1
    said = f"{state}: holds what a site keeps of another federation, its personal model among it: name another folder"
    assert one_line(capsys) == f"fedloge: {said} for more with --state\n"
    main.run(["check", second, "--state", str(state), "--json"])
    found = json.loads(capsys.readouterr().out)["checks"]
    assert [line["text"] for line in found if (line["name"], line["result"]) == ("state", "FAIL")] == [
        f"{said} for more with --state"
    ]


# --- shares ----------------------------------------------------------------------------------------------------------


def test_shares_are_written_and_what_belongs_into_federation_toml_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = tmp_path / "e.toml"
    experiment.write_text("[data]\nlargest = 20\n[partition]\nclients = 2\n")
    assert main.run(["shares", str(experiment), str(tmp_path / "out"), "--set", "data.imbalance=0.5"]) == 0
    printed = capsys.readouterr().out
    assert '[images]\nclasses = ["0", "1"' in printed
    assert 'size = 8\nchannels = 1\nmean = [0.305]\nstd = [0.376]\naugment = "none"\n' in printed
    assert main.run(["shares", str(experiment), str(tmp_path / "more"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sites"] == ["site-000", "site-001"]
    assert (tmp_path / "more" / "site-001-test.npz").exists()
