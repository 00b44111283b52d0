"""Who holds which images: a training set divided among sites, and the data every site is judged by.

Every image goes to exactly one client (with natural groups: to at most one), and a split depends on its own seed
alone. `split` with kind = dirichlet is the partition of the reference experiments, bit for bit: it runs on numpy's
legacy stream, whose algorithms never change. Indices are positions in `labels`.
"""

import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from common.config import PartitionConfig
from common.errors import UserError
from common.seeds import generator


def split(labels: Tensor, config: PartitionConfig, groups: Sequence[str] | None = None) -> list[Tensor]:
    """Index of every client's images; no client is left without one."""
    if config.kind == "groups":
        return list(natural(groups, config.clients).values())
    if config.clients > len(labels):
        raise UserError(f"partition.clients = {config.clients} sites cannot share {len(labels)} images: use fewer")
    if config.kind == "group-dirichlet":
        clients = _whole_groups(labels, config, groups)
    else:
        clients = {"dirichlet": _dirichlet, "shards": _shards, "iid": _iid}[config.kind](labels, config)
    for k, index in enumerate(clients):
        if len(index) == 0:
            raise UserError(
                f"client {k} of {config.clients} got no image (partition.seed = {config.seed}): "
                "use fewer partition.clients or a larger partition.alpha"
            )
    return clients


def natural(groups: Sequence[str] | None, clients: int = 0) -> dict[str, Tensor]:
    """Name of every group → index of its images; the `clients` largest groups, largest first, 0 for all."""
    if groups is None:
        raise UserError('partition.kind = "groups" needs data with groups and these have none: use another kind')
    sizes = sorted(Counter(groups).items(), key=lambda item: (-item[1], item[0]))
    members: dict[str, list[int]] = {name: [] for name, _ in sizes[: clients or None]}
    for i, name in enumerate(groups):
        if name in members:
            members[name].append(i)
    return {name: torch.tensor(index) for name, index in members.items()}


def _dirichlet(labels: Tensor, config: PartitionConfig) -> list[Tensor]:
    K, classes = config.clients, int(labels.max()) + 1
    rng = np.random.RandomState(config.seed)
    rng.binomial(1, 1.0, size=(K, classes))  # all ones, but the published partition drew them
    owner = np.empty(len(labels), dtype=np.int64)
    by_class = [np.flatnonzero(labels.numpy() == c) for c in range(classes)]
    for index in by_class:
        p = rng.dirichlet(np.repeat(config.alpha, K))
        if not np.isfinite(p).all():
            raise UserError(f"partition.alpha = {config.alpha} is too small to draw from: use a larger one")
        owner[index] = rng.choice(K, len(index), p=p)
    order = np.concatenate(by_class)
    return [torch.from_numpy(order[owner[order] == k]) for k in range(K)]


def _whole_groups(labels: Tensor, config: PartitionConfig, groups: Sequence[str] | None) -> list[Tensor]:
    """What `_dirichlet` does with images, done with groups; one counts for the class of its first image."""
    members = list(natural(groups).values())
    first = torch.stack([labels[index[0]] for index in members])
    if config.clients > len(members):
        raise UserError(f"partition.clients = {config.clients} sites cannot share {len(members)} groups: use fewer")
    owned = _dirichlet(first, config)
    nothing = torch.empty(0, dtype=torch.int64)
    return [torch.cat([nothing, *(members[i] for i in own.tolist())]).sort().values for own in owned]


def _shards(labels: Tensor, config: PartitionConfig) -> list[Tensor]:
    """Images sorted by class and cut into equal runs, `config.shards` random runs for every client."""
    pieces = config.clients * config.shards
    if pieces > len(labels):
        raise UserError(
            f"partition.shards = {config.shards} for each of {config.clients} clients is more than the "
            f"{len(labels)} images: use fewer"
        )
    runs = np.array_split(np.argsort(labels.numpy(), kind="stable"), pieces)
    hands = np.random.RandomState(config.seed).permutation(pieces).reshape(config.clients, config.shards)
    return [torch.from_numpy(np.concatenate([runs[i] for i in hand])) for hand in hands]


def _iid(labels: Tensor, config: PartitionConfig) -> list[Tensor]:
    order = np.random.RandomState(config.seed).permutation(len(labels))
    return [torch.from_numpy(part) for part in np.array_split(order, config.clients)]


def counts(labels: Tensor, index: Tensor, classes: int) -> Tensor:
    """Images of every class among `index`, int64 (classes,)."""
    return torch.bincount(labels[index], minlength=classes)


def local_test(client_counts: Sequence[Tensor], test_labels: Tensor, budget: int, seed: int) -> list[Tensor]:
    """Index into the test set for every client, drawn without replacement within a client, independently across.

    With a budget, as published: int(n_kc / N * budget) images of class c, where the client has n_kc of all N training
    images, or as many as the test set has. A client with very few images may get an empty test set, and a budget
    larger than the test set distorts the mix of classes. Budget 0 takes the largest test sets in which every client
    keeps its own mix: one scale for all, rounded up, so no class a client has goes untested."""
    by_class = [torch.nonzero(test_labels == c).flatten() for c in range(len(client_counts[0]))]
    total = sum(int(own.sum()) for own in client_counts)
    ratios = [Fraction(len(i), n) for own in client_counts for i, n in zip(by_class, own.tolist(), strict=True) if n]
    scale = min([ratio for ratio in ratios if ratio] or [Fraction(0)])
    chosen = []
    for k, own in enumerate(client_counts):
        rng = generator(seed, "local test", k)
        parts = [torch.empty(0, dtype=torch.int64)]
        for index, n in zip(by_class, own.tolist(), strict=True):
            if n:
                take = int(n / total * budget) if budget else math.ceil(n * scale)
                parts.append(index[torch.randperm(len(index), generator=rng)[:take]])
        chosen.append(torch.cat(parts))
    return chosen


def holdout(index: Tensor, labels: Tensor, share: float, seed: int, name: str) -> tuple[Tensor, Tensor]:
    """Divide a client's images into (train, held): the share of every class, rounded, but never the last image the
    client can train a class with. Both keep the order of `index`."""
    rng = generator(seed, "holdout", name)
    held = torch.zeros(len(index), dtype=torch.bool)
    own = labels[index]
    for c in sorted(set(own.tolist())):
        positions = torch.nonzero(own == c).flatten()
        n = min(round(share * len(positions)), len(positions) - 1)
        held[positions[torch.randperm(len(positions), generator=rng)[:n]]] = True
    return index[~held], index[held]
