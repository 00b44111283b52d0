"""The server's memory does not grow with the number of sites."""

import json
import subprocess
import sys
from pathlib import Path

MODEL_MB = 45  # a ResNet-18
CHILD = """
import json, sys
from pathlib import Path
import torch
from common.config import FederationConfig, parse
from common.messages import Order, Reply
from common.net import Task, build
from server import rounds
from server.fleet import LocalFleet

torch.set_num_threads(1)
task = Task(parse({"method": {"name": "fedavg"}, "model": {"name": "resnet18"}}), tuple("abcdefghij"), 3, 32)
net = build(task.config.method, task)
start = task.config.method.init(net, task)
trained = {part: {n: t + 0.5 for n, t in group.items()} for part, group in start.parts.items()}
largest = max(trained["backbone"], key=lambda n: trained["backbone"][n].numel())
hoard = []

def site(name, hoarding):
    def handle(order):
        # nine of its 45 MB are new in every reply: enough to see who holds on to it
        backbone = {**trained["backbone"], largest: trained["backbone"][largest].clone()}
        made = Reply(name, order.round, order.model, 7, {**trained, "backbone": backbone})
        if hoarding:
            hoard.append(made)
        return made
    return handle

def peak_mb(many, hoarding=False):
    names = [f"site-{k:03d}" for k in range(many)]
    fleet = LocalFleet({name: site(name, hoarding) for name in names})
    report = rounds.one_round(fleet, task.config.method, start, net, FederationConfig(quorum=1.0), 1, rounds.Hooks())
    assert len(report.folded) == many and not report.refused, report.refused
    moved = report.state.parts["backbone"][largest] - start.parts["backbone"][largest]
    assert torch.allclose(moved, torch.tensor(0.5), atol=1e-4)
    # not getrusage, whose peak may be that of the process that started this one
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024

megabytes = sum(t.numel() * 4 for group in start.parts.values() for t in group.values()) / 2**20
print(json.dumps({"model": megabytes, "few": peak_mb(4), "many": peak_mb(200), "hoarded": peak_mb(40, hoarding=True)}))
"""


def test_two_hundred_sites_take_the_memory_of_four() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    peak = json.loads(done.stdout)
    assert peak["model"] > 0.9 * MODEL_MB
    assert peak["many"] - peak["few"] < 2 * MODEL_MB
    assert peak["hoarded"] - peak["many"] > 3 * MODEL_MB  # were replies kept, this test would see it
