"""The personal model of a site: as a file, and for a site that comes after training.

For the latter nothing of the federation changes: backbone, frame and global head stay as they were received, and only
the parts that are local by the method are trained, by the method's own phases. For FedLoGe that is the personal head
phi, to which the norms are then transferred as for every other site.
"""

from dataclasses import replace
from pathlib import Path

from torch import nn

from client.participant import Participant
from common import model_file
from common.engine import run_phase
from common.errors import UserError
from common.methods.method import Predictor
from common.model_file import Model, described
from common.net import roles
from common.parts import Tensors
from common.seeds import isolated


def join(participant: Participant, received: dict[str, Tensors], after: int, rounds: int) -> dict[str, Predictor]:
    """Train the site's local parts for as long as `rounds` rounds would, keep them as of round `after` and return
    its personal predictors. `received` are the final shared and fixed parts."""
    method, net = participant.method, participant.net
    _, _, local = roles(method, net)
    if "norms" in local:
        raise UserError('model.norm = "local": a site can join after training only where BatchNorm is averaged')
    participant.prepare(received, before=after)
    site = participant.site(after)
    for round in range(after, after + rounds):
        site = participant.site(round)
        with isolated(site.task.config.seed, "join", round, site.name):
            for number, phase in enumerate(method.phases(net, site)):
                own = tuple(part for part in phase.train if part in local)
                if own:
                    run_phase(net, replace(phase, train=own), site, number)
    net.load(received)  # a method's phases may note something of the site in a shared part for the reply
    if local:
        mine = net.parts()
        participant.store.save(after, {part: mine[part] for part in sorted(local)})
    return method.deployed(net, site)


def save(participant: Participant, round: int, path: Path, generic: nn.Module | None = None) -> None:
    """Write the personal model by the values that the participant's net holds after `round`. The backbone is left out
    where it is `generic`, which generic.safetensors beside it holds."""
    task, method = participant.task, participant.method
    name, predictor = next(iter(method.deployed(participant.net, participant.site(round)).items()))
    model = Model(
        task.config.model, described(participant.images), predictor.features, predictor.head, name, round,
        participant.counts > 0, participant.name,
    )  # fmt: skip
    shared = predictor.features is generic
    model_file.save(path, model, durable=participant.store.durable, shared=shared)
