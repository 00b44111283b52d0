"""What a killed writer left is gone when the next process takes over its folder, and nothing else is."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from client.node import only_one
from common import files, parts
from fedloge.serve import _alone


@pytest.mark.parametrize("take_over", [only_one, _alone])
def test_a_folder_that_is_taken_over_is_swept(
    take_over: Callable[[Path], AbstractContextManager[None]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "node.json"
    kept.write_text("{}", encoding="utf-8")
    with monkeypatch.context() as killed:
        killed.setattr(Path, "replace", lambda *_: None)
        killed.setattr(Path, "unlink", lambda *_: None)
        files.write(tmp_path / "link.json", "{}")
    assert [path.name for path in tmp_path.glob(".link.json.*.tmp")]
    with take_over(tmp_path):
        assert list(tmp_path.glob(".*")) == []
    assert kept.exists()


def test_nothing_else_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a file that `parts` left."""
    path = tmp_path / "a.safetensors"
    parts.save(path, {"w": torch.ones(3)}, {})
    (tmp_path / ".keep.tmp").touch()

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(Path, "unlink", lambda *_, **__: None)
        killed.setattr(Path, "replace", kill)
        with pytest.raises(KeyboardInterrupt):
            parts.save(path, {"w": torch.zeros(3)}, {})
    assert len(list(tmp_path.iterdir())) == 3
    files.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".keep.tmp", path.name]
