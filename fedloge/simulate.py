"""A whole federation in one process: the same rounds, folds, local updates and files as the real one.

The run folder holds `config.json`, `events.jsonl` (one line a round), `metrics.json` (the result),
`checkpoints/`, `sites/` (every site's local parts) and `models/` (final parts, safetensors). The same command
goes on where a run stopped; a finished run is not run again. Times are in events.jsonl only, so everything else
is the same bit for bit whether the run was interrupted or not.
"""

import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from client.participant import Participant
from client.store import Store
from common import metrics, partition, parts, sources
from common.config import Config
from common.errors import UserError
from common.evaluation import FeatureCache, evaluate
from common.images import Images
from common.methods.method import Method, ServerState
from common.net import Net, Task, best_device, build
from server import checkpoint, rounds
from server.checkpoint import Checkpoint
from server.fleet import LocalFleet

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    round: int
    rounds: int
    evaluation: dict[str, Any] | None  # the newest one
    seconds: float  # of this round, evaluation included


@dataclass(frozen=True)
class Federation:
    """The sites of a simulated federation and what they are judged on."""

    task: Task
    net: Net
    device: torch.device
    images: Images  # training images of everybody
    test: Images
    sites: dict[str, Participant]
    judged_on: dict[str, Tensor]  # per site: index into `test` (or into `images`, for the hold-out)
    global_index: Tensor
    groups: tuple[metrics.Groups, ...]


def assemble(config: Config, folder: Path) -> Federation:
    """Load the data, split it among sites and build the net; refuses what cannot work before anything is written."""
    split = sources.load(config.data)
    images, test = split.train, split.test
    classes = images.classes
    task = Task(config, classes, images.channels, images.side)
    device = best_device(config.run.device)
    net = build(config.method, task).to(device)
    if config.train.layout == "channels_last":
        net = net.to(memory_format=torch.channels_last)
    indices = partition.split(images.labels, config.partition, images.groups)
    names = [f"site-{number:03d}" for number in range(len(indices))]
    kept, held = [], []
    for name, index in zip(names, indices, strict=True):
        mine, aside = partition.holdout(index, images.labels, config.partition.holdout, config.partition.seed, name)
        kept.append(mine)
        held.append(aside)
    counts = [partition.counts(images.labels, index, len(classes)) for index in kept]
    if config.evaluation.on == "holdout":
        judged, target = held, images
        global_index = torch.cat(held)
    else:
        judged = partition.local_test(
            counts, len(images), test.labels, config.partition.local_test, config.partition.seed
        )
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
            store=Store(folder / "sites" / name, keep=config.run.keep, durable=False),
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


def simulate(config: Config, folder: Path, progress: Callable[[Progress], None]) -> dict[str, Any]:
    """Run or resume the experiment in `folder` to its end; returns what metrics.json holds."""
    found = checkpoint.latest(folder / "checkpoints")
    if found is not None:
        _same_experiment(found.config, config.as_dict(), folder)
    federation = assemble(config, folder)
    method = config.method
    if found is None:
        state = method.init(federation.net, federation.task)
        history: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / "config.json", config.as_dict())
        _write_json(folder / "environment.json", environment())
    else:
        state, history = _on(found.state, federation.device), found.history
        log.info("going on after round %d", state.round)
    events = folder / "events.jsonl"
    _keep_lines(events, len(history))

    def after(report: rounds.RoundReport) -> None:
        began = time.monotonic()
        entry: dict[str, Any] = {
            "round": report.round,
            "sites": list(report.folded),
            "refused": report.refused,
            "missing": list(report.missing),
            "loss": _mean_metrics(report.metrics),
        }
        if report.round % config.evaluation.every == 0 or report.round == config.federation.rounds:
            entry["evaluation"] = judge(federation, method, report.state)
        history.append(entry)
        seconds = {"training": round(report.seconds, 3), "evaluation": round(time.monotonic() - began, 3)}
        with events.open("a", encoding="utf-8") as stream:  # before the checkpoint: a resume drops what is too new
            stream.write(json.dumps({**entry, "seconds": seconds}) + "\n")
        saved = Checkpoint(report.state, history, config.as_dict())
        checkpoint.save(folder / "checkpoints", saved, config.run.keep, durable=False)
        progress(Progress(report.round, config.federation.rounds, _newest(history), sum(seconds.values())))

    fleet = LocalFleet({name: site.handle for name, site in federation.sites.items()})
    state = rounds.run(fleet, method, state, federation.net, config.federation, config.seed, after)
    save_models(federation, method, state, folder / "models")
    result = summary(config, history, federation)
    _write_json(folder / "metrics.json", result)
    return result


