"""Facts the papers state about their methods, and what is built here to the letter."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from client.train import train
from common import frame
from common.engine import run_phase
from common.methods.apfl import APFL, mixed
from common.methods.creff import BATCH, CReFF, class_gradients, distance, gradients
from common.methods.fedavg import PROBES
from common.methods.fedloge_plus import loss as plus_loss
from common.methods.fedrod import rod_loss
from common.methods.method import ServerState, Site
from common.net import Net
from common.parts import Tensors, snapshot
from common.seeds import generator, isolated
from server import rounds
from server.fleet import LocalFleet
from tests.fakes import CPU, Tiny, tiny
from tests.unit.test_methods import SMALL_CREFF, everything, first_order, same

torch.set_num_threads(1)


def state(method: str, clip: float = 0.0, **knobs: Any) -> ServerState:
    return tiny({"name": method, **knobs}, train={"clip": clip}).run(2)[-1].state


def only(parts: dict[str, Tensors], *names: str) -> dict[str, Tensors]:
    return {name: parts[name] for name in names}


def at_site(federation: Tiny, name: str = "north") -> tuple[Net, Site]:
    federation.sites[name].prepare(federation.state.parts, before=1)
    return federation.net, federation.sites[name].site(1)


def gap(net: Net, ours: tuple[str, str], theirs: dict[str, Tensors]) -> float:
    squares = 0.0
    for part, other in zip(ours, ("backbone", "global_head"), strict=True):
        for name, parameter in net[part].named_parameters():
            squares += float((parameter.detach() - theirs[other][name]).square().sum())
    return math.sqrt(squares)


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize(
    ("method", "knobs"),
    [
        ("fedavg-ft", {}),
        ("fedavg", {"probes": True}),
        ("fedprox", {"mu": 0.0}),
        ("ditto", {}),
        ("apfl", {}),
        ("creff", SMALL_CREFF),
    ],
)
def test_the_global_model_is_fedavgs_to_the_bit(method: str, knobs: dict[str, Any], clip: float) -> None:
    """Also where gradients are clipped: what else a phase trains takes nothing from them."""
    expected, found = state("fedavg", clip).parts, state(method, clip, **knobs).parts
    assert same(only(expected, "backbone", "global_head"), only(found, "backbone", "global_head"))


def test_where_no_simplex_has_room_fedloge_plus_trains_what_fedavg_does() -> None:
    """A simplex of four classes needs three dimensions."""
    plus, average = (tiny({"name": n}, model={"width": 2}).run(2)[-1].state.parts for n in ("fedloge+", "fedavg"))
    assert same(only(plus, "backbone", "global_head"), only(average, "backbone", "global_head"))
    assert "frame" not in plus
    assert "frame" in tiny({"name": "fedloge+"}, model={"width": 3}).state.parts


@pytest.mark.parametrize("method", ["fedprox", "fedlc", "balanced"])
def test_probes_change_nothing_else(method: str) -> None:
    plain, probed = state(method).parts, state(method, probes=True).parts
    assert PROBES.keys() <= probed.keys()
    assert same(plain, only(probed, *plain))


def test_the_personal_head_of_fedloge_plus_is_stable_however_long_features_are() -> None:
    """FedRoD's is not: on features a hundred times as long its loss grows instead."""
    losses = {}
    for name, step in (("fedrod", rod_loss), ("fedloge+", plus_loss)):
        federation = tiny({"name": name})
        net, site = at_site(federation)
        given = federation.method.phases(net, site)[0].given
        (x, y), *_ = site.batches(0, 0)
        long = net.features(x).detach() * 100
        net.features = lambda _, f=long: f  # type: ignore[method-assign]
        head = net["local_head"]
        optimizer = torch.optim.SGD(head.parameters(), lr=0.03, momentum=0.5)
        curve = []
        for _ in range(60):
            optimizer.zero_grad()
            step(net, x, y, given).backward()
            optimizer.step()
            with torch.no_grad():
                fixed = net["global_head" if name == "fedrod" else "frame"](long)
                curve.append(float(F.cross_entropy(fixed + head(long), y)))
        losses[name] = curve
    assert losses["fedloge+"][-1] < 0.7 * losses["fedloge+"][0]
    assert max(losses["fedloge+"]) <= losses["fedloge+"][0] * 1.01
    assert max(losses["fedrod"]) > 1.1 * losses["fedrod"][0]


