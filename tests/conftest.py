"""One thread in every test: results do not depend on the machine's cores, and the suite shares them fairly."""

import os

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test becomes another program: the suite would end there, with whatever status that ends with."""
    for name in ("execv", "execve", "_exit"):
        monkeypatch.setattr(os, name, _refuse)


def _refuse(*words: object) -> None:
    raise AssertionError(f"a test would have become another program: {words}")
