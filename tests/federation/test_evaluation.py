"""What every model is judged by: against one image after the other, against stored parts and against the model files,
all loaded by hand into modules that were built for it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from client.store import Store
from common import metrics, model_file, models, parts
from common.config import Config, parse
from common.evaluation import FeatureCache, evaluate
from common.images import Images
from common.methods.method import Predictor
from common.model_file import Model
from common.parts import Tensors
from fedloge.federation import Federation, assemble, judge
from fedloge.simulate import simulate
from server import checkpoint
from tests.fakes import CLASSES, CPU, images, tiny

BATCH = 7
BY = (metrics.Groups("share", many=(0,), medium=(1, 2), few=(3,)),)
SMALL: dict[str, Any] = {
    "name": "small",
    "seed": 5,
    "data": {"source": "digits", "largest": 60, "imbalance": 0.2},
    "partition": {"clients": 4, "alpha": 0.3, "local_test": 1500},
    "model": {"name": "mlp", "width": 24},
    "frame": {"norm": 3.0, "sparsity": 0.3},
    "train": {"epochs": 2, "batch": 8, "lr": 0.05},
    "federation": {"rounds": 4},
    "evaluation": {"every": 2},
}


# --- many heads, one pass --------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Random features of small images; it counts its calls and the images of each."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(64, 6, generator=torch.Generator().manual_seed(seed)) / 8)
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        self.seen.append(len(x))
        return torch.relu(x.flatten(1) @ self.get_buffer("weight"))


def head(seed: int) -> nn.Linear:
    made = nn.Linear(6, len(CLASSES))
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=rng))
    return made


@pytest.fixture
def test() -> Images:
    rng = torch.Generator().manual_seed(1)
    return images(torch.randint(0, len(CLASSES), (45,), generator=rng), seed=2)


def one_by_one(predictor: Predictor, test: Images, index: Tensor, support: Tensor | None = None) -> list[int]:
    """The classes said of the images of `index`, each image on its own."""
    said = []
    for i in index.tolist():
        x, _ = next(iter(test.batches(torch.tensor([i]), 1, CPU)))
        logits = predictor.head(predictor.features(x))[0].tolist()
        allowed = [c for c in range(len(logits)) if support is None or bool(support[c])]
        said.append(max(allowed, key=lambda c: logits[c]))
    return said


def agrees(found: dict[str, Any], said: list[int], y: list[int]) -> bool:
    pairs = list(zip(said, y, strict=True))
    recall = [[s == c for s, true in pairs if true == c] for c in range(len(CLASSES))]
    assert found["samples"] == len(y)
    assert found["per_class"] == [pytest.approx(sum(hits) / len(hits)) if hits else None for hits in recall]
    return bool(found["top1"] == pytest.approx(sum(s == true for s, true in pairs) / len(pairs)))


INDICES = {
    "all": torch.arange(45),
    "backwards": torch.arange(44, -1, -1),
    "some": torch.tensor([40, 3, 17, 17, 29, 0, 44, 8, 31]),
    "one": torch.tensor([23]),
}


@pytest.mark.parametrize("shared", [True, False], ids=["cached", "not cached"])
@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_every_predictor_says_of_every_image_what_it_says_of_it_alone(
    test: Images, index: Tensor, shared: bool
) -> None:
    backbone, own = Counting(1), Counting(2)
    predictors = {
        "a": Predictor(backbone, head(1)),
        "b": Predictor(backbone, head(2)),
        "own": Predictor(own, head(1)),
    }
    cache = FeatureCache(test, CPU, BATCH, backbone if shared else None)
    found = evaluate(predictors, cache, index, BY)
    assert list(found) == list(predictors)
    for net in (backbone, own):
        net.eval()
    for name, predictor in predictors.items():
        assert agrees(found[name], one_by_one(predictor, test, index), test.labels[index].tolist())


def test_rows_are_those_of_the_index(test: Images) -> None:
    """To the value: the logits that are measured, for two indices on the same cache."""
    backbone, psi = Counting(1), head(1)
    cache = FeatureCache(test, CPU, BATCH, backbone)
    everything = torch.cat([x for x, _ in test.batches(torch.arange(45), 45, CPU)])
    for index in INDICES.values():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("common.evaluation.measure", lambda logits, y, by: {"logits": logits, "y": y, "by": by})
            measured = evaluate({"psi": Predictor(backbone, psi)}, cache, index, BY)["psi"]
        assert torch.allclose(measured["logits"], psi(backbone(everything[index])), atol=1e-5)
        assert torch.equal(measured["y"], test.labels[index])
        assert measured["by"] == BY


def test_bf16_is_for_the_backbone_alone(test: Images) -> None:
    """What is kept of it is fp32 again, and close to what fp32 gives."""
    backbone = Counting(1)
    exact, half = (FeatureCache(test, CPU, BATCH, backbone, precision) for precision in ("fp32", "bf16"))
    index = INDICES["some"]
    features = half.of(backbone, index)
    assert features.dtype == torch.float32
    assert torch.equal(features, features.bfloat16().float())
    assert torch.allclose(features, exact.of(backbone, index), rtol=0.05, atol=0.05)


def test_an_own_backbone_runs_once_for_all_its_heads(test: Images) -> None:
    own = Counting(2)
    cache = FeatureCache(test, CPU, BATCH, None)
    evaluate({str(n): Predictor(own, head(n)) for n in range(3)}, cache, INDICES["some"], BY)
    assert sum(own.seen) == len(INDICES["some"])


def test_features_of_the_shared_backbone_are_computed_once_for_all_heads_and_sites(test: Images) -> None:
    backbone = Counting(1)
    cache = FeatureCache(test, CPU, BATCH, backbone)
    predictors = {str(n): Predictor(backbone, head(n)) for n in range(5)}
    for site in INDICES.values():
        evaluate(predictors, cache, site, BY)
    first = len(backbone.seen)
    assert sum(backbone.seen) == len(torch.cat(list(INDICES.values())).unique())  # each image once, no other
    evaluate(predictors, FeatureCache(test, CPU, BATCH, backbone), INDICES["one"], BY)
    assert backbone.seen[first:] == [1]  # a new evaluation computes them anew: it may have changed


def test_a_backbone_of_ones_own_is_computed_on_its_own_images_every_time(test: Images) -> None:
    """The workspace's module is the same for every site but its values are not: nothing of it may be remembered."""
    backbone, own = Counting(1), Counting(2)
    cache = FeatureCache(test, CPU, BATCH, backbone)
    predictors = {"shared": Predictor(backbone, head(1)), "own": Predictor(own, head(1))}
    first = evaluate(predictors, cache, INDICES["some"], BY)
    assert own.seen == [7, 2]
    own.get_buffer("weight").copy_(Counting(3).get_buffer("weight"))
    second = evaluate(predictors, cache, INDICES["some"], BY)
    assert own.seen == [7, 2, 7, 2]
    assert first["shared"] == second["shared"]
    assert first["own"]["ece"] != second["own"]["ece"]


