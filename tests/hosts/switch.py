"""A network switch with machines plugged into it, each a network namespace of its own: a program for root on Linux.

    switch.py HOSTS        HOSTS takes the place of /etc/hosts for all machines

Commands come as lines of JSON on standard input, and each is answered by a line of JSON. When the input ends, and the
kernel ends it when whoever started the switch dies, the switch ends, and with it everything it has made: the
namespaces have no names and no files, they last as long as something runs in them.

    {"plug": HOST, "address": A}            a machine -> {"net": path of its network namespace, "mount": ...}
    {"address": A, "of": HOST}              another address for it
    {"cable": HOST, "out": {}, "into": {}}  what its cable does to frames from and to it (see Line), from now on
    {"count": HOST}                         -> frames its cable carried and lost {"out": [c, l], "into": [c, l]}, and
                                               how many are under way in all cables {"waiting": n}

It needs the standard library only.
"""

import ctypes
import fcntl
import heapq
import json
import os
import random
import select
import socket
import struct
import sys
import time
from typing import Any

CLONE_NEWNS, CLONE_NEWNET = 0x00020000, 0x40000000
MS_BIND, MS_REC, MS_SLAVE = 0x1000, 0x4000, 0x80000
TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
SIOCGIFFLAGS, SIOCSIFFLAGS, SIOCSIFADDR, SIOCSIFNETMASK, IFF_UP = 0x8913, 0x8914, 0x8916, 0x891C, 1
NETMASK = "255.255.255.0"
CARD = "eth0"
QUEUE = 64 * 1024  # bytes that wait before a line with a rate: a quarter of a second at 2 Mbit/s
FRAMES = 64  # read from one machine before the next one has its turn
libc = ctypes.CDLL(None, use_errno=True)


