"""How good a model a site gets that never trained: `python -m benchmarks.newcomer FILE.toml --without 5`.

The last sites of the experiment take no part: neither in rounds nor in the survey. Then they are given the final model
and judged on their own test images, among the classes they have: the generic model as it is; the computed head with
their own prior (a count of labels and one pass for the temperature, nothing is trained); the method's personal model
without and with local parts trained as long as two rounds would; and, for comparison, training alone as long as the
federation did.
"""

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine
from client import personal
from client.participant import Participant
from common import config, heap
from common.evaluation import FeatureCache, evaluate
from common.methods import METHODS
from common.methods.method import Predictor, ServerState
from fedloge.federation import Federation, assemble
from server import rounds, run_folder
from server.fleet import LocalFleet
from server.rounds import Hooks

JOINING = 2  # rounds of local training by which a newcomer makes its local parts


def trained(federation: Federation, names: list[str]) -> ServerState:
    """The end of a federation of these sites alone."""
    task, net = federation.task, federation.net
    method, policy = task.config.method, replace(task.config.federation, min_clients=1, wait=0.0)
    fleet = LocalFleet({name: federation.sites[name].handle for name in names})
    last = policy.rounds

    def complete(state: ServerState) -> ServerState:
        if state.round < last or not method.surveyed(task):
            return state
        return rounds.survey(fleet, method, task, state, net, policy, Hooks())

    def told(report: rounds.RoundReport) -> None:
        print(f"round {report.round} of {last}", flush=True)

    return rounds.run(fleet, method, method.init(net, task), net, policy, task.config.seed, Hooks(told, complete))


def accuracy(
    federation: Federation, site: Participant, predictors: dict[str, Predictor], own: bool
) -> dict[str, float]:
    cache = FeatureCache(federation.test, federation.device, 500, None)
    index = federation.judged_on[site.name]
    found = evaluate(predictors, cache, index, (), site.counts > 0 if own else None)
    return {name: result["top1"] for name, result in found.items()}


def measure(experiment: config.Config, without: int, folder: Path) -> dict[str, Any]:
    federation = assemble(experiment, folder / "with")
    names = sorted(federation.sites)
    come, late = names[:-without], names[-without:]
    state = trained(federation, come)
    method, net = experiment.method, federation.net
    rows: dict[str, list[float]] = {}

    def note(prefix: str, found: dict[str, float]) -> None:
        for name, top1 in found.items():
            rows.setdefault(f"{prefix}: {name}", []).append(top1)

    for name in late:
        site = federation.sites[name]
        site.prepare(state.parts, before=state.round + 1)
        generic = method.served(net, federation.task)
        note("generic", accuracy(federation, site, generic, own=False))
        note("generic, among its classes", accuracy(federation, site, generic, own=True))
        note(
            "personal, nothing trained",
            accuracy(federation, site, method.deployed(net, site.site(state.round)), own=True),
        )
        joined = personal.join(site, state.parts, state.round, JOINING)
        note(f"personal, {JOINING} rounds alone", accuracy(federation, site, joined, own=True))
    alone = assemble(replace(experiment, method=METHODS["local"]()), folder / "alone")
    ends = trained(alone, late)
    for name in late:
        site = alone.sites[name]
        site.prepare(ends.parts, before=ends.round + 1)
        found = alone.task.config.method.deployed(alone.net, site.site(ends.round))
        note("from scratch", accuracy(alone, site, found, own=True))
    return {"sites": late, "accuracy": rows, "means": {name: statistics.mean(of) for name, of in rows.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE.toml")
    parser.add_argument("--without", type=int, default=1, metavar="N", help="sites that take no part (%(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the file")
    parser.add_argument("--out", type=Path, help="where the record goes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    heap.keep()
    experiment = config.load(options.file, [f"seed={options.seed}", *options.set])
    with tempfile.TemporaryDirectory() as folder:
        found = measure(experiment, options.without, Path(folder))
    for name, mean in found["means"].items():
        print(f"{100 * mean:5.1f}  {name}")
    if options.out:
        record = {"experiment": experiment.as_dict(), **found, "machine": machine()}
        record["experiment"]["data"]["path"] = Path(experiment.data.path).name
        run_folder.write_json(options.out, record)


if __name__ == "__main__":
    main()
