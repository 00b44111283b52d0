"""A whole federation, seen from the server: rounds, figures, checkpoints and files, over any fleet.

It is to real sites what `fedloge/simulate.py` is to simulated ones, and writes the same files into the run folder:
`config.json`, `environment.json`, `events.jsonl` (one line a round), `metrics.json` (the result), `checkpoints/` and
`models/generic.safetensors`; beside them `status.json` says what is going on. Local parts and personal models stay at
the sites. Whenever it is stopped, the next call goes on after the last finished round, and after the last round with
the judgement of the final models. A round is finished, and said to be, once its checkpoint is on the disk, which is
written while the next round runs. Between two calls the operator may change how rounds are run, trained and judged, not
what is learnt from what: such a change is noted with the first round it counts for.

A site judges the model of a round when it gets it, at the beginning of the next one: its figures are added to the
round they are about when its reply comes in. Figures of classes or groups never leave a site.
"""

import json
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from common.config import RunConfig
from common.deployment import Deployment, from_settings
from common.errors import UserError
from common.holding import resolved
from common.messages import Judgement, Order
from common.methods.method import ServerState
from common.net import best_device, build_on, roles
from server import checkpoint, rounds, run_folder
from server.checkpoint import Checkpoint, Writer
from server.fleet import Exchange, Fleet
from server.models import TestSet, over_sites, placed, save_generic
from server.spill import aside
from server.status import Board, added
from server.survey import unsurveyed

log = logging.getLogger(__name__)

PATIENCE = 30.0  # seconds for a server that was told to end to be gone, and for sites to be back for the farewell
MAY_CHANGE = (
    "federation.",
    "evaluation.",
    "train.",
    "name",
)  # between rounds; [run] and [server] are the machine's own
PACE = 5  # rounds by which the time left is guessed


