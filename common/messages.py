"""What the server asks of a site and what a site answers, before any encoding for the wire."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from common.parts import Tensors

SCHEMA = 1  # raised whenever the meaning of a field below changes

# what a site measured on its own test images: {"generic" or "personal": {predictor: {measure: value}}}
Judgement: TypeAlias = dict[str, dict[str, dict[str, float | None]]]


@dataclass(frozen=True)
class Order:
    """Train one round from these parts; or, when all rounds are done, only judge them."""

    round: int
    model: str  # digest of the shared parts, echoed in the reply
    shared: dict[str, Tensors]
    fixed: dict[str, Tensors]
    train: bool = True  # False: the parts are final and `round` is the last one that was trained
    judge: bool = False  # say how good the parts are as received, before any training
    schema: int = SCHEMA


@dataclass(frozen=True)
class Reply:
    """One site's round. Local parts are not in it: they never leave the site."""

    client: str
    round: int
    model: str  # digest of the model it was trained from
    examples: int  # weight of the reply in the mean
    shared: dict[str, Tensors]
    sums: Tensors = field(default_factory=dict)  # a method's statistics; the server only ever sees their sum
    metrics: dict[str, float] = field(default_factory=dict)
    judged: Judgement = field(default_factory=dict)  # of the parts as received: empty unless asked for
    schema: int = SCHEMA


def class_digest(classes: Sequence[str]) -> str:
    """By it server and site tell that class 3 is the same thing for both."""
    return hashlib.sha256(json.dumps(list(classes)).encode()).hexdigest()
