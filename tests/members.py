"""A small real federation without a network: digits at three sites and at the operator, members that answer orders."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from client.member import Member
from common.config import parse
from common.deployment import Deployment, ImagesConfig, ServerConfig
from common.messages import Order, Reply
from common.packed import fixed_digest

CLASSES = tuple("0123456789")
NAMES = ("north", "south", "west")
SMALL: dict[str, Any] = {
    "name": "small",
    "seed": 3,
    "model": {"name": "mlp", "width": 16},
    "frame": {"norm": 1.0, "sparsity": 0.3},
    "train": {"epochs": 1, "batch": 16, "lr": 0.1},
    "federation": {"rounds": 3, "quorum": 1.0, "min_clients": 3, "wait": 20.0, "deadline": 60.0, "fold": "name"},
    "evaluation": {"every": 2, "last": 2},
    "run": {"device": "cpu"},
}


@dataclass(frozen=True)
class Ticket:
    name: str
    fingerprint: str = "f" * 64
    classes: tuple[str, ...] = CLASSES


def images(folder: Path) -> Path:
    """NAME.npz of every site, its own classes more than others, and test.npz."""
    folder.mkdir(parents=True, exist_ok=True)
    digits = load_digits()
    pixels, labels = (digits.images * 15).astype(np.uint8), digits.target
    rng = np.random.default_rng(0)
    order = rng.permutation(len(labels))[:700]
    share = {"test": order[:200]}
    for place, name in enumerate(NAMES):
        mine = order[200 + place :: len(NAMES)]
        share[name] = mine[(labels[mine] % len(NAMES) == place) | (rng.random(len(mine)) < 0.3)]
    for name, index in share.items():
        np.savez(folder / f"{name}.npz", images=pixels[index], labels=labels[index])
    return folder


def deployment(data: Path, method: str = "fedloge", **sections: dict[str, Any]) -> Deployment:
    table = {**SMALL, "method": {"name": method}}
    config = parse({**table, **{key: {**table.get(key, {}), **more} for key, more in sections.items()}})
    return Deployment(config, ImagesConfig(CLASSES, size=8, channels=1), ServerConfig(test=str(data / "test.npz")))


def members(data: Path, states: Path, names: tuple[str, ...] = NAMES) -> dict[str, Member]:
    return {name: Member(Ticket(name), data / f"{name}.npz", states / name, device="cpu") for name in names}


@dataclass(frozen=True)
class Handler:
    """A member, as a `LocalFleet` wants it."""

    member: Member
    settings: str

    def __call__(self, order: Order) -> Reply:
        return self.member.answer(order, self.settings, fixed_digest(order.fixed))
