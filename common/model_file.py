"""A finished model as one file, with all it takes to use it and nothing that is executed.

A safetensors file with the tensors `backbone.*` and `head.*`. Its metadata name the architecture, the classes, how an
image becomes numbers, and the classes the model is meant for: all of them for a generic model, for a personal one those
of its site. The backbone may be left to another file, `generic.safetensors` beside it or one folder above; its digest
tells whether it is that one. A file comes from anywhere: what does not fit together is a UserError.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from common import models, parts
from common.config import ModelConfig, build, section
from common.deployment import ImagesConfig
from common.errors import UsageError, UserError
from common.images import Images
from common.methods.fedetf import EtfHead
from common.parts import Tensors
from common.realign import linear, masked

GENERIC = "generic.safetensors"
OWN = "own"  # where the backbone is


@dataclass(frozen=True)
class Model:
    architecture: ModelConfig
    images: ImagesConfig
    backbone: nn.Module
    head: nn.Module
    predictor: str  # what the head is called in tables and reports
    round: int
    meant: Tensor  # of every class, whether it is an answer
    site: str = ""  # whose personal model it is; nobody's is everybody's

    def logits(self, x: Tensor) -> Tensor:
        """Of normalised images; of what it is not meant for, minus infinity."""
        return masked(self.head(self.backbone(x)), self.meant.to(x.device))


def described(images: Images) -> ImagesConfig:
    """How these images become numbers, so that others can in the same way."""
    return ImagesConfig(images.classes, images.side, images.channels, images.mean, images.std, images.augment)


def save(path: Path, model: Model, durable: bool = True, shared: bool = False) -> None:
    """Write `model`; its backbone only if it is not `shared`, as the generic model's beside it."""
    classes = model.images.classes
    tensors = parts.prefixed("head", model.head)
    if not shared:
        tensors |= parts.prefixed("backbone", model.backbone)
    about = {
        "classes": json.dumps(classes),
        "model": json.dumps(asdict(replace(model.architecture, weights=""))),
        "images": json.dumps({key: value for key, value in asdict(model.images).items() if key != "classes"}),
        "round": str(model.round),
        "predictor": model.predictor,
        "site": model.site,
        "backbone": parts.digest(parts.prefixed("backbone", model.backbone)) if shared else OWN,
        "trained_classes": json.dumps([classes[c] for c in model.meant.nonzero().flatten()]),
    }
    parts.save(path, tensors, about, durable=durable)


def load(path: Path, device: torch.device | str = "cpu") -> Model:
    """Read it, ready to be used."""
    tensors, about = parts.read(path)
    try:
        classes, meant = tuple(json.loads(about["classes"])), set(json.loads(about["trained_classes"]))
        images = build(ImagesConfig, section({**json.loads(about["images"]), "classes": classes}, "images"), "images.")
        architecture = build(ModelConfig, section(json.loads(about["model"]), "model"), "model.")
        number = int(about["round"])
        backbone = models.build(replace(architecture, weights=""), images.channels, images.size)
        parts.load(parts.tensors(backbone), _backbone(path, tensors, about["backbone"]))
        head = _head(_under("head", tensors))
        support = torch.tensor([name in meant for name in classes])
        if not support.any() or head(torch.zeros(1, backbone.feature_dim)).shape != (1, len(classes)):
            raise ValueError("its head is not one of its classes and features")
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError, UsageError) as error:
        reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"{path}: is no model of this version of fedloge ({reason})") from None
    for module in (backbone, head):
        module.to(device).eval().requires_grad_(False)
    return Model(architecture, images, backbone, head, about["predictor"], number, support, about["site"])


def _backbone(path: Path, tensors: Tensors, where: str) -> Tensors:
    if where == OWN:
        return _under("backbone", tensors)
    places: Sequence[Path] = [folder / GENERIC for folder in (path.parent, path.parent.parent)]
    for place in filter(Path.exists, places):
        found = {name: t for name, t in parts.read(place)[0].items() if name.startswith("backbone.")}
        if parts.digest(found) == where:
            return _under("backbone", found)
    raise UserError(f"{path}: its backbone is that of another {places[0]} than is there: bring that back")


def _head(t: Tensors) -> nn.Module:
    if t.keys() <= {"weight", "bias"}:
        weight = t["weight"]
        return linear(weight, t.get("bias", torch.zeros(len(weight), dtype=weight.dtype)))
    return EtfHead(linear(t["projection.weight"], t["projection.bias"]), t["frame"], t["temperature"])


def _under(prefix: str, tensors: Tensors) -> Tensors:
    return {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}
