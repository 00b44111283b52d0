"""The round loop of this project, without evaluation and checkpoints; writes the seconds of every round."""

import json
import time
from pathlib import Path

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common import deployment
from common.net import build
from server import rounds
from server.flower_fleet import FlowerFleet
from server.flower_link import open_link
from server.spill import aside

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    torch.set_num_threads(1)
    config = {key: str(value) for key, value in context.run_config.items()}
    folder = Path(config["federation"])
    plan = deployment.load(folder / "federation.toml")
    method, task = plan.config.method, plan.task
    net = build(method, task)
    link = open_link(folder)

    def names() -> dict[int, str]:
        return {node: seen.name for node, seen in link.nodes().items() if seen.name}

    fleet = FlowerFleet(grid, plan.settings(), names, plan.config.federation.wire)
    last = time.monotonic()

    def note(report: rounds.RoundReport) -> None:
        nonlocal last
        now = time.monotonic()
        with Path(config["out"]).open("a", encoding="utf-8") as out:
            line = {"round": report.round, "seconds": now - last, "sites": len(report.folded)}
            out.write(json.dumps(line) + "\n")
        last = time.monotonic()

    policy = plan.config.federation
    hooks = rounds.Hooks(after=note, asking=net.stowed, waiting=aside(policy, folder))
    rounds.run(fleet, method, method.init(net, task), net, policy, plan.config.seed, hooks)
    fleet.over()
    fleet.close()
    link.close()
