"""Configuration: one TOML file, parsed once into frozen dataclasses.

Unknown keys, wrong types and values out of range are refused with the key's full name and the allowed values.
A comment on a field is the documentation of its key. `[method]` is parsed by the method it names, so a knob
of another method is an unknown key. Everything downstream takes the dataclass, nobody touches the dictionary.
"""

import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin

from common.errors import UsageError

if TYPE_CHECKING:
    from common.methods.method import Method

T = TypeVar("T")

LARGEST = 2**63  # no key means anything beyond
SEEDS = 2**32  # the legacy numpy stream, on which the published partition is drawn, has this many seeds


def require(holds: bool, key: str, value: object, allowed: str) -> None:
    """Refuse `key = value` unless `holds`; `allowed` tells the reader which values are fine."""
    if not holds:
        raise UsageError(f"{key} = {value!r} is not possible: use {allowed}")


@dataclass(frozen=True)
class DataConfig:
    source: Literal["digits", "cifar10", "cifar100", "folder", "manifest", "npz", "lists", "inaturalist"] = "digits"
    path: str = ""  # folder or file of the source; not used by digits
    test_path: str = ""  # where the source keeps its test set apart (npz, manifest, lists)
    size: int = 0  # side of the square images are brought to; 0 keeps them (they must then be of one size)
    imbalance: float = 1.0  # IF = smallest class / largest class of the training set; 1 keeps the data as it is
    profile: Literal["exp", "step"] = "exp"  # shape of the long tail
    largest: int = 0  # images kept of the largest class; 0 keeps all it has
    test_share: float = 0.2  # share put aside as test set by sources that bring none
    augment: Literal["auto", "none", "crop-flip", "crop", "resized-crop"] = "auto"  # auto: what suits the source
    workers: int = 2  # threads that decode images which are not kept in memory

    def __post_init__(self) -> None:
        require(0 < self.imbalance <= 1, "data.imbalance", self.imbalance, "a number in (0, 1]")
        require(0 < self.test_share < 1, "data.test_share", self.test_share, "a number in (0, 1)")
        require(0 <= self.size <= 4096, "data.size", self.size, "0 or a number of pixels up to 4096")
        require(self.largest >= 0, "data.largest", self.largest, "0 or a number of images")
        require(self.workers >= 0, "data.workers", self.workers, "0 or more")
        require(
            self.source == "digits" or bool(self.path),
            "data.path",
            self.path,
            "the folder or file of the data",
        )


@dataclass(frozen=True)
class PartitionConfig:
    # group-dirichlet: as dirichlet, but natural groups (all pictures of one object, say) stay whole
    kind: Literal["dirichlet", "group-dirichlet", "shards", "groups", "iid"] = "dirichlet"
    clients: int = 4  # sites; with kind = groups: at most this many groups, largest first, 0 for all
    alpha: float = 0.5  # Dirichlet concentration: small is very different sites
    shards: int = 2  # classes' shards per client, kind = shards
    seed: int = 3407  # the split is a part of the experiment: it does not change with the run's seed
    holdout: float = 0.0  # share of every site's training images put aside to choose settings on
    local_test: int = 0  # int(n_kc / N * local_test) test images of class c for site k; 0: as many as keep its own mix

    def __post_init__(self) -> None:
        require(
            self.clients >= (0 if self.kind == "groups" else 1),
            "partition.clients",
            self.clients,
            "1 or more",
        )
        require(self.alpha > 0, "partition.alpha", self.alpha, "a number above 0")
        require(self.shards >= 1, "partition.shards", self.shards, "1 or more")
        require(0 <= self.seed < SEEDS, "partition.seed", self.seed, "a number from 0 to 2^32 - 1")
        require(0 <= self.holdout < 1, "partition.holdout", self.holdout, "a number in [0, 1)")
        require(self.local_test >= 0, "partition.local_test", self.local_test, "0 or a number of images")


@dataclass(frozen=True)
class ModelConfig:
    name: str = "mlp"  # mlp, cnn, resnet8/20/18/34 (CIFAR stem), torchvision/NAME
    norm: Literal["aggregate", "local", "group"] = "aggregate"  # BatchNorm: averaged, kept at the site, GroupNorm
    weights: str = ""  # a safetensors file with pretrained weights of the backbone
    width: int = 64  # features of mlp and cnn

    def __post_init__(self) -> None:
        require(1 <= self.width <= 65536, "model.width", self.width, "1 to 65536")


@dataclass(frozen=True)
class FrameConfig:
    norm: float = 0.1  # length of every column: the temperature of the frame's logits
    sparsity: float = 0.6  # share of exact zeros
    solver: Literal["auto", "reference", "gram", "lse"] = "auto"  # auto: gram where a simplex is possible, else lse
    seed: int = 0  # of the places of the zeros and of the first values
    best_effort: bool = False  # true: take the best frame there is where the zeros make the exact one impossible

    def __post_init__(self) -> None:
        require(self.norm > 0, "frame.norm", self.norm, "a number above 0")
        require(0 <= self.sparsity < 1, "frame.sparsity", self.sparsity, "a number in [0, 1)")
        require(0 <= self.seed < LARGEST, "frame.seed", self.seed, "a number from 0 to 2^63 - 1")


