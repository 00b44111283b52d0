"""Local: every site alone, the lower bound that taking part has to beat.

Shared: nothing. Fixed: nothing. Local: backbone, local_head.
Sites start from initial values of their own and train as many epochs, of the same SGD, as in the federated
methods; momentum starts from zero every round there as well. There is no generic model.
"""

from dataclasses import dataclass
from typing import ClassVar

from common.methods.fedper import FedPer


@dataclass(frozen=True)
class Local(FedPer):
    name: ClassVar[str] = "local"
    shared: ClassVar[frozenset[str]] = frozenset()
    local: ClassVar[frozenset[str]] = frozenset({"backbone", "local_head"})
