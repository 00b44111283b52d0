"""The stock node of Flower instead of the resident one: `flower-supernode` as a child process.

It starts a new process for every message and runs the app that the server sends. It and all it started are gone when
we are, however we end (server/guard.py). One that ends by itself, as it does while the server still counts one that
was killed as online, is started again until the federation is over.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from client.node import only_one
from client.reach import diagnose
from common import files, keys
from common.errors import UserError
from common.kit import Kit
from server import guard
from server.superlink import find_program

AGAIN = 3.0  # seconds until one that ended is started again
FAREWELL = 30.0  # seconds it has to tell the server that the site has heard of the end
END = 10.0  # seconds until all of it is gone after it was told to end
TICK = 0.2
SENDING = re.compile(r"Sending: (\S+) message")
SENT = re.compile(r"Sent successfully")
LAST = "query.over"  # the type of the last message of a federation


class SuperNode:
    """Under the site's state folder lie its configuration, its log `supernode.log` and Flower's own home."""

    def __init__(
        self, kit: Kit, state: Path, config: dict[str, bool | int | float | str], say: Callable[[str], None]
    ) -> None:
        self._kit = kit
        self._say = say
        self._state = state
        self._log = state / "supernode.log"
        ca, key, settings = (state / name for name in ("ca.crt", "supernode.key", "supernode.toml"))
        files.write(ca, kit.ca.decode())
        files.write(key, keys.openssh(kit.private_key()), files.SECRET)
        files.write(settings, "".join(f"{key} = {json.dumps(v, ensure_ascii=False)}\n" for key, v in config.items()))
        program = find_program("flower-supernode")
        self._command = [
            sys.executable, "-I", guard.__file__, str(self._log), program,
            "--superlink", kit.address,
            "--root-certificates", str(ca),
            "--auth-supernode-private-key", str(key),
            "--node-config", str(settings),
            "--isolation", "subprocess",
            "--clientappio-api-address", "127.0.0.1:0",
        ]  # fmt: skip
        path = os.pathsep.join([str(Path(program).parent), os.environ.get("PATH", os.defpath)])
        self._environment = os.environ | {
            "PATH": path,  # it starts its helpers by name
            "FLWR_HOME": str(state / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PYTHONUNBUFFERED": "1",
        }

    def run(self, over: Callable[[], bool], look: Callable[[], None]) -> None:
        """Keep it running until `over` says so; `look` is called now and then."""
        found = diagnose(self._kit.host, self._kit.port, self._kit.ca)
        if found.lasting:
            raise UserError(found.text)
        if found.step != "ok":
            self._say(f"{found.text} - trying again")
        with only_one(self._state):
            while not self._once(over, look):
                time.sleep(AGAIN)

    def _once(self, over: Callable[[], bool], look: Callable[[], None]) -> bool:
        """One start of it, to its end or that of the federation; True for the latter."""
        child = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,  # it ends when this closes
            stdout=subprocess.PIPE,
            env=self._environment,
            start_new_session=True,  # a Ctrl-C is ours to handle
        )
        assert child.stdin is not None
        assert child.stdout is not None
        said = guard.Lines(child.stdout.fileno())
        sending = last = ""
        end = float("inf")
        try:
            while child.poll() is None and time.monotonic() < end:
                look()
                for last in said.new():
                    if found := SENDING.search(last):
                        sending = found[1]
                    elif sending == LAST and SENT.search(last):
                        end = 0.0
                if over():
                    end = min(end, time.monotonic() + FAREWELL)
                time.sleep(TICK)
            look()
            last = [last, *said.new()][-1]  # its last words
        finally:
            child.stdin.close()
            try:
                child.wait(END)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            child.stdout.close()
        if over():
            self._say("the federation is over")
            return True
        self._say(f"flower-supernode ended ({last or 'it said nothing'}): it is started again; its log is {self._log}")
        return False
