"""Labelled images: how many of which class, and whether they can be read."""

import os
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from common.deployment import ImagesConfig
from common.errors import UserError
from common.holding import Holding
from fedloge.checks.findings import Findings

SAMPLE = 1000  # images read of a larger set, spread evenly over it
NAMED = 5  # classes named of many


def check_counts(findings: Findings, name: str, labels: Tensor, classes: tuple[str, ...], what: str) -> None:
    """How many images each class has. A class without any is fine at a site: others have it."""
    counts = dict(zip(classes, torch.bincount(labels, minlength=len(classes)).tolist(), strict=True))
    there = sorted((n, c) for c, n in counts.items() if n)
    absent = [c for c, n in counts.items() if not n]
    few = ", ".join(f"{c} {n}" for n, c in there[:NAMED])
    text = f"{what} of {len(there)} of {len(classes)} classes; fewest: {few}"
    if absent:
        text += f"; none of {listed(absent)}"
    if len(there) < 2:
        findings.warn(name, f"{text}: images of one class alone teach little; are the others missing?")
    else:
        findings.passed(name, text)


def check_readable(findings: Findings, name: str, holding: Holding, wish: ImagesConfig) -> None:
    """Decode image files, all or a sample. Arrays are read already when they are known."""
    total = len(holding.labels)
    step = max(1, -(-total // SAMPLE))
    chosen = list(range(0, total, step))

    def read(position: int) -> str:
        try:
            holding.take(torch.tensor([position])).images(wish, training=False)
        except UserError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(os.cpu_count(), "decode") as pool:
        bad = list(dict.fromkeys(text for text in pool.map(read, chosen) if text))
    if bad:
        more = f" ({len(bad)} such among the {len(chosen)} that were looked at)" if len(bad) > 1 else ""
        findings.fail(name, f"{bad[0]}{more}")
    else:
        findings.passed(name, f"{len(chosen)} of {total} were read" if step > 1 else f"all {total} were read")


def listed(names: list[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")