def judge(federation: Federation, method: Method, state: ServerState) -> dict[str, Any]:
    """GM of every generic predictor, PM of every personal one, and of the generic ones at the sites."""
    net, config = federation.net, federation.task.config
    net.load(state.parts)
    apart = "norms" in net.parts()  # then no two sites have the same features
    cache = FeatureCache(
        federation.test, federation.device, config.evaluation.batch, None if apart else net["backbone"]
    )
    predictors = {} if apart else method.generic(net, federation.task)
    generic = evaluate(predictors, cache, federation.global_index, federation.groups)
    personal: dict[str, dict[str, Any]] = {}
    for name, participant in federation.sites.items():
        participant.prepare(state.parts, before=state.round + 1)
        site = participant.site(state.round)
        found = evaluate(method.personal(net, site), cache, federation.judged_on[name], federation.groups, site.support)
        for predictor, result in found.items():
            personal.setdefault(predictor, {})[name] = result
    return {
        "generic": generic,
        "personal": {name: metrics.over_sites(results, federation.groups) for name, results in personal.items()},
        # their personal models hold untrained local parts
        "never_trained": [name for name, site in federation.sites.items() if not site.has_trained()],
    }


def summary(config: Config, history: list[dict[str, Any]], federation: Federation) -> dict[str, Any]:
    """The result: every figure as the mean of the last `evaluation.last` evaluations."""
    evaluations = [{"round": e["round"], **e["evaluation"]} for e in history if "evaluation" in e]
    last = evaluations[-config.evaluation.last :]
    return {
        "name": config.name,
        "method": config.method.name,
        "seed": config.seed,
        "rounds": history[-1]["round"],
        "judged_on": config.evaluation.on,
        "mean_of_rounds": [e["round"] for e in last],
        "generic": _mean([e["generic"] for e in last]),
        "personal": _mean([e["personal"] for e in last]),
        "never_trained": last[-1]["never_trained"],
        "groups": {g.rule: dict(g.items()) for g in federation.groups},
        "evaluations": evaluations,
        "loss": [e["loss"] for e in history],
    }


def save_models(federation: Federation, method: Method, state: ServerState, folder: Path) -> None:
    """The method's own generic and personal models. A personal file holds the backbone only where it is its own."""
    net, about = federation.net, {"classes": json.dumps(federation.task.classes), "round": str(state.round)}
    net.load(state.parts)
    apart = "norms" in net.parts()
    (folder / "personal").mkdir(parents=True, exist_ok=True)
    if not apart:
        for name, predictor in list(method.generic(net, federation.task).items())[:1]:
            tensors = {**_prefixed("backbone", predictor.features), **_prefixed("head", predictor.head)}
            parts.save(folder / "generic.safetensors", tensors, {**about, "predictor": name})
    for name, participant in federation.sites.items():
        participant.prepare(state.parts, before=state.round + 1)
        predictor_name, predictor = next(iter(method.personal(net, participant.site(state.round)).items()))
        own = apart or predictor.features is not net["backbone"] or "backbone" not in state.parts
        tensors = _prefixed("head", predictor.head)
        if own:
            tensors |= _prefixed("backbone", predictor.features)
        note = {**about, "predictor": predictor_name, "backbone": "own" if own else "generic.safetensors"}
        parts.save(folder / "personal" / f"{name}.safetensors", tensors, note, durable=False)


def environment() -> dict[str, Any]:
    """What a reader of a record needs to know of the machine and the code."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": importlib.metadata.version("torchvision"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "code": _commit(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str:
    """The commit the code was run from, marked when files differ from it; "unknown" outside a checkout."""
    here = Path(__file__).parent
    try:
        commit = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(commit, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _same_experiment(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """A run may be continued with more rounds or on another device; nothing else may change under it."""
    old, new = _flat(before), _flat(now)
    for key in sorted(old.keys() | new.keys()):
        if key != "federation.rounds" and not key.startswith("run.") and old.get(key) != new.get(key):
            raise UserError(
                f"{folder} holds a run with {key} = {old.get(key)!r}, not {new.get(key)!r}: "
                "name another folder with --out, or delete that one to start anew"
            )


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _on(state: ServerState, device: torch.device) -> ServerState:
    moved = {part: {name: t.to(device) for name, t in group.items()} for part, group in state.parts.items()}
    return replace(state, parts=moved, extra={name: t.to(device) for name, t in state.extra.items()})


def _prefixed(prefix: str, module: nn.Module) -> parts.Tensors:
    return {f"{prefix}.{name}": t.detach() for name, t in parts.tensors(module).items()}


def _newest(history: list[dict[str, Any]]) -> dict[str, Any] | None:
    return next((e["evaluation"] for e in reversed(history) if "evaluation" in e), None)


def _mean_metrics(reported: dict[str, dict[str, float]]) -> dict[str, float]:
    names = sorted({name for metrics in reported.values() for name in metrics})
    values = {name: [m[name] for m in reported.values() if name in m] for name in names}
    return {name: sum(v) / len(v) for name, v in values.items()}


def _mean(items: list[Any]) -> Any:
    """The mean of equally shaped JSON values, leaf by leaf; None where any is missing."""
    first = items[0]
    if isinstance(first, dict):
        return {key: _mean([item[key] for item in items]) for key in first}
    if isinstance(first, list):
        return [_mean(list(values)) for values in zip(*items, strict=True)]
    if any(item is None for item in items):
        return None
    return sum(items) / len(items)


def _keep_lines(path: Path, many: int) -> None:
    """Drop events of rounds that will be run again: a run may have been killed between event and checkpoint."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(lines[:many]), encoding="utf-8")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
