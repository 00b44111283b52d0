"""One federation on this machine: a SuperLink, sites of either kind, and runs that write a line a round.

Everything is in one folder, started by `with`, and gone at its end.
"""

import hashlib
import json
import math
import os
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import grpc
import numpy as np
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.control_pb2_grpc import ControlStub
from flwr.supercore.fab import Fab

from benchmarks.overhead.processes import guarded, memory, processor_seconds, started
from benchmarks.overhead.site import change
from common import deployment, keys, pki
from common.errors import UserError
from common.net import build
from common.register import registry
from fedloge import provision
from server.flower_link import Control
from server.superlink import Doors, SuperLink, processes

HERE = Path(__file__).parent
PROCESSES = 4  # of resident nodes at most; more sites share them
CLASSES = tuple("0123456789")
MODELS: dict[str, dict[str, object]] = {
    "tiny": {"model.name": "mlp", "images.size": 16, "images.channels": 1},
    "medium": {"model.name": "resnet20", "model.norm": "group"},
    "large": {"model.name": "resnet18", "model.norm": "group"},  # 62 tensors, all of them float32
    "huge": {"model.name": "mlp", "model.width": 3600, "images.size": 112},
}
START = 120.0  # seconds sites have to come online
TICK = 0.1
LOOK = 2.0  # seconds between two looks whether a run still lives

Kind = Literal["resident", "stock"]


