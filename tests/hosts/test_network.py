"""The network that the other tests here rely on does what it says, and nothing of it is ever left."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.superlink import alive
from tests.hosts.network import CLEAN, DEAD, FAR, LOSSY, SLOW, Network
from tests.hosts.network import Line as Settings
from tests.hosts.switch import QUEUE, Line

PROC = Path("/proc")
PORT = "9000"
LISTEN = """
import json, socket, sys, time
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as into:
    into.bind(("", int(sys.argv[1])))
    print("ready", flush=True)
    got = []
    while (packet := into.recv(2000)) != b"end":
        got.append((int(packet[:8]), time.monotonic() - float(packet[8:40])))
print(json.dumps(got))
"""
SEND = """
import socket, sys, time
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
    for number in range(int(sys.argv[3])):
        out.sendto(b"%08d%32.9f" % (number, time.monotonic()), (sys.argv[1], int(sys.argv[2])))
        time.sleep(0.002)
"""
END = """
import socket, sys
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"end", ("127.0.0.1", int(sys.argv[1])))
"""
OWNER = """
import sys, time
from pathlib import Path
from tests.hosts.network import Network
with Network(Path(sys.argv[1])) as network:
    network.plug("a")
    print(network.switch, flush=True)
    time.sleep(600)
"""


def words_on(network: Network, machine: str, code: str, *words: str) -> list[str]:
    return [str(word) for word in (*network.on(machine), sys.executable, "-c", code, *words)]


def run(network: Network, machine: str, code: str, *words: str) -> None:
    subprocess.run(words_on(network, machine, code, *words), check=True, timeout=60)


def send(network: Network, source: str, target: str, many: int) -> list[tuple[int, float]]:
    """Packets with a number from one machine to another one, by its name; gives the numbers of those that arrive, in
    their order, with the seconds each has taken. All clocks here are one."""
    network.call(f"{target}.test", target)
    command = words_on(network, target, LISTEN, PORT)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as listener:
        assert listener.stdout is not None
        try:
            assert listener.stdout.readline() == "ready\n"
            before = sum(network.counts(source)["out"])
            run(network, source, SEND, f"{target}.test", PORT, str(many))
            wait(lambda: sum(network.counts(source)["out"]) >= before + many and not network.counts(source)["waiting"])
            run(network, target, END, PORT)
            return [(number, took) for number, took in json.loads(listener.stdout.read())]
        finally:
            listener.kill()


def wait(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def numbers(got: list[tuple[int, float]]) -> list[int]:
    return [number for number, _ in got]


def test_machines_reach_each_other_by_name_and_find_no_other_network(network: Network) -> None:
    network.plug("a", "b")
    assert numbers(send(network, "a", "b", 20)) == list(range(20))
    assert numbers(send(network, "b", "a", 20)) == list(range(20))
    assert "a.test" in Path(network.names).read_text(encoding="utf-8")
    assert "a.test" not in Path("/etc/hosts").read_text(encoding="utf-8")
    with pytest.raises(subprocess.CalledProcessError):
        run(network, "a", "import socket; socket.create_connection(('192.0.2.1', 9), 5)")


def test_a_cable_is_far_in_both_directions_and_keeps_the_order(network: Network) -> None:
    network.plug("a", "b")
    send(network, "a", "b", 1)  # they know each other's hardware
    for out, into in ((FAR, CLEAN), (CLEAN, FAR)):
        network.cable("b", out, into)
        for source, target, line in (("a", "b", into), ("b", "a", out)):
            got = send(network, source, target, 100)
            assert numbers(got) == list(range(100))
            assert all(took >= line.delay for _, took in got)


def test_a_cable_that_is_pulled_in_one_direction_or_both(network: Network) -> None:
    network.plug("a", "b")
    send(network, "a", "b", 1)
    for out, into in ((DEAD, CLEAN), (CLEAN, DEAD), (DEAD, DEAD), (CLEAN, CLEAN)):
        network.cable("b", out, into)
        assert numbers(send(network, "a", "b", 10)) == ([] if into is DEAD else list(range(10)))
        assert numbers(send(network, "b", "a", 10)) == ([] if out is DEAD else list(range(10)))


def test_a_machine_moves_to_another_address(network: Network) -> None:
    network.plug("a", "b")
    before = network.addresses["b"]
    network.move("b")
    assert network.addresses["b"] != before
    assert numbers(send(network, "a", "b", 10)) == list(range(10))


def carried(settings: Settings, many: int, size: int = 1500, pause: float = 0.0) -> list[float | None]:
    """What becomes of as many frames, one every `pause` seconds."""
    line = Line("a seed")
    line.set(**vars(settings))
    return [line.arrival(number * pause, size) for number in range(many)]


def test_a_line_loses_what_it_says_and_the_same_each_time() -> None:
    lost = [arrival is None for arrival in carried(LOSSY, 10_000)]
    assert 0.04 < sum(lost) / len(lost) < 0.06
    assert carried(LOSSY, 100) == carried(LOSSY, 100)


def test_frames_that_are_far_vary_and_do_not_overtake() -> None:
    sent = [number * 0.01 for number in range(1000)]
    arrivals: list[Any] = carried(FAR, 1000, pause=0.01)
    took = [arrival - begin for begin, arrival in zip(sent, arrivals, strict=True)]
    assert arrivals == sorted(arrivals)
    assert FAR.delay <= min(took) < FAR.delay + 0.002
    assert FAR.delay + FAR.jitter - 0.002 < max(took) <= FAR.delay + FAR.jitter


def test_a_slow_line_sends_one_after_the_other_and_drops_what_cannot_wait() -> None:
    arrivals = carried(SLOW, 1000)  # all at once
    kept = [arrival for arrival in arrivals if arrival is not None]
    assert kept == pytest.approx([(number + 1) * 1500 * 8 / SLOW.rate for number in range(len(kept))])
    assert QUEUE <= 1500 * len(kept) <= QUEUE + 2 * 1500
    assert None not in carried(SLOW, 1000, pause=1500 * 8 / SLOW.rate)


def test_nothing_is_left_of_a_network_whose_owner_was_killed(machines: None, tmp_path: Path) -> None:  # noqa: ARG001
    with subprocess.Popen([sys.executable, "-c", OWNER, tmp_path], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        switch = int(owner.stdout.readline())
        namespaces = [os.readlink(path) for path in PROC.glob(f"{switch}/fd/*") if "net:[" in os.readlink(path)]  # noqa: PTH115
        assert len(namespaces) == 1
        os.kill(owner.pid, signal.SIGKILL)
        wait(lambda: not alive(switch))
    assert namespaces[0] not in {_network(path) for path in PROC.glob("[0-9]*/ns/net")}


def _network(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:  # it has just ended
        return ""
