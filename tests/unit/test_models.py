"""Backbones: shapes, sizes, norm policies, published weights, and what is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import get_model

from common import models, parts
from common.config import ModelConfig, parse
from common.errors import UsageError, UserError
from common.net import Task, build_on
from common.seeds import isolated

SMALL = ("resnet8", "resnet20", "cnn", "mlp")
OWN = (*SMALL, "resnet18", "resnet34")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def build(name: str, channels: int = 3, side: int = 32, **keys) -> models.Backbone:
    return models.build(ModelConfig(name=name, **keys), channels, side)


def images(n: int, channels: int = 3, side: int = 32) -> Tensor:
    return torch.randn(n, channels, side, side, generator=torch.Generator().manual_seed(1))


def kinds(net: nn.Module) -> set[type]:
    return {type(m) for m in net.modules() if isinstance(m, nn.BatchNorm2d | nn.GroupNorm)}


@pytest.mark.parametrize(
    ("name", "dim", "parameters"),
    [
        ("resnet8", 64, 77_392),
        ("resnet20", 64, 271_824),
        ("resnet18", 512, 11_168_832),
        ("resnet34", 512, 21_276_992),
        ("cnn", 48, 9 * (3 * 32 + 32 * 64 + 64 * 48) + 2 * (32 + 64 + 48)),
        ("mlp", 48, 3072 * 48 + 48 + 48 * 48 + 48),
    ],
)
def test_size(name: str, dim: int, parameters: int) -> None:
    net = build(name, width=48)
    assert net.feature_dim == dim
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert net.training


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("norm", ["aggregate", "group"])
def test_features_have_their_shape_are_not_negative_and_train_everything(name: str, norm: str) -> None:
    net = build(name, norm=norm)
    f = net(images(3))
    assert f.shape == (3, net.feature_dim)
    assert f.min() >= 0
    assert f.max() > 0
    f.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_tiny_grey_images_and_memory_layout(name: str) -> None:
    net = build(name, 1, 8).eval()
    x = images(2, 1, 8)
    expected = net(x)
    assert expected.shape == (2, 64)
    turned = net.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(turned, expected)


def test_resnet_is_torchvisions_but_for_stem_and_classifier() -> None:
    """The same function of the same weights, so every layer is where it belongs."""
    theirs = get_model("resnet18", weights=None)
    theirs.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    theirs.maxpool = nn.Identity()
    theirs.fc = nn.Identity()
    ours = build("resnet18")
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(images(2)), theirs(images(2)))


def test_initial_values_depend_on_the_stream_alone() -> None:
    def one() -> dict[str, Tensor]:
        with isolated(1, "init", "backbone"):
            return build("resnet8").state_dict()

    first = one()
    torch.rand(7)
    for name, t in one().items():
        assert torch.equal(t, first[name])


def test_norm_aggregate_and_local_keep_batch_norm() -> None:
    for norm in ("aggregate", "local"):
        assert kinds(build("resnet8", norm=norm)) == {models.BatchNorm}
        assert kinds(build("cnn", norm=norm)) == {models.BatchNorm}


@pytest.mark.parametrize("name", ["resnet18", "resnet20", "cnn", "torchvision/mobilenet_v3_small"])
def test_norm_group_leaves_no_batch_norm(name: str) -> None:
    net = build(name, norm="group")
    assert kinds(net) == {nn.GroupNorm}
    assert models.norm_names(net) == frozenset()
    assert not any("running" in key for key in net.state_dict())
    for layer in net.modules():
        if isinstance(layer, nn.GroupNorm):
            assert layer.num_groups <= 32
            assert layer.num_channels // layer.num_groups >= 4


def test_norm_group_makes_features_independent_of_the_batch() -> None:
    net = build("resnet8", norm="group")
    torch.testing.assert_close(net(images(4))[:1], net(images(4)[:1]))


def test_norm_group_of_odd_widths() -> None:
    groups = {c: models._group_norm(nn.BatchNorm2d(c)).num_groups for c in (1, 7, 8, 16, 24, 64, 512, 912)}
    assert groups == {1: 1, 7: 1, 8: 2, 16: 4, 24: 6, 64: 16, 512: 32, 912: 24}


def test_norm_names_are_all_tensors_of_batch_norm_that_travel() -> None:
    net = build("resnet8", norm="local")
    names = models.norm_names(net)
    assert len(names) == 4 * 9  # 1 stem, 2 a block, 2 projections
    assert {"bn1.running_var", "layer1.0.bn2.weight", "layer3.0.downsample.1.bias"} <= names
    assert not any("num_batches" in name for name in names)
    assert names <= parts.tensors(net).keys()
    assert not any(name in names for name in net.state_dict() if "conv" in name)
    assert models.norm_names(nn.BatchNorm1d(2)) == {"weight", "bias", "running_mean", "running_var"}
    assert models.norm_names(build("mlp")) == frozenset()


@pytest.mark.parametrize("name", ["mlp", "torchvision/squeezenet1_1"])
def test_norm_local_without_batch_norm_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"model\.norm"):
        build(name, 3, 64, norm="local")


def test_batch_of_one_over_one_pixel_uses_the_moving_statistics() -> None:
    norm, torchs = models.BatchNorm(3), nn.BatchNorm2d(3)
    for x in (images(4, 3, 2), images(4, 3, 1), images(1, 3, 2)):
        assert torch.equal(norm(x), torchs(x))
    before = {key: t.clone() for key, t in norm.state_dict().items()}
    lone = images(1, 3, 1).requires_grad_()
    y = norm(lone)
    assert torch.equal(y, torchs.eval()(lone))
    y.sum().backward()
    assert lone.grad is not None
    assert lone.grad.abs().min() > 0
    assert all(torch.equal(t, before[key]) for key, t in norm.state_dict().items())


@pytest.mark.parametrize("norm", ["aggregate", "group"])
@pytest.mark.parametrize(
    ("name", "side"),
    [("resnet8", 2), ("resnet18", 8), ("cnn", 8), ("mlp", 8), ("torchvision/mobilenet_v3_small", 32)],
)
def test_batch_of_one_trains(name: str, side: int, norm: str) -> None:
    net = build(name, 3, side, norm=norm)
    f = net(images(1, 3, side))
    f.sum().backward()
    assert f.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize(
    ("name", "dim", "side"),
    [
        ("resnet50", 2048, 32),
        ("convnext_tiny", 768, 32),
        ("vit_b_16", 768, 32),
        ("efficientnet_b0", 1280, 32),
        ("mobilenet_v3_small", 1024, 32),
        ("densenet121", 1024, 32),
        ("swin_t", 768, 32),
        ("regnet_y_400mf", 440, 32),
        ("shufflenet_v2_x0_5", 1024, 32),
        ("squeezenet1_1", 512, 32),
        ("googlenet", 1024, 32),
        ("inception_v3", 2048, 75),
    ],
)
def test_torchvision(name: str, dim: int, side: int, recwarn) -> None:
    net = build(f"torchvision/{name}", 3, side)
    assert net.feature_dim == dim
    f = net(images(2, 3, side))
    assert f.shape == (2, dim)
    assert f.std() > 0
    assert not recwarn.list


def test_torchvision_takes_other_channels() -> None:
    net = build("torchvision/mobilenet_v3_small", 1).eval()
    grey = images(2, 1)
    assert net.net.get_submodule("features.0.0").in_channels == 3
    assert torch.equal(net(grey), net(grey.repeat(1, 3, 1, 1)))
    for name in ("mobilenet_v3_small", "vit_b_32", "densenet121"):
        net = build(f"torchvision/{name}", 5)
        assert net(images(2, 5)).shape == (2, net.feature_dim)


def refusal(name: str, channels: int = 3, side: int = 32, **keys) -> str:
    with pytest.raises(UserError) as refused:
        build(name, channels, side, **keys)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("torchvision/resnet_50", "torchvision/resnet50"),
        ("resnet50", "torchvision/resnet50"),
        ("ResNet18", "resnet18"),
        ("torchvision/fcn_resnet50", "torchvision/resnet50"),
        ("torchvision/fasterrcnn_mobilenet_v3_large_fpn", "torchvision/mobilenet_v3_large"),
        ("torchvision/swin3d_t", "torchvision/swin_t"),
        ("torchvision/quantized_googlenet", "torchvision/googlenet"),
        ("torchvision/", "torchvision/"),
        ("", "resnet20"),
    ],
)
def test_other_names_are_refused_with_near_ones(name: str, near: str) -> None:
    message = refusal(name)
    assert f"model.name = {name!r}" in message
    assert near in message.partition(": use ")[2]


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("torchvision/vit_b_16", 30),
        ("torchvision/maxvit_t", 32),
        ("torchvision/alexnet", 32),
        ("torchvision/densenet121", 8),
        ("cnn", 7),
    ],
)
def test_images_a_model_cannot_take_are_refused(name: str, side: int) -> None:
    message = refusal(name, side=side)
    assert f"model.name = {name!r} takes no " in message
    assert str(side) in message


def test_the_check_of_shapes_leaves_no_trace() -> None:
    state = torch.get_rng_state()
    net = build("resnet8")
    with torch.random.fork_rng():
        torch.set_rng_state(state)
        models._make(ModelConfig(name="resnet8"), 3, 32)
        drawn = torch.get_rng_state()
    assert torch.equal(torch.get_rng_state(), drawn)
    assert torch.equal(net.bn1.running_mean, torch.zeros(16))
    assert net.bn1.num_batches_tracked == 0


@pytest.mark.parametrize("name", ["resnet8", "torchvision/mobilenet_v3_small"])
def test_weights_of_our_own_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / "backbone.safetensors"
    trained = build(name)
    parts.save(path, parts.tensors(trained), {"round": "3"})
    net = build(name, weights=str(path))
    assert parts.digest(parts.tensors(net)) == parts.digest(parts.tensors(trained))


def test_weights_as_published_bring_a_classifier_and_counters(tmp_path: Path) -> None:
    path = tmp_path / "published.safetensors"
    theirs = get_model("mobilenet_v3_small", weights=None)
    save_file(theirs.state_dict(), path)
    net = build("torchvision/mobilenet_v3_small", weights=str(path)).eval()
    features: list[Tensor] = []
    theirs.classifier[3].register_forward_pre_hook(lambda _, given: features.append(given[0]))
    theirs.eval()(images(2))
    torch.testing.assert_close(net(images(2)), features[0])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"conv1.weight": torch.zeros(16, 3, 7, 7)}, "conv1.weight has shape (16, 3, 7, 7) instead of (16, 3, 3, 3)"),
        ({"conv1.weight": None}, "conv1.weight is missing"),
        ({"head.weight": torch.zeros(2)}, "head.weight is not expected"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, change, complaint: str) -> None:
    path = tmp_path / "w.safetensors"
    state = {**build("resnet8").state_dict(), **change}
    save_file({name: t for name, t in state.items() if t is not None}, path)
    message = refusal("resnet8", weights=str(path))
    assert message == f"{path}: the weights do not fit model.name = 'resnet8': {complaint}"


def test_weights_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    assert f"{path}: cannot be read" in refusal("mlp", weights=str(path))
    path.write_bytes(b"no weights")
    assert f"{path}: is damaged or not a safetensors file" in refusal("mlp", weights=str(path))


def test_a_stowed_net_has_no_values_and_then_room_for_new_ones() -> None:
    task = Task(parse({"model": {"name": "resnet8"}}), ("a", "b"), 3, 32)
    net = build_on(torch.device("cpu"), task.config.method, task)
    before = {part: parts.snapshot(values) for part, values in net.parts().items()}
    strides = [t.stride() for t in net.parameters()]
    with net.stowed():
        assert not any(t.numel() for t in [*net.parameters(), *net.buffers()])
    net.load(before)
    assert [t.stride() for t in net.parameters()] == strides
    assert all(torch.equal(t, before[part][name]) for part, values in net.parts().items() for name, t in values.items())
