"""The server's state after every round, in one file each: whole or not there, verified when read.

A file holds the parts, the method's own tensors, the history and the configuration. The newest `keep` are kept;
one that is damaged is passed over, said so, and the one before is used. A `Writer` writes it while the next round
runs: nothing in it may change in place meanwhile, and no method's server step does that.
"""

import json
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import files, parts
from common.errors import UserError
from common.methods.method import Method, ServerState
from common.net import Net
from common.parts import Corrupt, Tensors

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    state: ServerState
    history: list[dict[str, Any]]  # one entry a round
    config: dict[str, Any]
    data: str = ""  # fingerprint of the data a simulation runs on


def save(folder: Path, checkpoint: Checkpoint, keep: int, durable: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    state = checkpoint.state
    flat = {f"part/{part}/{name}": t for part, group in state.parts.items() for name, t in group.items()}
    flat |= {f"extra/{name}": t for name, t in state.extra.items()}
    path = folder / f"round-{state.round:06d}.safetensors"
    about = {
        "round": str(state.round),
        "history": json.dumps(checkpoint.history),
        "config": json.dumps(checkpoint.config),
        "data": checkpoint.data,
    }
    parts.save(path, flat, about, durable=durable)
    for old in _files(folder)[:-keep]:
        old.unlink()
    return path


class Writer:
    """Saves checkpoints in a thread of its own, one at a time."""

    def __init__(self, folder: Path, keep: int, durable: bool = True) -> None:
        self._folder = folder
        self._keep = keep
        self._durable = durable
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._under_way: Future[None] | None = None

    def save(self, checkpoint: Checkpoint, done: Callable[[], None] = lambda: None) -> None:
        """Begin to save it, as soon as the one before is saved; `done` is called, in that thread, once it is."""
        self.wait()
        # the history of now: the next round adds to it
        now = replace(checkpoint, history=json.loads(json.dumps(checkpoint.history)))
        self._under_way = self._pool.submit(self._write, now, done)

    def check(self) -> None:
        """Raise what has gone wrong so far."""
        if self._under_way is not None and self._under_way.done():
            self.wait()

    def wait(self) -> None:
        """Return when everything is saved; or raise why it cannot be, once."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def close(self) -> None:
        """Whatever was begun is whole, or was not to be had."""
        self._pool.shutdown()

    def _write(self, checkpoint: Checkpoint, done: Callable[[], None]) -> None:
        save(self._folder, checkpoint, self._keep, self._durable)
        done()


def latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; None when there has never been one. Nobody may be writing to `folder`."""
    files.sweep(folder)
    for path in reversed(_files(folder)):
        try:
            return read(path)
        except Corrupt as error:
            log.warning("%s; the checkpoint before it is tried", error)
    if _files(folder):
        raise UserError(f"{folder}: no checkpoint is whole: delete the folder it is in to start anew")
    return None


def require_parts(found: Checkpoint, method: Method, net: Net, folder: Path) -> None:
    """Refuse to go on from a checkpoint whose parts are not the method's: it was another one's at that time."""
    ours = method.shared | method.fixed
    if (found.state.parts.keys() ^ net.parts().keys()) & ours:
        raise UserError(
            f"{folder} was begun by a version of fedloge whose method {method.name} has other parts here: go on with "
            "that version, or start anew in another folder"
        )


def read(path: Path) -> Checkpoint:
    flat, about = parts.read(path)
    groups: dict[str, Tensors] = {}
    extra: Tensors = {}
    for key, t in flat.items():
        kind, _, rest = key.partition("/")
        if kind == "extra":
            extra[rest] = t
        else:
            part, _, name = rest.partition("/")
            groups.setdefault(part, {})[name] = t
    state = ServerState(round=int(about["round"]), parts=groups, extra=extra)
    return Checkpoint(state, json.loads(about["history"]), json.loads(about["config"]), about.get("data", ""))


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("round-*.safetensors"))