@pytest.mark.parametrize("support", [(True, True, False, True), (False, False, True, False), (True,) * 4], ids=str)
def test_classes_never_trained_on_are_out_of_the_running(test: Images, support: tuple[bool, ...]) -> None:
    backbone = Counting(1)
    predictor = Predictor(backbone, head(3))
    index, allowed = INDICES["all"], torch.tensor(support)
    found = evaluate({"a": predictor}, FeatureCache(test, CPU, BATCH, backbone), index, BY, allowed)["a"]
    backbone.eval()
    said = one_by_one(predictor, test, index, allowed)
    assert agrees(found, said, test.labels.tolist())
    assert {c for c in range(4) if found["per_class"][c]} <= {c for c in range(4) if support[c]}
    if not all(support):
        assert said != one_by_one(predictor, test, index)


def test_without_images_there_is_no_entry(test: Images) -> None:
    backbone, own = Counting(1), Counting(2)
    cache = FeatureCache(test, CPU, BATCH, backbone)
    nothing = torch.empty(0, dtype=torch.int64)
    assert evaluate({"a": Predictor(backbone, head(1)), "own": Predictor(own, head(1))}, cache, nothing, BY) == {}
    assert evaluate({}, cache, INDICES["all"], BY) == {}
    assert backbone.seen == own.seen == []


# --- what the sites and the server hold, loaded by hand --------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Federation]]:
    """Folder of a finished run of a method, and its federation as it is assembled anew; every method is run once."""
    made: dict[str, tuple[Path, Federation]] = {}

    def run(method: str) -> tuple[Path, Federation]:
        if method not in made:
            folder = tmp_path_factory.mktemp(method)
            simulate(small(method), folder, lambda _: None)
            made[method] = folder, assemble(small(method), folder)
        return made[method]

    return run


def small(method: str) -> Config:
    return parse({**SMALL, "method": {"name": method}})


def server_parts(folder: Path) -> dict[str, Tensors]:
    found = checkpoint.latest(folder / "checkpoints")
    assert found is not None
    assert found.state.round == 4
    return found.state.parts