class Federation:
    """`rounds` and what else is in `settings` (as `section.key`) are for resident runs."""

    def __init__(self, place: Path, model: str, sites: int, settings: Mapping[str, object]) -> None:
        self.folder = place / "federation"
        given = {"images.classes": CLASSES, "method.name": "fedavg", "server.bind": "127.0.0.1", **MODELS[model]}
        provision.create(self.folder, "overhead", "localhost", _free_port(), {**given, **settings})
        self._plan = deployment.load(self.folder / "federation.toml")
        self.names = [f"site-{number:02d}" for number in range(sites)]
        self._kits = [pki.issue(self.folder, name, None, self._plan) for name in self.names]
        self._shapes = self._arrays()
        self._images(self.folder / "images.npz")
        self._link = SuperLink(self.folder, "127.0.0.1", self._plan.server.port)
        self._stack = ExitStack()
        self._doors = Doors(0, 0, 0)
        self.peaks: dict[str, float] = {}  # program -> most resident megabytes so far; "sites" is their largest process
        self._programs: dict[int, str] = {}
        self._sites: list[int] = []

    @property
    def tensors(self) -> int:
        return len(self._shapes)

    @property
    def size(self) -> int:
        """Bytes of the model."""
        return 4 * sum(math.prod(shape) for shape in self._shapes.values())

    def __enter__(self) -> "Federation":
        with ExitStack() as stack:  # what is started is ended, also when the next start fails
            stack.callback(self._link.stop)
            self._doors = self._link.start()
            self.control = Control(self.folder, self._doors.control)
            stack.callback(self.control.close)
            for site in registry(self.folder).values():
                self.control.register(site.public_key)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self, kind: Kind, processes: int = PROCESSES) -> list[int]:
        """Start all sites and wait until they are online; gives the processes they share."""
        guards = []
        if kind == "resident":
            many = min(processes, len(self.names))
            for number in range(many):
                kits = [self.folder / "kits" / f"{name}.kit" for name in self.names[number::many]]
                command = [sys.executable, "-m", "benchmarks.overhead.site", self.folder / "images.npz", *kits]
                guards.append(started(self.folder / f"sites-{number}.log", command))
        else:
            guards = [self._stock(number) for number in range(len(self.names))]
        children = [self._stack.enter_context(guard) for guard in guards]
        end = time.monotonic() + START
        while sum(seen.online for seen in self.control.nodes().values()) < len(self.names):
            if time.monotonic() > end or any(child.poll() is not None for child in children):
                raise UserError(f"the sites do not come online: see {self.folder}/*.log")
            time.sleep(TICK)
        self._sites = [guarded(child) for child in children]
        return self._sites

    def run(self, kind: Kind, rounds: int) -> Iterator[dict[str, Any]]:
        """Start a run, and give what is known of every round as it ends."""
        out = self.folder / "rounds.jsonl"
        out.touch()
        more: dict[str, object] = {} if kind == "resident" else {"sites": len(self.names), "rounds": rounds}
        id = self._start_run(HERE / kind, {"federation": self.folder, "out": out, **more})
        told, looked = 0, time.monotonic()
        while told < rounds:
            over = False
            if time.monotonic() > looked + LOOK:
                over, looked = self.control.look_at(id).finished, time.monotonic()
            lines = out.read_text(encoding="utf-8").split("\n")[told:-1]
            self._look()
            for line in lines:
                told += 1
                yield json.loads(line)
            if over and told < rounds:
                why = self.control.look_at(id).details
                raise UserError(f"the run ended early ({why}): see {self.folder}/run/logs/superlink.log")
            time.sleep(TICK)

    def wait(self) -> None:
        """Start a run that has nothing to do, as its sites never are enough."""
        self._start_run(HERE / "resident", {"federation": self.folder, "out": os.devnull})
        end = time.monotonic() + START
        while "flwr-serverapp" not in self._known().values():
            if time.monotonic() > end:
                raise UserError(f"the ServerApp does not start: see {self.folder}/run/logs/superlink.log")
            time.sleep(TICK)

    def processor_seconds(self) -> dict[str, float]:
        """Of the SuperLink and its helpers, by program."""
        found: defaultdict[str, float] = defaultdict(float)
        for pid, name in self._known().items():
            found[name] += processor_seconds(pid)
        return dict(found)

    def superlink(self) -> dict[str, float]:
        """Its memory."""
        return next(memory(pid) for pid, name in self._known().items() if name == "flower-superlink")

    def _known(self) -> dict[int, str]:
        found = processes(self.folder / "run")
        return {pid: name for pid, name in found.items() if name != "guard.py"}

    def _look(self) -> None:
        if "flwr-serverapp" not in self._programs.values():
            self._programs = {**self._known(), **dict.fromkeys(self._sites, "sites")}
        for pid, name in self._programs.items():
            try:
                self.peaks[name] = max(self.peaks.get(name, 0.0), memory(pid)["peak"])
            except (OSError, KeyError):  # it has ended
                continue

    def _stock(self, number: int) -> Any:
        kit = self._kits[number]
        state = self.folder / kit.name
        state.mkdir()
        (state / "key").write_text(keys.openssh(kit.private_key()))
        command = [
            Path(sys.executable).with_name("flower-supernode"),
            "--superlink", kit.address,
            "--root-certificates", self.folder / "pki" / "ca.crt",
            "--auth-supernode-private-key", state / "key",
            "--node-config", f"change={change(kit.name)}",
            "--isolation", "subprocess",
            "--clientappio-api-address", "127.0.0.1:0",
        ]  # fmt: skip
        environment = {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
            "FLWR_HOME": str(state / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
        }
        return started(self.folder / f"{kit.name}.log", command, **environment)

    def _start_run(self, app: Path, config: Mapping[str, object]) -> int:
        files = {path.name: path.read_bytes() for path in app.iterdir() if path.suffix in (".py", ".toml")}
        content, _ = build_fab_from_files(files)
        fab = Fab(hashlib.sha256(content).hexdigest(), content, {})
        texts = user_config_to_proto({key: str(value) for key, value in config.items()})
        credentials = grpc.ssl_channel_credentials((self.folder / "pki" / "ca.crt").read_bytes())
        with grpc.secure_channel(f"localhost:{self._doors.control}", credentials) as channel:
            request = StartRunRequest(fab=fab_to_proto(fab), override_config=texts)
            return int(ControlStub(channel).StartRun(request, timeout=30).run_id)

    def _arrays(self) -> dict[str, list[int]]:
        """Shapes of the model, also written down for the stock app."""
        parts = build(self._plan.config.method, self._plan.task).parts()
        shapes = {f"{part}/{name}": list(t.shape) for part, group in parts.items() for name, t in group.items()}
        (self.folder / "arrays.json").write_text(json.dumps(shapes), encoding="utf-8")
        return shapes

    def _images(self, path: Path) -> None:
        """What a site must have to take part."""
        images = self._plan.images
        rng = np.random.default_rng(0)
        pixels = rng.integers(256, size=(50, images.size, images.size, images.channels), dtype=np.uint8)
        grey = images.channels == 1
        np.savez(path, images=pixels[..., 0] if grey else pixels, labels=np.arange(50) % len(CLASSES))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
