"""`fedloge bench`: what there is, and what becomes of a record."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import __main__ as bench


@pytest.fixture
def tally(monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark that counts."""

    def options(parser: Any) -> None:
        parser.add_argument("--many", type=int, default=3)

    def table(record: Mapping[str, Any]) -> str:
        return f"counted {record['count']}"

    made = SimpleNamespace(
        __doc__="Counts.", ABOUT="counts", EXAMPLE="--many 4", SMALL={"many": 1}, options=options, table=table,
        measure=lambda many: {"count": many}, ratios=lambda record: {"count": float(record["count"])},
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "tally", made)  # type: ignore[arg-type]
    monkeypatch.setitem(bench.NAMES, "tally", "tally")


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["benchmarks", *map(str, words)])
    return bench.main()


@pytest.mark.usefixtures("tally")
def test_a_record_says_what_was_asked_for_and_where(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(monkeypatch, "tally", "--many", 5, "--json", "--out", tmp_path / "new" / "record.json") == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["benchmark"], record["count"], record["options"]) == ("tally", 5, {"many": 5})
    assert {"processor", "cores", "gpu", "torch", "flwr", "code"} <= record["environment"].keys()
    assert record == json.loads((tmp_path / "new" / "record.json").read_text())
    assert run(monkeypatch, "tally") == 0
    assert capsys.readouterr().out == "counted 3\n"


def test_every_benchmark_is_told_in_a_line_of_the_help() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fedloge", "bench", "--help"], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    for name in bench.NAMES:
        assert any(line.split()[:1] == [name] and len(line.split()) > 3 for line in lines), name


@pytest.mark.parametrize("name", bench.NAMES)
def test_example_is_usage(name: str) -> None:
    module = bench.benchmark(name)
    given = vars(bench.parse([name, *module.EXAMPLE.split()]))
    assert given.keys() >= {"json", "out", *module.SMALL}


@pytest.mark.parametrize("words", [[], ["nothing"], ["memory", "--sites", "0"]])
def test_wrong_usage_ends_with_two(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.parse(words)
    assert ended.value.code == 2
    assert "usage: fedloge bench" in capsys.readouterr().err
