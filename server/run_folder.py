"""The files of a run: what was asked for, on what machine, what happened and what came out.

`config.json`, `environment.json` (of every start whose code or machine was another), `events.jsonl` (one line a
round), `metrics.json` (the result).
"""

import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from common.config import Config, parse
from common.errors import UsageError, UserError
from common.metrics import Groups


def summary(config: Config, history: list[dict[str, Any]], groups: tuple[Groups, ...]) -> dict[str, Any]:
    """The result: every figure as the mean of the last `evaluation.last` evaluations."""
    wanted = [e for e in history if "evaluation" in e and evaluated(config, e["round"])]
    evaluations = [{"round": e["round"], **e["evaluation"]} for e in wanted]
    last = evaluations[-config.evaluation.last :]
    return {
        "name": config.name,
        "method": config.method.name,
        "seed": config.seed,
        "rounds": history[-1]["round"],
        "judged_on": config.evaluation.on,
        "mean_of_rounds": [e["round"] for e in last],
        "generic": _mean([e["generic"] for e in last]),
        "generic_local": _mean([e.get("generic_local") for e in last]),
        "personal": _mean([e["personal"] for e in last]),
        "never_trained": last[-1]["never_trained"],
        "groups": {g.rule: dict(g.items()) for g in groups},
        "evaluations": evaluations,
        "loss": [e["loss"] for e in history],
    }


def finished(folder: Path, rounds: int) -> dict[str, Any] | None:
    """The result of a run that has come to its end after `rounds` rounds."""
    path = folder / "metrics.json"
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return result if result.get("rounds") == rounds else None


def evaluated(config: Config, round: int) -> bool:
    """Whether the models are judged after `round`. A run that is given more rounds loses its former last one."""
    wish = config.evaluation
    return round == config.federation.rounds or (round >= wish.start and round % wish.every == 0)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time works in a run folder; the lock goes with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another process is running this experiment: wait for it, or use --out"
            ) from None
        yield


def note_environment(path: Path) -> None:
    """Add what runs now to the environments a run has had, if it is another than the last."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    now = environment()
    if now not in known[-1:]:
        write_json(path, [*known, now])


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


def same_experiment(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """A run may be continued with more rounds or on another device; nothing else may change under it."""
    with suppress(UsageError):  # a key that exists no more is named below
        before = parse(before).as_dict()  # a key that did not exist yet had its default
    old, new = _flat(before), _flat(now)
    for key in sorted(old.keys() | new.keys(), key=lambda key: (key != "method.name", key)):  # its knobs follow from it
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


def _mean(items: list[Any]) -> Any:
    """The mean of equally shaped JSON values, leaf by leaf; None where any is missing."""
    first = items[0]
    if isinstance(first, dict):
        return {key: _mean([item.get(key) for item in items]) for key in first}
    if isinstance(first, list):
        return [_mean(list(values)) for values in zip(*items, strict=True)]
    if any(item is None for item in items):
        return None
    return sum(items) / len(items)


def keep_lines(path: Path, many: int) -> None:
    """Drop events of rounds that will be run again: a run may have been killed between event and checkpoint."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        _write(path, "".join(lines[:many]))


def write_json(path: Path, value: Any) -> None:
    _write(path, json.dumps(value, indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    """The whole file or the one before, whenever the process is killed."""
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
