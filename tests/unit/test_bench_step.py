"""Both sides of `fedloge bench step` and `eval` do the same work: same pictures, same answers, same models at the end.

That the published loop and ours give the same parameters is in test_reference.py.
"""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.step import judging, reference, update, workers
from benchmarks.step.problem import CLASSES, federation
from common.errors import UserError
from common.images import PixelImages
from common.messages import Reply
from fedloge.federation import judge


def test_both_see_the_same_pictures() -> None:
    with federation("fp32", "resnet8", 20, clients=1) as (made, _):
        images = made.test
        assert isinstance(images, PixelImages)
        pictures = reference.Pictures(
            images.pixels.numpy(), images.labels.tolist(), reference.testing(images.mean, images.std)
        )
        theirs = list(DataLoader(pictures, batch_size=8))
        ours = list(images.batches(torch.arange(20), 8, torch.device("cpu")))
    assert [len(y) for _, y in theirs] == [8, 8, 4]
    for (x, y), (x_ours, y_ours) in zip(theirs, ours, strict=True):
        assert torch.equal(x, x_ours)
        assert torch.equal(y, y_ours)


def test_training_pictures_are_moved_and_mirrored() -> None:
    torch.manual_seed(0)
    with federation("fp32", "resnet8", 20, clients=1) as (made, _):
        images = made.images
        assert isinstance(images, PixelImages)
        picture = images.pixels.numpy()[:1].repeat(40, 0)
        seen = {
            tuple(x.flatten().tolist())
            for x, _ in reference.Pictures(picture, [0] * 40, reference.training(images.mean, images.std))
        }
        code = images.augment
    assert code == "crop-flip"
    assert len(seen) > 20


@pytest.mark.parametrize(("precision", "gap"), [("fp32", 1e-6), ("bf16", 0.1)])
def test_both_ways_of_judging_find_the_same(precision: str, gap: float) -> None:
    """Each with the predictor that the other has as well: the frame on all images."""
    with federation(precision, "resnet8", 60, clients=3) as (made, state):
        found = judge(made, made.task.config.method, state)["generic"]["frame"]
        images, net = made.test, made.net
        assert isinstance(images, PixelImages)
        pictures = reference.Pictures(
            images.pixels.numpy(), images.labels.tolist(), reference.testing(images.mean, images.std)
        )
        theirs = reference.accuracy(nn.Sequential(net["backbone"], net["frame"]), pictures, 7, CLASSES)
    assert sum(theirs) / CLASSES == pytest.approx(found["balanced"], abs=gap)


def test_the_published_loop_starts_from_the_same_model_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    loop = reference.local_update

    def watched(modules: tuple[nn.Module, nn.Module, nn.Module], *rest: object) -> float:
        before = copy.deepcopy(modules[0].state_dict())
        loss = loop(modules, *rest)  # type: ignore[arg-type]
        seen.append(float(sum(t.double().sum() for t in before.values())))
        assert any(not torch.equal(t, before[name]) for name, t in modules[0].state_dict().items())
        return loss

    monkeypatch.setattr(reference, "local_update", watched)
    with update.prepared(workers.REFERENCE, model="resnet8", images=12, batch=8, epochs=1) as work:
        work()
        work()
    assert len(seen) == 2
    assert len(set(seen)) == 1


@pytest.mark.parametrize("rung", ["fp32", "bf16"])
def test_a_site_does_the_same_update_every_time(rung: str) -> None:
    with update.prepared(rung, model="resnet8", images=12, batch=8, epochs=1) as work:
        first, second = work(), work()
    assert isinstance(first, Reply)
    assert isinstance(second, Reply)
    assert first.examples == 12
    assert first.metrics == second.metrics


def test_rungs_are_measured_in_turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    [row] = judging.measure(["resnet8"], images=20, clients=2, turns=2)["rows"]
    assert row["processor_seconds"].keys() == {"reference", "fp32", "bf16"}
    for name in ("fp32", "bf16"):
        pairs = zip(row["processor_seconds"]["reference"]["all"], row["processor_seconds"][name]["all"], strict=True)
        assert row["ratios"][name]["all"] == pytest.approx([r / s for r, s in pairs], rel=0.05)
    assert list(tmp_path.iterdir()) == []
    assert "aim: at least 2.4" in judging.table({"rows": [row]})


def test_bf16_counts_only_where_it_is_native() -> None:
    rows = [{"model": "resnet8", "ratios": {"fp32": {"median": 1.5}, "bf16": {"median": 0.4}}}]
    assert update.ratios({"rows": rows, "native_bf16": False}) == {"resnet8 fp32": 1.5}
    assert update.ratios({"rows": rows, "native_bf16": True}) == {"resnet8 fp32": 1.5, "resnet8 bf16": 0.4}


def test_a_process_that_ends_is_told_of() -> None:
    with pytest.raises(UserError, match="ended with 0"):
        workers.alternated("benchmarks.arguments", {"fp32": {}}, 1)
