"""What a simulated client costs beyond its training: loading, saving, folding, the server's step.

    python -m benchmarks.simulate_cost [--clients 20] [--json]

Runs real rounds with local training left out and reports processor milliseconds per client and round, medians of
five rounds, for models of three sizes and for methods without and with local parts. Beside each stands its floor,
measured between the rounds and so on the same machine in the same state: the memory traffic of the shared parts that
no client can do without. What is kept at the sites (Ditto: a whole model, in files) is in the cost, not in the floor.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from common.config import parse
from fedloge.federation import assemble
from server import rounds
from server.fleet import LocalFleet
from server.run_folder import environment

MODELS = ("mlp", "resnet8", "resnet18")
METHODS = ("fedavg", "fedloge", "ditto")
ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(model, method, options.clients) for model in MODELS for method in METHODS]
    if options.json:
        print(json.dumps({"clients": options.clients, "rows": rows, "environment": environment()}))
        return
    for row in rows:
        print(
            "{model:10} {method:8} {megabytes:7.1f} MB shared  {ms_per_client:7.2f} ms per client and round, "
            "{ratio:5.1f} times the floor of {floor_ms:.2f} ms".format(**row)
        )


def measure(model: str, method: str, clients: int) -> dict[str, object]:
    config = parse(
        {
            "method": {"name": method},
            "model": {"name": model},
            "partition": {"kind": "iid", "clients": clients},
            "federation": {"rounds": ROUNDS + 1},
        }
    )
    with tempfile.TemporaryDirectory() as folder, mock.patch("client.participant.train", return_value={}):
        federation = assemble(config, Path(folder))
        state = config.method.init(federation.net, federation.task)
        names = [(part, name) for part in config.method.shared & state.parts.keys() for name in state.parts[part]]
        shared = sum(state.parts[part][name].nbytes for part, name in names)
        live = federation.net.parts()
        trained = [live[part][name] for part, name in names]
        total = [torch.zeros_like(t) for t in trained]
        fleet = LocalFleet({name: site.handle for name, site in federation.sites.items()})
        seconds, least = [], []
        for _ in range(ROUNDS + 1):
            began = time.process_time()
            report = rounds.one_round(
                fleet, config.method, state, federation.net, config.federation, config.seed, rounds.Hooks()
            )
            seconds.append(time.process_time() - began)
            state = report.state
            sent = [state.parts[part][name] for part, name in names]
            began = time.process_time()
            for _ in range(clients):
                move(sent, trained, total)
            least.append(time.process_time() - began)
    # the first round also makes the local parts' initial values
    per_client, floor = (1000 * statistics.median(s[1:]) / clients for s in (seconds, least))
    return {
        "model": model,
        "method": method,
        "megabytes": shared / 1e6,
        "ms_per_client": round(per_client, 3),
        "floor_ms": round(floor, 3),
        "ratio": round(per_client / floor, 2),
    }


@torch.no_grad()
def move(sent: list[Tensor], trained: list[Tensor], total: list[Tensor]) -> None:
    """What one client costs at least: each tensor is loaded into the net, read to be checked, and added up."""
    for t, values in zip(trained, sent, strict=True):
        t.copy_(values)
    for t in trained:
        t.sum()
    for t, sums in zip(trained, total, strict=True):
        sums.add_(t, alpha=2)


if __name__ == "__main__":
    main()