def federate(
    deployment: Deployment,
    folder: Path,
    fleet: Fleet,
    board: Board,
    *,
    initial: ServerState | None = None,
    farewell: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Run or resume the federation in `folder` to its end; returns what metrics.json holds.

    `initial` replaces the state before round 1. `farewell` lets the sites go: the result is written by then. What
    only a user can mend ends as UserError and as the phase `gave-up`; whatever else stops it can be tried again.
    """
    with run_folder.locked(folder, PATIENCE):
        board.show(phase="starting", rounds=deployment.config.federation.rounds)
        try:
            result = _begin(deployment, folder, fleet, board, initial)
            farewell()
        except UserError as error:
            board.show(phase="gave-up", message=str(error))
            raise
        else:
            board.show(phase="finished", left=0.0, message="", **_shown(result["evaluations"]))
            return result
        finally:
            board.flush()


def _begin(
    deployment: Deployment, folder: Path, fleet: Fleet, board: Board, initial: ServerState | None
) -> dict[str, Any]:
    config = deployment.config
    found = checkpoint.latest(folder / "checkpoints")
    changed: dict[str, list[Any]] = {}
    if found is not None:
        changed = _changes(found.config, deployment, folder)
        done, wanted = found.state.round, config.federation.rounds
        if done > wanted:
            raise UserError(
                f"{folder} holds {done} rounds, more than federation.rounds = {wanted}: ask for as many or more"
            )
        surveyed = not unsurveyed(config.method, deployment.task, found.state)
        if done == wanted and surveyed and (result := run_folder.finished(folder, done)):
            took_part = {name for e in found.history for name in e["sites"]}
            fleet.names(len(took_part), PATIENCE)  # the sites look for a server that can tell them so
            return result
        log.info("going on after round %d of %d", done, wanted)
    run = _Run(deployment, folder, fleet, board, changed)
    if found is not None:
        checkpoint.require_parts(found, run.method, run.net, folder)
    else:
        found = Checkpoint(initial or config.method.init(run.net, run.task), [], {})
    return run.go(found)


class _Run:
    """One process's share of the federation."""

    def __init__(
        self, deployment: Deployment, folder: Path, fleet: Fleet, board: Board, changed: dict[str, list[Any]]
    ) -> None:
        self.task = deployment.task
        self.config = deployment.config
        self.method = self.config.method
        self.device = best_device(self.config.run.device)
        self.net = build_on(self.device, self.method, self.task)
        self._test = TestSet(deployment)
        self._images = resolved(deployment.images)
        self._table = _table(deployment)
        self._folder = folder
        self._events = folder / "events.jsonl"
        self._fleet = _Reporting(fleet, self._waits)
        self._board = board
        self._changed = changed
        self._history: list[dict[str, Any]] = []
        self._writer = Writer(folder / "checkpoints", self.config.run.keep)
        self._standing: rounds.Standing | None = None
        self._began = time.monotonic()
        self._paces: deque[float] = deque(maxlen=PACE)
        self._hooks = rounds.Hooks(
            self._after,
            self._surveyed,
            self._during,
            judge=lambda round: run_folder.evaluated(self.config, round),
            asking=self.net.stowed,
            waiting=aside(self.config.federation, folder, self._writer.wait),
        )

    def go(self, found: Checkpoint) -> dict[str, Any]:
        self._history = found.history
        run_folder.note_environment(self._folder / "environment.json")
        run_folder.write_json(self._folder / "config.json", self._table)
        run_folder.restore_lines(self._events, self._history)
        quarantined = {
            name: {"round": e["round"], "reason": reason}
            for e in found.history
            for name, reason in e["refused"].items()
        }
        self._board.show(round=found.state.round, quarantined=quarantined, **_shown(_evaluations(found.history)))
        state = placed(found.state, self.device)
        policy, seed = self.config.federation, self.config.seed
        self._began = time.monotonic()
        try:
            state = rounds.run(self._fleet, self.method, state, self.net, policy, seed, self._hooks)
            return self._end(state)
        finally:
            self._writer.close()

    def _end(self, state: ServerState) -> dict[str, Any]:
        """The sites keep and judge their personal models; until metrics.json is there, a resume begins here."""
        log.info("all %d rounds are done: the sites judge the final models", state.round)
        # the run went on only to be ended earlier than it was once meant to, or there is more to judge than there was
        if "evaluation" not in self._history[-1] or unsurveyed(self.method, self.task, state):
            state = self._surveyed(state)
            self._history[-1]["evaluation"] = self._judge(state)
        report = rounds.final_judgement(self._fleet, self.method, state, self.config.federation, self._hooks)
        if not report.judged:
            log.warning("no site has judged the final models: there are no figures of personal models for them")
        self._board.show(deadline=None)
        self._merge(report.judged)
        self._save(state)
        self._writer.wait()
        if not save_generic(self.net, self.method, self.task, state, self._folder / "models", self._images):
            log.info("BatchNorm stays at the sites: there is no generic model")
        result = run_folder.summary(self.config, self._history, ())
        run_folder.write_json(self._folder / "metrics.json", result)
        return result

    def _surveyed(self, state: ServerState) -> ServerState:
        """With the head that is computed from everybody's class statistics, where the models are judged by it."""
        if not (self.method.surveyed(self.task) and run_folder.evaluated(self.config, state.round)):
            return state
        policy, before = self.config.federation, self._board.status.traffic
        state = rounds.survey(self._fleet, self.method, self.task, state, self.net, policy, self._hooks)
        self._board.show(traffic=added(before, self._board.status.traffic))
        return state

    def _after(self, report: rounds.RoundReport) -> None:
        self._board.show(deadline=None)  # it is closed, and what follows may take its time
        self._merge(report.judged)
        entry = run_folder.entry(report)
        if self._changed:
            entry["changed"], self._changed = self._changed, {}
        began = time.monotonic()
        if run_folder.evaluated(self.config, report.round):
            entry["evaluation"] = self._judge(report.state)
        self._history.append(entry)
        seconds = {"training": round(report.seconds, 3), "evaluation": round(time.monotonic() - began, 3)}
        # of the network and the machine: not part of what is resumed
        run_folder.add_line(self._events, {**entry, "seconds": seconds, "bytes": self._board.status.traffic})
        losses = ", ".join(f"{loss:.4f}" for loss in entry["loss"].values()) or "-"
        done = f"round {report.round} of {self.config.federation.rounds}: {len(report.folded)} sites"
        self._save(report.state, partial(log.info, f"{done} in {report.seconds:.1f} s, loss {losses}"))
        self._paces.append(time.monotonic() - self._began)
        self._began = time.monotonic()
        left = (self.config.federation.rounds - report.round) * sum(self._paces) / len(self._paces)
        self._board.show(message="", left=round(left, 1), **_shown(_evaluations(self._history)))

    def _during(self, standing: rounds.Standing) -> None:
        self._writer.check()
        changes: dict[str, Any] = {}
        if standing is not self._standing:
            before, self._standing = self._standing, standing
            training = standing.training
            changes = {
                "phase": "training" if training else "judging",
                "round": standing.round,
                "chosen": list(standing.chosen),
                "round_began": time.time(),
                "deadline": time.time() + self.config.federation.deadline,
            }
            if training and before is not None and before.training and before.round == standing.round:
                changes["message"] = f"round {standing.round} had no quorum and is tried again"
        refused = {name: {"round": standing.round, "reason": reason} for name, reason in standing.refused.items()}
        self._board.show(
            waiting=sorted(standing.waiting),
            refused=dict(standing.refused),
            quarantined={**self._board.status.quarantined, **refused},
            **changes,
        )

    def _waits(self) -> None:
        self._board.show(phase="waiting", chosen=[], waiting=[], refused={}, round_began=None, deadline=None)

    def _judge(self, state: ServerState) -> dict[str, Any]:
        """What the server finds itself; the sites' own findings come later."""
        generic = self._test.judge(self.net, self.method, self.task, state, self.device)
        return {"generic": generic, "generic_local": {}, "personal": {}, "never_trained": []}

    def _merge(self, judged: Mapping[str, Judgement]) -> None:
        """Add to the last round what the sites found of its models."""
        if not self._history or not judged or "evaluation" not in self._history[-1]:
            return
        trained = {name for e in self._history for name in e["sites"]}
        _, _, local = roles(self.method, self.net)
        found = {
            "generic_local": over_sites(judged, "generic"),
            "personal": over_sites(judged, "personal"),
            # their personal models hold untrained local parts
            "never_trained": [name for name in sorted(judged) if local and name not in trained],
        }
        evaluation = self._history[-1]["evaluation"]
        evaluation |= found
        run_folder.amend_line(self._events, len(self._history) - 1, {"evaluation": evaluation})

    def _save(self, state: ServerState, done: Callable[[], None] = lambda: None) -> None:
        self._writer.save(Checkpoint(state, self._history, self._table), done)


class _Reporting:
    """The fleet, saying when it waits for sites."""

    def __init__(self, fleet: Fleet, waits: Callable[[], None]) -> None:
        self._fleet = fleet
        self._waits = waits

    def names(self, at_least: int, wait: float) -> list[str]:
        self._waits()
        return self._fleet.names(at_least, wait)

    def broadcast(self, order: Order, names: Sequence[str], deadline: float) -> Exchange:
        return self._fleet.broadcast(order, names, deadline)


def _evaluations(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"round": e["round"], **e["evaluation"]} for e in history if "evaluation" in e]


