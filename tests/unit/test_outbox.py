"""What a node writes down before it does it, and what it finds after it was killed at any point."""

import hashlib
from pathlib import Path

import pytest

from client.outbox import Outbox
from common.errors import UserError


def replied(folder: Path) -> tuple[Outbox, str]:
    box = Outbox(folder, "key")
    box.begin(b"order")
    content = b"content"
    object_id = hashlib.sha256(content).hexdigest()
    box.put(object_id, content)
    box.finish(b"reply")
    return box, object_id


def test_what_is_owed_is_found_by_the_next_process(tmp_path: Path) -> None:
    box = Outbox(tmp_path, "key")
    assert (box.order(), box.reply(), box.tried) == (None, None, False)
    box.begin(b"order")
    assert (Outbox(tmp_path, "key").order(), Outbox(tmp_path, "key").reply()) == (b"order", None)
    _, object_id = replied(tmp_path)
    after = Outbox(tmp_path, "key")
    assert (after.order(), after.reply(), after.tried) == (b"order", b"reply", False)
    assert after.object(object_id) == b"content"
    after.try_now()
    assert Outbox(tmp_path, "key").tried


def test_nothing_is_left_of_a_message_when_the_next_begins(tmp_path: Path) -> None:
    box, object_id = replied(tmp_path)
    box.try_now()
    box.begin(b"next")
    assert (box.order(), box.reply(), box.tried, box.object(object_id)) == (b"next", None, False, None)
    box.clear()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_damage_is_noticed(tmp_path: Path) -> None:
    box, object_id = replied(tmp_path)
    assert box.whole([object_id])
    (path,) = (tmp_path / "outbox" / "objects").iterdir()
    path.write_bytes(b"conte")
    assert not box.whole([object_id])
    path.unlink()
    assert not box.whole([object_id])


def test_a_node_id_is_of_one_key(tmp_path: Path) -> None:
    box = Outbox(tmp_path, "key")
    assert box.node_id() is None
    box.remember(2**63 + 1)
    assert Outbox(tmp_path, "key").node_id() == 2**63 + 1
    assert Outbox(tmp_path, "other").node_id() is None
    for damage in ("", "[]", "{", '{"node": "5", "owner": "key"}'):
        (tmp_path / "node.json").write_text(damage, encoding="utf-8")
        assert box.node_id() is None


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "outbox").write_text("a file where a folder should be", encoding="utf-8")
    with pytest.raises(UserError, match="outbox: cannot be written"):
        Outbox(tmp_path, "key").begin(b"order")
