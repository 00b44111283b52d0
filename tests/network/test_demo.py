"""The demo as a newcomer meets it: real processes over TLS, the simulation's bits, and nothing left afterwards."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from common import config, parts
from fedloge import main
from fedloge.demo import DEMO
from fedloge.simulate import simulate

SETTINGS = ["federation.rounds=3", "evaluation.every=1"]
FLAGS = [word for setting in SETTINGS for word in ("--set", setting)]
pytestmark = pytest.mark.timeout(300)  # six processes that import torch, on a machine that may be busy


def started(folder: Path, *more: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "fedloge", "demo", "--out", str(folder), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def processes(folder: Path) -> list[str]:
    """Command lines of all processes that have to do with `folder`."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            line = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(folder) in line:
            found.append(line)
    return found


def all_gone(folder: Path, within: float = 60.0) -> bool:
    until = time.monotonic() + within
    while left := processes(folder):
        if time.monotonic() > until:
            print("\n".join(left))
            return False
        time.sleep(0.2)
    return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "runs"


@pytest.fixture(scope="module")
def said(folder: Path) -> tuple[str, str]:
    demo = started(folder, "--json", *FLAGS)
    out, err = demo.communicate()
    assert demo.returncode == 0, err
    return out, err


def test_the_result_is_one_json_object(folder: Path, said: tuple[str, str]) -> None:
    out, _ = said
    assert out.count("\n") == 1
    given = json.loads(out)
    assert given.keys() == {
        "rounds", "sites", "transport", "generic_accuracy", "generic_local_accuracy", "personal_accuracy", "seconds",
        "report",
    }  # fmt: skip
    assert (given["rounds"], given["sites"], given["transport"]) == (3, 4, "grpc+tls")
    assert Path(given["report"]).read_text().startswith("<!doctype html>")
    assert all_gone(folder)


def test_it_is_the_simulation_bit_for_bit(folder: Path, said: tuple[str, str], tmp_path: Path) -> None:
    given = json.loads(said[0])
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        result = simulate(config.load(DEMO, SETTINGS), tmp_path / "run", lambda _: None)
    finally:
        torch.set_num_threads(before)
    name = "round-000003.safetensors"
    pairs = [(folder / "federation" / "run" / "checkpoints" / name, tmp_path / "run" / "checkpoints" / name)]
    for site in sorted((folder / "sites").iterdir()):
        [kept] = site.glob(f"store/*/{name}")
        pairs.append((kept, tmp_path / "run" / "sites" / site.name / name))
    assert len(pairs) == 5
    for real, simulated in pairs:
        ours, theirs = parts.read(real)[0], parts.read(simulated)[0]
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    metrics = json.loads((folder / "federation" / "run" / "metrics.json").read_text())
    for kind in ("generic", "generic_local", "personal"):
        own = next(iter(result[kind].values()))["top1"]
        assert given[f"{kind}_accuracy"] == own
        tops = {predictor: values["top1"] for predictor, values in metrics[kind].items()}
        assert tops == {predictor: values["top1"] for predictor, values in result[kind].items()}


def test_with_coded_backbones_it_is_the_simulation_too(tmp_path: Path) -> None:
    settings = [*SETTINGS, "federation.wire=int8"]
    demo = started(tmp_path / "runs", *FLAGS, "--set", settings[-1])
    _, err = demo.communicate()
    assert demo.returncode == 0, err
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        simulate(config.load(DEMO, settings), tmp_path / "run", lambda _: None)
    finally:
        torch.set_num_threads(before)
    run, name = tmp_path / "runs" / "federation" / "run", "round-000003.safetensors"
    pairs = [(run / "checkpoints" / name, tmp_path / "run" / "checkpoints" / name)]
    for site in sorted((tmp_path / "runs" / "sites").iterdir()):
        for inner in (name, f"residual/{name}"):
            [kept] = site.glob(f"store/*/{inner}")
            pairs.append((kept, tmp_path / "run" / "sites" / site.name / inner))
    assert len(pairs) == 9
    for real, simulated in pairs:
        assert parts.digest(parts.read(real)[0]) == parts.digest(parts.read(simulated)[0])
    events = [json.loads(line)["bytes"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert all(sorted(of_round) == ["site-000", "site-001", "site-002", "site-003"] for of_round in events)
    # with a survey a round: the model goes down whole for it, and as a change to be trained from
    assert all(
        last["down"] < 0.8 * first["down"]
        for first, last in zip(*[event.values() for event in (events[0], events[-1])], strict=True)
    )


def test_progress_fits_on_a_screen(said: tuple[str, str]) -> None:
    lines = said[1].splitlines()
    assert [line.partition(":")[0] for line in lines if line.startswith("round ")] == [
        f"round {n} of 3" for n in (1, 2, 3)
    ]
    assert len(lines) < 25
    assert "Traceback" not in said[1]


def test_models_are_where_it_says(folder: Path, said: tuple[str, str]) -> None:
    del said
    assert (folder / "federation" / "run" / "models" / "generic.safetensors").exists()
    assert len(list(folder.glob("sites/*/models/personal.safetensors"))) == 4


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / "data").mkdir()
    assert main.run(["demo", "--out", str(tmp_path)]) == 1
    assert "thesis.txt" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "thesis.txt"]


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_whatever_happens_to_it_nothing_is_left(tmp_path: Path, kill: signal.Signals) -> None:
    demo = started(tmp_path / "runs", "--set", "federation.rounds=100000")
    assert demo.stderr is not None
    for line in demo.stderr:
        if line.startswith("round 1 "):
            break
    assert len(processes(tmp_path)) > 8  # itself, guards, server, SuperLink, ServerApp, clients
    demo.send_signal(kill)
    demo.communicate()
    assert demo.returncode == (1 if kill is signal.SIGTERM else -kill)
    assert all_gone(tmp_path)
