"""What is left of the classes of a site that leaves: `python -m benchmarks.leaving FILE.toml --left 5 10 15 20`.

The site that alone has the most classes takes part for some rounds and in the survey after them, the others go on to
the end, and the last survey is of them alone. Judged are the generic model on images of its classes and of the others,
and the personal model of the site that left, with three heads: one in which classes without statistics are never
answered, the one that is used (common/statistics.py: `solve`), and that of everybody's statistics, had the site come
back.
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import machine
from common import config, heap
from common.methods.method import ServerState
from common.parts import Tensors
from common.statistics import NOBODY, PART
from fedloge.federation import Federation, assemble, judge
from server import rounds, run_folder
from server.fleet import LocalFleet
from server.rounds import Hooks
from server.survey import with_head


def sole_owner(federation: Federation) -> tuple[str, Tensor]:
    """The site that alone has the most classes, and which."""
    counts = {name: site.counts for name, site in federation.sites.items()}
    total = torch.stack(list(counts.values())).sum(dim=0)
    alone = {name: ((mine > 0) & (mine == total)).nonzero().flatten() for name, mine in counts.items()}
    return max(alone.items(), key=lambda item: len(item[1]))


def silent(head: Tensors, classes: Tensor) -> Tensors:
    """The head if these classes were never its answer."""
    bias = head["bias"].clone()
    bias[classes] = NOBODY
    return {**head, "bias": bias}


def measure(experiment: config.Config, left: int, folder: Path) -> dict[str, Any]:
    """One site leaves after the round `left`."""
    federation = assemble(experiment, folder)
    task, net, method = federation.task, federation.net, experiment.method
    gone, classes = sole_owner(federation)
    policy = replace(experiment.federation, min_clients=1, wait=0.0)
    everybody = LocalFleet({name: site.handle for name, site in federation.sites.items()})
    rest = LocalFleet({name: site.handle for name, site in federation.sites.items() if name != gone})

    def trained(state: ServerState, fleet: LocalFleet, last: int) -> ServerState:
        return rounds.run(fleet, method, state, net, replace(policy, rounds=last), experiment.seed, Hooks())

    def surveyed(state: ServerState, fleet: LocalFleet) -> ServerState:
        return rounds.survey(fleet, method, task, state, net, policy, Hooks())

    last = trained(surveyed(trained(method.init(net, task), everybody, left), everybody), rest, policy.rounds)
    used = surveyed(last, rest)
    heads = {
        "never answered": with_head(used, silent(used.parts[PART], classes)),
        "used": used,
        "had it come back": surveyed(last, everybody),
    }
    rows = {}
    for name, one in heads.items():
        found = judge(federation, method, one)
        recall = torch.tensor(found["generic"]["statistics"]["per_class"])
        others = torch.ones(len(recall), dtype=torch.bool)
        others[classes] = False
        own = next(iter(found["personal"].values()))["per_site"][gone]
        rows[name] = {
            "its classes": float(recall[classes].mean()), "others": float(recall[others].mean()), "personal": own
        }  # fmt: skip
    return {"left": left, "site": gone, "classes": [task.classes[c] for c in classes], "heads": rows}


def means(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    first = results[0]["heads"]
    return {
        head: {key: statistics.mean(r["heads"][head][key] for r in results) for key in figures}
        for head, figures in first.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE.toml")
    parser.add_argument("--left", type=int, nargs="+", required=True, metavar="ROUND", help="the site's last round")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the file")
    parser.add_argument("--out", type=Path, help="where the record goes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    heap.keep()
    results, summary = [], {}
    for left in options.left:
        found = []
        for seed in options.seeds:
            experiment = config.load(options.file, [f"seed={seed}", *options.set])
            with tempfile.TemporaryDirectory() as folder:
                found.append({"seed": seed, **measure(experiment, left, Path(folder))})
        results += found
        summary[left] = means(found)
        for head, row in summary[left].items():
            told = ", ".join(f"{key} {100 * mean:.1f}" for key, mean in row.items())
            print(f"left after round {left}, {head}: {told}", flush=True)
    if options.out:
        record = {"experiment": experiment.as_dict(), "results": results, "means": summary, "machine": machine()}
        record["experiment"]["data"]["path"] = Path(experiment.data.path).name
        options.out.parent.mkdir(parents=True, exist_ok=True)
        run_folder.write_json(options.out, record)


if __name__ == "__main__":
    main()
