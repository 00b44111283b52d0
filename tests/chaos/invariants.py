"""What holds of every federation that has come to its end, whatever happened to it on the way.

That every round folded only good replies of its own, each once, is shown by doing it again: the same rounds with the
sites that events.jsonl names, in one process, come to the same bits as every checkpoint that is kept. One reply more
or less, or of another round, and they do not. The personal heads are shown likewise, each from the one before.
Whose class statistics a computed head is made of is not told: it must be that of some of the sites, each once.
"""

import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import accumulate, product
from pathlib import Path
from typing import Any

import torch

from client.store import Store
from common import config, deployment, parts, statistics
from common.errors import UserError
from common.methods.method import ServerState
from common.parts import Tensors
from common.statistics import NOBODY, PART, Sums
from fedloge import demo
from fedloge.federation import Federation, assemble
from server import checkpoint, rounds, run_folder
from server import status as board
from server.checkpoint import Checkpoint
from server.survey import centre
from tests.chaos import disks
from tests.chaos.arena import PROC, processes

TEMPORARY = ("*.tmp", "*.partial", "ballast", "*.kept", "link.json")
OWED = ("outbox/order", "outbox/reply", "outbox/tried", "outbox/objects/*")


def broken(place: Path, names: Sequence[str], experiment: Sequence[str], quorum: float = 0.5) -> list[str]:
    """What does not hold of the federation in `place`, as `fedloge demo` lays it out; a line each."""
    run = place / "federation" / "run"
    found = [*_unfinished(place, names), *_left_over(place, names), *_doubtful_rounds(run, quorum)]
    kept = dict(_checkpoints(run))
    found += _gaps(run, kept)
    if not found:  # with sound files only
        found += _unlike(place, names, experiment, {n: one for n, one in kept.items() if isinstance(one, Checkpoint)})
    return found


def _unfinished(place: Path, names: Sequence[str]) -> Iterator[str]:
    run = place / "federation" / "run"
    status = board.read(run)
    if status is None or status.phase != "finished":
        yield "the status is not that of a finished federation"
    elif run_folder.finished(run, status.rounds) is None:
        yield "there is no result"
    wanted = [run / "models" / "generic.safetensors"]
    wanted += [place / "sites" / name / what for name in names for what in ("over", "models/personal.safetensors")]
    yield from (f"{path.relative_to(place)} is missing" for path in wanted if not path.exists())


def _left_over(place: Path, names: Sequence[str]) -> Iterator[str]:
    yield from (f"process {pid} is left: {command}" for pid, command in processes(place).items())
    yield from (f"{path} is still mounted" for path in disks.mounted(place))
    port = deployment.load(place / "federation" / "federation.toml").server.port
    if port in _listening():
        yield f"port {port} is still open"
    for pattern in TEMPORARY:
        yield from (f"{path.relative_to(place)} is left" for path in sorted(place.rglob(pattern)))
    for name in names:
        for pattern in OWED:
            yield from (f"{name} still owes {path.name}" for path in (place / "sites" / name).glob(pattern))


def _doubtful_rounds(run: Path, quorum: float) -> Iterator[str]:
    events = _events(run)
    if [entry["round"] for entry in events] != list(range(1, len(events) + 1)) or not events:
        yield "events.jsonl has not one line for every round"
    for entry in events:
        folded, others = entry["sites"], {*entry["refused"], *entry["missing"]}
        if len(set(folded)) < len(folded) or set(folded) & others:
            yield f"round {entry['round']} counts a site twice"
        if len(folded) < max(math.ceil(quorum * (len(folded) + len(others))), 1):
            yield f"round {entry['round']} was folded without a quorum"


def _checkpoints(run: Path) -> Iterator[tuple[int, Checkpoint | str]]:
    """Every one that is kept, or what is wrong with it."""
    for path in sorted((run / "checkpoints").glob("round-*.safetensors")):
        number = int(path.stem.removeprefix("round-"))
        try:
            yield number, checkpoint.read(path)
        except UserError as error:
            yield number, f"{path.name} cannot be read: {error}"


def _gaps(run: Path, kept: dict[int, Checkpoint | str]) -> Iterator[str]:
    events = _events(run)
    with suppress(OSError, ValueError, KeyError):
        keep = json.loads((run / "config.json").read_text(encoding="utf-8"))["run"]["keep"]
        wanted = list(range(max(len(events) - keep, 0) + 1, len(events) + 1))
        if list(kept) != wanted:
            yield f"there are checkpoints of the rounds {list(kept)} instead of {wanted}"
    for number, one in kept.items():
        if isinstance(one, str):
            yield one
        elif one.state.round != number or [_told(e) for e in one.history] != [_told(e) for e in events[:number]]:
            yield f"the checkpoint of round {number} tells of other rounds than events.jsonl"


