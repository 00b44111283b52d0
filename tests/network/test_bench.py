"""The benchmarks run, and their figures are of what they say. How large these are is not for tests: see the records."""

import json
import os
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import pytest

from benchmarks.overhead import measure, rounds
from server.superlink import processes
from tests.network.superlink import until

ROOT = Path(__file__).parents[2]
MARK = uuid4().hex

pytestmark = pytest.mark.timeout(300)  # a busy machine needs a minute to start a federation, and some tests start two


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `fedloge bench` has it, for the processes that are started."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.mark.parametrize("name", ["resident bf16", "stock", "floor"])
def test_rounds_of_every_kind_are_timed(name: str) -> None:
    with measure.federation("tiny", 2, {"federation.rounds": 2, **measure.together(2)}) as place:
        seconds = measure.block_of(name, place, 2, 2)
        assert processes(place.folder / "run") == {}
    assert len(seconds) == 2
    assert min(seconds) > 0
    assert not place.folder.exists()


def test_figures_are_medians_over_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the first round of every block left out, and the kinds in turns."""
    made: list[str] = []

    def block_of(name: str, *_: object) -> list[float]:
        made.append(name)
        second = len(made) > len(measure.KINDS)
        base = {"stock": 8.0, "resident": 2.0, "floor": 1.0, "resident bf16": 1.5}[name]
        return [99.0, base, base + (2.0 if second else 0.0)]

    monkeypatch.setattr(measure, "block_of", block_of)
    [row] = measure.overhead(["tiny"], 2, 2, 2)["rows"]
    assert made == [*measure.KINDS, *measure.KINDS]
    assert row["tensors"] == 6
    assert row["seconds"]["stock"] == {"median": 8.0, "least": 8.0, "most": 10.0, "all": [8.0, 8.0, 8.0, 10.0]}
    assert row["ratios"] == {"stock / resident": 4.0, "resident / floor": 2.0, "resident bf16 / floor": 1.5}
    assert "aim: at least 20" in rounds.table({"rows": [row]})


def test_the_model_of_the_comparison_is_a_resnet18() -> None:
    with measure.federation("large", 1, {}) as place:
        assert (place.tensors, round(place.size / 1e6)) == (62, 45)


def bench(*words: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "fedloge", "bench", *map(str, words)]
    environment = {**os.environ, "FEDLOGE_TEST_MARK": MARK}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=290)


def left() -> list[str]:
    """Processes that a benchmark started here and did not end."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"FEDLOGE_TEST_MARK={MARK}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # it has ended, or is not ours to look at
            continue
    return found


def test_an_idle_federation_is_measured_and_recorded(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    done = bench("idle", "--sites", 2, "--seconds", 0.5, "--settle", 0, "--json", "--out", record)
    assert done.returncode == 0, done.stderr
    table = json.loads(done.stdout)
    assert table == json.loads(record.read_text())
    assert [row["serverapp"] for row in table["rows"]] == [False, True]
    assert {"flower-superlink", "flwr-serverapp"} <= table["rows"][1]["cores"].keys()
    assert {"cores", "code", "flwr"} <= table["environment"].keys()
    assert left() == []


def test_memory_is_that_of_every_program() -> None:
    found = measure.memory("tiny", [2], 2)
    [row] = found["rows"]
    assert {"flower-superlink", "flwr-serverapp", "sites"} <= row["peak_megabytes"].keys()
    assert found["more_in_models"] == 0


def test_rounds_without_a_dead_site_are_counted() -> None:
    found = measure.dead("tiny", 2, 3)
    assert found["rounds_without_the_dead"] == 3
    assert len(found["superlink_megabytes"]["by_round"]) >= 3 + measure.DEAD_AFTER


def test_nothing_outlives_a_benchmark_that_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fedloge", "bench", "idle", "--sites", "2", "--seconds", "1000"]
    environment = {**os.environ, "FEDLOGE_TEST_MARK": MARK, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, env=environment) as child:
        until(lambda: any("overhead.site" in program for program in left()), "sites to be started")
        child.kill()
    until(lambda: not left(), "everything to be gone")


def test_wrong_usage_ends_with_two() -> None:
    assert bench("overhead", "--sites", 0).returncode == 2
