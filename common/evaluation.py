"""Running predictors over images, with one pass for all heads on the same backbone."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.features import features_of
from common.images import Images
from common.methods.method import Predictor
from common.metrics import Groups, measure
from common.realign import masked


class FeatureCache:
    """Features of a fixed set of images. Those of the `shared` backbone are computed once for all its heads.

    In the precision the backbone is trained in; heads and what is measured are in fp32.
    Valid only while the shared backbone does not change: make a new one for every evaluation.
    """

    def __init__(
        self, images: Images, device: torch.device, batch: int, shared: nn.Module | None, precision: str = "fp32"
    ) -> None:
        self.images = images
        self._device = device
        self._batch = batch
        self._shared = shared
        self._precision = precision
        self._place = torch.full((len(images),), -1)  # of every image: its row in `_rows`, -1 if it has none yet
        self._rows: Tensor | None = None

    def of(self, features: nn.Module, index: Tensor) -> Tensor:
        if features is not self._shared:
            return self._compute(features, index)
        new = index[self._place[index] < 0].unique()  # type: ignore[no-untyped-call]
        if len(new):
            rows = self._compute(features, new)
            known = 0 if self._rows is None else len(self._rows)
            self._place[new] = torch.arange(known, known + len(new))
            self._rows = rows if self._rows is None else torch.cat([self._rows, rows])
        assert self._rows is not None
        return self._rows[self._place[index].to(self._rows.device)]

    def _compute(self, features: nn.Module, index: Tensor) -> Tensor:
        found = features_of(features, self.images, index, self._device, self._batch, self._precision)
        return torch.cat([f for f, _ in found])


@torch.no_grad()
def evaluate(
    predictors: dict[str, Predictor],
    cache: FeatureCache,
    index: Tensor,
    by: Sequence[Groups],
    support: Tensor | None = None,
) -> dict[str, dict[str, Any]]:
    """Every predictor on the images of `index`; with `support`, only among the classes it names."""
    if not len(index):
        return {}
    y = cache.images.labels[index]
    found, rows = {}, {}
    for name, predictor in predictors.items():
        features = predictor.features
        if features not in rows:
            rows[features] = cache.of(features, index)
        logits = predictor.head.eval()(rows[features]).cpu()
        found[name] = measure(logits if support is None else masked(logits, support.cpu()), y, by)
    return found
