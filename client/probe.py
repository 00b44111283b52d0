"""How a site stands with the server: whether its key is accepted, and how far apart the two clocks are.

Asking changes nothing, not even for a running client with the same key: requests are signed like a client's, but each
asks for what the server refuses only after it has looked at signature, time and key. Its refusal is the answer.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import grpc
from flwr.common.constant import (
    PUBLIC_KEY_HEADER,
    SIGNATURE_HEADER,
    SYSTEM_TIME_TOLERANCE,
    TIMESTAMP_HEADER,
    TIMESTAMP_TOLERANCE,
)
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.proto.fleet_pb2_grpc import FleetStub
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message

from client.fleet_api import CALL, OPTIONS, ClockOff, Faulty, FleetError, Forgotten, Unknown, meaning
from common.kit import Kit

AHEAD: float = SYSTEM_TIME_TOLERANCE  # seconds by which a site's clock may be ahead of the server's
BEHIND: float = TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE  # and behind it
FARTHEST = 7200.0  # seconds up to which a difference of the clocks is measured
EXACT = 0.5  # seconds to which it is
NOBODY, NEVER = 0, 0.0  # a node id that no node has, and a heartbeat interval that is not allowed


@dataclass(frozen=True)
class Standing:
    in_time: bool  # whether the server accepts requests that are stamped by this clock
    ahead: float | None  # seconds by which this clock is ahead of the server's; None if more than FARTHEST either way
    registered: bool | None  # None if that cannot be asked, for the clocks


def ask(kit: Kit) -> Standing:
    """FleetError if the server cannot be reached, or answers as it never should."""
    with grpc.secure_channel(kit.address, grpc.ssl_channel_credentials(kit.ca), OPTIONS) as channel:
        site = _Site(kit, FleetStub(channel))
        shift = next((shift for shift in _shifts() if site.in_time(shift)), None)
        if shift is None:
            return Standing(False, None, None)
        low, high = shift, shift + AHEAD + BEHIND  # of stamps that are later and later, the last that is accepted
        while high - low > EXACT:
            middle = (low + high) / 2
            low, high = (middle, high) if site.in_time(middle) else (low, middle)
        return Standing(shift == 0, AHEAD - (low + high) / 2, site.registered(shift))


def _shifts() -> Iterator[float]:
    """Nearest first, and so dense that one is right for every difference."""
    yield 0.0
    for number in range(1, int(FARTHEST / TIMESTAMP_TOLERANCE) + 1):
        yield from (number * TIMESTAMP_TOLERANCE, -number * TIMESTAMP_TOLERANCE)


class _Site:
    """A site whose clock is off by as much as one likes."""

    def __init__(self, kit: Kit, stub: FleetStub) -> None:
        self._key = kit.private_key()
        self._public = public_key_to_bytes(self._key.public_key())
        self._stub = stub

    def in_time(self, shift: float) -> bool:
        """Whether a request is accepted that is stamped with this clock plus `shift`."""
        beat = SendNodeHeartbeatRequest(node=Node(node_id=NOBODY), heartbeat_interval=NEVER)
        answer = self._refusal(self._stub.SendNodeHeartbeat, beat, shift)
        if not isinstance(answer, Forgotten | ClockOff):
            raise answer
        return isinstance(answer, Forgotten)

    def registered(self, shift: float) -> bool:
        """The interval is looked at only for a key that is known, and then nothing is activated."""
        request = ActivateNodeRequest(public_key=self._public, heartbeat_interval=NEVER)
        answer = self._refusal(self._stub.ActivateNode, request, shift)
        if isinstance(answer, Faulty) and "Invalid heartbeat interval" in str(answer):
            return True
        if not isinstance(answer, Unknown):
            raise answer
        return False

    def _refusal(self, method: Callable[..., Any], request: Any, shift: float) -> FleetError:
        stamp = (now() + timedelta(seconds=shift)).isoformat()
        signature = sign_message(self._key, stamp.encode("ascii"))
        signed = ((PUBLIC_KEY_HEADER, self._public), (TIMESTAMP_HEADER, stamp), (SIGNATURE_HEADER, signature))
        try:
            method(request, timeout=CALL, metadata=signed)
        except grpc.RpcError as error:
            return meaning(error.code(), error.details() or "")
        return Faulty("it accepts what no server should")
