"""A site's standing with the server: known, online, and back after every failure that is not for ever.

Whatever is asked of the server goes through `insist`, which waits for as long as the server is out of reach. A
certificate that is wrong, a key that is not accepted and a second client with the same key end in a UserError;
what may pass is told in a line and tried again.
"""

import logging
import math
import os
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn, TypeVar

from client.fleet_api import BEAT, ClockOff, Faulty, FleetApi, FleetError, Forgotten, Taken, Unknown, Unreachable
from client.outbox import Outbox
from client.reach import diagnose
from common.errors import UserError
from common.kit import Kit

log = logging.getLogger(__name__)

LONGEST_PAUSE = 5.0  # seconds between two tries
MOMENT = 3.0  # seconds in which a server that waits for answers looks whether their nodes are online
LOOK = 30.0  # seconds between two looks at why the server is not reached
GONE = 2 * BEAT  # seconds without a heartbeat after which the server takes a node for gone
ALIVE = 65.0  # seconds for which at most a node that was killed counts as online: Flower's own ask for 60
T = TypeVar("T")


class Membership:
    """Of one node. A key that the server does not know may not be registered yet, when the server itself has just
    been started: it is tried again for `patience` seconds."""

    def __init__(self, kit: Kit, api: FleetApi, outbox: Outbox, notify: Callable[[str], None], patience: float) -> None:
        self._kit = kit
        self._api = api
        self._outbox = outbox
        self._notify = notify
        self._patience = patience
        self._leaving = threading.Event()
        self._beating = threading.Lock()
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._joined = False
        self._looked = -math.inf
        self._told = ""

    def start(self) -> None:
        """Join for the first time; what cannot work is found before anything is tried."""
        self.say(f"connecting to {self._kit.address}")
        found = diagnose(self._kit.host, self._kit.port, self._kit.ca)
        if found.lasting:
            raise UserError(found.text)
        self.join()
        self._heart.start()

    def join(self) -> None:
        """Become a node: the one of before where the server knows it, even if it has not noticed that it was gone. One
        that was gone for longer and is online all the same is so by another client."""
        before = self._outbox.node_id()

        def enter() -> None:
            if before is not None and self._outbox.heard_within(GONE):
                with suppress(Forgotten):
                    self._api.resume(before)
                    return
            self._api.activate()

        unknown = taken = 0.0
        while True:
            try:
                self.insist(enter)
                break
            except Unknown:
                self.say(f"the server does not know the key of {self._kit.name} (yet): trying again")
                if unknown >= self._patience:
                    raise UserError(
                        f"the server at {self._kit.address} does not accept the key of {self._kit.name}: "
                        "it was revoked, or replaced by that of a newer kit: ask the operator"
                    ) from None
                unknown += 1.0
            except Taken:
                self.say(f"the server counts {self._kit.name} as online already: trying again")
                if taken >= ALIVE:
                    raise UserError(
                        f"{self._kit.name} is online from elsewhere: another client uses this kit: "
                        "stop that one, or ask the operator for a kit with another name"
                    ) from None
                taken += 1.0
            time.sleep(1.0)
        if self._api.node_id != before:
            self._outbox.clear()  # the server that wanted it is gone
            self._outbox.remember(self._api.node_id)
        self._joined = True
        self._outbox.heard()
        self._say_connected()

    def leave(self, farewell: bool) -> None:
        """With a farewell the server sees at once that the node is gone, and not only after some missing heartbeats."""
        self._leaving.set()
        if self._heart.is_alive():
            self._heart.join(1.0)  # a beat after the farewell would bring the node back
        if farewell and self._joined:
            with suppress(FleetError):
                self._api.deactivate()
                self._outbox.left()
        self._api.close()

    def step_out(self) -> None:
        """Be offline for a moment: the server gives up what it has handed out to this node and would wait for."""
        with self._beating:
            with suppress(Faulty):  # it takes us for offline already
                self.insist(self._api.deactivate, 1)
            time.sleep(MOMENT)
            self.insist(self._api.heartbeat)

    def insist(self, call: Callable[[], T], faults: float = math.inf) -> T:
        """What the call gives, however long the server is out of reach; or Faulty, if it failed `faults` times."""
        failed = faulty = 0
        while True:
            try:
                given = call()
            except (Unreachable, ClockOff, Faulty) as error:
                failed += 1
                faulty += isinstance(error, Faulty)
                if faulty >= faults:
                    raise
                self._complain(error)
                pause = min(0.2 * 2 ** min(failed - 1, 10), LONGEST_PAUSE)
                time.sleep(LONGEST_PAUSE if isinstance(error, ClockOff) else random.uniform(0.5, 1.0) * pause)
            else:
                if failed and self._joined:
                    self._say_connected()
                return given

    def say(self, text: str) -> None:
        if text != self._told:
            self._told = text
            log.info("%s", text)
            self._notify(text)

    def _say_connected(self) -> None:
        self.say(f"connected to {self._kit.address} as {self._kit.name}")

    def _complain(self, error: FleetError) -> None:
        """Say why the server is not reached. A certificate that is wrong from the start ends it, as the server cannot
        be trusted; later the same may be a passing matter of the network in between."""
        if isinstance(error, ClockOff):
            self.say("the clocks of this machine and of the server differ: set them right, this one tries again")
        elif isinstance(error, Faulty):
            self.say(f"the server has a problem ({error}): trying again")
        elif time.monotonic() - self._looked > LOOK:
            found = diagnose(self._kit.host, self._kit.port, self._kit.ca)
            self._looked = time.monotonic()
            if found.lasting and not self._joined:
                raise UserError(found.text)
            silent = f"{self._kit.address} does not answer now ({error})"
            self.say(f"{silent if found.step == 'ok' else found.text} - trying again")

    def _beat(self) -> None:
        """The heartbeat thread. That the server is away is noticed by the loop, so it is not said here."""
        pause = 0.8 * BEAT
        while not self._leaving.wait(pause):
            try:
                with self._beating:
                    self._api.heartbeat()
                self._outbox.heard()
                pause = 0.8 * BEAT
            except FleetError:
                pause = 1.0
            except BaseException:
                if not self._leaving.is_set():
                    _die()


def _die() -> NoReturn:
    """Without a heartbeat a site looks dead while it works: better to end at once, and be started again."""
    log.critical("the heartbeat failed as it never should", exc_info=True)
    logging.shutdown()
    os._exit(1)
