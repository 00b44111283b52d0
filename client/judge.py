"""How good the models are on one site's own test images."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from client.participant import Participant
from common.evaluation import FeatureCache, evaluate
from common.messages import Judgement
from common.metrics import Groups

SHARED = ("samples", "top1", "balanced", "macro_f1", "ece")  # what a site tells of them; no figure of a single class


def judge(
    participant: Participant, cache: FeatureCache, index: Tensor, by: Sequence[Groups], round: int
) -> dict[str, dict[str, dict[str, Any]]]:
    """Every generic and every personal predictor, by the values that the participant's net holds after `round`.

    The generic model answers as it does everywhere; a personal one only with classes the site has trained on.
    """
    net, method, site = participant.net, participant.method, participant.site(round)
    return {
        "generic": evaluate(method.served(net, participant.task), cache, index, by),
        "personal": evaluate(method.deployed(net, site), cache, index, by, site.support),
    }


def brief(found: dict[str, dict[str, dict[str, Any]]]) -> Judgement:
    return {
        kind: {name: {key: measured[key] for key in SHARED} for name, measured in predictors.items()}
        for kind, predictors in found.items()
    }
