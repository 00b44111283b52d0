"""A federation of real sites: `federation.toml` at the server, and what of it travels to the sites.

It has the sections of an experiment (method, model, frame, train, federation, evaluation, run) but for `[data]` and
`[partition]`: the data are at the sites and nobody divides them. `[images]` says instead what an image is for
everybody, and `[server]` where the server is.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from common.config import Config, RunConfig, build, parse, read, require, section
from common.errors import UsageError, UserError
from common.net import Task


@dataclass(frozen=True)
class ImagesConfig:
    classes: tuple[str, ...] = ()  # names of class 0, 1, ...: the same list at every site
    size: int = 32  # side of the square images; sites bring theirs to it
    channels: int = 3  # 3 for colour, 1 for grey (as .npz)
    mean: tuple[float, ...] = ()  # per channel of values in [0, 1]; empty: ImageNet's for colour, 0.5 for grey
    std: tuple[float, ...] = ()  # per channel, like mean
    augment: Literal["auto", "none", "crop-flip", "crop", "resized-crop"] = "auto"  # auto: what suits a site's files

    def __post_init__(self) -> None:
        require(1 <= self.size <= 4096, "images.size", self.size, "1 to 4096 pixels")
        twice = sorted({name for name in self.classes if self.classes.count(name) > 1})
        require(not twice, "images.classes", twice, "every class name once")
        require(all(self.classes), "images.classes", "", "names that are not empty")
        for key, values in (("mean", self.mean), ("std", self.std)):
            require(len(values) in (0, self.channels), f"images.{key}", values, "one number for every channel, or none")
        require(all(value > 0 for value in self.std), "images.std", self.std, "numbers above 0")


@dataclass(frozen=True)
class ServerConfig:
    host: str = "localhost"  # the name or address by which sites reach the server; it is in the certificate
    port: int = 9092  # the one port sites connect to
    bind: str = "0.0.0.0"  # the address it listens on
    listen: int = 0  # the port it listens on, where a proxy or a port mapping brings sites to another one; 0: `port`
    test: str = ""  # a balanced test set the operator has (.npz, folder or table): the generic model is judged on it

    def __post_init__(self) -> None:
        require(self.host != "" and not set(self.host) & set("/ \t"), "server.host", self.host, "a name or an address")
        require(1 <= self.port <= 65535, "server.port", self.port, "1 to 65535")
        require(self.bind != "", "server.bind", self.bind, "an address of this machine, or 0.0.0.0 for all of them")
        require(0 <= self.listen <= 65535, "server.listen", self.listen, "1 to 65535, or 0 for server.port")

    @property
    def door(self) -> int:
        """The port it listens on."""
        return self.listen or self.port


@dataclass(frozen=True)
class Deployment:
    config: Config
    images: ImagesConfig = field(default_factory=ImagesConfig)
    server: ServerConfig = field(default_factory=ServerConfig)

    @property
    def task(self) -> Task:
        if len(self.images.classes) < 2:
            raise UserError(
                f"images.classes = {list(self.images.classes)} is not possible: list the names of all classes"
            )
        return Task(self.config, self.images.classes, self.images.channels, self.images.size)

    def settings(self) -> str:
        """What the sites train by, as the text that travels with every order. Paths and machine settings stay here."""
        table = self.config.as_dict()
        for own in ("data", "partition", "run"):
            del table[own]
        table["model"]["weights"] = ""  # sites get the values
        return json.dumps({**table, "images": asdict(self.images)}, sort_keys=True)


def load(path: Path, overrides: Sequence[str] = ()) -> Deployment:
    """Read federation.toml; overrides are as for an experiment, `section.key=value`. Its paths are from its folder."""
    found = _parse(read(path, overrides))
    test = found.server.test and str(path.parent.resolve() / found.server.test)
    weights = found.config.model.weights and str(path.parent.resolve() / found.config.model.weights)
    model = replace(found.config.model, weights=weights)
    return replace(found, config=replace(found.config, model=model), server=replace(found.server, test=test))


def from_settings(text: str, run: RunConfig) -> Deployment:
    """What a site was sent, to be run on its own machine. It comes from the network: UserError if it is not right."""
    try:
        table = json.loads(text)
    except (ValueError, RecursionError):
        table = None
    if not isinstance(table, dict) or table.keys() & {"data", "partition", "run", "server"}:
        raise UserError("the server's settings cannot be read: run the same version of fedloge on both sides")
    try:
        found = _parse(table)
    except UsageError as error:
        raise UserError(f"the server's settings: {error} (is it of another version of fedloge?)") from None
    return replace(found, config=replace(found.config, run=run))


def _parse(table: Mapping[str, Any]) -> Deployment:
    for key in ("data", "partition"):
        if key in table:
            raise UsageError(f"unknown key {key}: the data are at the sites; [images] says what an image is")
    parts = {key: build(kind, section(table.get(key, {}), key), f"{key}.") for key, kind in _OWN.items()}
    images = parts["images"]
    require(images.channels in (1, 3), "images.channels", images.channels, "1 or 3")
    config = parse({key: value for key, value in table.items() if key not in _OWN})
    require(config.evaluation.on == "test", "evaluation.on", config.evaluation.on, "test: sites put nothing else aside")
    require(config.run.lanes == 0, "run.lanes", config.run.lanes, "0: every site trains on its own machine")
    return Deployment(config, **parts)


_OWN: dict[str, Any] = {"images": ImagesConfig, "server": ServerConfig}
