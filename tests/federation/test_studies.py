"""What is measured of finished runs: their geometry, the price of noise, and what a site gets that never trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import geometry, leaving, newcomer, privacy, records
from common import config
from common.config import Config
from fedloge.federation import assemble
from fedloge.simulate import simulate
from server import checkpoint

RUNG = Path(__file__).parents[2] / "benchmarks" / "experiments" / "ladder" / "digits.toml"


def experiment() -> Config:
    return config.load(RUNG, ["federation.rounds=3", "evaluation.start=3", "evaluation.last=1"])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "fedloge+-s1"
    simulate(experiment(), folder, lambda _: None)
    return folder


def test_the_geometry_of_a_run(run: Path) -> None:
    found = geometry.measure(run)
    assert found["rounds"] == 3
    assert found["row_norm"]["frame"] == pytest.approx([3.0] * 10, rel=1e-5)
    assert found["counts"] == sorted(found["counts"], reverse=True)
    assert 0 < found["largest_eigenvalue"] <= 2 * found["feature_length"] ** 2
    assert found["head_step"] == pytest.approx(0.03 * found["largest_eigenvalue"] / 2)


def test_recall_by_class_is_drawn_from_records(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(records, "RECORDS", tmp_path)
    monkeypatch.setattr(geometry, "RECORDS", tmp_path)
    records.add("some", run)
    drawn = geometry.drawn(["some"])
    assert drawn.count("<polyline") == 2  # of this method's two predictors
    mean = json.loads((run / "metrics.json").read_text())["generic"]["statistics"]["balanced"]
    assert f"FedLoGe+: computed head ({100 * mean:.1f})" in drawn


def test_the_accountant_gives_the_noise_of_one_gaussian_release() -> None:
    assert privacy.sigma(8.0) == pytest.approx(0.600, abs=0.01)  # by the exact formula of Balle and Wang
    assert privacy.sigma(2.0) == pytest.approx(1.994, abs=0.03)


def test_noise_has_its_price_and_no_noise_has_none(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privacy, "DRAWS", 2)
    found = checkpoint.latest(run / "checkpoints")
    assert found is not None
    rows = privacy.measure(assemble(config.parse(found.config), run), found.state, 1e6)
    free, *priced = rows
    exact: dict[str, Any] = json.loads((run / "metrics.json").read_text())
    assert free["generic"] == [exact["generic"]["statistics"]["top1"]]
    assert [(row["epsilon"], row["noise"]) for row in priced] == [
        (8.0, "the sum"), (8.0, "every site"), (2.0, "the sum"), (2.0, "every site"),
    ]  # fmt: skip
    assert all(max(row["generic"]) < free["generic"][0] for row in priced)


def test_features_are_cut_to_a_length() -> None:
    f = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    assert torch.allclose(privacy.cut(f, 1.0), torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))


def test_a_newcomer_is_judged_by_what_others_have_learnt(tmp_path: Path) -> None:
    found = newcomer.measure(experiment(), 1, tmp_path)
    assert found["sites"] == ["site-003"]
    kinds = {name.partition(":")[0] for name in found["means"]}
    assert kinds == {
        "generic",
        "generic, among its classes",
        "personal, nothing trained",
        "personal, 2 rounds alone",
        "from scratch",
    }
    assert all(0 <= mean <= 1 for mean in found["means"].values())
    assert not list((tmp_path / "with" / "sites" / "site-003").glob("round-000001*"))  # it trained when all was over


def test_the_classes_of_a_site_that_leaves_are_judged_apart(tmp_path: Path) -> None:
    found = leaving.measure(experiment(), 1, tmp_path)
    assert found["classes"]
    heads = found["heads"]
    assert heads["never answered"]["its classes"] == 0
    assert heads["never answered"]["others"] >= heads["used"]["others"]
    assert heads["used"]["its classes"] > 0.1
    assert leaving.means([found, found]) == heads
