"""Flat arrays become the objects that Flower would make of them, and come out of them without being there twice."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_id, get_object_tree

from common.objects import flat, inflated

RAW = "fedloge.raw"
PIECE = 5 << 20
CHILD = """
import json
from pathlib import Path
import numpy as np
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from common import heap, objects

heap.KEPT = 16 << 20
heap.keep()

def megabytes(key):
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)]
    return int(line.split()[1]) / 1024

def contents():
    data = np.random.default_rng(0).bytes(100 << 20)
    record = ArrayRecord({"a": objects.flat("float32", len(data) // 4, "x", data)})
    message = Message(RecordDict({"parts": record}), 1, "train")
    return message.object_id, {name: part.deflate() for name, part in get_all_nested_objects(message).items()}

name, made = contents()
heap.trim()
before = megabytes("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
found = objects.inflated(name, made)
once = megabytes("VmHWM") - before
assert len(found.content["parts"]["a"].data) == 100 << 20
del found
name, made = contents()
heap.trim()
before = megabytes("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
joined = b"".join(made.values())
print(json.dumps({"once": once, "twice": megabytes("VmHWM") - before}))
"""


def message_of(*arrays: Array) -> Message:
    records = ArrayRecord({f"array {k}": array for k, array in enumerate(arrays)})
    return Message(RecordDict({"parts": records, "about": ConfigRecord({"x": 1})}), 7, "train", ttl=60)


@pytest.mark.parametrize("size", [0, 4, PIECE, PIECE + 4, 3 * PIECE])
@pytest.mark.parametrize("of", ["noise", "zeros"])
def test_the_objects_are_those_of_flower(size: int, of: str) -> None:
    data = np.random.default_rng(0).bytes(size) if of == "noise" else bytes(size)
    ours, theirs = flat("float32", size // 4, RAW, data), Array("float32", (size // 4,), RAW, data)
    assert get_object_tree(ours) == get_object_tree(theirs)
    contents = {name: part.deflate() for name, part in get_all_nested_objects(ours).items()}
    assert contents == {name: part.deflate() for name, part in get_all_nested_objects(theirs).items()}
    assert all(get_object_id(content) == name for name, content in contents.items())


def test_what_comes_out_is_what_went_in_and_the_contents_are_used_up() -> None:
    noise = np.random.default_rng(0).bytes(2 * PIECE + 4)
    zeros, shared = bytes(2 * PIECE), noise[:PIECE]  # pieces that are in one array twice, and in two arrays
    given = [("float32", noise), ("uint8", zeros), ("bfloat16", shared), ("uint8", b"")]
    message = message_of(*(flat(dtype, len(data), RAW, data) for dtype, data in given))
    contents = {name: part.deflate() for name, part in get_all_nested_objects(message).items()}
    found = inflated(message.object_id, contents).content
    assert contents == {}
    assert found["about"] == {"x": 1}
    got = [(array.dtype, bytes(array.data)) for array in found["parts"].values()]
    assert got == given
    assert {array.shape for array in found["parts"].values()} == {(len(data),) for _, data in given}


def test_a_large_array_is_there_once() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    peak = json.loads(done.stdout)
    assert peak["once"] < 40
    assert peak["twice"] > 90, "were all pieces kept until they are joined, this test would see it"
