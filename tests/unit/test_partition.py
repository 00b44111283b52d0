"""Partitions: the published client sizes to the image, and nothing lost or held twice."""

from dataclasses import replace
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.config import PartitionConfig
from common.errors import UserError
from common.longtail import profile
from common.partition import counts, holdout, local_test, natural, split

PUBLISHED = [  # classes, clients, alpha, IF, sizes of the first clients
    (10, 40, 0.5, 0.02, [226, 200, 143, 400, 329, 90]),
    (10, 40, 0.5, 0.01, [215, 141, 207]),
    (10, 40, 1.0, 0.02, [265, 279, 338]),
    (10, 40, 1.0, 0.01, [257, 284, 401]),
    (100, 20, 0.5, 0.02, [557, 682, 644]),
    (100, 20, 0.5, 0.01, [573, 766, 469]),
    (100, 20, 1.0, 0.02, [570, 712, 662]),
    (100, 20, 1.0, 0.01, [496, 625, 562]),
    (100, 40, 0.5, 0.01, [264, 285, 233, 378]),
    (100, 100, 0.5, 0.01, [139, 127, 81]),
]


def longtailed(classes: int, imbalance: float) -> Tensor:
    kept = profile(50000 // classes, imbalance, classes)
    return torch.repeat_interleave(torch.arange(classes), torch.tensor(kept))


@pytest.mark.parametrize(("classes", "clients", "alpha", "imbalance", "sizes"), PUBLISHED)
def test_published_client_sizes(classes: int, clients: int, alpha: float, imbalance: float, sizes: list[int]) -> None:
    parts = split(longtailed(classes, imbalance), PartitionConfig(clients=clients, alpha=alpha))
    assert len(parts) == clients
    assert [len(part) for part in parts[: len(sizes)]] == sizes


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=30, max_size=200),
    st.integers(1, 6),
    st.sampled_from(["dirichlet", "shards", "iid"]),
    st.integers(0, 2**32 - 1),
)
def test_every_image_has_exactly_one_client(
    labels: list[int], clients: int, kind: Literal["dirichlet", "shards", "iid"], seed: int
) -> None:
    config = PartitionConfig(kind=kind, clients=clients, alpha=5.0, seed=seed)
    parts, message = None, ""
    try:
        parts = split(torch.tensor(labels), config)
    except UserError as error:
        message = str(error)
    assert parts is not None or "got no image" in message
    if parts is None:
        return
    assert len(parts) == clients
    assert sorted(torch.cat(parts).tolist()) == list(range(len(labels)))
    assert [part.tolist() for part in split(torch.tensor(labels), config)] == [part.tolist() for part in parts]


def test_a_split_leaves_global_random_state_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    split(longtailed(10, 0.01), PartitionConfig(clients=4))
    assert torch.equal(torch.rand(3), expected)


def test_shards_give_few_classes() -> None:
    labels = torch.arange(10).repeat(100)
    parts = split(labels, PartitionConfig(kind="shards", clients=5, shards=2))
    assert all(len(part) == 200 and len(set(labels[part].tolist())) == 2 for part in parts)


def test_natural_groups_largest_first() -> None:
    names = ["b", "a", "c", "b", "a", "d", "b"]
    assert {k: v.tolist() for k, v in natural(names).items()} == {"b": [0, 3, 6], "a": [1, 4], "c": [2], "d": [5]}
    assert list(natural(names, 2)) == ["b", "a"]
    assert list(natural(names, 9)) == ["b", "a", "c", "d"]
    config = PartitionConfig(kind="groups", clients=3)
    assert [part.tolist() for part in split(torch.zeros(7).long(), config, names)] == [[0, 3, 6], [1, 4], [2]]