def test_fedrods_generic_model_is_balanced_softmax() -> None:
    balanced, fedrod = state("balanced").parts, state("fedrod").parts
    assert same(balanced, fedrod)


def test_fedper_fedrep_and_fedbabu_are_not_fedavg() -> None:
    fedavg = state("fedavg").parts
    for method in ("fedper", "fedrep", "fedbabu", "fedlc", "balanced", "fedetf", "fedloge"):
        assert not same(only(fedavg, "backbone"), only(state(method).parts, "backbone")), method


# FedProx


def test_fedprox_stays_nearer_the_received_model() -> None:
    distances = []
    for mu in (0.0, 1.0, 10.0):
        federation = tiny({"name": "fedprox", "mu": mu})
        net, site = at_site(federation)
        train(net, federation.method, site)
        distances.append(gap(net, ("backbone", "global_head"), federation.state.parts))
    assert distances[0] > distances[1] > distances[2] > 0


def test_fedprox_gradient_is_mu_times_the_distance() -> None:
    federation, plain = tiny({"name": "fedprox", "mu": 0.5}), tiny({"name": "fedavg"})
    gradients = []
    x, y = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    for f in (federation, plain):
        net, site = at_site(f)
        (phase,) = f.method.phases(net, site)
        net.train_only(phase.train)
        head = net["global_head"]
        assert isinstance(head, nn.Linear)
        with torch.no_grad():
            head.weight += 0.25
        phase.loss(net, x, y, phase.given).backward()
        gradients.append(head.weight.grad)
    torch.testing.assert_close(gradients[0] - gradients[1], torch.full_like(gradients[0], 0.5 * 0.25))


# FedRep, FedBABU


def test_fedrep_trains_the_head_on_the_received_features() -> None:
    federation = tiny({"name": "fedrep", "head_epochs": 2})
    net, site = at_site(federation)
    phase, _ = federation.method.phases(net, site)
    head = copy.deepcopy(net["local_head"])
    run_phase(net, phase, site, 0)
    net["backbone"].eval()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.05, momentum=0.5)
    for epoch in range(2):
        for x, y in site.batches(0, epoch):
            optimizer.zero_grad()
            F.cross_entropy(head(net.features(x).detach()), y).backward()
            optimizer.step()
    trained = net["local_head"]
    assert isinstance(trained, nn.Linear)
    assert isinstance(head, nn.Linear)
    torch.testing.assert_close(trained.weight, head.weight)


def test_fedbabus_head_never_moves_not_even_by_weight_decay() -> None:
    federation = tiny({"name": "fedbabu"}, train={"weight_decay": 0.1})
    start = snapshot(federation.state.parts["global_head"])
    after = federation.run(3)[-1].state.parts
    assert same({"head": start}, {"head": after["global_head"]})
    assert same({"head": start}, {"head": everything(federation)["global_head"]})


@pytest.mark.parametrize(("knob", "own_backbone"), [("full", True), ("head", False)])
def test_fedbabu_tunes_what_it_says(knob: str, own_backbone: bool) -> None:
    federation = tiny({"name": "fedbabu", "tune": knob})
    net, site = at_site(federation)
    tuned = federation.method.personal(net, site)["tuned"]
    assert (tuned.features is not net["backbone"]) == own_backbone
    assert isinstance(tuned.head, nn.Linear)
    assert not tuned.head.weight.equal(federation.state.parts["global_head"]["weight"])


# FedBN


def test_fedbn_keeps_batchnorm_at_the_site() -> None:
    federation = tiny({"name": "fedbn"}, model={"norm": "local"})
    reports = federation.run(2)
    assert not any("running" in name for name in reports[-1].state.parts["backbone"])
    kept = [site.store.load(before=9)["norms"] for site in federation.sites.values()]  # type: ignore[index]
    assert any("running_mean" in name for name in kept[0])
    assert not same({"norms": kept[0]}, {"norms": kept[1]})


