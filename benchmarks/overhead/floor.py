"""The floor: the same bytes to every site and back, through bare gRPC streams with TLS, and nothing else.

    python -m benchmarks.overhead.floor PORT CA BYTES ROUNDS      (one site; `measure` starts them)

Every site has one stream. A round begins for all at once, and ends when everything has come back from all, each time
as one piece in memory: what is done with it is no part of the floor.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc

from benchmarks.overhead.processes import started
from common.errors import UserError

CHUNK = 1 << 20  # bytes of a message; larger ones are no faster
OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
PATIENCE = 120.0  # seconds for a round, or for the sites to come


def measure(folder: Path, sites: int, size: int, rounds: int) -> list[float]:
    """Seconds of every round."""
    moments: list[float] = []
    content = os.urandom(size)
    done = threading.Semaphore(0)
    start, end = (threading.Barrier(sites, lambda: moments.append(time.monotonic()), PATIENCE) for _ in range(2))

    def exchange(requests: Iterator[bytes], context: object) -> Iterator[bytes]:
        del context
        for _ in range(rounds):
            start.wait()
            yield from chunks(content)
            take(requests, size)
            end.wait()
        done.release()

    handler = grpc.stream_stream_rpc_method_handler(exchange)
    server = grpc.server(ThreadPoolExecutor(sites), options=OPTIONS)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("floor", {"Exchange": handler})])
    pki = folder / "pki"
    pair = (pki / "server.key").read_bytes(), (pki / "server.crt").read_bytes()
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
    server.start()
    command = [sys.executable, "-m", "benchmarks.overhead.floor", port, pki / "ca.crt", size, rounds]
    with ExitStack() as stack:
        stack.callback(server.stop, None)
        for number in range(sites):
            stack.enter_context(started(folder / f"floor-{number}.log", command))
        for _ in range(sites):
            if not done.acquire(timeout=PATIENCE * (rounds + 1)):
                raise UserError(f"the bare streams broke off: see {folder}/floor-*.log")
    return [moments[i + 1] - moments[i] for i in range(0, len(moments), 2)]


def site(port: str, ca: Path, size: int, rounds: int) -> None:
    content = os.urandom(size)
    arrived = threading.Semaphore(0)

    def replies() -> Iterator[bytes]:
        for _ in range(rounds):
            arrived.acquire()
            yield from chunks(content)

    credentials = grpc.ssl_channel_credentials(ca.read_bytes())
    with grpc.secure_channel(f"localhost:{port}", credentials, OPTIONS) as channel:
        answers: Any = channel.stream_stream("/floor/Exchange")(replies())
        for _ in range(rounds):
            take(answers, size)
            arrived.release()
        for _ in answers:  # until the other side has everything
            pass


def chunks(content: bytes) -> Iterator[bytes]:
    for begin in range(0, len(content), CHUNK):
        yield content[begin : begin + CHUNK]


def take(stream: Iterator[bytes], size: int) -> bytes:
    taken = []
    while size > 0:
        taken.append(next(stream))
        size -= len(taken[-1])
    return b"".join(taken)


if __name__ == "__main__":
    site(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
