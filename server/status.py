"""What a federation is doing now, in one small file: `run/status.json`.

The ServerApp writes it, the supervisor and `fedloge status` read it, each from its own process. A file is whole or the
one before. It is written at every change but at most five times a second; the last of many quick changes is written
too, a moment later. This module imports no torch: `fedloge status --healthy` is asked every few seconds.
"""

import json
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from common import files

Traffic: TypeAlias = dict[str, dict[str, int]]  # site -> bytes down to it and up from it
Phase: TypeAlias = Literal["starting", "waiting", "training", "judging", "finished", "gave-up"]

OFTEN = 0.2  # seconds between two writes
NAME = "status.json"  # in the run folder


@dataclass(frozen=True)
class Status:
    """Times are in seconds since 1970."""

    phase: Phase = "starting"
    run: str = ""  # Flower's id of the run
    round: int = 0  # the one that is open, or the last one
    rounds: int = 0
    chosen: list[str] = field(default_factory=list)  # sites of this round
    waiting: list[str] = field(default_factory=list)  # those of them that have not answered
    refused: dict[str, str] = field(default_factory=dict)  # site -> reason, of this round
    quarantined: dict[str, dict[str, Any]] = field(default_factory=dict)  # site -> its latest refusal: round, reason
    sites: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> online, examples, since
    bad_cards: dict[str, str] = field(default_factory=dict)  # site that cannot take part -> reason
    generic: float | None = None  # newest share of right answers on the operator's test set
    generic_local: float | None = None  # of the same model, as the mean over the sites' own test sets
    personal: float | None = None  # of the personal models, likewise
    judged_round: int = 0  # of the last two; 0 when there is none yet
    traffic: Traffic = field(default_factory=dict)  # of this round
    round_began: float | None = None
    deadline: float | None = None  # when the open round is closed at the latest
    left: float | None = None  # seconds the remaining rounds will take if they go on like the last ones
    message: str = ""  # what the operator should know
    updated: float = 0.0


class Board:
    """The status of this process, shown in `folder`."""

    def __init__(self, folder: Path, **first: Any) -> None:
        self.status = Status(**first)
        self._path = folder / NAME
        self._lock = threading.RLock()
        self._written = -OFTEN
        self._timer: threading.Timer | None = None

    def show(self, **changes: Any) -> None:
        with self._lock:
            self.status = replace(self.status, **changes, updated=time.time())
            if self._timer is not None:
                return
            wait = self._written + OFTEN - time.monotonic()
            if wait <= 0:
                self._write()
                return
            self._timer = threading.Timer(wait, self.flush)
            self._timer.daemon = True
            self._timer.start()

    def flush(self) -> None:
        """Write now what is not written yet."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            self._write()

    def _write(self) -> None:
        with suppress(OSError):  # a full disk ends the run where something is lost by it: at a checkpoint
            files.replace(self._path, json.dumps(asdict(self.status), indent=1) + "\n")
        self._written = time.monotonic()


def read(folder: Path) -> Status | None:
    """The status shown in `folder`; None when there is none that this version can read."""
    try:
        table = json.loads((folder / NAME).read_text(encoding="utf-8"))
        known = {f.name for f in fields(Status)}
        return Status(**{key: value for key, value in table.items() if key in known})
    except (OSError, ValueError, AttributeError):
        return None


def added(first: Traffic, second: Traffic) -> Traffic:
    """What both are together."""
    ways = ("down", "up")
    return {
        name: {way: first.get(name, {}).get(way, 0) + second.get(name, {}).get(way, 0) for way in ways}
        for name in sorted(first.keys() | second.keys())
    }