# Ditto


def test_ditto_starts_from_the_first_global_model_and_goes_on_from_its_own() -> None:
    federation = tiny({"name": "ditto"})
    site = federation.sites["north"]
    site.prepare(federation.state.parts, before=1)
    assert gap(federation.net, ("own_backbone", "own_head"), federation.state.parts) == 0
    state = federation.run(1)[-1].state
    kept = site.store.load(before=2)
    site.prepare(state.parts, before=2)
    assert same(kept or {}, only(everything(federation), "own_backbone", "own_head"))
    assert gap(federation.net, ("own_backbone", "own_head"), state.parts) > 0


def test_dittos_lambda_pulls_to_the_received_model() -> None:
    distances = []
    for lam in (0.0, 1.0, 10.0):
        federation = tiny({"name": "ditto", "lam": lam})
        net, site = at_site(federation)
        train(net, federation.method, site)
        distances.append(gap(net, ("own_backbone", "own_head"), federation.state.parts))
    assert distances[0] > distances[1] > distances[2] > 0


# APFL


def test_apfls_gradients_are_the_papers() -> None:
    """Of v: alpha grad f(mixture). Of alpha: <v - w, grad f(mixture)>, times alpha (1 - alpha) for the sigmoid."""
    federation = tiny({"name": "apfl", "alpha": 0.3})
    net, site = at_site(federation)
    with torch.no_grad():
        for v in [*net["own_backbone"].parameters(), *net["own_head"].parameters()]:
            v.add_(torch.randn(v.shape, generator=torch.Generator().manual_seed(1)), alpha=0.05)
    (phase,) = federation.method.phases(net, site)
    net.train_only(phase.train)
    x, y = torch.randn(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    mixture = [copy.deepcopy(net[part]) for part in ("own_backbone", "own_head")]
    with torch.no_grad():
        for module, own, other in zip(mixture, ("own_backbone", "own_head"), ("backbone", "global_head"), strict=True):
            module.load_state_dict(mixed(net[own], net[other], torch.tensor(0.3)), strict=False)
    F.cross_entropy(mixture[1](mixture[0](x)), y).backward()
    phase.loss(net, x, y, phase.given).backward()
    inner = 0.0
    for module, own, other in zip(mixture, ("own_backbone", "own_head"), ("backbone", "global_head"), strict=True):
        theirs, ours = dict(net[other].named_parameters()), dict(net[own].named_parameters())
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None
            torch.testing.assert_close(ours[name].grad, 0.3 * parameter.grad, rtol=1e-4, atol=1e-6)
            inner += float(((ours[name] - theirs[name]).detach() * parameter.grad).sum())
    gradient = next(net["alpha"].parameters()).grad
    assert gradient is not None
    assert float(gradient) == pytest.approx(inner * 0.3 * 0.7, rel=1e-3)


def test_apfl_near_zero_is_the_global_model_and_near_one_the_own() -> None:
    federation = tiny({"name": "apfl", "alpha": 0.5, "adaptive": False})
    state = federation.run(1)[-1].state
    site = federation.sites["north"]
    site.prepare(state.parts, before=2)
    net = federation.net
    x = torch.randn(5, 1, 8, 8)
    for alpha, part in ((1e-6, "global_head"), (1 - 1e-6, "own_head")):
        net.load({"alpha": {"logit": torch.tensor(math.log(alpha / (1 - alpha)))}})
        predictor = APFL().personal(net, site.site(1))["mixed"]
        assert isinstance(predictor.head, nn.Linear)
        torch.testing.assert_close(predictor.head.weight, dict(net[part].named_parameters())["weight"])
        predictor.features.eval()
        if part == "own_head":
            net["own_backbone"].eval()
            torch.testing.assert_close(predictor(x), net["own_head"](net["own_backbone"](x)))


def test_apfls_alpha_is_learned_and_kept() -> None:
    federation = tiny({"name": "apfl"})
    federation.run(3)
    alphas = []
    for site in federation.sites.values():
        kept = site.store.load(before=9)
        assert kept is not None
        alphas.append(float(kept["alpha"]["logit"].sigmoid()))
    assert all(0 < alpha < 1 for alpha in alphas)
    assert len(set(alphas)) == len(alphas)
    assert 0.5 not in alphas


# FedLC, FedETF


def test_fedlc_margins() -> None:
    federation = tiny({"name": "fedlc", "tau": 2.0})
    net, site = at_site(federation)
    (phase,) = federation.method.phases(net, site)
    criterion = federation.method.criterion  # type: ignore[attr-defined]
    logits, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 0])
    margins = 2.0 * torch.tensor([12.0, 6.0, 3.0]) ** -0.25
    expected = F.cross_entropy(logits[:, :3] - margins, y)  # class 3 is absent: not in the softmax
    torch.testing.assert_close(criterion(logits, y, phase.given), expected)


