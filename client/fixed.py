"""The fixed parts of a method at a site: they are the same in every round, so each travels once and is kept; the head
that is computed from class statistics travels again when it is another.

They are known by their digests, which are made from the file they are kept in: one that was damaged is found out and
counts as not there, and the site says so in its card.
"""

import logging
from pathlib import Path

from client.refusal import Refusal
from common import parts
from common.errors import UserError
from common.packed import part_digest
from common.parts import Tensors

log = logging.getLogger(__name__)


class Fixed:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._parts: dict[str, tuple[str, Tensors]] = {}  # by digest
        try:
            flat, _ = parts.read(path)
        except parts.Corrupt as error:
            log.warning("%s; the server sends the fixed parts again", error)
            return
        except UserError:
            return  # not there yet
        kept: dict[str, Tensors] = {}
        for key, t in flat.items():
            part, _, name = key.partition("/")
            kept.setdefault(part, {})[name] = t
        self._parts = {part_digest(part, group): (part, group) for part, group in kept.items()}

    @property
    def digest(self) -> str:
        """Of what is at hand; empty for nothing."""
        return " ".join(sorted(self._parts))

    def take(self, sent: dict[str, Tensors], digest: str) -> dict[str, Tensors]:
        """The fixed parts of an order, which `digest` names: those that were `sent`, and others that are at hand."""
        came = {part_digest(part, group): (part, group) for part, group in sent.items()}
        named = digest.split()
        if not came.keys() <= set(named):
            raise Refusal("the fixed parts are not those that the order names: send them again")
        if not set(named) <= came.keys() | self._parts.keys():
            raise Refusal("the fixed parts are not at hand: send them with the order")
        if came.keys() - self._parts.keys():
            copied = {name: (part, parts.snapshot(group)) for name, (part, group) in came.items()}  # views of a message
            self._parts = {name: self._parts.get(name) or copied[name] for name in named}
            flat = {f"{part}/{name}": t for part, group in self._parts.values() for name, t in group.items()}
            self._path.parent.mkdir(parents=True, exist_ok=True)
            parts.save(self._path, flat, {})
        return dict(self._parts[name] for name in named)
