"""What a simulated client costs beyond its training: loading, saving, folding, the server's step.

    python -m benchmarks.simulate_cost [--clients 20] [--json]

Runs real rounds with local training left out and reports processor milliseconds per client and round, medians of
five rounds, for models of three sizes and for methods without and with local parts.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch

from common.config import parse
from fedloge.federation import assemble
from fedloge.run_folder import environment
from server import rounds
from server.fleet import LocalFleet

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
            "{model:10} {method:8} {megabytes:7.1f} MB shared  {ms_per_client:7.2f} ms per client and round".format(
                **row
            )
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
        shared = sum(
            t.numel() * t.element_size()
            for p in config.method.shared & state.parts.keys()
            for t in state.parts[p].values()
        )
        fleet = LocalFleet({name: site.handle for name, site in federation.sites.items()})
        seconds = []
        for _ in range(ROUNDS + 1):
            began = time.process_time()
            report = rounds.one_round(fleet, config.method, state, federation.net, config.federation, config.seed)
            seconds.append(time.process_time() - began)
            state = report.state
    # the first round also makes the local parts' initial values
    per_client = 1000 * statistics.median(seconds[1:]) / clients
    return {"model": model, "method": method, "megabytes": shared / 1e6, "ms_per_client": round(per_client, 3)}


if __name__ == "__main__":
    main()
