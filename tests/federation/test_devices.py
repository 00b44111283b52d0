"""A GPU that fails in mid-round: the server is told, the site lives on, and the CPU takes over where it may."""

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from client import devices, node, participant
from client.devices import wished
from client.member import Member
from client.refusal import Refusal, cause
from common.errors import UsageError
from common.images import PixelImages
from common.messages import Order
from common.net import build
from common.parts import digest
from fedloge import site as site_verb
from tests.members import Handler, Ticket, deployment, images

LOST = torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nin detail")
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
CPU = torch.device("cpu")


class Playing:
    """A site whose GPU, played by the CPU, fails in training as often as there are `errors`."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, device: str, errors: list[Exception]) -> None:
        self.trained = 0
        self.errors = errors
        train = participant.train

        def played(*arguments: Any) -> dict[str, float]:
            self.trained += 1
            if self.errors:
                raise self.errors.pop(0)
            return train(*arguments)

        monkeypatch.setattr(participant, "train", played)
        monkeypatch.setattr(devices, "best_device", lambda _: CPU)
        plan = deployment(images(folder / "data"))
        state = plan.config.method.init(build(plan.config.method, plan.task), plan.task)
        fixed = {"frame": state.parts["frame"]}
        self.order = Order(1, "m", {part: t for part, t in state.parts.items() if part != "frame"}, fixed)
        self.member = Member(Ticket("north"), folder / "data" / "north.npz", folder / "state", device=device)
        self.ask = Handler(self.member, plan.settings())

    def sent(self) -> str:
        shared = self.ask(self.order).shared
        return digest({f"{part}/{name}": t for part, group in shared.items() for name, t in group.items()})


Play = Callable[..., Playing]


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Play:
    def made(device: str, *errors: Exception, name: str = "a") -> Playing:
        return Playing(tmp_path / name, monkeypatch, device, list(errors))

    return made


def test_the_server_is_told_and_the_site_lives_on(play: Play, caplog: pytest.LogCaptureFixture) -> None:
    playing = play("cuda", LOST)
    with pytest.raises(Refusal, match=r"^its GPU failed: see the site's own log$"):
        playing.ask(playing.order)
    assert "illegal memory access" in caplog.text
    assert playing.member.lost
    assert playing.sent()  # nothing of the failed round is in the way


def test_the_cpu_takes_over_in_the_same_round_if_it_may(play: Play, caplog: pytest.LogCaptureFixture) -> None:
    whole = play("cuda", name="whole").sent()
    playing = play("cuda,cpu", LOST, name="failing")
    with caplog.at_level(logging.WARNING):
        assert playing.sent() == whole
    assert "failed (CUDA error: an illegal memory access was encountered): the CPU takes its place" in caplog.text
    assert "in detail" not in caplog.text
    assert (playing.member.device, playing.member.lost) == (CPU, False)
    assert playing.trained == 2
    with pytest.raises(Refusal):  # it takes the place once
        play("cuda,cpu", LOST, LOST, name="twice").sent()


def test_a_full_gpu_gives_up_the_images_first_then_the_round(
    play: Play, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = play("cuda", name="whole").sent()
    there = [True, True]  # training and test images
    monkeypatch.setattr(PixelImages, "stay_home", lambda *_: there.pop() if there else False)
    playing = play("cuda", FULL, name="failing")
    assert playing.sent() == whole
    assert [r.message for r in caplog.records if r.levelno == logging.WARNING] == [
        "the memory of cpu is full: images stay outside from here on"
    ]
    playing.errors.append(FULL)
    with pytest.raises(Refusal, match="the memory of its GPU is full"):
        playing.sent()
    assert not playing.member.lost  # it may have more room in the next round


def test_other_errors_are_not_the_gpus(play: Play) -> None:
    playing = play("cuda,cpu", RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(Refusal, match=r"it failed \(RuntimeError\)"):
        playing.ask(playing.order)
    assert (playing.trained, playing.member.lost) == (1, False)


@pytest.mark.parametrize(
    "error", [LOST, RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), RuntimeError("CUDA error: unspecified")]
)
def test_what_a_failed_gpu_says(error: Exception) -> None:
    assert cause(error, Path("/state")) == "its GPU failed: see the site's own log"


@pytest.mark.parametrize("wish", ["cpu,cpu", "cuda,cuda", "cuda,", "cuda,cpu,cpu"])
def test_only_the_cpu_takes_the_place_of_a_gpu(wish: str) -> None:
    with pytest.raises(UsageError, match="--device"):
        wished(wish)
    assert wished("cpu") == (CPU, None)


def test_a_client_begins_anew_with_the_same_command(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[list[str]] = []
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "fedloge", "client", "north.kit"])
    monkeypatch.setattr(os, "execv", lambda _, words: begun.append(words))
    site_verb._begin_anew(play("cuda").member)
    assert begun == [["python", "-m", "fedloge", "client", "north.kit", "--device", "cpu"]]


def test_a_node_whose_app_is_spent_ends_once_it_has_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a farewell, after which the server would never get that answer."""
    left: list[bool] = []

    def leave(farewell: bool) -> None:
        left.append(farewell)

    membership = SimpleNamespace(insist=None, start=lambda: None, leave=leave)
    monkeypatch.setattr(node, "FleetApi", lambda _: SimpleNamespace(key=b"key"))
    monkeypatch.setattr(node, "Membership", lambda *_: membership)
    turns: list[bool] = []
    monkeypatch.setattr(node.Node, "_turn", lambda _, only_owed=False: turns.append(only_owed))
    node.Node(None, tmp_path, None, {}, spent=lambda: len(turns) > 2).run()  # type: ignore[arg-type]
    assert turns == [True, False, False]
    assert left == [False]


def test_images_for_which_a_device_has_no_room_stay_outside(caplog: pytest.LogCaptureFixture) -> None:
    class Full:
        """Pixels that cannot be moved as a whole."""

        def __init__(self, pixels: torch.Tensor) -> None:
            self.pixels = pixels
            self.device = pixels.device

        def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
            return self.pixels[index]

        def to(self, _: torch.device) -> torch.Tensor:
            raise FULL

    def made() -> PixelImages:
        pixels = torch.randint(0, 256, (9, 4, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        return PixelImages(pixels, torch.arange(9), list("abcdefghi"), mean=(0.5,) * 3, std=(0.5,) * 3)

    plain, full = made(), made()
    full.pixels = Full(full.pixels)  # type: ignore[assignment]
    for (x, y), (expected, labels) in zip(
        full.batches(torch.arange(9), 4, CPU), plain.batches(torch.arange(9), 4, CPU), strict=True
    ):
        assert torch.equal(x, expected)
        assert torch.equal(y, labels)
    assert [r.message for r in caplog.records] == ["9 images do not fit into the memory of cpu: they stay outside"]
    assert not plain.stay_home(CPU)  # they are at home
    elsewhere = torch.device("meta")
    plain._to(elsewhere)
    assert plain.stay_home(elsewhere)
    assert plain._to(elsewhere)[0].device == CPU
    assert not plain.stay_home(elsewhere)
