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
from benchmarks import check, figures, performance
from benchmarks.registry import NAMES, benchmark


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
    monkeypatch.setitem(NAMES, "tally", "tally")


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
    for name in NAMES:
        assert any(line.split()[:1] == [name] and len(line.split()) > 3 for line in lines), name


@pytest.mark.parametrize("name", NAMES)
def test_example_is_usage(name: str) -> None:
    module = benchmark(name)
    given = vars(bench.parse([name, *module.EXAMPLE.split()]))
    assert given.keys() >= {"json", "out", *module.SMALL}


@pytest.mark.parametrize("words", [[], ["nothing"], ["memory", "--sites", "0"]])
def test_wrong_usage_ends_with_two(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.parse(words)
    assert ended.value.code == 2
    assert "usage: fedloge bench" in capsys.readouterr().err


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, tally: None, tmp_path: Path) -> list[float]:  # noqa: ARG001
    """What the benchmark that counts will find, in turn; it is the only one, and its record says 10."""
    values: list[float] = []
    found = benchmark("tally")
    monkeypatch.setattr(found, "measure", lambda many: {"count": values.pop(0) * many})
    monkeypatch.setattr(check, "NAMES", ["tally"])
    for name, ratio in (("2026-01-09-2", 99.0), ("2026-01-09-10", 10.0), ("2025-12-31", 1.0)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"ratios": {"tally": {"count": ratio, "gone": 5.0}}}))
    return values


@pytest.mark.parametrize(
    ("measured", "code"),
    [
        ([10.0], 0),
        ([8.0], 0),
        ([6.0, 6.0], 1),
        ([6.0, 9.0], 0),  # the second time it was as before
    ],
)
def test_a_ratio_that_fell_fails_the_check(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    counted: list[float],
    measured: list[float],
    code: int,
) -> None:
    counted += measured
    assert run(monkeypatch, "check", "--records", tmp_path) == code
    said = capsys.readouterr()
    assert counted == []
    assert ("fedloge: tally: count was 10.00, is 6.00" in said.err) == (code == 1)
    assert "was 10.00" in said.out


def test_a_new_record_is_what_the_next_check_compares_with(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, counted: list[float]
) -> None:
    counted += [3.0, 3.0]
    assert run(monkeypatch, "check", "--record", "--records", tmp_path) == 0
    assert run(monkeypatch, "check", "--records", tmp_path, "--json") == 0
    found = json.loads(capsys.readouterr().out.partition("\n{")[2].join(["{", ""]))
    assert (found["ratios"], found["slower"]) == ({"tally": {"count": 3.0}}, {})
    assert "processor" in found["environment"]


def test_without_a_record_there_is_nothing_to_compare_with(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(monkeypatch, "check", "--records", tmp_path / "none") == 1
    assert "make a record with --record" in capsys.readouterr().err


def test_performance_is_what_the_records_give() -> None:
    assert performance.PERFORMANCE.read_text(encoding="utf-8") == performance.performance(performance.RECORDS)


@pytest.mark.usefixtures("tally")
def test_the_newest_record_of_every_model_is_shown(tmp_path: Path) -> None:
    rows = {"2026-01-09": {"a": 1, "b": 2}, "2026-01-09-2": {"b": 3}, "2026-01-08": {"a": 4, "b": 5, "c": 6}}
    for name, row in rows.items():
        record = {
            "benchmark": "tally",
            "count": " ".join(f"{model}{value}" for model, value in row.items()),
            "rows": [{"model": model} for model in row],
            "environment": {"processor": "abacus", "cores": 1, "gpu": None, "code": "abc"},
        }
        (tmp_path / "tally").mkdir(exist_ok=True)
        (tmp_path / "tally" / f"{name}.json").write_text(json.dumps(record))
    found = {path.stem: [row["model"] for row in record["rows"]] for path, record in performance.current(
        list((tmp_path / "tally").glob("*.json")))}  # fmt: skip
    assert found == {"2026-01-09-2": ["b"], "2026-01-09": ["a"], "2026-01-08": ["c"]}
    text = performance.performance(tmp_path)
    assert text.index("counted b3") < text.index("counted a1 b2") < text.index("counted a4 b5 c6")
    assert "abacus, 1 cores, no GPU" in text


@pytest.mark.parametrize(("wanted", "met"), [("at least 2", "NOT MET"), ("at most 2", "met"), ("at least 1.5", "met")])
def test_aims_are_judged(wanted: str, met: str) -> None:
    assert figures.aim(1.5, wanted) == f"aim: {wanted}, {met}"
