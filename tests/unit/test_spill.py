"""A model that is out of the way: its memory is free, and its values come back to the bit, also after a failure."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.parts import digest
from server import spill
from server.spill import spilled


def tensors() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(1)
    return {
        "matrix": torch.randn(300, 70, generator=rng),
        "images last": torch.randn(4, 3, 5, 5, generator=rng).contiguous(memory_format=torch.channels_last),
        "half": torch.randn(33, generator=rng).to(torch.bfloat16),
        "scalar": torch.tensor(4.5),
        "nothing": torch.empty(0, 3),
    }


@pytest.fixture(autouse=True)
def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "LARGE", 1)


def within(held: dict[str, Tensor], folder: Path, work: Callable[[], None] = lambda: None) -> None:
    with spilled(list(held.values()), folder):
        assert all(t.numel() == 0 for t in held.values())
        work()


def test_values_layouts_and_tensors_are_the_same_afterwards(tmp_path: Path) -> None:
    held = tensors()
    before, places, strides = digest(held), [id(t) for t in held.values()], [t.stride() for t in held.values()]
    for _ in range(2):
        within(held, tmp_path)
        assert digest(held) == before
        assert [id(t) for t in held.values()] == places
        assert [t.stride() for t in held.values()] == strides
    assert list(tmp_path.iterdir()) == []


def test_they_come_back_when_what_was_done_meanwhile_fails(tmp_path: Path) -> None:
    held = tensors()
    before = digest(held)

    def fail() -> None:
        raise KeyError("folded")

    with pytest.raises(KeyError, match="folded"):
        within(held, tmp_path, fail)
    assert digest(held) == before


def test_what_cannot_be_written_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    held = tensors()
    before = digest(held)
    real = spill._bytes

    def full(t: Tensor) -> memoryview:
        if t.dtype == torch.bfloat16:
            raise OSError(28, "No space left on device")
        return real(t)

    monkeypatch.setattr(spill, "_bytes", full)
    with spilled(list(held.values()), tmp_path):
        assert digest(held) == before
    assert digest(held) == before
    assert "stays in memory (No space left on device)" in caplog.text
    with spilled(list(held.values()), tmp_path / "nowhere"):
        assert digest(held) == before


def test_nothing_is_taken_away_before_it_is_said_to_be_ready(tmp_path: Path) -> None:
    held = tensors()
    before, seen = digest(held), []
    with spilled(list(held.values()), tmp_path, ready=lambda: seen.append(digest(held))):
        pass
    assert seen == [before]

    def failed() -> None:
        raise KeyError("the checkpoint")

    with pytest.raises(KeyError, match="the checkpoint"), spilled(list(held.values()), tmp_path, ready=failed):
        pass
    assert digest(held) == before


def test_a_small_model_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "LARGE", 10**6)
    held = tensors()
    with spilled(list(held.values()), tmp_path):
        assert held["matrix"].numel()
