"""A federation on random pictures of CIFAR's size, assembled as an experiment file would have it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from common import heap
from common.config import parse
from common.methods.method import ServerState
from fedloge.federation import Federation, assemble

CLASSES = 10
OURS = ("fp32", "bf16")


@contextmanager
def federation(
    rung: str, model: str, images: int, clients: int, batch: int = 8, epochs: int = 1
) -> Iterator[tuple[Federation, ServerState]]:
    """With as many images to train with as to test with. `rung` is one of `OURS` or the reference, which has plain
    settings and nothing of what our processes ask of the C library."""
    torch.set_num_threads(1)
    if rung in OURS:
        heap.keep()
    with TemporaryDirectory(prefix="fedloge-bench-step-") as place:
        for number, name in enumerate(("train", "test")):
            _write(Path(place) / f"{name}.npz", images, number)
        config = parse(
            {
                "method": {"name": "fedloge"},
                "model": {"name": model},
                "data": {
                    "source": "npz",
                    "path": f"{place}/train.npz",
                    "test_path": f"{place}/test.npz",
                    "augment": "crop-flip",
                },
                "partition": {"kind": "iid", "clients": clients, "local_test": images},
                "train": {"batch": batch, "epochs": epochs, **_settings(rung)},
                "run": {"device": "cpu"},
            }
        )
        made = assemble(config, Path(place) / "run")
        yield made, config.method.init(made.net, made.task)


def _settings(rung: str) -> dict[str, Any]:
    return {"precision": rung} if rung in OURS else {"layout": "plain"}


def _write(path: Path, images: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(256, size=(images, 32, 32, 3), dtype=np.uint8)
    np.savez(path, images=pixels, labels=np.arange(images) % CLASSES)
