"""FedAvg + fine-tuning: every site tunes a copy of the global model on its own data, at the end.

Shared: backbone, global_head. Fixed: nothing. Local: nothing (the tuned copy is a result, not a state).
Training is FedAvg's to the bit; only the personal result differs. `tune = "head"` tunes the head on features in
evaluation mode, `tune = "full"` the whole model.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from common.methods.fedavg import FedAvg
from common.methods.method import Predictor, Site
from common.methods.tune import tuned
from common.net import Net


@dataclass(frozen=True)
class FedAvgTuned(FedAvg):
    name: ClassVar[str] = "fedavg-ft"

    tune: Literal["head", "full"] = "head"

    def personal(self, net: Net, site: Site) -> dict[str, Predictor]:
        own = tuned(net["backbone"], net["global_head"], site, self.tune)
        return {"tuned": own, **super().personal(net, site)}
