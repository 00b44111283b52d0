"""The command as a user or a script meets it: what goes to which stream, and the exit code."""

import argparse
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from fedloge import main

EXPERIMENT = """
[data]
largest = 20
[partition]
clients = 2
[model]
width = 16
[frame]
norm = 1.0
sparsity = 0.3
[train]
batch = 32
epochs = 1
[federation]
rounds = 2
"""


class Captured(Exception):
    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


def verbs() -> dict[str, argparse.ArgumentParser]:
    """Every verb the command has, the ones inside groups of verbs included."""

    def capture(parser: argparse.ArgumentParser, *_: object) -> None:
        raise Captured(parser)

    def within(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
        groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        for group in groups:
            for verb, inner in group.choices.items():
                yield from within(inner, f"{name} {verb}".strip())
        if not groups:
            yield name, parser

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", capture)
        with pytest.raises(Captured) as caught:
            main.run([])
    return dict(within(caught.value.parser, ""))


VERBS = verbs()


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """The command takes SIGTERM over; pytest gets it back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    path = tmp_path / "experiment.toml"
    path.write_text(EXPERIMENT)
    return path


def frame(*more: str, dim: int = 16, classes: int = 5, sparsity: float = 0.3) -> list[str]:
    return ["frame", "--dim", str(dim), "--classes", str(classes), "--sparsity", str(sparsity), *more]


def left(arguments: list[str]) -> int:
    """The status the command ends with, argparse's own way out included."""
    with pytest.raises(SystemExit) as end:
        main.main(arguments)
    assert isinstance(end.value.code, int)
    return end.value.code


# --- usage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "verb", sorted(VERBS.keys() - {"bench"})
)  # tests/unit/test_benchmarks.py: it becomes another program
def test_the_help_of_every_verb_has_an_example_of_it(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert left([*verb.split(), "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"example: fedloge {verb} " in f"{text} "


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_says_what_it_is_for(verb: str) -> None:
    silent = [a.dest for a in VERBS[verb]._actions if a.option_strings and not a.help]
    assert set(silent) <= {"seed", "solver"}  # their names say all


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        ["fly"],
        ["frame"],
        ["frame", "--dim", "many", "--classes", "3"],
        ["simulate"],
        ["simulate", "x", "--fast"],
    ],
    ids=" ".join,
)
def test_wrong_usage_ends_with_two_and_says_so(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert left(wrong) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "usage: fedloge" in err


# --- frame -----------------------------------------------------------------------------------------------------------


def test_frame_reports_what_it_built_as_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(frame("--json", "--norm", "2")) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    report = json.loads(out)
    keys = {"min_angle_deg", "mean_angle_deg", "bound_deg", "norm_std", "zeros", "seconds", "digest", "solver"}
    assert keys <= report.keys()
    assert report["zeros"] == int(0.3 * 16 * 5)
    assert report["min_angle_deg"] == pytest.approx(104.4775, abs=2e-3)  # arccos(-1/4)
    assert report["norm_std"] < 1e-6
    assert report["solver"] == "gram"
    assert len(report["digest"]) == 64


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_frame_on_a_gpu_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(frame("--device", "cuda")) == 2
    assert "0 GPUs here: use auto or cpu" in capsys.readouterr().err
    assert main.run(frame("--device", "auto")) == 0


def test_frame_for_people_names_the_same_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(frame()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} >= {"min_angle_deg", "zeros", "digest"}


@pytest.mark.parametrize(
    ("arguments", "condition"),
    [
        (frame(dim=4, classes=5, sparsity=0.5), "count: "),
        (frame(dim=4, classes=4, sparsity=0.9), "have no free entry"),
        (frame("--solver", "gram", dim=4, classes=9), "classes <= dim + 1 = 5, not 9"),
    ],
    ids=["count", "empty", "gram"],
)
def test_a_frame_that_cannot_be_is_refused_by_the_condition_that_fails(
    arguments: list[str], condition: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fedloge: ")
    assert err.count("\n") == 1
    assert condition in err


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (frame(sparsity=1.5), "sparsity = 1.5"),
        (frame("--norm", "0"), "norm = 0.0"),
        (frame(classes=1), "classes = 1"),
    ],
    ids=["sparsity", "norm", "classes"],
)
def test_a_flag_out_of_range_is_wrong_usage(arguments: list[str], key: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(arguments) == 2
    assert key in capsys.readouterr().err


def test_debug_shows_where_it_went_wrong() -> None:
    with pytest.raises(UserError, match="sparsity"):
        main.run(["--debug", *frame(sparsity=1.5)])


# --- simulate --------------------------------------------------------------------------------------------------------


def test_simulate_prints_one_json_object_and_its_progress_elsewhere(
    experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["simulate", str(experiment), "--method", "fedavg", "--seed", "7", "--out", str(tmp_path / "run")]
    assert main.run([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    result = json.loads(out)
    assert (result["method"], result["seed"], result["rounds"]) == ("fedavg", 7, 2)
    assert result["folder"] == str(tmp_path / "run")
    assert [line.split()[1] for line in err.splitlines() if line.startswith("round ")] == ["1/2", "2/2"]
    assert main.run(arguments) == 0  # a finished run shows its result again, as a table
    out = capsys.readouterr().out
    assert out.splitlines()[0].split()[:3] == ["method", "model", "predictor"]
    assert "fedavg" in out


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.speed=1", "unknown key train.speed"),
        ("federation.fraction=2", "federation.fraction = 2.0"),
        ("model.name=vgg", "model.name = 'vgg'"),
        ("data.imbalance=0.001", "data.imbalance"),
    ],
)
def test_a_wrong_key_ends_with_two_and_leaves_nothing_behind(
    experiment: Path, tmp_path: Path, override: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert main.run(["simulate", str(experiment), "--out", str(folder), "--set", override]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert said in err
    assert list(folder.rglob("*")) == []


def test_a_frame_that_the_experiment_cannot_have_stops_it_before_it_starts(
    experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert main.run(["simulate", str(experiment), "--out", str(folder), "--set", "frame.sparsity=0.9"]) == 1
    err = capsys.readouterr().err
    assert "sparsity" in err
    assert err.count("\n") == 1
    assert [path for path in folder.rglob("*") if path.is_file()] == []


def test_a_file_that_is_not_there_is_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["simulate", str(tmp_path / "none.toml")]) == 2
    assert "none.toml" in capsys.readouterr().err


def test_an_interrupt_is_one_line_and_says_that_nothing_is_lost(
    experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("fedloge.experiments.simulate", interrupted)
    assert main.run(["simulate", str(experiment), "--out", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err.strip().startswith("fedloge: stopped; ")
