"""A site that comes after training gets a personal model, and nothing else changes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from client.personal import join
from client.store import Store
from common.config import Config, parse
from common.errors import UserError
from common.evaluation import FeatureCache, evaluate
from fedloge.federation import assemble
from fedloge.simulate import simulate
from server import checkpoint


def config(method: str, **model: object) -> Config:
    return parse(
        {
            "seed": 2,
            "method": {"name": method},
            "data": {"imbalance": 0.2},
            "model": model,
            "frame": {"norm": 1.0},
            "partition": {"clients": 5, "alpha": 1.0},
            "train": {"epochs": 1},
            "federation": {"rounds": 8},
        }
    )


@pytest.mark.parametrize("method", ["fedloge", "ditto", "fedper", "fedavg-ft"])
def test_a_late_site_gets_a_personal_model_that_knows_its_classes(tmp_path: Path, method: str) -> None:
    wish = config(method)
    torch.set_num_threads(1)
    simulate(wish, tmp_path, lambda _: None)
    found = checkpoint.latest(tmp_path / "checkpoints")
    assert found is not None
    federation = assemble(wish, tmp_path)
    late = replace(federation.sites["site-000"], name="late", store=Store(tmp_path / "late"))

    predictors = join(late, found.state.parts, after=8, rounds=4)

    now = federation.net.parts()
    for part, values in found.state.parts.items():
        for name, t in values.items():
            assert torch.equal(now[part][name], t), f"{part}/{name} moved"
    cache = FeatureCache(federation.test, federation.device, 500, shared=None)
    site = late.site(8)
    result = evaluate(predictors, cache, federation.judged_on["site-000"], federation.groups, site.support)
    assert result[next(iter(predictors))]["top1"] > 0.6
    local = method not in ("fedavg-ft",)
    assert late.has_trained()
    assert (late.store.rounds() == [8]) == local


def test_a_late_site_cannot_join_where_batchnorm_stays_at_the_sites(tmp_path: Path) -> None:
    wish = config("fedavg", name="resnet8", norm="local")
    federation = assemble(wish, tmp_path)
    state = wish.method.init(federation.net, federation.task)
    with pytest.raises(UserError, match=r"model\.norm"):
        join(federation.sites["site-000"], state.parts, after=1, rounds=1)