class Line:
    """One direction of a cable. Frames never overtake each other, as they do not on one path."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)
        self.carried = self.lost = 0
        self._free = self._last = 0.0  # when all that waits is on the line; when the last frame arrives
        self.set()

    def set(self, delay: float = 0.0, jitter: float = 0.0, loss: float = 0.0, rate: float = 0.0) -> None:
        """Seconds, seconds at most on top of them, a share of the frames, and bits a second (0: no limit)."""
        self._delay, self._jitter, self._loss, self._rate = delay, jitter, loss, rate

    def arrival(self, now: float, size: int) -> float | None:
        """When a frame that is given to the line now comes out of it; None if it is lost."""
        sent = now
        if self._rate:
            begins = max(now, self._free)
            if (begins - now) * self._rate > 8 * QUEUE:
                self.lost += 1
                return None
            sent = self._free = begins + 8 * size / self._rate
        lost = self._random.random() < self._loss
        extra = self._random.random() * self._jitter
        if lost:
            self.lost += 1
            return None
        self.carried += 1
        self._last = max(self._last, sent + self._delay + extra)
        return self._last


class Port:
    """A machine: its namespace, the end of its network card that is ours, and its cable."""

    def __init__(self, name: str, address: str) -> None:
        _checked(libc.unshare(CLONE_NEWNET), "unshare")  # we are in it; the switch itself has no network
        self.namespace = os.open("/proc/self/ns/net", os.O_RDONLY)
        self.card = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(self.card, TUNSETIFF, struct.pack("16sH22x", CARD.encode(), IFF_TAP | IFF_NO_PI))
        _up("lo")
        _address(address)
        _up(CARD)
        self.out, self.into = Line(f"{name} out"), Line(f"{name} into")

    def move(self, address: str) -> None:
        _checked(libc.setns(self.namespace, CLONE_NEWNET), "setns")
        _address(address)


class Switch:
    def __init__(self) -> None:
        self._poll = select.epoll()
        self._ports: dict[str, Port] = {}
        self._cards: dict[int, Port] = {}
        self._known: dict[bytes, Port] = {}  # who was seen to have which hardware address
        self._queue: list[
            tuple[float, int, Port, Port | None, bytes]
        ] = []  # when, order, from, to (None: to all), what
        self._count = 0

    def serve(self, commands: int) -> None:
        self._poll.register(commands, select.EPOLLIN)
        rest = b""
        while True:
            wait = max(self._queue[0][0] - time.monotonic(), 0.0) if self._queue else -1
            for file, _ in self._poll.poll(wait):
                if file != commands:
                    self._read(self._cards[file])
                    continue
                if not (block := os.read(commands, 65536)):
                    return
                *lines, rest = (rest + block).split(b"\n")
                for line in lines:
                    print(json.dumps(self._obey(json.loads(line))), flush=True)
            self._pass_on()

    def _obey(self, command: dict[str, Any]) -> dict[str, Any]:
        match command:
            case {"plug": name, "address": address}:
                self._ports[name] = port = Port(name, address)
                self._cards[port.card] = port
                self._poll.register(port.card, select.EPOLLIN)
                here = f"/proc/{os.getpid()}"
                return {"net": f"{here}/fd/{port.namespace}", "mount": f"{here}/ns/mnt"}
            case {"address": address, "of": name}:
                self._ports[name].move(address)
            case {"cable": name, "out": out, "into": into}:
                self._ports[name].out.set(**out)
                self._ports[name].into.set(**into)
            case {"count": name}:
                port = self._ports[name]
                counts = {key: [line.carried, line.lost] for key, line in (("out", port.out), ("into", port.into))}
                return {**counts, "waiting": len(self._queue)}
            case _:
                raise ValueError(command)
        return {}

    def _read(self, port: Port) -> None:
        """Frames that a machine sends enter its cable."""
        now = time.monotonic()
        for _ in range(FRAMES):
            try:
                frame = os.read(port.card, 65536)
            except BlockingIOError:
                return
            self._known[frame[6:12]] = port
            self._enter(port.out, now, port, None, frame)

    def _pass_on(self) -> None:
        """Frames that have come through a cable go on: into that of whom they are for, or into its machine."""
        now = time.monotonic()
        while self._queue and self._queue[0][0] <= now:
            due, _, source, target, frame = heapq.heappop(self._queue)
            if target is not None:
                try:
                    os.write(target.card, frame)
                except OSError:
                    target.into.lost += 1  # its card is down, or its queue is full
                continue
            known = self._known.get(frame[:6])
            for port in [known] if known else self._ports.values():
                if port is not source:
                    self._enter(port.into, due, source, port, frame)

    def _enter(self, line: Line, now: float, source: Port, target: Port | None, frame: bytes) -> None:
        due = line.arrival(now, len(frame))
        if due is not None:
            self._count += 1
            heapq.heappush(self._queue, (due, self._count, source, target, frame))


def _up(card: str) -> None:
    request = struct.pack("16sH22x", card.encode(), 0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        flags = struct.unpack("16sH22x", fcntl.ioctl(any_socket, SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH22x", card.encode(), flags | IFF_UP))


def _address(address: str) -> None:
    """The only one that the card has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for request, value in ((SIOCSIFADDR, address), (SIOCSIFNETMASK, NETMASK)):
            wanted = struct.pack("16sHH4s16x", CARD.encode(), socket.AF_INET, 0, socket.inet_aton(value))
            fcntl.ioctl(any_socket, request, wanted)


def _checked(result: int, what: str) -> None:
    if result:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def _rename(hosts: str) -> None:
    """Machines see `hosts` as /etc/hosts, and ask no other machine for a name; nobody else sees anything of it."""
    _checked(libc.unshare(CLONE_NEWNS), "unshare")
    _checked(libc.mount(b"none", b"/", None, MS_REC | MS_SLAVE, None), "mount")
    for source, target in ((hosts, "/etc/hosts"), ("/dev/null", "/etc/resolv.conf")):
        _checked(libc.mount(source.encode(), target.encode(), None, MS_BIND, None), f"mount {target}")


def main() -> None:
    _rename(sys.argv[1])
    switch = Switch()
    print("{}", flush=True)
    switch.serve(sys.stdin.fileno())


if __name__ == "__main__":
    main()
