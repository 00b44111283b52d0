"""A Docker engine for the tests: the one that can be reached, or a private one, and the image everything starts from.

The private one needs root and the commands of Debian's docker.io, docker-compose and iptables. It keeps its images in
the user's cache, so that they are built once, and ends with the tests. Where no registry of images is reachable, a
Debian with Python takes the place of python:3.11-slim (debootstrap).
"""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BASE = "python:3.11-slim"
PLACE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedloge-engine"
SOCKET = PLACE / "docker.sock"
START = 60.0  # seconds an engine may take to come up
PULL = 60.0
DEBIAN = "bookworm"
PYTHON = "python3,python3-venv,python3-pip,ca-certificates"
AUTHORITIES = Path("etc/ssl/certs/ca-certificates.crt")


class NoEngine(Exception):
    """There is none to be had here; says why."""


@contextmanager
def engine() -> Iterator[dict[str, str]]:
    """The environment in which `docker` and the compose command work."""
    if shutil.which("docker") is None:
        raise NoEngine("docker is not installed")
    private = {**os.environ, "DOCKER_HOST": f"unix://{SOCKET}"}
    found = next((environment for environment in (dict(os.environ), private) if _answers(environment)), None)
    if found is not None:
        yield found
        return
    if os.geteuid() or shutil.which("dockerd") is None or shutil.which("iptables") is None:
        raise NoEngine("no engine answers, and to start one takes root, dockerd and iptables")
    PLACE.mkdir(parents=True, exist_ok=True)
    with (PLACE / "dockerd.log").open("w") as log:
        daemon = subprocess.Popen(
            ["dockerd", "--host", f"unix://{SOCKET}", "--data-root", PLACE / "data", "--exec-root", PLACE / "exec",
             "--pidfile", PLACE / "docker.pid"],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        end = time.monotonic() + START
        while not _answers(private):
            if daemon.poll() is not None or time.monotonic() > end:
                last = (PLACE / "dockerd.log").read_text(encoding="utf-8").splitlines()[-1:]
                raise NoEngine(f"dockerd does not start: {' '.join(last)}")
            time.sleep(0.2)
        yield private
    finally:
        daemon.terminate()
        daemon.wait()


def compose(environment: dict[str, str]) -> list[str]:
    """The words that begin a compose command."""
    for words in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(words[0]) and _works([*words, "version"], environment):
            return words
    raise NoEngine("docker compose is not installed")


def ready_base(environment: dict[str, str]) -> None:
    """See that the image exists from which ours are made."""
    if _works(["docker", "image", "inspect", BASE], environment):
        return
    if _works(["docker", "pull", "--quiet", BASE], environment, PULL):
        return
    if os.geteuid() or shutil.which("debootstrap") is None:
        raise NoEngine(f"{BASE} cannot be pulled, and to make one like it takes root and debootstrap")
    with tempfile.TemporaryDirectory(prefix="fedloge-base-") as folder:
        root = Path(folder) / "root"
        made = subprocess.run(
            ["debootstrap", "--variant=minbase", f"--include={PYTHON}", DEBIAN, root],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        if made.returncode:
            raise NoEngine(f"{BASE} cannot be pulled, and debootstrap failed: {made.stdout.splitlines()[-1]}")
        (root / "usr/bin/python").symlink_to("python3")
        shutil.copy("/" / AUTHORITIES, root / AUTHORITIES)  # those by which this machine trusts its package index
        for archive in (root / "var/cache/apt/archives").glob("*.deb"):
            archive.unlink()
        with subprocess.Popen(["tar", "-C", root, "-c", "."], stdout=subprocess.PIPE) as packed:
            changes = ["--change", f"ENV PIP_CERT=/{AUTHORITIES}", "--change", 'CMD ["python3"]']
            subprocess.run(
                ["docker", "import", *changes, "-", BASE],
                stdin=packed.stdout, stdout=subprocess.DEVNULL, env=environment, check=True,
            )  # fmt: skip


def _answers(environment: dict[str, str]) -> bool:
    return _works(["docker", "version"], environment)


def _works(words: list[str], environment: dict[str, str], patience: float = 30.0) -> bool:
    try:
        return not subprocess.run(words, env=environment, capture_output=True, check=False, timeout=patience).returncode
    except subprocess.TimeoutExpired:
        return False
