"""Choosing settings on data put aside from training: nobody trains on it, and no test image has a say in it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common import parts, sources
from common.config import Config, DataConfig, parse
from common.errors import UserError
from common.images import PixelImages, Split
from fedloge.federation import Federation, assemble
from fedloge.simulate import simulate
from server import checkpoint

ROUNDS = 3
SMALL: dict[str, Any] = {
    "name": "small",
    "seed": 5,
    "data": {"source": "digits", "largest": 60, "imbalance": 0.2},
    "partition": {"clients": 4, "alpha": 0.5, "holdout": 0.3},
    "model": {"name": "mlp", "width": 16},
    "frame": {"norm": 3.0, "sparsity": 0.3},
    "train": {"epochs": 1, "batch": 8, "lr": 0.05},
    "federation": {"rounds": ROUNDS},
    "evaluation": {"every": 1, "last": 1, "on": "holdout"},
}
METHODS = ["fedloge", "fedavg-ft", "ditto", "fedbabu"]  # two of them train again when judged


def small(method: str = "fedloge", **sections: dict[str, Any]) -> Config:
    table = {**SMALL, "method": {"name": method}}
    return parse({**table, **{key: {**table[key], **more} for key, more in sections.items()}})


def run(config: Config, folder: Path) -> tuple[dict[str, Any], Federation]:
    result = simulate(config, folder, lambda _: None)
    return json.loads(json.dumps(result)), assemble(config, folder)


class Watch:
    """Which images batches were made of while it was on: with a generator (training) and without (judging)."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.trained: set[int] = set()
        self.sets: list[PixelImages] = []
        batches = PixelImages.batches

        def watched(images: PixelImages, index: Tensor, size: int, device: torch.device, rng: Any = None) -> Any:
            self.sets.append(images)
            if rng is not None:
                self.trained |= set(index.tolist())
            return batches(images, index, size, device, rng)

        patch.setattr(PixelImages, "batches", watched)


def everything(indices: Sequence[Tensor]) -> list[int]:
    return sorted(torch.cat(list(indices)).tolist())


def test_what_is_held_and_what_is_trained_on_are_all_the_images(tmp_path: Path) -> None:
    federation = assemble(small(), tmp_path)
    kept = {name: site.train_index for name, site in federation.sites.items()}
    assert federation.test is federation.images
    assert everything([*kept.values(), *federation.judged_on.values()]) == list(range(len(federation.images)))
    whole = assemble(small(evaluation={"on": "test"}, partition={"holdout": 0.0}), tmp_path)
    for name, index in kept.items():
        held = federation.judged_on[name]
        assert everything([index, held]) == sorted(whole.sites[name].train_index.tolist())
        assert len(held) == pytest.approx(0.3 * len(whole.sites[name].train_index), abs=5)
        labels = federation.images.labels
        assert set(labels[held].tolist()) <= set(labels[index].tolist())
        assert federation.sites[name].counts.tolist() == torch.bincount(labels[index], minlength=10).tolist()


@pytest.mark.parametrize("method", METHODS)
def test_no_site_ever_trains_on_an_image_that_is_held(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(monkeypatch)
    _, federation = run(small(method), tmp_path)
    assert watch.trained == set(everything([site.train_index for site in federation.sites.values()]))
    assert not watch.trained & set(everything(list(federation.judged_on.values())))
    for images in watch.sets:  # and the test set is not even looked at
        assert torch.equal(images.pixels, federation.images.pixels)  # type: ignore[attr-defined]


def test_models_are_judged_on_held_images_and_on_no_others(tmp_path: Path) -> None:
    """The global head and a site's own, with the values they are left with, on those images by hand."""
    result, federation = run(small("ditto"), tmp_path)
    assert result["judged_on"] == "holdout"
    found = checkpoint.latest(tmp_path / "checkpoints")
    assert found is not None
    net = federation.net
    net.load(found.state.parts)

    def top1(backbone: nn.Module, head: nn.Module, index: Tensor, support: Tensor) -> float:
        x, y = next(federation.images.batches(index, len(index), torch.device("cpu")))
        logits = head(backbone.eval()(x)).masked_fill(~support, -torch.inf)
        return float((logits.argmax(1) == y).double().mean())

    held = torch.tensor(everything(list(federation.judged_on.values())))
    generic = result["generic"]["head"]
    assert generic["samples"] == len(held)
    everywhere = torch.ones(10, dtype=torch.bool)
    assert generic["top1"] == pytest.approx(top1(net["backbone"], net["global_head"], held, everywhere))
    for name, site in federation.sites.items():
        site.prepare(found.state.parts, before=ROUNDS + 1)
        by_hand = top1(net["own_backbone"], net["own_head"], federation.judged_on[name], site.counts > 0)
        assert result["personal"]["own"]["per_site"][name] == pytest.approx(by_hand)


def test_on_the_test_set_the_held_images_stay_out_of_training(tmp_path: Path) -> None:
    """What was chosen without them can be judged with the same sites."""
    chosen = assemble(small(), tmp_path)
    judged = assemble(small(evaluation={"on": "test"}), tmp_path)
    assert len(judged.test) == len(judged.global_index) != len(chosen.global_index)
    for name, site in judged.sites.items():
        assert torch.equal(site.train_index, chosen.sites[name].train_index)


def garbage(split: Split) -> PixelImages:
    """A few test images of noise, all of one class."""
    rng = torch.Generator().manual_seed(9)
    pixels = torch.randint(0, 256, (5, 8, 8, 1), generator=rng).to(torch.uint8)
    return PixelImages(pixels, torch.full((5,), 7), split.train.classes, mean=(0.1,), std=(0.9,))


@pytest.mark.parametrize("method", METHODS)
def test_no_test_image_influences_anything(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = run(small(method), tmp_path / "first")
    load = sources.load

    def with_garbage(config: DataConfig, classes: tuple[str, ...] = ()) -> Split:
        split = load(config, classes)
        return Split(split.train, garbage(split))

    monkeypatch.setattr(sources, "load", with_garbage)
    second, federation = run(small(method), tmp_path / "second")
    assert first == second
    assert len(federation.test) == len(federation.images) > 5
    for name in ("generic", *(f"personal/site-00{k}" for k in range(4))):
        files = [parts.read(tmp_path / run / "models" / f"{name}.safetensors") for run in ("first", "second")]
        assert parts.digest(files[0][0]) == parts.digest(files[1][0])
    monkeypatch.undo()
    assert run(small(method), tmp_path / "second")[0] == first  # to go on with the real test set is no other run


def test_judged_on_the_test_set_the_garbage_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the check above can fail."""
    load = sources.load
    split = load(small().data)
    monkeypatch.setattr(sources, "load", lambda config: Split(split.train, garbage(load(config))))
    result, _ = run(small(evaluation={"on": "test"}), tmp_path)
    assert result["generic"]["psi"]["samples"] == 5


def test_holding_nothing_back_cannot_be_judged(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"partition\.holdout"):
        small(partition={"holdout": 0.0})
    with pytest.raises(UserError, match=r"partition\.holdout"):
        assemble(small(partition={"holdout": 0.001}), tmp_path)
    assert list(tmp_path.iterdir()) == []