def site_parts(folder: Path, name: str) -> dict[str, Tensors]:
    return Store(folder / "sites" / name).load(before=5) or {}


def built(config: Config, backbone: Tensors, head: Tensors, channels: int = 1, classes: int = 10) -> Predictor:
    """A classifier of new modules that hold exactly these tensors."""
    features = models.build(config.model, channels, 8)
    missing, unexpected = features.load_state_dict(backbone, strict=False)
    assert unexpected == []
    assert all(name.endswith("num_batches_tracked") for name in missing)
    linear = nn.Linear(int(features.feature_dim), classes, bias="bias" in head)
    linear.load_state_dict(head)
    return Predictor(features.eval(), linear)


@torch.no_grad()
def top1(predictor: Predictor, test: Images, index: Tensor, support: Tensor | None = None) -> float:
    hits = 0
    for x, y in test.batches(index, 500, CPU):
        logits = predictor(x)
        if support is not None:
            logits[:, ~support] = -torch.inf
        hits += int((logits.argmax(1) == y).sum())
    return hits / len(index)


def support(federation: Federation, name: str) -> Tensor:
    """Classes of the images the site trains on."""
    labels = federation.images.labels[federation.sites[name].train_index]
    return torch.tensor([bool((labels == c).any()) for c in range(len(federation.images.classes))])


def last(folder: Path) -> dict[str, Any]:
    evaluation: dict[str, Any] = json.loads((folder / "metrics.json").read_text())["evaluations"][-1]
    assert evaluation["round"] == 4
    return evaluation


def fedloge_personal(server: dict[str, Tensors], site: dict[str, Tensors]) -> tuple[Tensors, Tensors]:
    """phi + psi_k, from the published formulas: row c of psi times the length of row c of phi."""
    psi, phi = server["global_head"], site["local_head"]
    weight = phi["weight"] + psi["weight"] * phi["weight"].norm(dim=1, keepdim=True)
    return server["backbone"], {"weight": weight, "bias": phi["bias"] + psi["bias"]}


PERSONAL: dict[str, tuple[str, Callable[..., tuple[Tensors, Tensors]]]] = {
    "fedloge": ("phi+psi_k", fedloge_personal),
    "fedper": ("local", lambda server, site: (server["backbone"], site["local_head"])),
    "ditto": ("own", lambda _, site: (site["own_backbone"], site["own_head"])),
    "local": ("local", lambda _, site: (site["backbone"], site["local_head"])),
}


@pytest.mark.parametrize("method", PERSONAL)
def test_every_site_is_judged_by_the_parts_it_stored(
    finished: Callable[[str], tuple[Path, Federation]], method: str
) -> None:
    folder, federation = finished(method)
    name, make = PERSONAL[method]
    judged = last(folder)["personal"]
    assert next(iter(judged)) == name
    by_hand = {}
    for site, index in federation.judged_on.items():
        assert len(index) > 20
        predictor = built(small(method), *make(server_parts(folder), site_parts(folder, site)))
        by_hand[site] = top1(predictor, federation.test, index, support(federation, site))
    assert judged[name]["per_site"] == by_hand
    assert judged[name]["top1"] == pytest.approx(sum(by_hand.values()) / 4)
    assert min(by_hand.values()) > 0.3  # it has learned something, so other parts would not do
    assert len(set(by_hand.values())) > 1


def test_the_global_head_is_judged_at_a_site_among_the_classes_of_that_site(
    finished: Callable[[str], tuple[Path, Federation]],
) -> None:
    folder, federation = finished("fedloge")
    held = server_parts(folder)
    psi = built(small("fedloge"), held["backbone"], held["global_head"])
    judged = last(folder)["personal"]["psi"]["per_site"]
    sites = federation.judged_on.items()
    assert judged == {name: top1(psi, federation.test, index, support(federation, name)) for name, index in sites}
    assert judged != {name: top1(psi, federation.test, index) for name, index in sites}


@pytest.mark.parametrize("method", PERSONAL)
def test_judging_again_from_the_files_of_a_run_gives_its_last_evaluation(
    finished: Callable[[str], tuple[Path, Federation]], method: str
) -> None:
    folder, federation = finished(method)
    found = checkpoint.latest(folder / "checkpoints")
    assert found is not None
    assert {"round": 4, **judge(federation, federation.task.config.method, found.state)} == last(folder)


