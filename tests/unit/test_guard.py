"""The guard of the SuperLink: nothing outlives it, its log is bounded, and the chatter is gone."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from server import guard, superlink
from server.guard import Log, Sieve

PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("pids", child.pid, {more}, flush=True)
{then}
"""


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@contextmanager
def guarded(log: Path, program: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-I", guard.__file__, str(log), sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def pids(process: subprocess.Popen[bytes]) -> list[int]:
    assert process.stdout is not None
    while not (line := process.stdout.readline()).startswith(b"pids "):
        assert line, "it ended"
    return [int(word) for word in line.split()[1:]]


def alone(text: str) -> str:
    return PARENT.format(more="__import__('os').getpid()", then=text)


def test_all_of_a_command_is_gone_when_its_master_is(tmp_path: Path) -> None:
    with guarded(tmp_path / "log", alone("time.sleep(600)")) as process:
        both = pids(process)
        assert process.stdin is not None
        process.stdin.close()  # what the kernel does when the master dies
        assert process.wait(30) == 128 + 15
        until(lambda: not any(map(superlink.alive, both)))


def test_a_command_that_ignores_the_request_is_killed(tmp_path: Path) -> None:
    program = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + alone("time.sleep(600)")
    with guarded(tmp_path / "log", program) as process:
        both = pids(process)
        process.terminate()
        assert process.wait(60) == 128 + 9
        until(lambda: not any(map(superlink.alive, both)))


def test_what_a_command_left_behind_goes_with_it(tmp_path: Path) -> None:
    with guarded(tmp_path / "log", alone("sys.exit(3)")) as process:
        child, _ = pids(process)
        assert process.wait(30) == 3
        until(lambda: not superlink.alive(child))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux's")
def test_a_command_dies_with_its_guard(tmp_path: Path) -> None:
    with guarded(
        tmp_path / "log", "import os, time; print('pids', os.getpid(), flush=True); time.sleep(600)"
    ) as process:
        [command] = pids(process)
        process.kill()
        process.wait()
        until(lambda: not superlink.alive(command))


def test_a_master_that_does_not_read_stops_nothing(tmp_path: Path) -> None:
    with guarded(tmp_path / "log", "for n in range(5000): print(n, 'x' * 100)") as process:
        assert process.wait(60) == 0
    assert "4999 xxx" in (tmp_path / "log").read_text().splitlines()[-1]


def test_a_log_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "LARGEST", 1000)
    log = Log(tmp_path / "log")
    for number in range(102):
        log.write(f"line {number} {'x' * 80}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "log.1"]
    assert all(path.stat().st_size < 1200 for path in tmp_path.iterdir())
    assert "line 101" in (tmp_path / "log").read_text()


def test_a_log_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    Log(tmp_path / "missing" / "log").write("a line")


@pytest.mark.parametrize(
    "line",
    [
        "\x1b[92mINFO \x1b[0m:      [Fleet.PullMessages] node_id=123",
        "INFO :      ControlServicer.ListNodes",
        "INFO :      ControlServicer.ListRuns",
        "",
        "I1120 11:15:51.377527   29721 ssl_transport_security.cc:2563] Handshake failed with error SSL_ERROR_SSL",
        "W1120 11:15:48.357271   29729 log.cc:102] Log level INFO is not suitable for production.",
    ],
)
def test_chatter_is_dropped(line: str) -> None:
    assert Sieve().keep(line) is None


@pytest.mark.parametrize(
    "line",
    [
        "INFO :      Starting Flower SuperLink",
        "ERROR :     [Fleet.ActivateNode] Activation failed: No SuperNode found with the given public key.",
        "Traceback (most recent call last):",
        "  File 'x.py', line 1",
        "E1120 11:15:36.971099   29594 ssl_transport_security.cc:3238] No match found for server name: nope.example",
    ],
)
def test_what_matters_is_kept(line: str) -> None:
    assert Sieve().keep(line) == line
    assert Sieve().keep(f"\x1b[92m{line}\x1b[0m\n") == line


def test_a_failed_handshake_is_one_line() -> None:
    lines = """\
I1120 11:17:11.426670   30450 channel_trace.h:396] handshake manager 0x7f8710001ff0:  calling handshaker at index 1
I1120 11:17:11.431210   30449 handshaker.cc:155] CallNextHandshakerLocked: error=UNAVAILABLE: Handshake read failed
=== Source Location Trace: ===
src/core/util/status_helper.cc:124
 shutdown=false index=2, args={grpc.internal.endpoint_local_address=ipv4:127.0.0.1:9092, \
grpc.internal.endpoint_peer_address=ipv4:10.1.2.3:47474, grpc.internal.security_connector=0x55da60e8f8f0}
I1120 11:17:11.431247   30449 channel_trace.h:396] handshake manager: Failed with error: UNAVAILABLE
=== Source Location Trace: ===
src/core/util/status_helper.cc:124

INFO :      Starting Flower SuperExec"""
    sieve = Sieve()
    assert [kept for line in lines.splitlines() if (kept := sieve.keep(line))] == [
        "TLS handshake of ipv4:10.1.2.3:47474 with ipv4:127.0.0.1:9092 failed: UNAVAILABLE: Handshake read failed",
        "INFO :      Starting Flower SuperExec",
    ]