def _unlike(place: Path, names: Sequence[str], experiment: Sequence[str], kept: dict[int, Checkpoint]) -> Iterator[str]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        federation = assemble(config.load(demo.DEMO, experiment), Path(scratch))
        events = _events(place / "federation" / "run")
        states = _replayed(federation, events)
        for number, one in kept.items():
            if (wrong := _difference(one.state, states[number])) is not None:
                yield f"round {number}: {wrong} is not what the replies of its sites come to"
                return
            surveyed = "evaluation" in events[number - 1]  # the head of others is an earlier one
            if PART in one.state.parts and surveyed and not _of_some_sites(federation, one.state):
                yield f"round {number}: the computed head is not that of the statistics of any of the sites"
                return
        for name in names:
            yield from _wrong_heads(federation, states, place / "sites" / name, name, Path(scratch))


def _replayed(federation: Federation, events: Sequence[dict[str, Any]]) -> list[ServerState]:
    """The state before the first round and after every one. The mean is not left to the code that is judged here."""
    settings, net = federation.task.config, federation.net
    states = [settings.method.init(net, federation.task)]
    for entry in events:
        order = rounds.make_order(settings.method, states[-1], entry["round"], train=True, judge=False)
        mean: dict[str, Tensors] = {}
        examples = 0
        for name in sorted(entry["sites"]):
            reply = federation.sites[name].handle(order)
            examples += reply.examples
            for part, values in reply.shared.items():
                into = mean.setdefault(part, {})
                for key, t in values.items():
                    into[key] = into[key].add(t, alpha=reply.examples) if key in into else t * reply.examples
        mean = {part: {key: t.detach() / examples for key, t in values.items()} for part, values in mean.items()}
        states.append(replace(settings.method.update(states[-1], mean, {}, net), round=entry["round"]))
    return states


def _of_some_sites(federation: Federation, state: ServerState) -> bool:
    """Whether the computed head is what the sums of some sites, or of none, come to."""
    about = centre(federation.net, federation.task, state)
    sums = [site.count(about) for site in federation.sites.values()]
    others = federation.task.config.method.trained_rows(state)
    for chosen in product((True, False), repeat=len(sums)):
        empty = Sums.nothing(len(federation.task.classes), len(about))
        total = sum((one for one, taken in zip(sums, chosen, strict=True) if taken), empty)
        head = statistics.solve(total, about, others)
        wanted = {} if head is None else head.tensors()
        if head is not None:  # a class may be known of an earlier survey, or not
            silent = (total.count == 0) & (state.parts[PART]["bias"] == NOBODY)
            wanted["bias"][silent] = NOBODY
        near = [
            torch.allclose(t, wanted.get(name, torch.zeros_like(t)), rtol=1e-4, atol=1e-5)
            for name, t in state.parts[PART].items()
        ]
        if all(near):
            return True
    return False


def _difference(one: ServerState, other: ServerState) -> str | None:
    """The first tensor that is not the same, of those that rounds make."""
    for part in other.parts.keys() - {PART}:
        for name, tensor in other.parts[part].items():
            mine = one.parts.get(part, {}).get(name)
            if mine is None or not torch.equal(mine, tensor):
                return f"{part}/{name}"
    return None


def _wrong_heads(
    federation: Federation, states: Sequence[ServerState], state: Path, name: str, scratch: Path
) -> Iterator[str]:
    """The personal heads that are kept: there, of rounds that were, and each what training makes of the one before."""
    method, participant = federation.task.config.method, federation.sites[name]
    paths = sorted(state.glob("store/*/round-*.safetensors"))
    found = [int(path.stem.removeprefix("round-")) for path in paths]
    folded = max(
        (e["round"] for e in _events(state.parents[1] / "federation" / "run") if name in e["sites"]), default=0
    )
    if not found or not folded <= found[-1] < len(states):
        yield f"{name} has personal heads of the rounds {found}, and was last in round {folded}"
        return
    trained = [event["round"] for event in _events(state) if event["trained"]]
    if any(number < far - 1 for number, far in zip(trained, accumulate(trained, max), strict=True)):
        yield f"{name} trained in the rounds {trained}"
    for before, path, number in zip(paths, paths[1:], found[1:], strict=False):
        site = replace(participant, store=Store(scratch / f"{name}-{number}", durable=False))
        site.store.folder.mkdir()
        shutil.copyfile(before, site.store.folder / before.name)
        site.handle(rounds.make_order(method, states[number - 1], number, train=True, judge=False))
        try:
            mine, wanted = (parts.read(one)[0] for one in (path, site.store.folder / path.name))
        except UserError as error:
            yield f"{name}: {error}"
            return
        if mine.keys() != wanted.keys() or any(not torch.equal(mine[key], wanted[key]) for key in wanted):
            yield f"{name}: the personal head of round {number} is not what training made of the one before"


def _events(folder: Path) -> list[dict[str, Any]]:
    """Of a run, or of a site."""
    with suppress(OSError, ValueError):
        return [json.loads(line) for line in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    return []


def _told(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: entry[key] for key in ("round", "sites", "refused", "missing", "loss")}


def _listening() -> set[int]:
    rows = [line.split() for table in ("tcp", "tcp6") for line in (PROC / "net" / table).read_text().splitlines()[1:]]
    return {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A"}
