"""What it costs to hide every single image in the class statistics: heads from sums with noise.

    python -m benchmarks.privacy RUN --out benchmarks/records/privacy/NAME.json

RUN is a finished folder of `fedloge simulate` whose statistics heads are to be made anew; it is not changed. Features
are cut to a length R about the centre, so an image moves (n, sum f / R, sum f f^T / R^2) by at most the root of 3;
noise in proportion makes the sums (epsilon, delta)-differentially private for adding or removing one image (one
Gaussian mechanism; the accountant is that of opacus). Noise on the sum: once, over all sites, as behind a secure sum.
On every site: each adds all of it to its own, for those who trust nobody. R and the size of the ball that keeps the
scatter invertible are fixed in advance, by the noise and not by the data. Nothing is promised for the backbone, which
is trained without noise: this is about what the statistics themselves tell.
"""

import argparse
import json
import math
import statistics as figures
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import machine
from common import config
from common.evaluation import FeatureCache, evaluate
from common.features import features_of
from common.methods.method import Predictor, ServerState
from common.statistics import USUAL, Head, StatisticsHead, Sums, adapted, solve
from fedloge.federation import Federation, assemble
from server import checkpoint
from server.survey import centre

DELTA = 1e-5
EPSILONS = (8.0, 2.0)
DRAWS = 5  # of the noise


def sigma(epsilon: float) -> float:
    """Noise of one release, in units of the largest change that one image makes."""
    from opacus.accountants.utils import get_noise_multiplier  # an extra: pip install "fedloge[privacy]"

    if math.isinf(epsilon):
        return 0.0
    with warnings.catch_warnings():  # of logarithms of 0 and of a second, coarser accountant that it starts from
        warnings.simplefilter("ignore")
        found: float = get_noise_multiplier(
            target_epsilon=epsilon, target_delta=DELTA, sample_rate=1.0, steps=1, accountant="prv"
        )
    return found


def cut(f: Tensor, length: float) -> Tensor:
    """Features no longer than `length`."""
    return f * (length / f.norm(dim=1, keepdim=True).clamp_min(length))


def noisy(sums: Sums, scale: float, length: float, rng: torch.Generator) -> Sums:
    """With Gaussian noise of that scale on each number, in the units of an image's share of it."""

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=rng, dtype=torch.float64)

    raw = noise(sums.scatter)
    return Sums(
        sums.count + scale * noise(sums.count),
        sums.total + scale * length * noise(sums.total),
        sums.scatter + scale * length**2 * (raw + raw.T) / 2,
    )


def mended(sums: Sums, scale: float, length: float) -> Sums:
    """What noise has made impossible put right: counts of at least one, and a scatter that stays positive beside it."""
    dim = len(sums.scatter)
    ball = 2 * scale * length**2 * math.sqrt(dim) * torch.eye(dim, dtype=torch.float64)
    return replace(sums, count=sums.count.clamp_min(1.0), scatter=sums.scatter + ball)


def counted(federation: Federation, state: ServerState, about: Tensor, length: float) -> list[Sums]:
    """What every site would send, with no feature longer than `length`."""
    net, images = federation.net, federation.images
    net.load(state.parts)
    found = []
    for site in federation.sites.values():
        sums = Sums.nothing(len(federation.task.classes), len(about))
        for f, y in features_of(net["backbone"], images, site.train_index, federation.device, 500):
            sums.add(cut(f.double() - about, length), y)
        found.append(sums)
    return found


def judged(federation: Federation, cache: FeatureCache, found: Head) -> dict[str, float]:
    """The head for everybody, and with every site's prior at the usual temperature, which no noisy sum has chosen."""
    backbone = federation.net["backbone"]
    head = StatisticsHead(*found.weight.shape)
    for name, t in found.tensors().items():
        getattr(head, name).copy_(t)
    generic = evaluate({"head": Predictor(backbone, head)}, cache, federation.global_index, federation.groups)["head"]
    at_sites = []
    for name, site in federation.sites.items():
        own = Predictor(backbone, adapted(head, site.counts, USUAL))
        at_sites.append(evaluate({"head": own}, cache, federation.judged_on[name], (), site.counts > 0)["head"]["top1"])
    few = generic["groups"]["share"]["few"]
    return {"generic": generic["top1"], "few": few, "personal": figures.mean(at_sites)}


def measure(federation: Federation, state: ServerState, length: float) -> list[dict[str, Any]]:
    about = centre(federation.net, federation.task, state)
    exact = counted(federation, state, about, length)
    cache = FeatureCache(federation.test, federation.device, 500, federation.net["backbone"])
    rows = []
    for epsilon, where in ((math.inf, "nowhere"), *((e, w) for e in EPSILONS for w in ("the sum", "every site"))):
        scale = math.sqrt(3) * sigma(epsilon)
        alone = where == "every site"
        results = []
        for draw in range(DRAWS if scale else 1):
            rng = torch.Generator().manual_seed(draw)
            total = Sums.nothing(len(federation.task.classes), len(about))
            for sums in exact:
                total = total + (noisy(sums, scale, length, rng) if alone else sums)
            if not alone:
                total = noisy(total, scale, length, rng)
            head = solve(mended(total, scale * (math.sqrt(len(exact)) if alone else 1.0), length), about)
            assert head is not None
            results.append(judged(federation, cache, head))
        row = {
            "epsilon": epsilon if scale else None, "delta": DELTA if scale else None, "noise": where, "scale": scale,
            **{key: [r[key] for r in results] for key in ("generic", "few", "personal")},
        }  # fmt: skip
        rows.append(row)
        means = ", ".join(f"{key} {100 * figures.mean(row[key]):.1f}" for key in ("generic", "few", "personal"))
        print(f"epsilon {epsilon:g}, noise on {where}: {means}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="a finished run")
    parser.add_argument("--length", type=float, default=8.0, metavar="R", help="features are cut to it (%(default)s)")
    parser.add_argument("--out", type=Path, help="where the record goes")
    options = parser.parse_args()
    found = checkpoint.latest(options.run / "checkpoints")
    if found is None:
        parser.error(f"{options.run} has no checkpoint: finish the run first")
    federation = assemble(config.parse(found.config), options.run)  # judging reads what the sites have kept there
    rows = measure(federation, found.state, options.length)
    record = {"run": options.run.name, "length": options.length, "rows": rows, "machine": machine()}
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
