"""What the server asks of a site and what a site answers, before any encoding for the wire."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor

from common.codec import Change
from common.parts import Tensors

SCHEMA = 4  # raised whenever the meaning of a field below changes

# why a site cannot read an order whose backbone is a change; the server then sends it the whole
LACKS = "it has not kept the model that the change is from"

# what a site measured on its own test images: {"generic" or "personal": {predictor: {measure: value}}}
Judgement: TypeAlias = dict[str, dict[str, dict[str, float | None]]]


@dataclass(frozen=True)
class Order:
    """Train one round from these parts; or, with a `centre`, give the class statistics of their features; or, when all
    rounds are done, only judge them."""

    round: int
    model: str  # digest of the shared parts, echoed in the reply
    shared: dict[str, Tensors]
    fixed: dict[str, Tensors]
    train: bool = True  # False: the parts are final and `round` is the last one that was trained
    judge: bool = False  # say how good the parts are as received, before any training
    centre: Tensor | None = None  # about which features are taken (statistics.py); `train` and `judge` are then False
    # Where backbones travel as changes, `shared` may lack the part: it is then that of the name `base`, which the site
    # has kept, with the change, if there is one. It is to be kept under the name `reference`.
    changes: dict[str, Change] = field(default_factory=dict)
    base: str = ""
    reference: str = ""
    schema: int = SCHEMA


@dataclass(frozen=True)
class Reply:
    """One site's round. Local parts are not in it: they never leave the site."""

    client: str
    round: int
    model: str  # digest of the model it was trained from
    examples: int  # weight of the reply in the mean
    shared: dict[str, Tensors]
    sums: Tensors = field(default_factory=dict)  # a method's statistics, or the class statistics that were asked for
    metrics: dict[str, float] = field(default_factory=dict)
    judged: Judgement = field(default_factory=dict)  # of the parts as received: empty unless asked for
    changes: dict[str, Change] = field(default_factory=dict)  # of parts that `shared` lacks: from those of the order
    schema: int = SCHEMA


def class_digest(classes: Sequence[str]) -> str:
    """By it server and site tell that class 3 is the same thing for both."""
    return hashlib.sha256(json.dumps(list(classes)).encode()).hexdigest()