@dataclass(frozen=True)
class TrainConfig:
    batch: int = 8  # images a step
    epochs: int = 5  # local epochs a round
    lr: float = 0.03  # step of SGD, the same in every round
    momentum: float = 0.5  # starts from zero every round
    weight_decay: float = 0.0  # of SGD
    clip: float = 0.0  # largest norm of each part's gradient; 0 does not clip
    precision: Literal["fp32", "bf16", "tf32"] = "fp32"  # bf16: mixed precision; tf32: on a GPU, elsewhere as fp32
    layout: Literal["plain", "channels_last"] = "channels_last"  # memory layout; plain keeps the reference kernels

    def __post_init__(self) -> None:
        require(self.batch >= 1, "train.batch", self.batch, "1 or more")
        require(self.epochs >= 1, "train.epochs", self.epochs, "1 or more")
        require(self.lr > 0, "train.lr", self.lr, "a number above 0")
        require(0 <= self.momentum < 1, "train.momentum", self.momentum, "a number in [0, 1)")
        require(self.weight_decay >= 0, "train.weight_decay", self.weight_decay, "0 or more")
        require(self.clip >= 0, "train.clip", self.clip, "0 or more")


@dataclass(frozen=True)
class FederationConfig:
    rounds: int = 30  # in all
    fraction: float = 1.0  # share of the sites that train in a round: max(int(fraction * sites), 1)
    min_clients: int = 1  # sites that must be reachable before a round starts
    wait: float = 600.0  # seconds to wait for them before the attempt counts as failed
    quorum: float = 0.5  # share of a round's sites whose replies make it count
    grace: float = 60.0  # seconds a round stays open after its quorum is in
    deadline: float = 3600.0  # seconds after which a round is closed whatever is in
    failures: int = 3  # rounds in a row without a quorum after which the run is given up
    fold: Literal["arrival", "name"] = "arrival"  # name: the order of the sites' names, the same bits in every run
    wire: Literal["fp32", "bf16", "int8", "topk"] = "fp32"  # how backbones travel; only fp32 is exact, and resumes so
    topk: float = 0.05  # share of its values that a site sends of a backbone where wire = "topk"
    max_update: float = 0.0  # largest norm of a site's change to the shared parts; 0 accepts any finite one
    max_examples: int = 10_000_000  # no site may claim to stand for more

    def __post_init__(self) -> None:
        require(self.rounds >= 1, "federation.rounds", self.rounds, "1 or more")
        require(0 < self.fraction <= 1, "federation.fraction", self.fraction, "a number in (0, 1]")
        require(self.min_clients >= 1, "federation.min_clients", self.min_clients, "1 or more")
        require(self.wait >= 0, "federation.wait", self.wait, "0 or more seconds")
        require(0 < self.quorum <= 1, "federation.quorum", self.quorum, "a number in (0, 1]")
        require(self.grace >= 0, "federation.grace", self.grace, "0 or more seconds")
        require(self.deadline > 0, "federation.deadline", self.deadline, "a number of seconds above 0")
        require(self.failures >= 1, "federation.failures", self.failures, "1 or more")
        require(0 < self.topk <= 0.5, "federation.topk", self.topk, "a number above 0, up to 0.5")
        require(self.max_update >= 0, "federation.max_update", self.max_update, "0 or more")
        require(self.max_examples >= 1, "federation.max_examples", self.max_examples, "1 or more")


@dataclass(frozen=True)
class EvaluationConfig:
    every: int = 5  # rounds between evaluations; the last round is always evaluated
    start: int = 1  # no evaluation before this round
    last: int = 4  # evaluations at the end that a result is the mean of
    batch: int = 500  # images judged at a time; a processor takes 125 at most
    gain: float = 1.7  # length of the rows of the realigned generic head
    tune_epochs: int = 1  # epochs of every fine-tuned personal model
    statistics: bool = False  # true: judge heads computed from class statistics as well, which sites send as sums
    on: Literal["test", "holdout"] = "test"  # holdout: judge by data put aside from training, to choose settings

    def __post_init__(self) -> None:
        require(self.every >= 1, "evaluation.every", self.every, "1 or more")
        require(self.start >= 1, "evaluation.start", self.start, "1 or more")
        require(self.last >= 1, "evaluation.last", self.last, "1 or more")
        require(self.batch >= 1, "evaluation.batch", self.batch, "1 or more")
        require(self.gain > 0, "evaluation.gain", self.gain, "a number above 0")
        require(self.tune_epochs >= 1, "evaluation.tune_epochs", self.tune_epochs, "1 or more")


