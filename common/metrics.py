"""What is measured of a classifier: one name per quantity, never a bare "accuracy".

Everything is a function of logits and labels. Shares are fractions in [0, 1]; a group without any sample has no
value (None), it is not zero. Many / medium / few classes come from the training counts by two rules that are not
the same: `share` (classes up to 75 % and 95 % of all samples, as in the reference) and `count` (more than 100,
20 to 100, fewer than 20).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common import longtail

CALIBRATION_BINS = 15


@dataclass(frozen=True)
class Groups:
    """Class numbers of many / medium / few."""

    rule: str
    many: tuple[int, ...]
    medium: tuple[int, ...]
    few: tuple[int, ...]

    def items(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        return (("many", self.many), ("medium", self.medium), ("few", self.few))


def groups(counts: Sequence[int]) -> tuple[Groups, ...]:
    """Both rules on the federation's training counts."""
    return Groups("share", *longtail.groups(counts, "share")), Groups("count", *longtail.groups(counts, "count"))


def measure(logits: Tensor, y: Tensor, by: Sequence[Groups]) -> dict[str, Any]:
    """Everything of one classifier on one test set; JSON-ready."""
    classes = logits.shape[1]
    predicted = logits.argmax(dim=1)
    hits = torch.bincount(y[predicted == y], minlength=classes).double()
    truly = torch.bincount(y, minlength=classes).double()
    said = torch.bincount(predicted, minlength=classes).double()
    present = truly > 0
    recall = hits / truly.clamp_min(1)
    f1 = 2 * hits / (truly + said).clamp_min(1)
    n, of = hits.tolist(), truly.tolist()
    return {
        "samples": len(y),
        "top1": _share(sum(n), sum(of)),
        "balanced": float(recall[present].mean()) if present.any() else None,
        "macro_f1": float(f1[present].mean()) if present.any() else None,
        "ece": calibration_error(logits, y),
        "per_class": [r if p else None for r, p in zip(recall.tolist(), present.tolist(), strict=True)],
        "groups": {
            g.rule: {name: _share(sum(n[k] for k in c), sum(of[k] for k in c)) for name, c in g.items()} for g in by
        },
    }


def calibration_error(logits: Tensor, y: Tensor, bins: int = CALIBRATION_BINS) -> float | None:
    """Expected calibration error: the mean gap of confidence and hit rate over bins of equal width."""
    if len(y) == 0:
        return None
    confidence, predicted = torch.softmax(logits.double(), dim=1).max(dim=1)
    if confidence.isnan().any():  # a model that diverged has no confidence
        return None
    hit = (predicted == y).double()
    where = (confidence * bins).long().clamp_max(bins - 1)
    gap = torch.zeros(bins, dtype=torch.double).index_add_(0, where, confidence - hit)
    return float(gap.abs().sum() / len(y))


def over_sites(results: Mapping[str, Mapping[str, Any]], by: Sequence[Groups]) -> dict[str, Any]:
    """The reference's PM: unweighted means over sites; a site counts where it has samples."""

    def mean(values: Sequence[float | None]) -> float | None:
        known = [v for v in values if v is not None]
        return sum(known) / len(known) if known else None

    sites = [results[name] for name in sorted(results)]
    return {
        "sites": len(sites),
        "top1": mean([s["top1"] for s in sites]),
        "balanced": mean([s["balanced"] for s in sites]),
        "macro_f1": mean([s["macro_f1"] for s in sites]),
        "ece": mean([s["ece"] for s in sites]),
        "groups": {
            g.rule: {name: mean([s["groups"][g.rule][name] for s in sites]) for name, _ in g.items()} for g in by
        },
        "per_site": {name: results[name]["top1"] for name in sorted(results)},
    }


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None
