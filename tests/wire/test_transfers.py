"""Objects go to and from a site several at a time, the large ones fewer: round trips are saved, memory is not spent."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)

from client.fleet_api import LARGE, SMALL, FleetApi, pieces
from common import deployment, pki
from fedloge import provision


@pytest.fixture
def api(tmp_path: Path) -> Iterator[FleetApi]:
    folder = tmp_path / "federation"
    provision.create(folder, "study", "localhost", 9092, {"images.classes": ("a", "b"), "model.name": "mlp"})
    made = FleetApi(pki.issue(folder, "north", None, deployment.load(folder / "federation.toml")))
    yield made
    made.close()


def order() -> tuple[ObjectTree, dict[str, int]]:
    """The tree of a message with a large array, in pieces, and small ones; and the bytes of every object."""
    rng = np.random.default_rng(0)
    arrays = {"large": rng.random(2_000_000), **{f"small {number}": rng.random(100) for number in range(6)}}
    parts = {f"part {name}": ArrayRecord({name: Array(values)}) for name, values in arrays.items()}
    message = Message(RecordDict({**parts, "about": ConfigRecord({"round": 1})}), 1, "train")
    with no_object_id_recompute():
        sizes = {name: len(part.deflate()) for name, part in get_all_nested_objects(message).items()}
        return get_object_tree(message), sizes


def test_the_pieces_of_what_was_cut_are_the_large_ones() -> None:
    tree, sizes = order()
    assert {part.object_id for part in iterate_object_tree(tree)} == sizes.keys()
    assert pieces(tree) == {name for name, size in sizes.items() if size > 10_000}
    assert len(pieces(tree)) == 4


def test_many_small_ones_and_few_large_ones_are_under_way(api: FleetApi, monkeypatch: pytest.MonkeyPatch) -> None:
    tree, sizes = order()
    large, lock = pieces(tree), threading.Lock()
    now: dict[bool, set[str]] = {True: set(), False: set()}
    most = {True: 0, False: 0}
    enough = threading.Event()

    def fetched(_: FleetApi, __: int, name: str, ___: float) -> bytes:
        mine = now[name in large]
        with lock:
            mine.add(name)
            most[name in large] = max(most[name in large], len(mine))
            if most == {True: LARGE, False: SMALL}:
                enough.set()
        assert enough.wait(60)  # they stay until as many are there as may be
        with lock:
            mine.discard(name)
        return b"content"

    monkeypatch.setattr(FleetApi, "_object", fetched)
    into: dict[str, bytes] = {}
    api.fetch(1, list(sizes), into, time.time() + 60, large)
    assert into.keys() == sizes.keys()
    assert most == {True: LARGE, False: SMALL}
