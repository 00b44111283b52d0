"""Who can be reached, and how: the seam between the round loop and a transport."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from common.errors import UserError
from common.messages import Order, Reply


@dataclass(frozen=True)
class Failure:
    """A site that answered with an error instead of a reply."""

    client: str
    reason: str


class Exchange(Protocol):
    """An order under way to some sites."""

    def next(self, timeout: float) -> Reply | Failure | None:
        """The next answer, or None when none came within `timeout` seconds."""
        ...

    def close(self) -> None:
        """No more answers are wanted."""
        ...


class Fleet(Protocol):
    def names(self, at_least: int, wait: float) -> list[str]:
        """Sites that can be reached now; while they are fewer than `at_least`, wait up to `wait` seconds for more."""
        ...

    def broadcast(self, order: Order, names: Sequence[str], deadline: float) -> Exchange:
        """Send `order` to `names`; nothing is answered later than `deadline` seconds from now."""
        ...


class LocalFleet:
    """Sites in this process. Each trains when its answer is asked for, in the order of the names, however long it
    takes: use it with a policy that has no deadline. A site's error ends the run, as nobody could bring it back."""

    def __init__(self, sites: dict[str, Callable[[Order], Reply]]) -> None:
        self._sites = sites

    def names(self, at_least: int, wait: float) -> list[str]:
        del at_least, wait
        return sorted(self._sites)

    def broadcast(self, order: Order, names: Sequence[str], deadline: float) -> Exchange:
        del deadline
        return _LocalExchange([(name, self._sites[name]) for name in sorted(names)], order)


class _LocalExchange:
    def __init__(self, waiting: list[tuple[str, Callable[[Order], Reply]]], order: Order) -> None:
        self._waiting = waiting
        self._order = order

    def next(self, timeout: float) -> Reply | Failure | None:
        del timeout
        if not self._waiting:
            return None
        name, handle = self._waiting.pop(0)
        try:
            return handle(self._order)
        except UserError as error:
            raise type(error)(f"{name}: {error}") from error

    def close(self) -> None:
        self._waiting = []