def test_fedetfs_frame_is_a_simplex_of_unit_rows() -> None:
    W = tiny({"name": "fedetf"}).state.parts["frame"]["weight"]
    torch.testing.assert_close(W @ W.T, (4 * torch.eye(4) - 1) / 3, atol=1e-4, rtol=0)
    assert frame.angles(W).min_deg == pytest.approx(math.degrees(math.acos(-1 / 3)), abs=0.01)


def test_fedetfs_logits_are_cosines_times_a_learned_temperature() -> None:
    federation = tiny({"name": "fedetf"})
    state = federation.run(2)[-1].state
    temperature = float(state.parts["temperature"]["value"])
    assert temperature != 1
    site = federation.sites["north"]
    site.prepare(state.parts, before=3)
    net = federation.net
    found = federation.method.personal(net, site.site(2))
    f = 100 * torch.rand(7, net.feature_dim)
    p = F.normalize(F.linear(f, *(state.parts["projection"][n] for n in ("weight", "bias"))))
    expected = temperature * p @ state.parts["frame"]["weight"].T
    torch.testing.assert_close(found["etf"].head(f), expected)
    tuned = dict(found["tuned"].head.state_dict())
    assert not tuned["frame"].equal(state.parts["frame"]["weight"])
    assert not tuned["projection.weight"].equal(state.parts["projection"]["weight"])
    assert float(tuned["temperature"]) == temperature


# FedLoGe


def test_fedloges_count_aware_rows_are_means_over_the_samples_of_their_class() -> None:
    sites = {"north": (0,) * 9 + (1,) * 2, "south": (0,) * 3 + (1,) * 8, "west": (2,) * 5}  # nobody has class 3
    federation = tiny({"name": "fedloge", "count_aware": True}, sites=sites)
    order = first_order(federation)
    heads = [snapshot(site.handle(order).shared["global_head"]) for site in federation.sites.values()]
    counts = torch.stack([site.counts for site in federation.sites.values()]).float()
    counts[:, 3] = counts.sum(1)  # the plain mean: by all samples
    share = counts / counts.sum(0)
    expected = {
        "weight": torch.einsum("kc,kcd->cd", share, torch.stack([head["weight"] for head in heads])),
        "bias": torch.einsum("kc,kc->c", share, torch.stack([head["bias"] for head in heads])),
    }
    found = federation.run(1)[-1].state.parts
    plain = tiny({"name": "fedloge"}, sites=sites).run(1)[-1].state.parts
    for name, t in expected.items():
        torch.testing.assert_close(found["global_head"][name], t)
        assert found["global_head"][name][3].equal(plain["global_head"][name][3])
        assert not torch.allclose(found["global_head"][name][:2], plain["global_head"][name][:2])
    assert same(only(plain, "backbone", "frame"), only(found, "backbone", "frame"))


# CReFF


def creff() -> Tiny:
    return tiny({"name": "creff", **SMALL_CREFF})


