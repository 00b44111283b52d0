"""What a site keeps for itself between rounds: its local parts, durable and one file per round.

A file is written whole or not at all and only after a successful round; earlier ones are kept, so a round that
is run again after a crash starts from exactly what it started from the first time.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

from common import files, parts
from common.parts import Corrupt, Tensors

log = logging.getLogger(__name__)


class Store:
    """Local parts of one client in one federation, under `folder`."""

    def __init__(self, folder: Path, keep: int = 2, durable: bool = True) -> None:
        self.folder = folder
        self.keep = keep
        self.durable = durable  # False: survives a killed process but not a power cut; for simulations

    def save(self, round: int, values: dict[str, Tensors], about: Mapping[str, str] | None = None) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        flat = {f"{part}/{name}": t for part, group in values.items() for name, t in group.items()}
        parts.save(self._path(round), flat, {**(about or {}), "round": str(round)}, durable=self.durable)
        self.rewind(round)
        for old in self.rounds()[: -self.keep]:
            self._path(old).unlink()

    def rewind(self, round: int) -> None:
        """Forget what came after `round`: the server went back to it and the later rounds will be run again."""
        files.sweep(self.folder)
        for later in [r for r in self.rounds() if r > round]:
            self._path(later).unlink()

    def load(self, before: int) -> dict[str, Tensors] | None:
        """The newest readable local parts of a round earlier than `before`; None when there are none."""
        found = self.newest(before)
        return found and found[0]

    def newest(self, before: int) -> tuple[dict[str, Tensors], dict[str, str]] | None:
        """Those, and what is noted with them."""
        for round in reversed([r for r in self.rounds() if r < before]):
            try:
                flat, about = parts.read(self._path(round))
            except Corrupt as error:
                log.warning("%s; what is of an earlier round is used", error)
                continue
            values: dict[str, Tensors] = {}
            for key, t in flat.items():
                part, _, name = key.partition("/")
                values.setdefault(part, {})[name] = t
            return values, about
        return None

    def rounds(self) -> list[int]:
        return sorted(int(path.stem.removeprefix("round-")) for path in self.folder.glob("round-*.safetensors"))

    def _path(self, round: int) -> Path:
        return self.folder / f"round-{round:06d}.safetensors"
