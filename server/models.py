"""The server's state as a model: on which device it lies, how good it is, here and at the sites, and its file."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import files, metrics, model_file
from common.deployment import Deployment, ImagesConfig
from common.evaluation import FeatureCache, evaluate
from common.holding import gather
from common.images import Images
from common.messages import Judgement
from common.methods.method import Method, ServerState
from common.model_file import GENERIC, Model
from common.net import Net, Task

log = logging.getLogger(__name__)

FIGURES = ("top1", "balanced", "macro_f1", "ece")  # shares
PREDICTORS = 16  # more of one kind no method has


def placed(state: ServerState, device: torch.device) -> ServerState:
    moved = {part: {name: t.to(device) for name, t in group.items()} for part, group in state.parts.items()}
    return replace(state, parts=moved, extra={name: t.to(device) for name, t in state.extra.items()})


def common_backbone(net: Net, state: ServerState) -> nn.Module | None:
    """The backbone, where all sites have the same: it is shared, and so are its BatchNorm statistics."""
    return net["backbone"] if "backbone" in state.parts and "norms" not in net.parts() else None


def save_generic(net: Net, method: Method, task: Task, state: ServerState, folder: Path, images: ImagesConfig) -> bool:
    """Write the method's own generic model; False where it has none. `net` holds it afterwards."""
    net.load(state.parts)
    folder.mkdir(parents=True, exist_ok=True)
    files.sweep(folder)
    for name, predictor in list(method.served(net, task).items())[:1]:
        everything = torch.ones(len(task.classes), dtype=torch.bool)
        made = Model(task.config.model, images, predictor.features, predictor.head, name, state.round, everything)
        model_file.save(folder / GENERIC, made)
        return True
    return False


class TestSet:
    """The operator's own images, on which the generic model is judged; there may be none."""

    def __init__(self, deployment: Deployment) -> None:
        self._config = deployment.config
        self._images: Images | None = None
        if deployment.server.test:
            found, apart = gather(Path(deployment.server.test), deployment.images.classes)
            self._images = (found if apart is None else apart).images(deployment.images, training=False)

    def judge(self, net: Net, method: Method, task: Task, state: ServerState, device: torch.device) -> dict[str, Any]:
        """Figures of every generic predictor; none without images."""
        if self._images is None:
            return {}
        net.load(state.parts)
        batch, precision = self._config.evaluation.batch, self._config.train.precision
        cache = FeatureCache(self._images, device, batch, common_backbone(net, state), precision)
        everything: Tensor = torch.arange(len(self._images))
        return evaluate(method.served(net, task), cache, everything, ())


def over_sites(judged: Mapping[str, Judgement], kind: str) -> dict[str, Any]:
    """Figures of every predictor as means over the sites. What a site says that makes no sense is left out."""
    found: dict[str, dict[str, Any]] = {}
    for name in sorted(judged):
        for predictor, measures in list(judged[name].get(kind, {}).items())[:PREDICTORS]:
            values = [measures.get(key, -1.0) for key in FIGURES]
            if all(value is None or 0 <= value <= 1 for value in values):
                found.setdefault(predictor, {})[name] = measures
            else:
                log.warning("%s says of its %s model %r what cannot be: left out", name, kind, predictor)
    return {predictor: metrics.over_sites(results, ()) for predictor, results in found.items()}
