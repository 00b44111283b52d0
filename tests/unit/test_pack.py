"""Packs: what travels is what was there, bit for bit, and the smaller long-tailed set lies in the larger one."""

from pathlib import Path

import numpy as np
import torch

from benchmarks import pack, unpack
from common.config import DataConfig
from common.images import PixelImages
from common.longtail import profile, subset
from common.sources import load


def test_a_pack_comes_back_as_the_data_sets_it_was_made_of(tmp_path: Path) -> None:
    rng = np.random.RandomState(0)
    labels = torch.from_numpy(rng.randint(0, 4, 400))
    pixels = torch.from_numpy(rng.randint(0, 256, (400, 8, 8, 3)).astype(np.uint8))
    classes = ("ant", "bee", "cat", "dog")
    whole = PixelImages(pixels, labels, classes, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    larger, smaller = (whole.take(subset(labels, profile(80, i, 4))) for i in (0.2, 0.1))
    chosen = pack.within(larger.labels, smaller.labels)
    pack.write(tmp_path / "packs" / "cifar10_lt_train.npz", larger, in_if100=chosen)
    pack.write(tmp_path / "packs" / "cifar10_lt_test.npz", whole)
    done = dict(unpack.unpack(tmp_path / "packs", tmp_path))
    assert [done[f"cifar10_{name}.npz"] for name in ("lt50_train", "lt100_train", "test")] == ["written"] * 3
    for name, original in (("lt50", larger), ("lt100", smaller)):
        path, test = tmp_path / f"cifar10_{name}_train.npz", tmp_path / "cifar10_test.npz"
        split = load(DataConfig("npz", str(path), str(test)))
        for ours, theirs in ((split.train, original), (split.test, whole)):
            assert isinstance(ours, PixelImages)
            assert torch.equal(ours.pixels, theirs.pixels)
            assert torch.equal(ours.labels, theirs.labels)
            assert (ours.classes, ours.mean, ours.std) == (classes, whole.mean, whole.std)
