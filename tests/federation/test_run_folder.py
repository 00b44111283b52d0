"""A run folder belongs to one process, one experiment and one set of data; what is damaged or foreign is said."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from client.store import Store
from common.config import Config, parse
from common.errors import UsageError, UserError
from common.net import best_device
from fedloge import federation, main
from fedloge.simulate import simulate
from server import rounds, run_folder
from tests.fakes import tiny


def small(**sections: object) -> Config:
    table = {
        "method": {"name": "fedloge"},
        "data": {"largest": 30},
        "model": {"width": 16},
        "frame": {"norm": 1.0, "sparsity": 0.0},
        "partition": {"clients": 3, "alpha": 1.0},
        "train": {"epochs": 1, "batch": 16},
        "federation": {"rounds": 2},
        "evaluation": {"every": 5},
    }
    return parse({**table, **sections})


def quiet(_: object) -> None:
    pass


def test_two_processes_cannot_work_in_one_folder(tmp_path: Path) -> None:
    with run_folder.locked(tmp_path), pytest.raises(UserError, match="another process"):
        simulate(small(), tmp_path, quiet)
    simulate(small(), tmp_path, quiet)


def test_other_data_under_the_same_run_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulate(small(), tmp_path, quiet)
    load = federation.sources.load

    def relabelled(config):
        split = load(config)
        split.train.labels[0] = 1 - split.train.labels[0].clamp_max(1)
        return split

    monkeypatch.setattr(federation.sources, "load", relabelled)
    with pytest.raises(UserError, match="the data or its split"):
        simulate(small(federation={"rounds": 3}), tmp_path, quiet)


def test_a_run_may_end_earlier_than_it_was_meant_to(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(now) -> None:
        if now.round == 2:
            raise Stop

    with pytest.raises(Stop):
        simulate(small(federation={"rounds": 10}), tmp_path, stop)
    result = simulate(small(federation={"rounds": 2}), tmp_path, quiet)
    assert result["mean_of_rounds"] == [2]
    assert result["generic"]["psi"]["top1"] > 0


def test_every_other_environment_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulate(small(), tmp_path, quiet)
    simulate(small(), tmp_path, quiet)
    path = tmp_path / "environment.json"
    assert len(json.loads(path.read_text())) == 1
    monkeypatch.setattr(run_folder, "_commit", lambda: "another")
    simulate(small(federation={"rounds": 3}), tmp_path, quiet)
    assert [e["code"] == "another" for e in json.loads(path.read_text())] == [False, True]


@pytest.mark.parametrize(
    "section",
    [
        {"frame": {"norm": 1.0, "sparsity": 0.97}},
        {"model": {"norm": "local"}},
        {"partition": {"clients": 5000}},
        {"evaluation": {"on": "holdout"}, "partition": {"clients": 3, "holdout": 0.001}},
    ],
    ids=["frame", "norm", "clients", "holdout"],
)
def test_a_refused_run_leaves_nothing(tmp_path: Path, section: dict[str, object]) -> None:
    config = small(**section)
    with pytest.raises(UserError):
        simulate(config, tmp_path / "run", quiet)
    assert not (tmp_path / "run").exists()


def pictures(folder: Path) -> Path:
    """Two classes of images that stream from disk; one of them cannot be read."""
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for number in range(12):
            Image.new("RGB", (90, 80), (20 * number, 0, 0)).save(folder / name / f"{number}.png")
    (folder / "b" / "7.png").write_bytes(b"no image")
    return folder


@pytest.mark.parametrize("there", [False, True])
def test_a_run_that_fails_in_its_first_round_takes_its_folder_away_again(tmp_path: Path, there: bool) -> None:
    """Unless the folder is not its own: then it only adds to it."""
    data = {"source": "folder", "path": str(pictures(tmp_path / "images")), "size": 72, "test_share": 0.1}
    config = small(data=data, partition={"kind": "iid", "clients": 2}, method={"name": "ditto"})
    folder = tmp_path / "runs" / "first"
    if there:
        folder.mkdir(parents=True)
        (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"7\.png: cannot be read as an image"):
        simulate(config, folder, quiet)
    assert folder.exists() == there
    assert (folder / "notes.txt").exists() == there


def test_a_run_that_fails_after_its_first_round_keeps_it(tmp_path: Path) -> None:
    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(small(), tmp_path / "run", stop)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["round-000001.safetensors"]


def test_a_damaged_local_part_is_said_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path / "site", keep=3)
    for round in (1, 2):
        store.save(round, {"local_head": {"bias": torch.full((2,), float(round))}})
    path = tmp_path / "site" / "round-000002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        kept = store.load(before=3)
    assert kept is not None
    assert kept["local_head"]["bias"].tolist() == [1.0, 1.0]
    assert "round-000002" in caplog.text


def test_local_parts_of_another_method_are_refused() -> None:
    federation = tiny({"name": "fedloge"})
    site = federation.sites["north"]
    site.store.save(1, {"own_head": {"bias": torch.zeros(4)}})
    with pytest.raises(UserError, match="own_head"):
        site.prepare({}, before=2)


def test_the_clock_cannot_drop_a_site_of_a_simulation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sites in one process train one after another: however long that takes, all of them count."""
    slow: Iterator[int] = iter(range(0, 10**9, 10_000))
    one_round = rounds.one_round

    def timed(*arguments):
        return one_round(*arguments[:7], lambda: float(next(slow)))

    monkeypatch.setattr(rounds, "one_round", timed)
    simulate(small(), tmp_path, quiet)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["missing"] for event in events] == [[], []]
    assert [len(event["sites"]) for event in events] == [3, 3]


def test_a_gpu_that_is_not_there_is_named() -> None:
    with pytest.raises(UsageError, match=r"run\.device = 'cuda:99'"):
        best_device("cuda:99")


def test_a_run_folder_below_a_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    demo = str(Path(main.__file__).with_name("demo.toml"))
    assert main.run(["simulate", demo, "--out", str(tmp_path / "file" / "run")]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("fedloge: ")
