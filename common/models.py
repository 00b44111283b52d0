"""Backbones: images in, features out, no classifier.

`build` gives a module that maps NCHW images to (n, feature_dim) features: ResNets with the CIFAR stem, a
small CNN, an MLP, or any torchvision classifier without its last layer. The features of the first three are
>= 0 (a ReLU comes last). A model that cannot take the images is refused here and not in the first round.

Layers are initialised from torch's global generator, which the caller isolates (`seeds.isolated`), with
torch's default distributions: the reference results were had with them, and without weight decay the scale of
the weights sets the effective learning rate.
"""

from difflib import SequenceMatcher
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import batch_norm, relu

from common import parts
from common.config import ModelConfig
from common.errors import UsageError, UserError

TORCHVISION = "torchvision/"
RESNETS = {  # widths of the stages, blocks in each
    "resnet8": ((16, 32, 64), (1, 1, 1)),
    "resnet20": ((16, 32, 64), (3, 3, 3)),
    "resnet18": ((64, 128, 256, 512), (2, 2, 2, 2)),
    "resnet34": ((64, 128, 256, 512), (3, 4, 6, 3)),
}
CNN_SIDE = 8  # the smallest images the CNN takes


class Backbone(nn.Module):
    """NCHW images to (n, feature_dim) features."""

    feature_dim: int
    classifier = ""  # what published weights call the layer that is not here


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm that takes one value per channel: a last batch of one image over maps of one pixel.

    Such a batch has no variance and torch refuses it. It is normalised by the moving statistics, and these
    stay as they are.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.numel() == x.shape[1]:
            return batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut; the layers are called as in torchvision."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inside != outside:
            projection = nn.Conv2d(inside, outside, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        y = relu(self.bn1(self.conv1(x)))
        return relu(self.bn2(self.conv2(y)) + self.downsample(x))


class ResNet(Backbone):
    """CIFAR stem (3x3, stride 1, no pooling), one stage per width, the mean over all pixels."""

    classifier = "fc"

    def __init__(self, channels: int, widths: tuple[int, ...], blocks: tuple[int, ...]) -> None:
        super().__init__()
        self.feature_dim = widths[-1]
        self.conv1 = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.stages = [f"layer{number + 1}" for number in range(len(widths))]
        inside = widths[0]
        for stage, width, count in zip(self.stages, widths, blocks, strict=True):
            first = Block(inside, width, stride=1 if stage == "layer1" else 2)
            self.add_module(stage, nn.Sequential(first, *(Block(width, width, 1) for _ in range(count - 1))))
            inside = width

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.bn1(self.conv1(x)))
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        return x.mean((2, 3))


class Cnn(Backbone):
    """Three 3x3 convolutions for tiny images; of 8 x 8 pixels the last one still sees 2 x 2."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.feature_dim = width
        layers: list[nn.Module] = []
        for inside, outside in pairwise([channels, 32, 64, width]):
            if layers:
                layers.append(nn.MaxPool2d(2))
            layers.append(nn.Conv2d(inside, outside, 3, padding=1, bias=False))
            layers += [nn.BatchNorm2d(outside), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        maps: Tensor = self.layers(x)
        return maps.mean((2, 3))


class Mlp(Backbone):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.feature_dim = width
        self.hidden1 = nn.Linear(inputs, width)
        self.hidden2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.hidden2(relu(self.hidden1(x.flatten(1)))))


class Torchvision(Backbone):
    """A torchvision classifier without its last layer.

    Grey images are shown to it as three equal channels, so that published weights fit; for any other number
    of channels its first convolution is made anew.
    """

    def __init__(self, name: str, channels: int, side: int) -> None:
        from torchvision import models  # its import takes seconds, which the other models need not wait for

        super().__init__()
        options: dict[str, Any] = {}
        if name.startswith("vit"):
            options = {"image_size": side}
        elif name.startswith("maxvit"):
            options = {"input_size": (side, side)}
        elif name in ("googlenet", "inception_v3"):
            options = {"aux_logits": False, "init_weights": True}
        # With one class, the classifier is the last layer with one output. SqueezeNet's is a convolution.
        self.net: nn.Module = models.get_model(name, weights=None, num_classes=1, **options)
        for layer, module in self.net.named_modules():
            if isinstance(module, nn.Linear) and module.out_features == 1:
                self.classifier, self.feature_dim = layer, module.in_features
            elif isinstance(module, nn.Conv2d) and module.out_channels == 1:
                self.classifier, self.feature_dim = layer, module.in_channels
        self.net.set_submodule(self.classifier, nn.Identity())
        if channels not in (1, 3):
            self._replace_stem(channels)

    def _replace_stem(self, channels: int) -> None:
        layer, old = next((n, m) for n, m in self.net.named_modules() if isinstance(m, nn.Conv2d))
        size, stride, padding = old.kernel_size, old.stride, old.padding
        bias = old.bias is not None
        new = nn.Conv2d(channels, old.out_channels, size, stride, padding, bias=bias)  # type: ignore[arg-type]
        self.net.set_submodule(layer, new)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == 1:
            x = x.expand(-1, 3, -1, -1)
        features: Tensor = self.net(x)
        return features.flatten(1)


def build(config: ModelConfig, channels: int, side: int) -> Backbone:
    """The backbone `config` asks for, for images of `channels` x `side` x `side`, freshly initialised."""
    net = _make(config, channels, side)
    norms = [(name, m) for name, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)]
    if config.norm == "local" and not norms:  # nothing would stay at the site, against the user's wish
        raise UsageError(f"model.norm = 'local' needs BatchNorm and {config.name} has none: use aggregate")
    for name, norm in norms:
        net.set_submodule(name, _group_norm(norm) if config.norm == "group" else _batch_norm(norm))
    _check(net, config, channels, side)
    if config.weights:
        _load(net, config)
    return net


def norm_names(module: nn.Module) -> frozenset[str]:
    """State-dict names of the parameters and floating-point buffers of all BatchNorm layers."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, kinds)]
    found = [f"{name}.{key}" for name, layer in layers for key in parts.tensors(layer)]
    return frozenset(name.removeprefix(".") for name in found)  # the module itself has no name


