"""The experiment files: the published protocol to the letter, and one line when their data is not there."""

import signal
import tomllib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.family import FAMILIES, Row
from common import config
from common.config import Config
from common.methods import METHODS
from fedloge import main
from fedloge.demo import DEMO

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / "benchmarks" / "experiments"
FILES = sorted(EXPERIMENTS.glob("*.toml"))
LADDER = sorted((EXPERIMENTS / "ladder").glob("*.toml"))

#                                source, model, sites, alpha, imbalance, share of the sites in a round
REFERENCE = {
    "cifar10-k40-a0.5-if0.02": ("cifar10", "resnet18", 40, 0.5, 0.02, 1.0),
    "cifar10-k40-a0.5-if0.01": ("cifar10", "resnet18", 40, 0.5, 0.01, 1.0),
    "cifar10-k40-a1-if0.02": ("cifar10", "resnet18", 40, 1.0, 0.02, 1.0),
    "cifar10-k40-a1-if0.01": ("cifar10", "resnet18", 40, 1.0, 0.01, 1.0),
    "cifar100-k40-a0.5-if0.01": ("cifar100", "resnet34", 40, 0.5, 0.01, 0.3),
    "cifar100-k20-a0.5-if0.02": ("cifar100", "resnet34", 20, 0.5, 0.02, 1.0),
    "cifar100-k20-a0.5-if0.01": ("cifar100", "resnet34", 20, 0.5, 0.01, 1.0),
    "cifar100-k20-a1-if0.02": ("cifar100", "resnet34", 20, 1.0, 0.02, 1.0),
    "cifar100-k20-a1-if0.01": ("cifar100", "resnet34", 20, 1.0, 0.01, 1.0),
}
PROTOCOL = {  # the same in all nine
    "method.name": "fedloge",
    "method.psi_loss": "plain",
    "method.count_aware": False,
    "train.batch": 8,
    "train.lr": 0.03,
    "train.momentum": 0.5,
    "train.weight_decay": 0.0,
    "train.clip": 0.0,
    "train.epochs": 5,
    "train.precision": "fp32",
    "federation.rounds": 500,
    "partition.kind": "dirichlet",
    "partition.seed": 3407,
    "partition.holdout": 0.0,
    "partition.local_test": 10000,
    "data.profile": "exp",
    "data.largest": 0,
    "data.size": 0,
    "data.augment": "auto",
    "model.norm": "aggregate",
    "model.weights": "",
    "frame.norm": 0.1,
    "frame.sparsity": 0.6,
    "frame.best_effort": False,
    "evaluation.gain": 1.7,
    "evaluation.on": "test",
}


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """The command takes SIGTERM over; pytest gets it back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def value(experiment: Config, key: str) -> Any:
    found: Any = experiment.as_dict()
    for name in key.split("."):
        found = found[name]
    return found


def test_every_file_is_one_this_test_knows() -> None:
    others = {"cpu-scale", "imagenet-lt", "inaturalist"}
    assert {path.stem for path in FILES} == REFERENCE.keys() | others


@pytest.mark.parametrize("path", [*FILES, *LADDER, DEMO], ids=lambda path: path.stem)
def test_every_experiment_parses_and_is_called_like_its_file(path: Path) -> None:
    experiment = config.load(path)
    assert experiment.name == (f"ladder-{path.stem}" if path in LADDER else path.stem)
    assert config.parse(experiment.as_dict()) == experiment


# --- the reference settings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFERENCE)
def test_reference_settings_are_those_of_the_published_runs(name: str) -> None:
    experiment = config.load(EXPERIMENTS / f"{name}.toml")
    source, model, clients, alpha, imbalance, fraction = REFERENCE[name]
    own = {
        "data.source": source,
        "data.imbalance": imbalance,
        "model.name": model,
        "partition.clients": clients,
        "partition.alpha": alpha,
        "federation.fraction": fraction,
    }
    expected = {**PROTOCOL, **own}
    assert {key: value(experiment, key) for key in expected} == expected


@pytest.mark.parametrize("name", REFERENCE)
def test_a_reference_file_sets_its_protocol_itself(name: str) -> None:
    """A default that changes one day must not change a published setting."""
    written = tomllib.loads((EXPERIMENTS / f"{name}.toml").read_text(encoding="utf-8"))
    for section, keys in {
        "train": ("batch", "lr", "momentum", "epochs"),
        "federation": ("rounds", "fraction"),
        "partition": ("kind", "clients", "alpha", "seed", "local_test"),
        "frame": ("norm", "sparsity"),
        "data": ("source", "imbalance"),
        "model": ("name",),
        "method": ("name",),
    }.items():
        assert set(keys) <= written[section].keys()


def test_the_name_of_a_reference_setting_says_what_it_is() -> None:
    for name, (source, _, clients, alpha, imbalance, _) in REFERENCE.items():
        assert name == f"{source}-k{clients}-a{alpha:g}-if{imbalance:g}"


def test_reference_settings_differ_in_nothing_else() -> None:
    found = []
    for name in REFERENCE:
        table = asdict(config.load(EXPERIMENTS / f"{name}.toml"))
        for section, key in (("data", "source"), ("data", "imbalance"), ("model", "name"), ("partition", "clients"),
                             ("partition", "alpha"), ("federation", "fraction")):  # fmt: skip
            del table[section][key]
        del table["name"]
        found.append(table)
    assert all(table == found[0] for table in found)


# --- without data ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_missing_data_is_one_line_and_nothing_is_written(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = tmp_path / "no data here"
    run = tmp_path / "runs" / "run"
    assert main.run(["simulate", str(path), "--out", str(run), "--set", f"data.path={nowhere}"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fedloge: ")
    assert err.count("\n") == 1
    assert str(nowhere) in err
    assert list(tmp_path.iterdir()) == []


# --- families --------------------------------------------------------------------------------------------------------

ROWS = [(family, row) for family, (_, rows) in FAMILIES.items() for row in rows]


@pytest.mark.parametrize(("family", "row"), ROWS, ids=[f"{family}-{row.name}" for family, row in ROWS])
def test_every_row_of_a_family_is_an_experiment(family: str, row: Row) -> None:
    assert row.method in METHODS
    path = FAMILIES[family][0]
    plain = config.load(path, [f"method={row.method}"])
    experiment = config.load(path, [f"method={row.method}", "data.path=somewhere", *row.settings])
    assert experiment.method.name == row.method
    for setting in row.settings:
        key = setting.partition("=")[0]
        if family != "demo-choice":  # whose rows span what the demo chose
            assert value(experiment, key) != value(plain, key), f"{setting} changes nothing"
    assert row.seeds
    assert len(set(row.seeds)) == len(row.seeds)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_family_have_names_and_settings_of_their_own(family: str) -> None:
    _, rows = FAMILIES[family]
    assert len({row.name for row in rows}) == len(rows)
    assert len({(row.method, row.settings) for row in rows}) == len(rows)


def test_every_row_has_a_partner_for_each_of_its_seeds() -> None:
    """Rows are compared with FedAvg seed by seed, so FedAvg has all the seeds there are."""
    _, rows = FAMILIES["cpu-scale"]
    (fedavg,) = [row for row in rows if row.method == "fedavg-ft"]
    assert {seed for row in rows for seed in row.seeds} == set(fedavg.seeds)