def test_creffs_gradients_are_autograds() -> None:
    federation = creff()
    net, site = at_site(federation)
    found = class_gradients(net, site)
    assert found["sites"].tolist() == [1, 1, 1, 0]
    head = net["retrained_head"].requires_grad_(True)
    assert isinstance(head, nn.Linear)
    ((x, y),) = site.images.batches(site.train, 100, CPU)
    f = net.features(x).detach()
    for c in range(3):
        head.zero_grad()
        F.cross_entropy(head(f[y == c]), y[y == c]).backward()
        assert head.weight.grad is not None
        assert head.bias.grad is not None
        torch.testing.assert_close(found["weight"][c], head.weight.grad)
        torch.testing.assert_close(found["bias"][c], head.bias.grad)
    assert not found["weight"][3].any()
    assert not found["bias"][3].any()


def test_creff_measures_gradients_on_the_received_model() -> None:
    federation = creff()
    net, site = at_site(federation)
    expected = class_gradients(net, site)
    reply = federation.sites["north"].handle(first_order(federation))
    assert same({"sums": expected}, {"sums": reply.sums})
    assert same({"head": federation.state.parts["retrained_head"]}, {"head": reply.shared["retrained_head"]})


def test_creffs_server_gets_the_mean_over_sites_that_have_the_class() -> None:
    federation = creff()
    of_sites = [class_gradients(*at_site(federation, name)) for name in federation.sites]
    seen: list[Tensors] = []

    class Watched(CReFF):
        def match(self, features: Tensor, head: Tensors, gradient: Tensors, seen_classes: Tensor) -> Tensor:
            seen.append(gradient)
            return super().match(features, head, gradient, seen_classes)

    fleet = LocalFleet({name: site.handle for name, site in federation.sites.items()})
    policy = type(federation.task.config.federation)(rounds=1)
    rounds.run(fleet, Watched(**SMALL_CREFF), federation.state, federation.net, policy, 1, rounds.Hooks())
    sites = torch.tensor([2, 2, 2, 1])
    weight, bias = (torch.stack([g[name] for g in of_sites]).sum(0) for name in ("weight", "bias"))
    torch.testing.assert_close(seen[0]["weight"], weight / sites[:, None, None])
    torch.testing.assert_close(seen[0]["bias"], bias / sites[:, None])


def test_creffs_features_approach_the_gradients_of_seen_classes_only() -> None:
    rng = torch.Generator().manual_seed(0)
    real, features = torch.rand(4, 5, 6, generator=rng), torch.randn(4, 8, 6, generator=rng)
    head = {"weight": torch.randn(4, 6, generator=rng), "bias": torch.randn(4, generator=rng)}
    target = gradients(real, head)
    seen = torch.tensor([True, True, False, True])
    moved = CReFF(match_steps=50).match(features, head, target, seen)
    before, after = (distance(gradients(V, head), target) for V in (features, moved))
    assert (after < before)[seen].all()
    assert moved[2].equal(features[2])


def test_creffs_head_is_trained_like_by_torch() -> None:
    features = torch.randn(4, 20, 6, generator=torch.Generator().manual_seed(0))
    method = CReFF(retrain_epochs=3, retrain_lr=0.1)
    with isolated(7, "creff", "head", 5):
        head = nn.Linear(6, 4)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    V, y = features.flatten(0, 1), torch.arange(4).repeat_interleave(20)
    rng = generator(7, "creff", "order", 5)
    for _ in range(3):
        for batch in torch.randperm(80, generator=rng).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(head(V[batch]), y[batch]).backward()
            optimizer.step()
    found = method.retrain(features, 7, 5)
    torch.testing.assert_close(found["weight"], head.weight.detach())
    torch.testing.assert_close(found["bias"], head.bias.detach())
    other = method.retrain(features, 7, 6)
    assert not other["weight"].equal(found["weight"])  # every round has a start of its own


def test_creffs_generic_head_is_the_retrained_one() -> None:
    federation = creff()
    state = federation.run(2)[-1].state
    federation.net.load(state.parts)
    served = federation.method.served(federation.net, federation.task)
    assert list(served) == ["retrained", "head", "head realigned"]
    found = federation.method.retrain(state.extra["features"], federation.task.config.seed, 2)  # type: ignore[attr-defined]
    assert same({"head": found}, {"head": state.parts["retrained_head"]})
