"""Long tails: how many images every class gets, which ones, and which classes count as many, medium and few.

`profile` and `subset` are the rule of the reference experiments, bit for bit; `groups` uses whole numbers only, so
a class never changes its group by rounding.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Groups = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def profile(largest: int, imbalance: float, classes: int, kind: Literal["exp", "step"] = "exp") -> list[int]:
    """Images of class 0, 1, ...: `exp` falls from `largest` to `largest * imbalance` by a constant factor,
    `step` gives the first half of the classes `largest` and the other half `largest * imbalance`."""
    if kind == "step":
        full = classes - classes // 2
        return [largest] * full + [int(largest * imbalance)] * (classes - full)
    return [int(largest * imbalance ** (c / max(classes - 1, 1))) for c in range(classes)]


def subset(labels: Tensor, counts: Sequence[int], seed: int = 0) -> Tensor:
    """Index of the images kept, class after class: a permutation of each class's images, cut after `counts[c]` (or
    after all the class has). One legacy numpy stream serves all classes, so the set is the published one, and with
    the same seed a smaller set is contained in a larger one."""
    rng = np.random.RandomState(seed)
    kept = [rng.permutation(np.flatnonzero(labels.numpy() == c))[:n] for c, n in enumerate(counts)]
    return torch.from_numpy(np.concatenate(kept))


def groups(counts: Sequence[int], rule: Literal["share", "count"] = "share") -> Groups:
    """Class ids as (many, medium, few), each in descending order of training images.

    share: many is up to and including the class with which 75 % of all images are reached, medium up to and
    including the one with which 95 % are (the reference experiments). count: more than 100, 20 to 100, fewer.
    """
    order = sorted(range(len(counts)), key=lambda c: (-counts[c], c))
    if rule == "count":
        rank = [0 if counts[c] > 100 else 1 if counts[c] >= 20 else 2 for c in order]
    else:
        total = sum(counts)
        before = [0, *accumulate(counts[c] for c in order)]
        rank = [0 if 100 * b < 75 * total else 1 if 100 * b < 95 * total else 2 for b in before[: len(order)]]
    many, medium, few = (tuple(c for c, r in zip(order, rank, strict=True) if r == k) for k in range(3))
    return many, medium, few
