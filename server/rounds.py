"""The only place a round exists.

choose sites -> send the shared and fixed parts -> fold replies as they arrive -> close at quorum + grace or at
the deadline -> the method's server step -> `after` (evaluation, checkpoint, progress). It knows neither Flower
nor files, takes its clock as an argument and draws the sites of a round from (seed, round) alone.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from common.config import FederationConfig
from common.errors import UserError
from common.messages import Order
from common.methods.method import Method, ServerState
from common.net import Net
from common.parts import digest
from common.seeds import generator
from server.fleet import Failure, Fleet
from server.fold import Fold, Refused

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RoundReport:
    """What happened in one round; `state` is the result of the last round that made its quorum."""

    round: int
    state: ServerState
    chosen: tuple[str, ...]
    folded: tuple[str, ...]
    refused: dict[str, str]  # client -> reason
    missing: tuple[str, ...]
    metrics: dict[str, dict[str, float]]  # client -> what it reported
    seconds: float


class GaveUp(UserError):
    """Too many rounds in a row without a quorum."""


def run(
    fleet: Fleet,
    method: Method,
    state: ServerState,
    workspace: Net,
    policy: FederationConfig,
    seed: int,
    after: Callable[[RoundReport], None],
    clock: Callable[[], float] = time.monotonic,
) -> ServerState:
    """Run the rounds after `state.round` up to `policy.rounds`; `after` sees every round that counted."""
    failed = 0
    while state.round < policy.rounds:
        report = one_round(fleet, method, state, workspace, policy, seed, clock)
        if report.state.round == state.round:
            failed += 1
            reasons = "; ".join(f"{name}: {reason}" for name, reason in report.refused.items())
            log.warning(
                "round %d has no quorum: missing %s; refused %s",
                report.round, ", ".join(report.missing) or "nobody", reasons or "nobody",
            )  # fmt: skip
            if failed >= policy.failures:
                raise GaveUp(
                    f"round {report.round} found no quorum {failed} times in a row "
                    f"(missing: {', '.join(report.missing) or 'nobody'}; refused: {reasons or 'nobody'}): "
                    "bring the sites back or lower federation.quorum, then start again to go on from here"
                )
            continue
        failed = 0
        state = report.state
        after(report)
    return state


def one_round(
    fleet: Fleet,
    method: Method,
    state: ServerState,
    workspace: Net,
    policy: FederationConfig,
    seed: int,
    clock: Callable[[], float] = time.monotonic,
) -> RoundReport:
    """One attempt at round `state.round + 1`. Without a quorum the report carries the state it began with."""
    began = clock()
    number = state.round + 1
    names = fleet.names()
    chosen = choose(names, policy.fraction, seed, number)
    shared = {part: t for part, t in state.parts.items() if part in method.shared}
    order = Order(
        round=number,
        model=digest({f"{part}/{name}": t for part, group in shared.items() for name, t in group.items()}),
        shared=shared,
        fixed={part: t for part, t in state.parts.items() if part in method.fixed},
    )
    fold = Fold(order, method.statistics(workspace), method.objection, policy.max_examples, policy.max_update)
    quorum = max(math.ceil(policy.quorum * len(chosen) - 1e-9), 1)  # 0.07 of 100 is 7, not 8 because of rounding
    refused: dict[str, str] = {}
    metrics: dict[str, dict[str, float]] = {}
    waiting = set(chosen)
    closes = began + policy.deadline
    exchange = fleet.broadcast(order, chosen, policy.deadline)
    while waiting and (left := closes - clock()) > 0:
        answer = exchange.next(left)
        if answer is None:
            continue
        if answer.client not in waiting:
            log.warning("round %d: an answer from %s, which is not awaited, is ignored", number, answer.client)
            continue
        waiting.discard(answer.client)
        if isinstance(answer, Failure):
            refused[answer.client] = answer.reason
            log.warning("round %d: %s failed: %s", number, answer.client, answer.reason)
            continue
        try:
            fold.add(answer)
        except Refused as reason:
            refused[answer.client] = str(reason)
            log.warning("round %d: the reply of %s is refused: %s", number, answer.client, reason)
            continue
        metrics[answer.client] = answer.metrics
        if len(fold.clients) == quorum:
            closes = min(closes, clock() + policy.grace)
    exchange.close()
    new = state
    if len(fold.clients) >= quorum:
        mean, sums = fold.result()
        new = replace(method.update(state, mean, sums, workspace), round=number)
    return RoundReport(
        round=number,
        state=new,
        chosen=tuple(chosen),
        folded=tuple(fold.clients),
        refused=refused,
        missing=tuple(sorted(waiting)),
        metrics=metrics,
        seconds=clock() - began,
    )


def choose(names: Sequence[str], fraction: float, seed: int, round: int) -> list[str]:
    """max(int(fraction * K), 1) sites, uniformly without replacement, the same for the same seed and round."""
    ordered = sorted(names)
    if not ordered:
        return []
    many = max(int(fraction * len(ordered)), 1)
    picked = torch.randperm(len(ordered), generator=generator(seed, "sites", round))[:many]
    return [ordered[i] for i in sorted(picked.tolist())]
