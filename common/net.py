"""A backbone with the heads on it, seen as named parts.

A part is a named group of tensors (`backbone`, `frame`, `global_head`, `local_head`, ...). A method says which
parts are shared, fixed or local; everything else (training, aggregation, files, the wire) handles parts and
does not care what is inside. With BatchNorm kept at the site, the tensors of the backbone's BatchNorm layers
form a part of their own, `norms`, which no method shares.
"""

import copy
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from common import models, statistics
from common.config import Config
from common.errors import UsageError
from common.parts import Tensors, load, tensors
from common.seeds import isolated
from common.sgd import arithmetic

if TYPE_CHECKING:
    from common.methods.method import Method

Maker = Callable[[int], nn.Module | None]  # feature dimension -> a freshly initialised module, if there is to be one


@dataclass(frozen=True)
class Task:
    """What everybody in a federation must agree on to build the same net."""

    config: Config
    classes: tuple[str, ...]
    channels: int
    side: int

    def backbone(self) -> nn.Module:
        return models.build(self.config.model, self.channels, self.side)

    def head(self, dim: int) -> nn.Module:
        return nn.Linear(dim, len(self.classes))


class Net(nn.Module):
    """The modules of a method by part; `backbone` is always there."""

    def __init__(self, modules: dict[str, nn.Module], norms_apart: bool) -> None:
        super().__init__()
        self.by_part = nn.ModuleDict(modules)
        self._norms = models.norm_names(modules["backbone"]) if norms_apart else frozenset()
        self.draws = True  # whether its layers may draw random numbers while they train
        self.engine: object = None  # what a GPU has recorded of its training (common/engine.py)

    def __getitem__(self, part: str) -> nn.Module:
        return self.by_part[part]

    @property
    def feature_dim(self) -> int:
        return int(self["backbone"].feature_dim)  # type: ignore[arg-type]

    def features(self, x: Tensor) -> Tensor:
        f: Tensor = self["backbone"](x)
        return f

    def parts(self) -> dict[str, Tensors]:
        """The live tensors of every part."""
        found = {part: tensors(module) for part, module in self.by_part.items()}
        if self._norms:
            backbone = found["backbone"]
            found["norms"] = {name: backbone[name] for name in backbone if name in self._norms}
            found["backbone"] = {name: backbone[name] for name in backbone if name not in self._norms}
        return found

    def load(self, values: dict[str, Tensors]) -> None:
        """Copy the given parts in; the others stay as they are."""
        mine = self.parts()
        for part, given in values.items():
            load(mine[part], given)

    @contextmanager
    def stowed(self) -> Iterator[None]:
        """Without its values, which are lost, and without the memory for them."""
        places = [*self.parameters(), *self.buffers()]
        shapes = [(t.shape, t.stride()) for t in places]
        for t in places:
            t.data = t.new_empty(0)
        try:
            yield
        finally:
            for t, (shape, stride) in zip(places, shapes, strict=True):
                t.data = _zeros(t, shape) if t.is_cpu else t.new_zeros(shape)
                if t.stride() != stride:
                    t.data = t.new_empty_strided(shape, stride).zero_()

    def train_only(self, parts: Collection[str]) -> None:
        """Put `parts` in training mode and freeze the rest altogether: no gradient, no moving statistic."""
        for part, module in self.by_part.items():
            trained = part in parts
            module.train(trained)
            module.requires_grad_(trained)


def _zeros(like: Tensor, shape: torch.Size) -> Tensor:
    """torch would write them; numpy's take no memory before something else is written to them, if they are large."""
    if not shape.numel():
        return like.new_zeros(shape)
    return torch.from_numpy(np.zeros(shape.numel() * like.itemsize, np.uint8)).view(like.dtype).view(shape)


def build(method: "Method", task: Task) -> Net:
    """The net of `method` with the federation's common initial values.

    Every part is initialised on a stream of its own, so methods that share a part start it from the same
    values and comparisons are paired.
    """
    made = {}
    dim = 0
    makers = method.makers(task)
    if method.surveyed(task):
        makers = {**makers, statistics.PART: lambda dim: statistics.StatisticsHead(len(task.classes), dim)}
    for part, make in makers.items():
        with isolated(task.config.seed, "init", part):
            module = make(dim)
        if module is not None:
            made[part] = module
        dim = dim or int(made["backbone"].feature_dim)  # type: ignore[arg-type]
    return Net(made, norms_apart=task.config.model.norm == "local")


def build_on(device: torch.device, method: "Method", task: Task) -> Net:
    """The net where it is trained, in the memory layout that the settings ask for; from then on this process calculates
    as they say."""
    if device.type == "cuda":
        arithmetic(task.config.train)
    net = build(method, task).to(device)
    net.draws = _draws(net["backbone"], task, device)
    return net.to(memory_format=torch.channels_last) if task.config.train.layout == "channels_last" else net


@torch.no_grad()
def _draws(backbone: nn.Module, task: Task, device: torch.device) -> bool:
    """Whether training it draws from torch's global generator, as dropout does."""
    backbone = copy.deepcopy(backbone).train()
    state = partial(torch.cuda.get_rng_state, device) if device.type == "cuda" else torch.get_rng_state
    with isolated(task.config.seed, "draws"):
        before = state()
        backbone(torch.zeros(2, task.channels, task.side, task.side, device=device))
        return not torch.equal(state(), before)


def fresh(method: "Method", task: Task, net: Net, parts: Iterable[str], client: str) -> dict[str, Tensors]:
    """Initial values of a client's local parts: from its own stream, so no two sites start alike."""
    found: dict[str, Tensors] = {}
    makers = method.makers(task)
    names = net.parts()
    for part in parts:
        make = makers["backbone" if part == "norms" else part]  # BatchNorm's first values are not random
        with isolated(task.config.seed, "init", part, client):
            module = make(net.feature_dim)
        assert module is not None, part
        found[part] = tensors(module, names[part])
    return found


def roles(method: "Method", net: Net) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    """(shared, fixed, local) parts that `net` really has; whatever is neither shared nor fixed stays local."""
    parts = frozenset(net.parts())
    return parts & method.shared, parts & method.issued, parts - method.shared - method.issued


def best_device(wish: str) -> torch.device:
    if wish == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(wish)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"run.device = {wish!r} but torch sees {torch.cuda.device_count()} GPUs here: use auto or cpu, or mend the "
            "driver (nvidia-smi tells)"
        )
    return device
