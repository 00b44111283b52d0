"""Sites that train several at a time: the same bits for any number of lanes, and what happens when one fails."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from common import net as nets
from common.config import parse
from common.engine import Recorder
from common.errors import UserError
from common.messages import Order, Reply
from common.net import Task
from common.parts import read
from fedloge import lanes
from fedloge.federation import assemble
from fedloge.simulate import simulate
from server.lanes import HELD, LaneFleet

ORDER = Order(1, "m", {}, {})
SIZES = {"a": 3, "b": 50, "c": 7, "d": 20}
SMALL: dict[str, Any] = {
    "seed": 3,
    "data": {"source": "digits", "largest": 30, "imbalance": 0.2},
    "partition": {"clients": 5, "alpha": 1.0},
    "model": {"name": "cnn", "width": 16},
    "frame": {"norm": 1.0, "sparsity": 0.3},
    "train": {"epochs": 1, "batch": 16, "lr": 0.1},
    "federation": {"rounds": 2},
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Played:
    """A lane without a net."""

    def __init__(self, handle: Callable[[str], None] = lambda _: None) -> None:
        self.seen: list[str] = []
        self.closed = False
        self._handle = handle

    def handle(self, name: str, order: Order) -> Reply:
        assert not self.closed
        self.seen.append(name)
        self._handle(name)
        return Reply(name, order.round, order.model, SIZES.get(name, 1), {})

    def close(self) -> None:
        self.closed = True


def running() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "lane"]


def answers(fleet: LaneFleet, names: list[str] | None = None) -> list[str]:
    exchange = fleet.broadcast(ORDER, names or fleet.names(1, 0.0), 0.0)
    found = []
    while (reply := exchange.next(0.0)) is not None:
        assert isinstance(reply, Reply)
        found.append(reply.client)
    exchange.close()
    return found


# --- real sites ------------------------------------------------------------------------------------------------------


def remains(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"metrics": (folder / "metrics.json").read_text(encoding="utf-8")}
    for path in sorted(folder.rglob("*.safetensors")):
        tensors, _ = read(path)
        found[path.relative_to(folder).as_posix()] = {name: t.tolist() for name, t in tensors.items()}
    return found


@pytest.mark.parametrize("method", ["fedloge", "ditto"])
def test_the_number_of_lanes_changes_no_bit(tmp_path: Path, method: str) -> None:
    found = []
    for many in (1, 2, 3):
        config = parse({**SMALL, "method": {"name": method}, "run": {"lanes": many}})
        simulate(config, tmp_path / str(many), lambda _: None)
        found.append(remains(tmp_path / str(many)))
    assert found[0] == found[1] == found[2]


def test_a_run_may_go_on_with_another_number_of_lanes(tmp_path: Path) -> None:
    def config(many: int, rounds: int) -> Any:
        return parse({**SMALL, "run": {"lanes": many}, "federation": {"rounds": rounds}})

    simulate(config(1, 2), tmp_path / "whole", lambda _: None)
    simulate(config(3, 1), tmp_path / "run", lambda _: None)
    simulate(config(2, 2), tmp_path / "run", lambda _: None)
    whole, parts = remains(tmp_path / "whole"), remains(tmp_path / "run")
    assert whole["models/generic.safetensors"] == parts["models/generic.safetensors"]


def test_a_site_that_diverges_in_a_lane_ends_the_run_by_its_name(tmp_path: Path) -> None:
    config = parse({**SMALL, "run": {"lanes": 2}, "train": {"lr": 1e30}})
    with pytest.raises(UserError, match=r"^site-00\d: training diverged"):
        simulate(config, tmp_path / "run", lambda _: None)
    assert running() == []


def test_without_a_wish_a_cpu_has_one_lane_and_never_more_than_sites_in_a_round(tmp_path: Path) -> None:
    def number(**sections: dict[str, Any]) -> int:
        return lanes.number(assemble(parse({**SMALL, **sections}), tmp_path))

    assert number() == 1
    assert number(run={"lanes": 9}) == 5
    assert number(run={"lanes": 9}, federation={"fraction": 0.4}) == 2


def test_layers_that_draw_random_numbers_train_in_one_lane(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = Task.backbone

    def with_dropout(task: Task) -> nn.Module:
        backbone = made(task)
        backbone.layers.append(nn.Dropout(0.1))  # type: ignore[operator, union-attr]
        return backbone

    config = parse({**SMALL, "run": {"lanes": 3}})
    assert lanes.number(assemble(config, tmp_path)) == 3
    monkeypatch.setattr(nets.Task, "backbone", with_dropout)
    before = torch.get_rng_state()
    federation = assemble(config, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert lanes.number(federation) == 1
    assert [r.message for r in caplog.records if "random" in r.message] == [
        "layers of this model draw random numbers while they train: one site trains at a time"
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_lanes_of_a_gpu_give_the_bits_of_one_that_takes_its_steps_one_by_one(
    tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for many, graphs in ((1, False), (1, True), (4, True)):
        monkeypatch.setattr(Recorder, "failed", not graphs)
        train = {**SMALL["train"], "precision": precision}
        config = parse({**SMALL, "train": train, "run": {"device": "cuda", "lanes": many}})
        simulate(config, tmp_path / f"{many}{graphs}", lambda _: None)
        assert Recorder.failed != graphs
        found.append(remains(tmp_path / f"{many}{graphs}"))
    assert found[0] == found[1] == found[2]


# --- scheduling ------------------------------------------------------------------------------------------------------


def test_the_largest_site_trains_first_and_replies_come_by_name() -> None:
    lane = Played()
    assert answers(LaneFleet([lane], SIZES)) == ["a", "b", "c", "d"]
    assert lane.seen == ["b", "d", "c", "a"]
    assert answers(LaneFleet([Played(), Played()], SIZES), ["d", "b"]) == ["b", "d"]


def test_replies_that_wait_do_not_pile_up() -> None:
    """With as many of them as may wait, the next name is trained although it is the smallest."""
    sizes = {f"{k:03d}": k for k in range(HELD + 10)}
    gate = threading.Event()
    lane = Played(lambda name: (gate.set() if name == "000" else None) or None)
    assert answers(LaneFleet([lane], sizes)) == sorted(sizes)
    assert gate.is_set()
    assert lane.seen.index("000") == HELD


def test_lanes_have_the_threads_of_the_process() -> None:
    found = []
    lane = Played(lambda _: found.append(torch.get_num_threads()))
    answers(LaneFleet([lane], {"a": 1}))
    assert found == [1]


# --- failures --------------------------------------------------------------------------------------------------------


def full(times: list[int]) -> Callable[[str], None]:
    """As many sites as `times` counts find the memory full."""

    def handle(name: str) -> None:
        del name
        if times[0] > 0:
            times[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")

    return handle


def test_a_lane_for_which_there_is_no_memory_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    class First(Played):
        def close(self) -> None:
            super().close()
            gone.set()

    gone = threading.Event()
    first, second = First(full([1])), Played(lambda _: (gone.wait(10) and None) or None)
    fleet = LaneFleet([first, second], SIZES)
    assert answers(fleet) == ["a", "b", "c", "d"]
    assert len(first.seen) == 1
    assert sorted(second.seen) == ["a", "b", "c", "d"]
    assert fleet.lanes == [second]
    assert [r.message for r in caplog.records] == ["the memory of the GPU is full: lanes from here on: 1"]
    assert answers(fleet) == ["a", "b", "c", "d"]


def test_with_one_lane_left_images_leave_the_memory(caplog: pytest.LogCaptureFixture) -> None:
    spared: list[bool] = []

    def spare() -> bool:
        spared.append(True)
        return len(spared) == 1

    lane = Played(full([1]))
    assert answers(LaneFleet([lane], SIZES, spare)) == ["a", "b", "c", "d"]
    assert lane.seen == ["b", "b", "d", "c", "a"]
    assert [r.message for r in caplog.records] == ["the memory of the GPU is full: images stay outside from here on"]
    with pytest.raises(UserError, match=r"^b: the memory of the GPU is full: use a smaller train\.batch or model$"):
        answers(LaneFleet([Played(full([2]))], SIZES, spare))


def test_all_lanes_short_of_memory_end_as_one() -> None:
    """Each finds it full once: all but one are given up, and no site is lost."""
    barrier = threading.Barrier(3)
    first = {"b", "d", "c"}

    def handle(name: str) -> None:
        if name in first:
            first.discard(name)
            barrier.wait(timeout=10)
            raise torch.OutOfMemoryError("CUDA out of memory")

    fleet = LaneFleet([Played(handle) for _ in range(3)], SIZES)
    assert answers(fleet) == ["a", "b", "c", "d"]
    assert len(fleet.lanes) == 2  # one was given up; the others tried again after it had made room


def test_an_error_of_a_site_ends_the_round_and_all_lanes() -> None:
    def handle(name: str) -> None:
        if name == "d":
            raise UserError("no images")

    with pytest.raises(UserError, match=r"^d: no images$"):
        answers(LaneFleet([Played(handle), Played(handle)], SIZES))
    with pytest.raises(ZeroDivisionError):
        answers(LaneFleet([Played(lambda _: print(1 // 0))], SIZES))
    assert running() == []


def test_an_interrupt_waits_for_what_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    lane = Played()
    exchange = LaneFleet([lane], SIZES).broadcast(ORDER, sorted(SIZES), 0.0)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(exchange._changed, "wait_for", interrupted)  # type: ignore[attr-defined]
        with pytest.raises(KeyboardInterrupt):
            exchange.next(0.0)
    assert running() == []
