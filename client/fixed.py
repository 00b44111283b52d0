"""The fixed parts of a method at a site: they are the same in every round, so they travel once and are kept.

They are known by their digest, which is that of the file they are kept in: one that was damaged is found out and
counts as not there, and the site says so in its card.
"""

import logging
from pathlib import Path

from client.refusal import Refusal
from common import parts
from common.errors import UserError
from common.packed import fixed_digest
from common.parts import Tensors

log = logging.getLogger(__name__)


class Fixed:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._digest = ""
        self._parts: dict[str, Tensors] = {}
        try:
            flat, _ = parts.read(path)
        except parts.Corrupt as error:
            log.warning("%s; the server sends the fixed parts again", error)
        except UserError:
            pass  # not there yet
        else:
            self._hold(flat)

    @property
    def digest(self) -> str:
        """Of what is at hand; empty for nothing."""
        return self._digest

    def take(self, sent: dict[str, Tensors], digest: str) -> dict[str, Tensors]:
        """The fixed parts of an order: those that were `sent`, or if none were the ones at hand that `digest` names."""
        if sent:
            if fixed_digest(sent) != digest:
                raise Refusal("the fixed parts are not those that the order names: send them again")
            flat = {f"{part}/{name}": t for part, group in sent.items() for name, t in group.items()}
            if digest != self._digest:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                parts.save(self._path, flat, {})
                self._hold(parts.snapshot(flat))  # copies: what was sent is a view of the message
        elif digest and digest != self._digest:
            raise Refusal("the fixed parts are not at hand: send them with the order")
        return self._parts if digest else {}

    def _hold(self, flat: Tensors) -> None:
        self._parts = {}
        for key, t in flat.items():
            part, _, name = key.partition("/")
            self._parts.setdefault(part, {})[name] = t
        self._digest = parts.digest(flat)
