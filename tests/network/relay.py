"""A network that can be cut: passes bytes on from a port of its own to another one of this machine."""

import selectors
import socket
import threading
from contextlib import suppress


class Relay:
    """Use it as a context. While it is cut it breaks every connection at once and takes no new ones; while it holds,
    connections stay and nothing passes."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._left: int | None = None  # bytes towards the target before the cut
        self._cut = threading.Event()
        self._held = threading.Event()
        self._lock = threading.Lock()  # of `_left`
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> "Relay":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._listener.close()

    def cut_after(self, count: int) -> None:
        """Let so many more bytes through to the target, then cut."""
        with self._lock:
            self._left = count

    def hold(self) -> None:
        self._held.set()

    def mend(self) -> None:
        with self._lock:
            self._left = None
            self._cut.clear()
        self._held.clear()

    def _serve(self) -> None:
        selector = selectors.DefaultSelector()
        selector.register(self._listener, selectors.EVENT_READ)
        pairs: dict[socket.socket, socket.socket] = {}
        inward: set[socket.socket] = set()

        def drop(end: socket.socket) -> None:
            for one in (end, pairs.get(end)):
                if one is not None and pairs.pop(one, None) is not None:
                    selector.unregister(one)
                    one.close()

        while not self._done.is_set():
            if self._held.is_set():
                self._done.wait(0.1)
                continue
            for key, _ in selector.select(0.1):
                source = key.fileobj
                assert isinstance(source, socket.socket)
                if source is self._listener:
                    client, _ = source.accept()
                    try:
                        if self._cut.is_set():
                            raise ConnectionRefusedError
                        target = socket.create_connection(("127.0.0.1", self._target))
                    except OSError:  # the target may be away
                        client.close()
                        continue
                    pairs |= {client: target, target: client}
                    inward.add(client)
                    selector.register(client, selectors.EVENT_READ)
                    selector.register(target, selectors.EVENT_READ)
                elif source in pairs:
                    content = b""
                    with suppress(OSError):
                        content = source.recv(2**16)
                        pairs[source].sendall(content)
                    with self._lock:
                        if source in inward and self._left is not None:
                            self._left -= len(content)
                            if self._left <= 0:
                                self._cut.set()
                    if not content:
                        drop(source)
            if self._cut.is_set():
                for end in list(pairs):
                    drop(end)
        for end in list(pairs):
            drop(end)
        selector.close()
