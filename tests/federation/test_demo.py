"""The demo as a newcomer meets it: run once, shown as a table and as JSON, and not trained again when asked again."""

import io
import json
import signal
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from common import parts
from fedloge import main

METHODS = ("fedavg-ft", "fedloge")
COLUMNS = ("all", "many", "medium", "few")
ROWS = [
    ("FedAvg", "generic", ""),
    ("FedAvg", "personal", "global model fine-tuned at the site"),
    ("FedAvg", "personal", "global model as it is"),
    ("FedLoGe", "generic", "realigned global head"),
    ("FedLoGe", "personal", "site's head + realigned global head"),
]


@dataclass(frozen=True)
class Said:
    status: int
    out: str
    err: str


def demo(folder: Path, *more: str) -> Said:
    out, err = io.StringIO(), io.StringIO()
    before = signal.getsignal(signal.SIGTERM)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            status = main.run(["demo", "--out", str(folder), *more])
    finally:
        signal.signal(signal.SIGTERM, before)
    return Said(status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "runs"


@pytest.fixture(scope="module")
def first(folder: Path) -> Said:
    """The whole demo, once."""
    return demo(folder, "--json")


@pytest.fixture
def untrained(first: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever trains from here on is caught."""

    def trains(*_: object, **__: object) -> dict[str, float]:
        raise AssertionError("a finished demo trained again")

    assert first.status == 0
    monkeypatch.setattr("client.participant.train", trains)
    monkeypatch.setattr("fedloge.simulate.judge", trains)


def files(folder: Path) -> dict[str, str]:
    """What every file of the folder holds; the order of metadata in safetensors files is no content."""
    found = {}
    for path in sorted(path for path in folder.rglob("*.*") if path.is_file()):
        sealed = path.suffix == ".safetensors"
        found[str(path.relative_to(folder))] = parts.digest(parts.read(path)[0]) if sealed else path.read_text()
    return found


def table(text: str) -> list[tuple[str, str, str, list[float]]]:
    """(method, model, note, figures) of every row, cut where the header's columns begin."""
    lines = text.splitlines()
    top = next(n for n, line in enumerate(lines) if line.startswith("method"))
    rule = lines[top + 1]
    assert set(rule) == {"-", " "}
    starts = [n for n, c in enumerate(rule) if c == "-" and (n == 0 or rule[n - 1] == " ")]
    ends = [*starts[1:], 200]
    cut = [[line[a:b].strip() for a, b in zip(starts, ends, strict=True)] for line in lines[top:]]
    assert cut[0] == ["method", "model", "", *COLUMNS]
    rows = cut[2 : cut.index([""] * len(starts))]
    return [(row[0], row[1], row[2], [float(cell) for cell in row[3:]]) for row in rows]


@pytest.mark.timeout(300)  # the whole demo, on a machine that may be busy
def test_both_methods_run_on_the_same_sites_and_give_one_json_object(first: Said, folder: Path) -> None:
    assert first.status == 0
    assert first.out.count("\n") == 1
    given = json.loads(first.out)
    assert given["folder"] == str(folder)
    assert [result["method"] for result in given["results"]] == list(METHODS)
    for result in given["results"]:
        assert result["rounds"] == 20
        assert result["mean_of_rounds"] == [20]
        assert result["judged_on"] == "test"
        assert result["never_trained"] == []
        assert result["groups"] == given["results"][0]["groups"]
        for kind in ("generic", "personal"):
            own = next(iter(result[kind].values()))
            assert 0.5 < own["top1"] < 1  # it has learned what a digit is
        assert result == {**result, **json.loads((folder / result["method"] / "metrics.json").read_text())}


def test_progress_goes_to_standard_error(first: Said) -> None:
    lines = first.err.splitlines()
    assert [line for line in lines if " sites, " in line] == [f"{name}: 4 sites, 20 rounds" for name in METHODS]
    rounds = [line.split()[1] for line in lines if line.startswith("round ")]
    assert len(rounds) <= 42
    assert rounds.count("20/20") == 2


def test_the_models_are_where_it_says(first: Said, folder: Path) -> None:
    assert first.status == 0
    for method in METHODS:
        models = folder / method / "models"
        assert (models / "generic.safetensors").exists()
        assert len(list((models / "personal").glob("site-*.safetensors"))) == 4


@pytest.mark.usefixtures("untrained")
def test_the_table_has_generic_and_personal_rows_of_both_methods(first: Said, folder: Path) -> None:
    said = demo(folder)
    assert said.status == 0
    rows = table(said.out)
    assert [row[:3] for row in rows] == ROWS
    results: dict[str, Any] = {result["method"]: result for result in json.loads(first.out)["results"]}
    predictors = [
        (results["fedavg-ft"], "generic", "head"),
        (results["fedavg-ft"], "personal", "tuned"),
        (results["fedavg-ft"], "personal", "global"),
        (results["fedloge"], "generic", "psi realigned"),
        (results["fedloge"], "personal", "phi+psi_k"),
    ]
    for (result, kind, name), row in zip(predictors, rows, strict=True):
        values = result[kind][name]
        expected = [values["top1"], *(values["groups"]["share"][group] for group in COLUMNS[1:])]
        assert row[3] == [pytest.approx(100 * share, abs=0.051) for share in expected]
    assert f"{folder}/METHOD/models" in said.out
    groups = results["fedloge"]["groups"]["share"]
    digits = " / ".join(", ".join(str(c) for c in groups[name]) for name in COLUMNS[1:])
    assert digits in " ".join(said.out.split())
    assert sorted(groups["many"] + groups["medium"] + groups["few"]) == list(range(10))


@pytest.mark.usefixtures("untrained")
def test_asked_again_it_does_not_train_again(first: Said, folder: Path) -> None:
    before = files(folder)
    again = demo(folder, "--json")
    assert json.loads(again.out) == json.loads(first.out)
    assert "round " not in again.err
    assert files(folder) == before