@pytest.mark.parametrize(("method", "predictor"), [("fedloge", "psi"), ("ditto", "head")])
def test_the_generic_model_is_judged_on_all_test_images(
    finished: Callable[[str], tuple[Path, Federation]], method: str, predictor: str
) -> None:
    folder, federation = finished(method)
    held = server_parts(folder)
    by_hand = built(small(method), held["backbone"], held["global_head"])
    judged = last(folder)["generic"][predictor]
    assert judged["samples"] == len(federation.test)
    assert judged["top1"] == top1(by_hand, federation.test, torch.arange(len(federation.test)))


@pytest.mark.parametrize("method", ["fedper", "local"])
def test_where_no_head_belongs_to_everybody_there_is_no_generic_model(
    finished: Callable[[str], tuple[Path, Federation]], method: str
) -> None:
    folder, _ = finished(method)
    assert last(folder)["generic"] == {}
    assert not (folder / "models" / "generic.safetensors").exists()


@pytest.mark.parametrize("method", ["fedloge", "fedper"])
def test_with_batchnorm_at_the_sites_each_is_judged_with_its_own(method: str) -> None:
    """ResNet-8: convolutions of the server, scales and statistics of the site."""
    small = tiny({"name": method}, model={"name": "resnet8", "norm": "local"}, train={"epochs": 4, "lr": 0.1})
    reports = small.run(2)
    state = reports[-1].state
    y = torch.arange(48) % 4
    test = images(torch.cat([y, y]), seed=0).take(torch.arange(48, 96))  # the pictures it was trained on, other noise
    federation = Federation(
        task=small.task, net=small.net, device=CPU, images=next(iter(small.sites.values())).images, test=test,
        sites=small.sites, judged_on=dict.fromkeys(small.sites, torch.arange(48)), global_index=torch.arange(48),
        groups=BY,
    )  # fmt: skip
    judged = judge(federation, small.method, state)
    assert judged["generic"] == {}
    assert judged["never_trained"] == []
    name, make = PERSONAL[method]
    by_hand: dict[str, float] = {}
    borrowed: dict[str, float] = {}
    stored = {site: Store(Path(small.folder.name) / site).load(before=3) or {} for site in small.sites}
    for site, held in stored.items():
        allowed = support(federation, site)
        for norms, found in ((held["norms"], by_hand), (stored["south"]["norms"], borrowed)):
            backbone, head = make({**state.parts, "backbone": {**state.parts["backbone"], **norms}}, held)
            predictor = built(small.task.config, backbone, head, classes=4)
            found[site] = top1(predictor, test, torch.arange(48), allowed)
    assert judged["personal"][name]["per_site"] == by_hand
    assert by_hand != borrowed


# --- the model files -------------------------------------------------------------------------------------------------


def top1_of(model: Model, test: Images, index: Tensor) -> float:
    hits = sum(int((model.logits(x).argmax(1) == y).sum()) for x, y in test.batches(index, 500, CPU))
    return hits / len(index)


@pytest.mark.parametrize("method", ["fedloge", "fedloge+", "fedetf", "ditto", "fedavg-ft"])
def test_the_generic_file_is_the_model_that_was_judged(
    finished: Callable[[str], tuple[Path, Federation]], method: str
) -> None:
    folder, federation = finished(method)
    model = model_file.load(folder / "models" / "generic.safetensors")
    assert (model.round, model.images.classes, model.site) == (4, tuple("0123456789"), "")
    judged = last(folder)["generic"]
    assert next(iter(judged)) == model.predictor
    by_hand = top1_of(model, federation.test, torch.arange(len(federation.test)))
    assert judged[model.predictor]["top1"] == by_hand
    assert by_hand > 0.3


@pytest.mark.parametrize("site", ["site-001", "site-003"])
@pytest.mark.parametrize("method", ["fedloge", "fedloge+", "fedetf", "ditto", "fedavg-ft", "fedper", "local"])
def test_personal_files_are_the_models_that_were_judged(
    finished: Callable[[str], tuple[Path, Federation]], method: str, site: str
) -> None:
    folder, federation = finished(method)
    path = folder / "models" / "personal" / f"{site}.safetensors"
    model, (_, about) = model_file.load(path), parts.read(path)
    assert (about["backbone"] == "own") == (method in ("ditto", "fedper", "local"))
    assert (model.round, model.site) == (4, site)
    judged = last(folder)["personal"]
    assert next(iter(judged)) == model.predictor
    assert model.meant.equal(support(federation, site))
    assert judged[model.predictor]["per_site"][site] == top1_of(model, federation.test, federation.judged_on[site])
