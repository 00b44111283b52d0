"""The sites of a simulated federation: their data, what they are judged on, and the models that come out."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from client.judge import judge as judge_site
from client.participant import Participant
from client.personal import save as save_personal
from client.store import Store
from common import files, metrics, partition, sources
from common.config import Config
from common.errors import UserError
from common.evaluation import FeatureCache, evaluate
from common.images import Images
from common.methods.method import Method, ServerState
from common.model_file import described
from common.net import Net, Task, best_device, build_on
from server import models


@dataclass(frozen=True)
class Federation:
    """The sites of a simulated federation and what they are judged on."""

    task: Task
    net: Net
    device: torch.device
    images: Images  # training images of everybody
    test: Images  # with evaluation.on = "holdout" the training images, of which only held ones are judged
    sites: dict[str, Participant]
    judged_on: dict[str, Tensor]  # per site: index into `test`
    global_index: Tensor
    groups: tuple[metrics.Groups, ...]

    def fingerprint(self) -> str:
        """Changes when an image is added, relabelled or given to another site, or is judged by."""
        total = hashlib.sha256()
        for t in (self.images.labels, self.test.labels, *self.judged_on.values()):
            total.update(t.numpy().tobytes())
        for site in self.sites.values():
            total.update(site.train_index.numpy().tobytes())
        return total.hexdigest()


def assemble(config: Config, folder: Path) -> Federation:
    """Load the data, split it among sites and build the net; refuses what cannot work before anything is written."""
    split = sources.load(config.data)
    images, test = split.train, split.test
    classes = images.classes
    task = Task(config, classes, images.channels, images.side)
    device = best_device(config.run.device)
    net = build_on(device, config.method, task)
    indices = partition.split(images.labels, config.partition, images.groups)
    names = [f"site-{number:03d}" for number in range(len(indices))]
    kept, held = [], []
    for name, index in zip(names, indices, strict=True):
        mine, aside = partition.holdout(index, images.labels, config.partition.holdout, config.partition.seed, name)
        kept.append(mine)
        held.append(aside)
    counts = [partition.counts(images.labels, index, len(classes)) for index in kept]
    if len(classes) < 2:
        raise UserError(f"data.source = {config.data.source}: the images are all of class {classes[0]!r}: add others")
    if config.evaluation.on == "holdout":
        if not any(map(len, held)):
            raise UserError(
                f"partition.holdout = {config.partition.holdout} puts no image of any site aside: use a larger share"
            )
        judged, target = held, images
        global_index = torch.cat(held)
    else:
        judged = partition.local_test(counts, test.labels, config.partition.local_test, config.partition.seed)
        target = test
        global_index = torch.arange(len(test))
    sites = {
        name: Participant(
            name=name,
            task=task,
            method=config.method,
            net=net,
            images=images,
            train_index=index,
            counts=count,
            # a site may be two rounds ahead of the checkpoints, as one is written while the next round runs, and the
            # oldest of them must still find its local parts
            store=Store(folder / "sites" / name, keep=config.run.keep + 2, durable=False),
            device=device,
        )
        for name, index, count in zip(names, kept, counts, strict=True)
    }
    total = torch.stack(counts).sum(dim=0)
    return Federation(
        task=task,
        net=net,
        device=device,
        images=images,
        test=target,
        sites=sites,
        judged_on=dict(zip(names, judged, strict=True)),
        global_index=global_index,
        groups=metrics.groups([int(n) for n in total]),
    )


def judge(federation: Federation, method: Method, state: ServerState) -> dict[str, Any]:
    """GM of every generic predictor, PM of every personal one, and of the generic ones at the sites."""
    net, config = federation.net, federation.task.config
    net.load(state.parts)
    backbone = models.common_backbone(net, state)
    batch, precision = config.evaluation.batch, config.train.precision
    cache = FeatureCache(federation.test, federation.device, batch, backbone, precision)
    generic = evaluate(method.served(net, federation.task), cache, federation.global_index, federation.groups)
    at_sites: dict[str, dict[str, dict[str, Any]]] = {"generic": {}, "personal": {}}
    for name, participant in federation.sites.items():
        participant.prepare({}, before=state.round + 1)  # the net holds the shared parts already
        found = judge_site(participant, cache, federation.judged_on[name], federation.groups, state.round)
        for kind, predictors in found.items():
            for predictor, result in predictors.items():
                at_sites[kind].setdefault(predictor, {})[name] = result
    local, personal = (
        {predictor: metrics.over_sites(results, federation.groups) for predictor, results in found.items()}
        for found in (at_sites["generic"], at_sites["personal"])
    )
    return {
        "generic": generic,
        "generic_local": local,
        "personal": personal,
        # their personal models hold untrained local parts
        "never_trained": [name for name, site in federation.sites.items() if not site.has_trained()],
    }


def save_models(federation: Federation, method: Method, state: ServerState, folder: Path) -> None:
    """The method's own generic model, and the personal ones of sites that have trained. A personal file leaves the
    backbone to generic.safetensors where it is the same."""
    images = described(federation.images)
    has_generic = models.save_generic(federation.net, method, federation.task, state, folder, images)
    (folder / "personal").mkdir(exist_ok=True)
    files.sweep(folder / "personal")
    backbone = models.common_backbone(federation.net, state) if has_generic else None
    for name, participant in federation.sites.items():
        if participant.has_trained():
            participant.prepare(state.parts, before=state.round + 1)
            save_personal(participant, state.round, folder / "personal" / f"{name}.safetensors", backbone)