@dataclass(frozen=True)
class RunConfig:
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    threads: int = 1  # CPU threads; one keeps a run bit-reproducible
    keep: int = 3  # checkpoints kept
    lanes: int = 0  # sites of a simulation that train at once, the same bits for any; 0: 1 on a CPU, what fits on a GPU

    def __post_init__(self) -> None:
        cuda = self.device.removeprefix("cuda:")
        known = self.device in ("auto", "cpu", "cuda") or (cuda != self.device and cuda.isdigit())
        require(known, "run.device", self.device, "auto, cpu, cuda or cuda:N")
        require(1 <= self.threads <= 1024, "run.threads", self.threads, "1 to 1024")
        require(0 <= self.lanes <= 64, "run.lanes", self.lanes, "0 to 64")
        require(self.keep >= 2, "run.keep", self.keep, "2 or more: the previous one is the way back")


@dataclass(frozen=True)
class Config:
    method: "Method"
    name: str = "experiment"  # stands in results and folders
    seed: int = 1  # of initial values, sampling of sites, and batches
    data: DataConfig = field(default_factory=DataConfig)
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    frame: FrameConfig = field(default_factory=FrameConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, "seed", self.seed, "0 to 2^63 - 1")
        require(self.name != "" and "/" not in self.name, "name", self.name, "a word without slashes")
        if self.evaluation.on == "holdout":
            require(self.partition.holdout > 0, "partition.holdout", self.partition.holdout,
                    'a number above 0 when evaluation.on = "holdout"')  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """The whole configuration as a TOML-shaped dictionary; `parse(as_dict())` gives it back."""
        table = asdict(self)
        table["method"] = {"name": self.method.name, **table["method"]}
        return table


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file; each override is `section.key=value` with a TOML value (bare words are strings).

    `method=NAME` stands for a new `[method]` section: knobs of the file's method would not be its own.
    """
    return parse(read(path, overrides))


def read(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The table of a TOML file with its overrides, not yet checked."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}): name an existing TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: is not valid TOML ({error}): mend the file there") from None
    for override in overrides:
        _override(table, override)
    return table


def parse(table: Mapping[str, Any]) -> Config:
    from common.methods import METHODS

    method = dict(section(table.get("method", {}), "method"))
    name = method.pop("name", "fedloge")
    if not isinstance(name, str) or name not in METHODS:
        raise UsageError(f"method.name = {name!r} is not a method: use one of {', '.join(sorted(METHODS))}")
    rest = {key: value for key, value in table.items() if key != "method"}
    return build(Config, rest, "", method=build(METHODS[name], method, "method."))


def _override(table: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"--set {override}: write section.key=value, for example train.lr=0.1")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    if key.strip() == "method":
        table["method"] = {"name": value}
        return
    *sections, last = key.strip().split(".")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise UsageError(f"--set {override}: {section} is a value, not a section")
    table[last] = value


def section(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UsageError(f"{where} = {value!r} must be a section: write [{where}]")
    return value


def build(kind: type[T], table: Mapping[str, Any], where: str, **given: Any) -> T:
    """An instance of the dataclass `kind` from a TOML table; `where` prefixes keys in messages."""
    assert is_dataclass(kind)
    hints = typing.get_type_hints(kind, localns={"Method": object})
    known = {f.name: f for f in fields(kind) if f.init and f.name not in given}
    values: dict[str, Any] = dict(given)
    for key, value in table.items():
        if key not in known:
            raise UsageError(f"unknown key {where}{key}: use one of {', '.join(sorted(known)) or 'none'}")
        hint = hints[key]
        if is_dataclass(hint):
            values[key] = build(typing.cast(type, hint), section(value, f"{where}{key}"), f"{where}{key}.")
        else:
            values[key] = _value(hint, value, f"{where}{key}")
    for key, f in known.items():
        if key not in values and f.default is MISSING and f.default_factory is MISSING:
            raise UsageError(f"{where}{key} is missing: it has no default")
    return kind(**values)


def _value(hint: Any, value: Any, key: str) -> Any:
    if get_origin(hint) is Literal:
        allowed = get_args(hint)
        require(value in allowed, key, value, "one of " + ", ".join(map(str, allowed)))
        return value
    if get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise UsageError(f"{key} = {value!r} has the wrong type: use a list")
        return tuple(_value(get_args(hint)[0], item, key) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST:
        return float(value)
    if get_origin(hint) is types.UnionType:
        raise AssertionError(f"{key}: configuration fields have one type")
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        words = {int: "a whole number", float: "a number", str: "a text in quotes", bool: "true or false"}
        raise UsageError(f"{key} = {value!r} has the wrong type: use {words.get(hint, hint)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{key} = {value} is not possible: use a finite number")
    return value
