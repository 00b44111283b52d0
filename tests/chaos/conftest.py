"""What an uninterrupted run comes to, and federations of the same experiment to be disturbed."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from common import config
from fedloge.demo import DEMO
from fedloge.simulate import simulate
from tests.chaos.arena import Arena

EXPERIMENT = [  # 6 MB to send, so that sending takes a while
    "partition.clients=3", "model.width=1200", "train.epochs=1", "federation.rounds=12",
    "evaluation.every=1",
]  # fmt: skip


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a simulation with the state after every round."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    simulate(config.load(DEMO, [*EXPERIMENT, "run.keep=99"]), folder, lambda _: None)
    return folder


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[Arena]:
    with Arena(tmp_path / "arena", EXPERIMENT) as made:
        yield made
