"""Records and the tables made of them, on small run folders with figures worked out by hand."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import records

Predictors = dict[str, Any]


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in here touches the records of this project."""
    monkeypatch.setattr(records, "RECORDS", tmp_path / "records")
    monkeypatch.setattr(records, "RESULTS", tmp_path / "RESULTS.md")


def figures(top1: float, many: float | None = 0.9, medium: float | None = 0.5, few: float | None = 0.1) -> Predictors:
    by_rule = {"many": many, "medium": medium, "few": few}
    return {"top1": top1, "groups": {"share": by_rule, "count": dict.fromkeys(by_rule, 0.0)}}


def evaluation(generic: dict[str, Predictors], personal: dict[str, Predictors]) -> dict[str, Any]:
    return {"generic": generic, "personal": personal, "never_trained": []}


def finished(
    folder: Path,
    method: dict[str, Any],
    seed: int = 1,
    generic: dict[str, Predictors] | None = None,
    personal: dict[str, Predictors] | None = None,
    norm: float = 1.0,
) -> Path:
    """A run folder with what a record is made of, and with what is not for readers."""
    judged = evaluation(generic or {}, personal or {})
    events = [
        {"round": 1, "sites": ["a", "b"], "refused": {}, "missing": [], "loss": {"loss 0": 2.5}},
        {"round": 2, "sites": ["a"], "refused": {"b": "its tensors are not finite"}, "missing": ["c"],
         "loss": {"loss 0": 1.5}, "evaluation": judged},
    ]  # fmt: skip
    seconds = {"training": 1.25, "evaluation": 0.5}
    metrics = {"name": "x", "method": method["name"], "seed": seed, "rounds": 2, "mean_of_rounds": [2],
               "generic": generic or {}, "personal": personal or {}, "groups": {"share": {"many": [0]}},
               "evaluations": [{"round": 2, **judged}], "loss": [{"loss 0": 2.5}, {"loss 0": 1.5}]}  # fmt: skip
    config = {"method": method, "seed": seed, "data": {"source": "cifar10", "path": "/home/somebody/pictures"},
              "frame": {"norm": norm, "sparsity": 0.6}}  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "environment.json").write_text(json.dumps([{"python": "3.13", "code": "abc"}]))
    (folder / "events.jsonl").write_text("".join(json.dumps({**e, "seconds": seconds}) + "\n" for e in events))
    (folder / "metrics.json").write_text(json.dumps(metrics))
    for name in ("checkpoints", "sites", "models"):
        (folder / name).mkdir()
        (folder / name / "large.safetensors").write_bytes(b"large")
    return folder


def added(tmp_path: Path, name: str, method: str | dict[str, Any], seed: int = 1, **more: Any) -> Path:
    table = {"name": method} if isinstance(method, str) else method
    return records.add("family", finished(tmp_path / "runs" / f"{name}-s{seed}", table, seed, **more))


def rows(kind: str = "Generic") -> list[list[str]]:
    """Cells of the table of a kind, header first."""
    text = records.results()
    section = text[text.index(f"### {kind} models") :].partition("\n### ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    assert set(lines[1]) == {"|", "-"}
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]
    assert len({len(row) for row in cells}) == 1
    return cells


def row(label: str, predictor: str, kind: str = "Generic") -> dict[str, str]:
    header, *others = rows(kind)
    header[-1] = "delta"
    (found,) = [cells for cells in others if cells[:2] == [label, predictor]]
    return dict(zip(header, found, strict=True))


# --- records ---------------------------------------------------------------------------------------------------------


def test_a_record_is_what_a_reader_needs_and_no_more(tmp_path: Path) -> None:
    generic, personal = {"head": figures(0.5)}, {"global": figures(0.75)}
    method = {"name": "fedavg", "probes": False}
    run = finished(tmp_path / "run-s1", method, generic=generic, personal=personal)
    record = records.add("family", run)
    assert record == tmp_path / "records" / "family" / "run-s1"
    assert sorted(path.name for path in record.rglob("*")) == [
        "config.json", "environment.json", "log.jsonl", "metrics.json",
    ]  # fmt: skip
    before = {name: json.loads((run / name).read_text()) for name in ("config.json", "metrics.json")}
    config = json.loads((record / "config.json").read_text())
    assert config == {**before["config.json"], "data": {"source": "cifar10", "path": "pictures"}}
    assert (record / "environment.json").read_text() == (run / "environment.json").read_text()
    metrics = json.loads((record / "metrics.json").read_text())
    assert metrics == {k: v for k, v in before["metrics.json"].items() if k not in ("evaluations", "loss")}
    assert metrics["generic"] == generic
    log = [json.loads(line) for line in (record / "log.jsonl").read_text().splitlines()]
    seconds = {"training": 1.25, "evaluation": 0.5}
    assert log == [
        {"round": 1, "sites": 2, "loss": {"loss 0": 2.5}, "seconds": seconds},
        {"round": 2, "sites": 1, "loss": {"loss 0": 1.5}, "seconds": seconds,
         "refused": {"b": "its tensors are not finite"}, "missing": ["c"],
         "generic": {"head": 0.5}, "personal": {"global": 0.75}},
    ]  # fmt: skip


