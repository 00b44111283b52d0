"""Somebody on the line: passes connections on and keeps every byte, outside of TLS or, with the right keys, inside it.

Also what is needed to read a recording: the records of TLS and the frames of HTTP/2.
"""

import asyncio
import ssl
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"  # RFC 9113, 3.4
HANDSHAKE, APPLICATION = 22, 23  # content types of TLS records
DATA, HEADERS, CONTINUATION = 0, 1, 9  # types of HTTP/2 frames
PADDED, PRIORITY = 0x8, 0x20  # flags of HTTP/2 frames


@dataclass
class Talk:
    """One connection."""

    up: bytearray = field(default_factory=bytearray)  # from the site to the server
    down: bytearray = field(default_factory=bytearray)


class Wiretap:
    """Use it as a context. Without `serve` and `connect` it sees what is on the wire; with them it is the server to
    the site and a site to the server, and sees what is inside."""

    def __init__(self, target: int, serve: ssl.SSLContext | None = None, connect: ssl.SSLContext | None = None) -> None:
        self.talks: list[Talk] = []
        self.port = 0
        self._target = target
        self._serve, self._connect = serve, connect
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._listen(),), daemon=True)
        self._done: asyncio.Event

    def __enter__(self) -> "Wiretap":
        self._thread.start()
        assert self._ready.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._done.set)
        self._thread.join(30)
        self._loop.close()

    async def _listen(self) -> None:
        self._done = asyncio.Event()
        server = await asyncio.start_server(self._pass_on, "127.0.0.1", 0, ssl=self._serve)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._done.wait()
        server.close()
        passing = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in passing:
            task.cancel()
        await asyncio.gather(*passing, return_exceptions=True)

    async def _pass_on(self, source: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        talk = Talk()
        self.talks.append(talk)
        with suppress(OSError):
            name = "localhost" if self._connect else None
            answers, on = await asyncio.open_connection(
                "127.0.0.1", self._target, ssl=self._connect, server_hostname=name
            )
            ways = [_copy(source, on, talk.up), _copy(answers, back, talk.down)]
            tasks = [asyncio.ensure_future(way) for way in ways]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
                on.close()
        back.close()


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter, kept: bytearray) -> None:
    with suppress(OSError):
        while content := await source.read(2**16):
            kept += content
            target.write(content)
            await target.drain()


def records(content: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Content type, version and body of every TLS record; the last one may be cut off."""
    while content:
        assert len(content) < 5 or content[1] == 3, f"no record of TLS: {content[:5]!r}"
        length = int.from_bytes(content[3:5], "big")
        yield content[0], content[1:3], content[5 : 5 + length]
        content = content[5 + length :]


def frames(content: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Type, stream and body of every whole HTTP/2 frame, without padding and priorities."""
    while len(content) >= 9:
        length, kind, flags = int.from_bytes(content[:3], "big"), content[3], content[4]
        stream, body = int.from_bytes(content[5:9], "big"), content[9 : 9 + length]
        if len(body) < length:
            return
        if kind in (DATA, HEADERS) and flags & PADDED:
            body = body[1 : len(body) - body[0]]
        if kind == HEADERS and flags & PRIORITY:
            body = body[5:]
        yield kind, stream, body
        content = content[9 + length :]


@dataclass(frozen=True)
class Inside:
    """What both sides said inside of TLS, in all connections."""

    headers: bytes  # still packed; gRPC's C core leaves texts as they are when it sends them the first time
    data: bytes  # what was called with and answered, whole, stream after stream

    @classmethod
    def of(cls, talks: list[Talk]) -> "Inside":
        headers = b""
        streams: dict[tuple[int, bool, int], bytearray] = defaultdict(bytearray)
        for number, talk in enumerate(talks):
            assert talk.up.startswith(PREFACE)
            for up, content in ((True, bytes(talk.up).removeprefix(PREFACE)), (False, bytes(talk.down))):
                for kind, stream, body in frames(content):
                    if kind == DATA:
                        streams[number, up, stream] += body
                    elif kind in (HEADERS, CONTINUATION):
                        headers += body
        return cls(headers, b"".join(streams.values()))
