"""Why norms, temperature and statistics matter: the geometry of finished runs, and who recognises the rare classes.

    python -m benchmarks.geometry measure RUN... --out benchmarks/records/geometry/NAME.json
    python -m benchmarks.geometry draw FAMILY... --out benchmarks/records/geometry/NAME.svg

`measure` looks at the backbone of every run with its own training images, as it is deployed: how long features are,
how far a detached head's step is from its limit, and the norms of class means and of rows. RUN is a finished folder of
`fedloge simulate`. `draw` needs no run, only records: the share of right answers for every class, most frequent first.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine
from benchmarks.records import RECORDS
from common import config
from common.features import features_of
from common.parts import tensors
from fedloge.federation import assemble
from server import checkpoint

SHOWN = (  # record, predictor, what it is called, colour
    ("fedavg-ft", "head", "FedAvg: its head", "#5c6b73"),
    ("fedavg-ft", "head realigned", "FedAvg: rows of one length", "#b8962e"),
    ("fedloge", "psi realigned", "FedLoGe: psi realigned", "#1b6ca8"),
    ("fedloge-norm1", "psi realigned", "FedLoGe, norm 1: psi realigned", "#1b6ca8"),
    ("balanced-global", "head", "balanced softmax", "#3a8f4d"),
    ("fedloge+", "frame", "FedLoGe+: its frame", "#8c4fa3"),
    ("fedloge+", "statistics", "FedLoGe+: computed head", "#c2426a"),
)
WIDTH, HEIGHT, LEFT, TOP, KEY = 520, 240, 44, 30, 280


@torch.no_grad()
def measure(run: Path) -> dict[str, Any]:
    found = checkpoint.latest(run / "checkpoints")
    if found is None:
        raise SystemExit(f"{run}: has no checkpoint: finish the run first")
    federation = assemble(config.parse(found.config), run)
    net, train = federation.net, federation.task.config.train
    net.load(found.state.parts)
    index = torch.cat([site.train_index for site in federation.sites.values()])
    pairs = list(features_of(net["backbone"], federation.images, index, federation.device, 500))
    f, y = torch.cat([f for f, _ in pairs]).double(), torch.cat([y for _, y in pairs])
    largest = float(torch.linalg.eigvalsh(f.T @ f / len(f))[-1])
    classes = range(len(federation.task.classes))
    means = torch.stack([f[y == c].mean(dim=0) for c in classes])
    heads = {
        part: tensors(net[part])["weight"] for part in ("frame", "global_head", "statistics") if part in net.parts()
    }
    return {
        "run": run.name,
        "method": found.config["method"],
        "rounds": found.state.round,
        "feature_length": float(f.norm(dim=1).mean()),
        "largest_eigenvalue": largest,
        "head_step": train.lr * largest / 2,  # of a head that learns on detached features, by gradient descent
        "head_limit": 2 * (1 + train.momentum),
        "counts": [int((y == c).sum()) for c in classes],
        "class_mean_norm": (means - means.mean(dim=0)).norm(dim=1).tolist(),
        "row_norm": {part: weight.norm(dim=1).tolist() for part, weight in heads.items()},
    }


def recalls(families: Sequence[str]) -> dict[tuple[str, str], list[float]]:
    """Share of right answers by class, mean over the seeds there are; of a row in two families the first one's."""
    found: dict[tuple[str, str], list[float]] = {}
    for family, (row, predictor, *_) in itertools.product(families, SHOWN):
        paths = sorted(RECORDS.glob(f"{family}/{row}-s?/metrics.json"))
        if paths and (row, predictor) not in found:
            results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
            per_seed = [result["generic"][predictor]["per_class"] for result in results]
            found[row, predictor] = [statistics.mean(values) for values in zip(*per_seed, strict=True)]
    return found


def drawn(families: Sequence[str]) -> str:
    found, named = recalls(families), ", ".join(families)
    if not found:
        raise SystemExit(f"{named}: there are no records of it")
    classes = len(next(iter(found.values())))
    body = [f'<text class="head" x="{LEFT}" y="16">right answers by class, the most frequent first (%): {named}</text>']
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = _y(share)
        body.append(f'<line x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        body.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{100 * share:.0f}</text>')
    place = 0
    for row, predictor, label, colour in SHOWN:
        if (values := found.get((row, predictor))) is None:
            continue
        points = " ".join(f"{_x(c, classes):.1f},{_y(value):.1f}" for c, value in enumerate(values))
        body.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        mean = f"{label} ({100 * statistics.mean(values):.1f})"
        body.append(f'<text x="{WIDTH + 12}" y="{TOP + 12 + 18 * place}" style="fill:{colour}">{escape(mean)}</text>')
        place += 1
    size = f'viewBox="0 0 {WIDTH + KEY} {HEIGHT + TOP + 20}" width="{WIDTH + KEY}" height="{HEIGHT + TOP + 20}"'
    style = "text{font:12px system-ui,sans-serif;fill:#555}.head{font-size:13px;fill:#222}"
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{style}</style>\n' + "\n".join(body) + "\n</svg>\n"


def _x(place: int, classes: int) -> float:
    return LEFT + 10 + (WIDTH - LEFT - 20) * place / max(classes - 1, 1)


def _y(share: float) -> float:
    return TOP + HEIGHT * (1 - share)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    looker = verbs.add_parser("measure", help="the geometry of finished runs")
    looker.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    drawer = verbs.add_parser("draw", help="who recognises which class, from the records of a family")
    drawer.add_argument("families", nargs="+", metavar="FAMILY")
    for verb in (looker, drawer):
        verb.add_argument("--out", type=Path, required=True, help="the file to write")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.verb == "measure":
        record = {"runs": [measure(run) for run in options.runs], "machine": machine()}
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    else:
        options.out.write_text(drawn(options.families), encoding="utf-8")
    print(options.out)


if __name__ == "__main__":
    main()