def _make(config: ModelConfig, channels: int, side: int) -> Backbone:
    name = config.name
    if name in RESNETS:
        return ResNet(channels, *RESNETS[name])
    if name == "mlp":
        return Mlp(channels * side * side, config.width)
    if name == "cnn":
        if side < CNN_SIDE:
            raise UsageError(f"model.name = 'cnn' takes no images of {side} x {side} pixels: use mlp")
        return Cnn(channels, config.width)
    from torchvision import models

    classifiers = [TORCHVISION + known for known in models.list_models(module=models)]
    if name not in classifiers:
        raise UsageError(
            f"model.name = {name!r} is not an image classifier: use mlp, cnn, {', '.join(RESNETS)} or "
            f"{TORCHVISION}NAME, such as {', '.join(_near(name, classifiers))}"
        )
    try:
        return Torchvision(name.removeprefix(TORCHVISION), channels, side)
    except (AssertionError, ValueError) as error:
        raise _unfit(config, channels, side, error) from None


def _near(name: str, known: list[str]) -> list[str]:
    bare = name.rpartition("/")[2]
    return sorted(known, key=lambda k: -SequenceMatcher(None, k.removeprefix(TORCHVISION), bare).ratio())[:4]


def _check(net: Backbone, config: ModelConfig, channels: int, side: int) -> None:
    """Run shapes, not numbers, through the net: it costs next to nothing and draws nothing."""
    shapes = {name: t.to("meta") for name, t in net.state_dict().items()}
    net.eval()
    try:
        f = functional_call(net, shapes, torch.empty(1, channels, side, side, device="meta"))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise _unfit(config, channels, side, error) from None
    net.train()
    assert f.shape == (1, net.feature_dim), f"{config.name}: features of shape {tuple(f.shape)}"


def _unfit(config: ModelConfig, channels: int, side: int, error: Exception) -> UsageError:
    reason = " ".join(str(error).split())
    images = f"{channels} x {side} x {side} images"
    return UsageError(f"model.name = {config.name!r} takes no {images} ({reason}): change it or data.size")


def _batch_norm(old: nn.BatchNorm2d) -> BatchNorm:
    new = BatchNorm(old.num_features, old.eps, old.momentum)
    new.load_state_dict(old.state_dict())
    return new


def _group_norm(old: nn.BatchNorm2d) -> nn.GroupNorm:
    """At most 32 groups of at least 4 channels: fewer say nothing about an image where a map is one pixel."""
    channels = old.num_features
    groups = max(g for g in range(1, 33) if channels % g == 0 and (g == 1 or channels // g >= 4))
    new = nn.GroupNorm(groups, channels)
    new.load_state_dict({"weight": old.weight, "bias": old.bias})
    return new


def _load(net: Backbone, config: ModelConfig) -> None:
    """Pretrained weights, named as published or as in our files; a classifier among them is passed over."""
    path = Path(config.weights)
    given, _ = parts.read(path, sealed=False)
    if any(name.startswith("backbone.") for name in given):  # a model of ours, with its head
        given = {name.removeprefix("backbone."): t for name, t in given.items() if name.startswith("backbone.")}
    values = {name.removeprefix("net."): t for name, t in given.items() if t.is_floating_point()}
    values = {name: t for name, t in values.items() if not name.startswith(f"{net.classifier}.")}
    live = {name.removeprefix("net."): t for name, t in parts.tensors(net).items()}
    try:
        parts.load(live, values)
    except ValueError as error:
        raise UserError(f"{path}: the weights do not fit model.name = {config.name!r}: {error}") from None