def test_the_run_itself_is_left_as_it_is(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", {"name": "fedavg"})
    before = {path: path.read_bytes() for path in run.rglob("*.*") if path.is_file()}
    records.add("family", run)
    assert {path: path.read_bytes() for path in run.rglob("*.*") if path.is_file()} == before


def test_a_record_that_is_there_is_never_changed(tmp_path: Path) -> None:
    record = records.add("family", finished(tmp_path / "run", {"name": "fedavg"}, generic={"head": figures(0.5)}))
    before = {path: path.read_bytes() for path in record.iterdir()}
    other = finished(tmp_path / "again" / "run", {"name": "fedavg"}, generic={"head": figures(0.9)})
    assert records.add("family", other) == record
    assert {path: path.read_bytes() for path in record.iterdir()} == before
    elsewhere = records.add("other family", other)
    assert json.loads((elsewhere / "metrics.json").read_text())["generic"]["head"]["top1"] == 0.9


def test_an_unfinished_run_leaves_no_record(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", {"name": "fedavg"})
    (run / "metrics.json").unlink()
    with pytest.raises(SystemExit, match="finish the run first"):
        records.add("family", run)
    assert not (tmp_path / "records").exists()


# --- tables ----------------------------------------------------------------------------------------------------------


def test_one_seed_is_given_as_it_is(tmp_path: Path) -> None:
    added(tmp_path, "fedavg", "fedavg", generic={"head": figures(0.3372, 0.785, 0.2934, 0.0333)})
    assert rows() == [
        ["method", "predictor", "seeds", "top-1", "many", "medium", "few", "Δ to fedavg / head"],
        ["fedavg", "head", "1", "33.7", "78.5", "29.3", "3.3", ""],
    ]


def test_several_seeds_have_a_mean_and_a_standard_deviation(tmp_path: Path) -> None:
    for seed, top1, few in ((1, 0.30, 0.10), (2, 0.33, 0.20), (3, 0.36, None)):
        added(tmp_path, "fedavg", "fedavg", seed, generic={"head": figures(top1, few=few, medium=None)})
    found = row("fedavg", "head")
    assert found["seeds"] == "1, 2, 3"
    assert found["top-1"] == "33.0 ± 3.0"  # of the sample: ((-3)^2 + 0 + 3^2) / 2 = 9
    assert found["few"] == "15.0 ± 7.1"  # 5 * sqrt(2), of the two that have it
    assert found["many"] == "90.0 ± 0.0"
    assert found["medium"] == "-"


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    """Gaps of 3, 4 and 2: mean 3, standard deviation 1, standard error 1 / sqrt(3), whatever the seeds differ by."""
    for seed, ours, theirs in ((1, 0.13, 0.10), (2, 0.44, 0.40), (3, 0.72, 0.70)):
        added(tmp_path, "fedloge-norm1", "fedloge", seed, generic={"psi": figures(ours)})
        added(tmp_path, "fedavg", "fedavg", seed, generic={"head": figures(theirs)})
    assert row("fedloge-norm1", "psi")["delta"] == "+3.0 ± 0.6"
    assert row("fedavg", "head")["delta"] == ""


def test_only_seeds_that_both_have_are_compared(tmp_path: Path) -> None:
    for seed, top1 in ((1, 0.1), (2, 0.3)):
        added(tmp_path, "fedavg", "fedavg", seed, generic={"head": figures(top1)})
    for seed, top1 in ((2, 0.25), (3, 0.9)):
        added(tmp_path, "fedprox", "fedprox", seed, generic={"head": figures(top1)})
    added(tmp_path, "fedlc", "fedlc", 4, generic={"head": figures(0.5)})
    assert row("fedprox", "head")["delta"] == "-5.0"  # one pair: no error to give
    assert row("fedprox", "head")["top-1"] == "57.5 ± 46.0"
    assert row("fedlc", "head")["delta"] == "-"


def test_rows_stand_in_the_order_of_their_means(tmp_path: Path) -> None:
    added(tmp_path, "fedprox", "fedprox", generic={"head": figures(0.2)})
    added(tmp_path, "fedavg", "fedavg", generic={"head": figures(0.3), "head realigned": figures(0.4)})
    for seed, top1 in ((1, 0.1), (2, 0.7)):
        added(tmp_path, "fedlc", "fedlc", seed, generic={"head": figures(top1)})
    assert [cells[:2] for cells in rows()[1:]] == [
        ["fedavg", "head realigned"], ["fedlc", "head"], ["fedavg", "head"], ["fedprox", "head"],
    ]  # fmt: skip


def test_each_kind_of_model_has_its_own_reference(tmp_path: Path) -> None:
    """FedAvg's own models, which the run of fedavg-ft brings along; the tuned one is the other method's."""
    added(tmp_path, "fedavg-ft", "fedavg-ft", generic={"head": figures(0.3)},
          personal={"tuned": figures(0.8), "global": figures(0.7)})  # fmt: skip
    added(tmp_path, "fedper", "fedper", personal={"local": figures(0.65)})
    assert row("fedavg", "head")["delta"] == ""
    assert [cells[:2] + cells[-1:] for cells in rows("Personal")] == [
        ["method", "predictor", "Δ to fedavg / global"],
        ["fedavg-ft", "tuned", "+10.0"],
        ["fedavg", "global", ""],
        ["fedper", "local", "-5.0"],
    ]


def test_without_fedavg_another_row_is_the_reference_and_the_header_names_it(tmp_path: Path) -> None:
    added(tmp_path, "fedper", "fedper", personal={"local": figures(0.6)})
    added(tmp_path, "local", "local", personal={"local": figures(0.5)})
    header, *others = rows("Personal")
    assert header[-1] == "Δ to fedper / local"
    assert [cells[0] + cells[-1] for cells in others] == ["fedper", "local-10.0"]
    assert "(no predictor of this kind)" in records.results()  # nobody has a generic model


def test_a_row_is_named_by_its_records_and_has_one_result_a_seed(tmp_path: Path) -> None:
    for name, top1 in (("fedloge-norm1", 0.31), ("fedloge-norm0.1", 0.32)):
        added(tmp_path, name, "fedloge", generic={"psi": figures(top1)})
    assert [cells[0] for cells in rows()[1:]] == ["fedloge-norm0.1", "fedloge-norm1"]
    for name in ("fedavg", "fedavg-ft"):
        added(tmp_path, name, name, generic={"head": figures(0.3)})
    with pytest.raises(SystemExit, match="a result for seed 1 already"):
        records.results()


def test_families_have_their_own_tables_and_notes(tmp_path: Path) -> None:
    added(tmp_path, "a", "fedavg", generic={"head": figures(0.5)})
    other = finished(tmp_path / "runs" / "b", {"name": "fedavg"}, generic={"head": figures(0.75)})
    records.add("another", other)
    (tmp_path / "records" / "another" / "README.md").write_text("What this family is about.\n")
    text = records.results()
    assert text.index("## another\n\nWhat this family is about.\n") < text.index("| 1 | 75.0 ")
    assert text.index("| 1 | 75.0 ") < text.index("## family\n") < text.index("| 1 | 50.0 ")


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_adds_and_writes_the_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [
        finished(tmp_path / f"fedavg-s{seed}", {"name": "fedavg"}, seed, {"head": figures(0.5 + seed / 100)})
        for seed in (1, 2)
    ]
    monkeypatch.setattr(sys, "argv", ["records", "add", "family", *map(str, runs)])
    records.main()
    assert capsys.readouterr().out.split() == [str(tmp_path / "records" / "family" / run.name) for run in runs]
    monkeypatch.setattr(sys, "argv", ["records", "tables"])
    records.main()
    written = (tmp_path / "RESULTS.md").read_text()
    assert written == records.results()
    assert "| fedavg | head | 1, 2 | 51.5 ± 0.7 |" in written


def test_tables_do_not_depend_on_the_order_records_were_made_in(tmp_path: Path) -> None:
    made = []
    for order in ((1, 2, 3), (3, 1, 2)):
        patch = tmp_path / f"records-{order[0]}"
        with pytest.MonkeyPatch.context() as context:
            context.setattr(records, "RECORDS", patch)
            for seed in order:
                for method, top1 in (("fedavg", 0.1), ("fedprox", 0.2)):
                    folder = tmp_path / f"runs-{order[0]}" / f"{method}-s{seed}"
                    records.add("f", finished(folder, {"name": method}, seed, {"head": figures(top1 + seed / 50)}))
            made.append(records.results())
    assert made[0] == made[1]