def _shown(evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    """The newest figures, each of the method's own result."""
    shown: dict[str, Any] = {}
    for evaluation in evaluations:
        for kind in ("generic", "generic_local", "personal"):
            for predictor in list(evaluation[kind].values())[:1]:
                shown[kind] = predictor["top1"]
        if evaluation["personal"]:
            shown["judged_round"] = evaluation["round"]
    return shown


def _table(deployment: Deployment) -> dict[str, Any]:
    """All of federation.toml, as JSON has it."""
    table = {**deployment.config.as_dict(), "images": asdict(deployment.images), "server": asdict(deployment.server)}
    for absent in ("data", "partition"):
        del table[absent]
    loaded: dict[str, Any] = json.loads(json.dumps(table))
    return loaded


def _changes(before: dict[str, Any], deployment: Deployment, folder: Path) -> dict[str, list[Any]]:
    """What the operator has changed since the last round, {key: [before, now]}; refuses what cannot be changed."""
    table = {key: value for key, value in before.items() if key not in ("run", "server")}
    with suppress(UserError):  # a key that did not exist yet had its default; one that exists no more is named below
        table = json.loads(from_settings(json.dumps(table), RunConfig()).settings())
    changed = {}
    for key, (old, new) in run_folder.differences(table, json.loads(deployment.settings())).items():
        if not key.startswith(MAY_CHANGE):
            raise UserError(
                f"{folder} holds a federation with {key} = {old!r}, not {new!r}: only [federation], [evaluation], "
                "[train], [run] and [server] may change after its first round; put it back, or begin a new federation"
            )
        log.info("changed since the last round: %s = %r, was %r", key, new, old)
        changed[key] = [old, new]
    return changed
