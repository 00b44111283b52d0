"""A federation small enough to run in a blink, with everything real but the size."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from client.participant import Participant
from client.store import Store
from common.config import parse
from common.images import PixelImages
from common.methods.method import Method, ServerState
from common.net import Net, Task, build
from server import rounds
from server.fleet import LocalFleet

CLASSES = ("a", "b", "c", "d")
SITES = {  # labels of each site's images: a long tail, a class that only some have, a site with a single class
    "north": (0,) * 12 + (1,) * 6 + (2,) * 3,
    "south": (0,) * 3 + (1,) * 9 + (3,) * 7,
    "west": (2,) * 5,
}
CPU = torch.device("cpu")


def images(labels: Tensor, seed: int = 0) -> PixelImages:
    """Noise on a faint picture of each class: easy to learn, not at once."""
    rng = torch.Generator().manual_seed(seed)
    pictures = torch.randint(0, 256, (len(CLASSES), 8, 8, 1), generator=rng)
    noise = torch.randint(0, 256, (len(labels), 8, 8, 1), generator=rng)
    pixels = (0.7 * pictures[labels] + 0.3 * noise).to(torch.uint8)
    return PixelImages(pixels, labels, CLASSES, mean=(0.5,), std=(0.25,), augment="crop")


@dataclass(frozen=True)
class Tiny:
    """Sites, their server's state before round 1, and what it takes to run rounds."""

    task: Task
    net: Net
    state: ServerState
    sites: dict[str, Participant]
    folder: TemporaryDirectory[str]  # of the sites' stores; it goes when the federation does

    @property
    def method(self) -> Method:
        return self.task.config.method

    def run(self, count: int) -> list[rounds.RoundReport]:
        """`count` rounds from the state before round 1."""
        reports: list[rounds.RoundReport] = []
        fleet = LocalFleet({name: site.handle for name, site in self.sites.items()})
        config = self.task.config
        policy = type(config.federation)(rounds=count, quorum=1.0)
        rounds.run(fleet, self.method, self.state, self.net, policy, config.seed, rounds.Hooks(reports.append))
        return reports


def tiny(
    method: dict[str, Any],
    sites: dict[str, tuple[int, ...]] = SITES,
    **sections: dict[str, Any],
) -> Tiny:
    """A federation of `sites`; `sections` override parts of the configuration."""
    table = {
        "method": method,
        "model": {"name": "cnn", "width": 16} | sections.pop("model", {}),
        "train": {"epochs": 2, "lr": 0.05, "layout": "plain"} | sections.pop("train", {}),
        "frame": {"norm": 1.0, "sparsity": 0.3},
        **sections,
    }
    task = Task(parse(table), CLASSES, channels=1, side=8)
    net = build(task.config.method, task)
    state = task.config.method.init(net, task)
    labels = torch.tensor([label for of_site in sites.values() for label in of_site])
    data = images(labels)
    folder = TemporaryDirectory(prefix="fedloge-test-")
    made = {}
    start = 0
    for name, of_site in sites.items():
        index = torch.arange(start, start + len(of_site))
        counts = torch.bincount(labels[index], minlength=len(CLASSES))
        store = Store(Path(folder.name) / name, durable=False)
        made[name] = Participant(name, task, task.config.method, net, data, index, counts, store, CPU)
        start += len(of_site)
    return Tiny(task, net, state, made, folder)
