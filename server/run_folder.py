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
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from common import files
from common.config import Config, parse
from common.errors import UsageError, UserError
from common.metrics import Groups
from server.rounds import RoundReport


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
        "generic": _mean(_in_all([e["generic"] for e in last])),
        "generic_local": _mean(_in_all([e.get("generic_local") for e in last])),
        "personal": _mean(_in_all([e["personal"] for e in last])),
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
def locked(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """One process at a time works in a run folder; the lock goes with the process, however it ends. `patience` is for
    one that is about to end, in seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + patience
    with (folder / "lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise UserError(
                        f"{folder}: another process is running this experiment: wait for it, or name another folder"
                    ) from None
            time.sleep(0.1)
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
    for key, (old, new) in differences(before, now).items():
        if key != "federation.rounds" and not key.startswith("run."):
            raise UserError(
                f"{folder} holds a run with {key} = {old!r}, not {new!r}: "
                "name another folder with --out, or delete that one to start anew"
            )


def differences(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys of two configurations with their values in both, where these are not the same."""
    old, new = _flat(before), _flat(now)
    keys = sorted(old.keys() | new.keys(), key=lambda key: (key != "method.name", key))  # its knobs follow from it
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _in_all(evaluations: list[Any]) -> list[Any]:
    """Without predictors that some of them lack: a survey of class statistics may have failed once."""
    if any(found is None for found in evaluations):
        return evaluations
    return [{name: found[name] for name in found if all(name in e for e in evaluations)} for found in evaluations]


def _mean(items: list[Any]) -> Any:
    """The mean of equally shaped JSON values, leaf by leaf; None where any is missing."""
    first = items[0]
    if any(item is None for item in items):
        return None
    if isinstance(first, dict):
        return {key: _mean([item.get(key) for item in items]) for key in first}
    if isinstance(first, list):
        return [_mean(list(values)) for values in zip(*items, strict=True)]
    return sum(items) / len(items)


def entry(report: RoundReport) -> dict[str, Any]:
    """What is kept of a round."""
    return {
        "round": report.round,
        "sites": list(report.folded),
        "refused": report.refused,
        "missing": list(report.missing),
        "loss": mean_metrics(report.metrics),
    }


def newest(history: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The last evaluation."""
    return next((e["evaluation"] for e in reversed(history) if "evaluation" in e), None)


def mean_metrics(reported: dict[str, dict[str, float]]) -> dict[str, float]:
    names = sorted({name for metrics in reported.values() for name in metrics})
    values = {name: [m[name] for m in reported.values() if name in m] for name in names}
    return {name: sum(v) / len(v) for name, v in values.items()}


def add_line(path: Path, event: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(event) + "\n")


def amend_line(path: Path, number: int, more: dict[str, Any]) -> None:
    """Add to the event on line `number`, counted from 0."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    lines[number] = json.dumps({**json.loads(lines[number]), **more}) + "\n"
    files.replace(path, "".join(lines))


def restore_lines(path: Path, history: list[dict[str, Any]]) -> None:
    """One line for every round of `history`: events of rounds that will be run again go, as a run may have been killed
    between event and checkpoint; one that a power cut took or damaged comes back without its times."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    lines += [""] * (len(history) - len(lines))
    kept = (line if _is_of(line, e["round"]) else json.dumps(e) for line, e in zip(lines, history, strict=False))
    files.replace(path, "".join(f"{line}\n" for line in kept))


def _is_of(line: str, round: int) -> bool:
    try:
        event = json.loads(line)
    except ValueError:
        return False
    return isinstance(event, dict) and event.get("round") == round


def write_json(path: Path, value: Any) -> None:
    files.replace(path, json.dumps(value, indent=1) + "\n")
