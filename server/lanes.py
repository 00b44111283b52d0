"""Sites of this process that train several at a time, each lane in a thread.

Whoever is free takes the largest site that is left, so that the lanes end together. Replies are handed over in the
order of the names, whatever the order they were made in: the same bits for any number of lanes.
"""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from common.errors import UserError
from common.messages import Order, Reply
from server.fleet import Exchange, Failure

log = logging.getLogger(__name__)

HELD = 32  # replies that wait for their turn; with more of them the next name goes before the largest site


class Lane(Protocol):
    """A place to train in. Only the thread it is given to uses it."""

    def handle(self, name: str, order: Order) -> Reply:
        """The answer of one site. Its tensors stay as they are while the lane goes on."""
        ...

    def close(self) -> None:
        """Give back memory: it is not used any more."""
        ...


class LaneFleet:
    """`sizes` are the training images of each site; `spare` makes room in the memory of the device, if it can, when a
    single lane is too much for it. A site's error ends the run, as nobody could bring it back."""

    def __init__(
        self, lanes: Sequence[Lane], sizes: Mapping[str, int], spare: Callable[[], bool] = lambda: False
    ) -> None:
        self.lanes = list(lanes)
        self.sizes = sizes
        self.spare = spare

    def names(self, at_least: int, wait: float) -> list[str]:
        del at_least, wait
        return sorted(self.sizes)

    def broadcast(self, order: Order, names: Sequence[str], deadline: float) -> Exchange:
        del deadline
        return _LaneExchange(self, order, names)


class _LaneExchange:
    def __init__(self, fleet: LaneFleet, order: Order, names: Sequence[str]) -> None:
        self._fleet = fleet
        self._order = order
        self._wanted = sorted(names)
        self._todo = sorted(names, key=lambda name: (-fleet.sizes[name], name))
        self._busy = 0
        self._done: dict[str, Reply] = {}
        self._error: tuple[str, BaseException] | None = None
        self._changed = threading.Condition()
        of_torch = torch.get_num_threads()  # a new thread would take all cores
        self._threads = [
            threading.Thread(target=self._work, args=(lane, of_torch), name="lane", daemon=True) for lane in fleet.lanes
        ]
        for thread in self._threads:
            thread.start()

    def next(self, timeout: float) -> Reply | Failure | None:
        del timeout
        if not self._wanted:
            return None
        name = self._wanted.pop(0)
        try:
            with self._changed:
                self._changed.wait_for(lambda: name in self._done or self._error is not None)
                if self._error is not None:
                    raise _of(*self._error)
                return self._done.pop(name)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Sites that have begun end their round: nothing of theirs may go on beside the next."""
        with self._changed:
            self._todo.clear()
        for thread in self._threads:
            thread.join()

    def _work(self, lane: Lane, of_torch: int) -> None:
        torch.set_num_threads(of_torch)
        while (name := self._begin()) is not None:
            lanes = len(self._fleet.lanes)
            reply: Reply | None = None
            error: BaseException | None = None
            try:
                reply = lane.handle(name, self._order)
            except torch.OutOfMemoryError:
                pass  # what it left in memory goes with the exception
            except BaseException as raised:
                error = raised
            with self._changed:
                self._busy -= 1
                self._changed.notify_all()
                if reply is not None:
                    self._done[name] = reply
                elif error is not None:
                    self._error = self._error or (name, error)
                elif not self._goes_on(lane, name, lanes):
                    return

    def _begin(self) -> str | None:
        """The site to train next; None when there is none left, and none that another lane may yet have to give up."""
        with self._changed:
            self._changed.wait_for(lambda: self._todo or not self._busy or self._error is not None)
            if not self._todo or self._error is not None:
                return None
            name = self._todo[0] if len(self._done) < HELD else min(self._todo)
            self._todo.remove(name)
            self._busy += 1
            return name

    def _goes_on(self, lane: Lane, name: str, before: int) -> bool:
        """The device's memory was full. The site is trained again: with fewer lanes, or with more room."""
        fleet = self._fleet
        self._todo.insert(0, name)
        if len(fleet.lanes) < before:  # another lane has made room since
            return True
        if len(fleet.lanes) > 1:
            fleet.lanes.remove(lane)
            lane.close()
            log.warning("the memory of the GPU is full: lanes from here on: %d", len(fleet.lanes))
            return False
        if fleet.spare():
            log.warning("the memory of the GPU is full: images stay outside from here on")
            return True
        self._error = name, UserError("the memory of the GPU is full: use a smaller train.batch or model")
        return True


def _of(name: str, error: BaseException) -> BaseException:
    if not isinstance(error, UserError):
        return error
    told = type(error)(f"{name}: {error}")
    told.__cause__ = error
    return told
