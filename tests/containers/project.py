"""docker-compose.yml as somebody runs it who has just cloned the repository: in a folder, to its end."""

import json
import re
import shlex
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.containers import engine

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "containers.md"
LONG = 600.0  # seconds until anything awaited must have come
COLOURS = re.compile(r"\x1b\[[\d;]*m")
WRITING = re.compile(r"^\S+\s*\| ", re.M)  # what compose puts before a line


def clone(folder: Path) -> Path:
    """The repository as a clone would have it, with what is not committed yet."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file() and not name.startswith("benchmarks/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


class Project:
    """A clone of its own in `folder`, on an engine."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.runs = folder / "runs"
        self._environment = {**environment, "COMPOSE_PROJECT_NAME": f"fedloge-test-{uuid.uuid4().hex[:8]}"}
        self._compose = engine.compose(environment)
        self._output = folder / "output.txt"
        self._ups: list[subprocess.Popen[bytes]] = []

    def docker(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["docker", *words], env=self._environment, capture_output=True, text=True, check=check, timeout=LONG
        )

    def call(
        self, command: str, check: bool = True, patience: float = LONG, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """A command as docs/containers.md has it, to its end."""
        return subprocess.run(
            self._words(command), cwd=self.folder, env={**self._environment, **variables},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=check, timeout=patience,
        )  # fmt: skip

    @contextmanager
    def up(self, command: str = "docker compose up", **variables: str) -> Iterator["subprocess.Popen[bytes]"]:
        """`docker compose up` at a terminal. Nothing of it is left afterwards but volumes and what lies in runs."""
        with self._output.open("wb") as output:
            child = subprocess.Popen(
                self._words(command), cwd=self.folder, env={**self._environment, **variables},
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        try:
            yield child
        finally:
            self.call("docker compose --profile gpu down")
            child.wait(LONG)

    def output(self) -> str:
        """What `up` has shown so far, without colours."""
        return COLOURS.sub("", self._output.read_text(encoding="utf-8", errors="replace"))

    def said(self) -> str:
        """The same without the names of the services before the lines."""
        return WRITING.sub("", self.output())

    def wait(self, what: Callable[[], Any]) -> Any:
        """What `what` gives, once that is something."""
        end = time.monotonic() + LONG
        while not (found := what()):
            assert time.monotonic() < end, f"waited in vain\n{self.output()[-4000:]}"
            time.sleep(0.3)
        return found

    def wait_for_round(self, number: int) -> None:
        self.wait(lambda: re.search(rf"round {number} of \d+: ", self.output()))

    def finish(self, child: "subprocess.Popen[bytes]") -> str:
        """Let it come to its end, and give all it has shown."""
        assert child.wait(LONG) == 0, self.output()[-4000:]
        return self.said()

    def containers(self, service: str, *flags: str) -> list[str]:
        return self.call(f"docker compose ps {' '.join(flags)} -q {service}").stdout.split()

    def inspect(self, container: str) -> dict[str, Any]:
        [found] = json.loads(self.docker("inspect", container).stdout)
        return dict(found)

    def exit_codes(self) -> dict[str, int]:
        """Of all containers, by their names without that of the project."""
        listed = self.docker(
            "ps", "-a", "-q", "--filter", f"label=com.docker.compose.project={self.name}"
        ).stdout.split()
        found = [self.inspect(container) for container in listed]
        return {re.sub(rf"^/{self.name}[-_]", "", each["Name"]): each["State"]["ExitCode"] for each in found}

    @property
    def name(self) -> str:
        return self._environment["COMPOSE_PROJECT_NAME"]

    def forget(self) -> None:
        self.call("docker compose --profile gpu down --volumes --remove-orphans", check=False)

    def _words(self, command: str) -> list[str]:
        assert command.startswith("docker compose ")
        return [*self._compose, *shlex.split(command)[2:]]


def documented(command: str) -> str:
    """The command, which must be on the page that tells of it."""
    assert command in PAGE.read_text(encoding="utf-8").splitlines(), f"{PAGE.name} has no `{command}`"
    return command


def rounds(runs: Path) -> Sequence[dict[str, Any]]:
    return [json.loads(line) for line in (runs / "events.jsonl").read_text(encoding="utf-8").splitlines()]
