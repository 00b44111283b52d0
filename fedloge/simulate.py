"""A whole federation in one process: the same rounds, folds, local updates and files as the real one.

The run folder holds `config.json`, `environment.json`, `events.jsonl` (one line a round), `metrics.json` (the
result), `checkpoints/`, `sites/` (every site's local parts) and `models/` (final models, safetensors). The same
command goes on where a run stopped; of a finished one it gives the result. A run that fails before a round of it is
finished takes the folder it made away again. Times are in events.jsonl only, so every tensor and every figure is the
same bit for bit whether the run was interrupted or not (but within the rounding of federation.wire int8 and topk).
"""

import logging
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from common.config import Config
from common.errors import UserError
from common.methods.method import ServerState
from fedloge import lanes
from fedloge.federation import Federation, assemble, judge, save_models
from server import checkpoint, models, rounds, run_folder
from server.checkpoint import Checkpoint, Writer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    round: int
    rounds: int
    evaluation: dict[str, Any] | None  # the newest one


def simulate(config: Config, folder: Path, progress: Callable[[Progress], None]) -> dict[str, Any]:
    """Run or resume the experiment in `folder` to its end; returns what metrics.json holds."""
    start = None
    if not folder.exists():  # refuse what cannot work while nothing is written yet
        federation = assemble(config, folder)
        start = federation, config.method.init(federation.net, federation.task)
    with run_folder.locked(folder):
        found = checkpoint.latest(folder / "checkpoints")
        if found is not None:
            run_folder.same_experiment(found.config, config.as_dict(), folder)
            if found.state.round > config.federation.rounds:
                raise UserError(
                    f"{folder} holds {found.state.round} rounds, more than federation.rounds = "
                    f"{config.federation.rounds}: ask for as many or more, or name another folder with --out"
                )
            if found.state.round == config.federation.rounds and (
                done := run_folder.finished(folder, found.state.round)
            ):
                return done
        federation = start[0] if start else assemble(config, folder)
        if found is None:
            state = start[1] if start else config.method.init(federation.net, federation.task)
            found = Checkpoint(state, [], config.as_dict(), federation.fingerprint())
        else:
            if found.data not in ("", federation.fingerprint()):
                raise UserError(
                    f"{folder}: the data or its split is not what the run began with: bring it back, or --out"
                )
            checkpoint.require_parts(found, config.method, federation.net, folder)
            log.info("going on after round %d", found.state.round)
        try:
            return _go_on(config, folder, federation, found, progress)
        except BaseException:  # an interrupt too: with no round there is nothing to go on from
            if start and not any(folder.glob("checkpoints/round-*")):
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _go_on(
    config: Config, folder: Path, federation: Federation, found: Checkpoint, progress: Callable[[Progress], None]
) -> dict[str, Any]:
    method, history = config.method, found.history
    state = models.placed(found.state, federation.device)
    run_folder.note_environment(folder / "environment.json")
    run_folder.write_json(folder / "config.json", config.as_dict())  # a run that goes on may have got more rounds
    events = folder / "events.jsonl"
    run_folder.restore_lines(events, history)
    for site in federation.sites.values():  # a killed or damaged run may have left them ahead of the checkpoint
        site.store.rewind(state.round)

    def after(report: rounds.RoundReport) -> None:
        began = time.monotonic()
        entry = run_folder.entry(report)
        if run_folder.evaluated(config, report.round):
            entry["evaluation"] = judge(federation, method, report.state)
        history.append(entry)
        judged = time.monotonic()
        writer.wait()
        waited = time.monotonic() - judged  # for the checkpoint before this one
        seconds = {"training": report.seconds, "evaluation": judged - began, "checkpoint": waited}
        # before the checkpoint: a resume drops what is too new
        run_folder.add_line(events, {**entry, "seconds": {name: round(s, 3) for name, s in seconds.items()}})
        saved = Checkpoint(report.state, history, config.as_dict(), found.data)
        now = Progress(report.round, config.federation.rounds, run_folder.newest(history))
        writer.save(saved, partial(progress, now))

    def surveyed(state: ServerState) -> ServerState:
        if not (method.surveyed(federation.task) and run_folder.evaluated(config, state.round)):
            return state
        return rounds.survey(fleet, method, federation.task, state, federation.net, policy, rounds.Hooks())

    fleet = lanes.fleet(federation, state.round)
    # sites in one process take the time they take: no clock may close a round, and nobody can be missing
    policy = replace(
        config.federation, quorum=1.0, grace=math.inf, deadline=math.inf, failures=1, min_clients=1, wait=0.0
    )
    writer = Writer(folder / "checkpoints", config.run.keep, durable=False)
    try:
        state = rounds.run(fleet, method, state, federation.net, policy, config.seed, rounds.Hooks(after, surveyed))
        writer.wait()
    finally:
        writer.close()
    if "evaluation" not in history[-1]:  # the run went on only to be ended earlier than it was once meant to
        state = surveyed(state)
        history[-1]["evaluation"] = judge(federation, method, state)
    save_models(federation, method, state, folder / "models")
    result = run_folder.summary(config, history, federation.groups)
    run_folder.write_json(folder / "metrics.json", result)
    return result