def test_groups_can_be_spread_whole_by_class() -> None:
    """Every image goes somewhere, no group is torn apart, and sites differ in their classes."""
    labels = torch.arange(6).repeat_interleave(60)
    names = [f"{c}-{i % 12}" for c in range(6) for i in range(60)]
    config = PartitionConfig(kind="group-dirichlet", clients=4, alpha=0.5)
    parts = split(labels, config, names)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(360))
    owners: dict[str, set[int]] = {}
    for k, part in enumerate(parts):
        for i in part.tolist():
            owners.setdefault(names[i], set()).add(k)
    assert all(len(who) == 1 for who in owners.values())
    spread = torch.stack([torch.bincount(labels[part], minlength=6) for part in parts]).float()
    assert float((spread / spread.sum(dim=0)).std()) > 0.15
    assert all(torch.equal(a, b) for a, b in zip(parts, split(labels, config, names), strict=True))
    assert not torch.equal(parts[0], split(labels, replace(config, seed=1), names)[0])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PartitionConfig(kind="group-dirichlet"), r"needs data with groups"),
        (PartitionConfig(clients=31), r"partition\.clients = 31 .* 30 images: use fewer"),
        (PartitionConfig(clients=30, alpha=0.01), r"client \d+ of 30 got no image .* fewer .*partition\.alpha"),
        (PartitionConfig(clients=5, alpha=1e-300), r"partition\.alpha = 1e-300 is too small"),
        (PartitionConfig(kind="shards", clients=10, shards=4), r"partition\.shards = 4 .* use fewer"),
        (PartitionConfig(kind="groups"), r"partition\.kind = \"groups\" needs data with groups"),
    ],
)
def test_impossible_splits_are_refused_in_one_line(config: PartitionConfig, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        split(torch.arange(3).repeat(10), config)
    assert "\n" not in str(raised.value)


def test_one_image_or_one_class_is_enough() -> None:
    assert [part.tolist() for part in split(torch.zeros(1).long(), PartitionConfig(clients=1))] == [[0]]
    assert sum(map(len, split(torch.full((50,), 3), PartitionConfig(clients=2)))) == 50


def test_local_tests_follow_the_clients_classes() -> None:
    labels, test = longtailed(100, 0.01), torch.arange(100).repeat(100)
    parts = split(labels, PartitionConfig(clients=40))
    own = [counts(labels, part, 100) for part in parts]
    tests = local_test(own, test, 10000, 3407)
    for n, index in zip(own, tests, strict=True):
        assert len(set(index.tolist())) == len(index)
        expected = [min(int(k / len(labels) * 10000), 100) for k in n.tolist()]
        assert counts(test, index, 100).tolist() == expected
    again = local_test(own, test, 10000, 3407)
    assert all(torch.equal(a, b) for a, b in zip(tests, again, strict=True))
    assert not torch.equal(tests[0], local_test(own, test, 10000, 1)[0])


@given(
    own=st.lists(st.lists(st.integers(0, 40), min_size=3, max_size=3), min_size=1, max_size=5),
    have=st.lists(st.integers(0, 30), min_size=3, max_size=3),
)
def test_without_a_budget_every_client_is_tested_on_its_own_mix(own: list[list[int]], have: list[int]) -> None:
    test = torch.arange(3).repeat_interleave(torch.tensor(have))
    chosen = local_test([torch.tensor(n) for n in own], test, 0, 1)
    ratios = [have[c] / n[c] for n in own for c in range(3) if n[c] and have[c]]
    for n, index in zip(own, chosen, strict=True):
        got = counts(test, index, 3).tolist()
        for c in range(3):
            wanted = n[c] * min(ratios, default=0) if have[c] else 0
            assert abs(got[c] - wanted) < 1 + 1e-9
            assert got[c] <= have[c]
            assert (got[c] > 0) == (n[c] > 0 and have[c] > 0)


def test_local_tests_are_capped_and_independent() -> None:
    own = [torch.tensor([899, 0]), torch.tensor([50, 50]), torch.tensor([0, 1])]
    test = torch.arange(2).repeat_interleave(200)
    first, second, third = local_test(own, test, 1000, 0)
    assert counts(test, first, 2).tolist() == [200, 0]
    assert counts(test, second, 2).tolist() == [50, 50]
    assert set(first.tolist()) & set(second.tolist())
    assert len(third) == 1
    assert len(local_test([torch.tensor([999, 0]), torch.tensor([0, 1])], test, 100, 0)[1]) == 0
    # A client's test set does not depend on the others'.
    assert torch.equal(local_test([own[0], own[2], own[2]], test, 1000, 0)[2], third)


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=120), st.floats(0, 0.99), st.integers(0, 9))
def test_holdout_is_stratified_and_disjoint(labels: list[int], share: float, seed: int) -> None:
    every = torch.tensor(labels)
    index = torch.arange(0, len(labels), 2)
    train, held = holdout(index, every, share, seed, "site")
    assert sorted(torch.cat([train, held]).tolist()) == index.tolist()
    assert train.tolist() == sorted(train.tolist())
    have, kept, gone = (counts(every, part, 5) for part in (index, train, held))
    for n, k, g in zip(have.tolist(), kept.tolist(), gone.tolist(), strict=True):
        assert (k > 0) == (n > 0)
        assert g == (min(round(share * n), n - 1) if n else 0)


def test_holdout_depends_on_the_site() -> None:
    labels = torch.zeros(100).long()
    _, a = holdout(torch.arange(100), labels, 0.2, 0, "a")
    _, b = holdout(torch.arange(100), labels, 0.2, 0, "b")
    assert len(a) == len(b) == 20
    assert not torch.equal(a, b)
