"""The only place a round exists.

wait for sites -> choose some -> send the shared and fixed parts -> fold replies as they arrive -> close at quorum +
grace or at the deadline -> the method's server step -> `complete` (a survey of all sites, where heads are computed
from class statistics) -> `after` (evaluation, checkpoint, progress). It knows neither Flower nor files, takes its clock
as an argument and draws the sites of a round from (seed, round) alone.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch

from common.config import FederationConfig
from common.errors import UserError
from common.messages import Judgement, Order, Reply
from common.methods.method import Method, ServerState
from common.net import Net, Task
from common.parts import label
from common.seeds import generator
from server.fleet import Failure, Fleet
from server.fold import Fold, Refused
from server.survey import Survey, centre, known, with_head

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RoundReport:
    """What happened in one round; `state` is the result of the last round that made its quorum."""

    round: int
    state: ServerState
    reached: int  # sites that could have been chosen
    chosen: tuple[str, ...]  # nobody where too few could be reached
    folded: tuple[str, ...]
    refused: dict[str, str]  # client -> reason
    missing: tuple[str, ...]
    metrics: dict[str, dict[str, float]]  # client -> what it reported
    judged: dict[str, Judgement]  # client -> what it found of the model this round began with
    seconds: float


@dataclass
class Standing:
    """A round while it is open, for those who look on."""

    round: int
    training: bool  # otherwise sites judge or count
    chosen: tuple[str, ...]
    waiting: set[str]
    refused: dict[str, str] = field(default_factory=dict)  # client -> reason


class GaveUp(UserError):
    """Too many rounds in a row without a quorum."""


@dataclass(frozen=True)
class Hooks:
    """What the round loop tells its caller; by default nobody listens."""

    after: Callable[[RoundReport], None] = lambda _: None  # every round that counted
    complete: Callable[[ServerState], ServerState] = lambda state: state  # adds to its state, before `after` sees it
    during: Callable[[Standing], None] = lambda _: None  # whenever an open round's standing changes
    judge: Callable[[int], bool] = lambda _: False  # whether sites judge the state after this round
    asking: Callable[[], AbstractContextManager[None]] = nullcontext  # around an order and its replies
    waiting: Callable[[Order], AbstractContextManager[None]] = lambda _: nullcontext()  # while replies are waited for


def run(
    fleet: Fleet,
    method: Method,
    state: ServerState,
    workspace: Net,
    policy: FederationConfig,
    seed: int,
    hooks: Hooks,
    clock: Callable[[], float] = time.monotonic,
) -> ServerState:
    """Run the rounds after `state.round` up to `policy.rounds`."""
    failed = 0
    while state.round < policy.rounds:
        report = one_round(fleet, method, state, workspace, policy, seed, hooks, clock)
        if report.state.round == state.round:
            failed += 1
            lack = _lack(report, policy)
            log.warning("round %d has no quorum: %s", report.round, lack)
            if failed >= policy.failures:
                raise GaveUp(
                    f"round {report.round} found no quorum {failed} times in a row ({lack}): bring the sites back or "
                    "lower federation.quorum or federation.min_clients, then start again to go on from here"
                )
            continue
        failed = 0
        state = report.state  # the one before is as large, and goes
        state = hooks.complete(state)
        hooks.after(replace(report, state=state))
    return state


def one_round(
    fleet: Fleet,
    method: Method,
    state: ServerState,
    workspace: Net,
    policy: FederationConfig,
    seed: int,
    hooks: Hooks,
    clock: Callable[[], float] = time.monotonic,
) -> RoundReport:
    """One attempt at round `state.round + 1`. Without a quorum the report carries the state it began with."""
    names = fleet.names(policy.min_clients, policy.wait)
    enough = len(names) >= policy.min_clients
    order = make_order(method, state, state.round + 1, train=True, judge=state.round > 0 and hooks.judge(state.round))
    chosen = choose(names, policy.fraction, seed, order.round) if enough else []
    fold = Fold(order, method.statistics(workspace), method.objection, policy.max_examples, policy.max_update)
    with hooks.asking():
        answers = _collect(fleet, order, chosen, policy, hooks, clock, fold.add)
    new = state
    if answers.counts:
        mean, sums = fold.result()
        new = replace(method.update(state, mean, sums, workspace), round=order.round)
    return _report(order, new, len(names), chosen, answers)


def survey(
    fleet: Fleet,
    method: Method,
    task: Task,
    state: ServerState,
    workspace: Net,
    policy: FederationConfig,
    hooks: Hooks,
    clock: Callable[[], float] = time.monotonic,
) -> ServerState:
    """Every site that can be reached gives the class statistics of `state`; the result has the head of their sum.

    Like a round it is tried again while it has no quorum. But it does not hold up the run: in all, sites that are
    lacking are waited for as long as by one round at the end, before it no longer than by a round with its quorum, and
    of `policy.failures` tries the one that brought the most is used.
    """
    until = clock() + (policy.wait if state.round >= policy.rounds else min(policy.wait, policy.grace))
    order = make_order(method, state, state.round, train=False, judge=False)
    order = replace(order, centre=centre(workspace, task, state))
    best, chosen, answers = None, [], None
    for _ in range(policy.failures):
        names = fleet.names(policy.min_clients, max(until - clock(), 0.0))
        asked = Survey(order, task.classes, policy.max_examples)
        with hooks.asking():
            found = _collect(fleet, order, names, policy, hooks, clock, asked.add)
        if best is None or len(asked.clients) > len(best.clients):
            best, chosen, answers = asked, names, found
        if found.counts and (len(names) >= policy.min_clients or clock() >= until):
            break
    assert best is not None
    assert answers is not None
    if len(best.clients) < max(len(chosen), policy.min_clients):
        log.warning(
            "round %d: class statistics of %d of %d sites; missing: %s; kept to themselves: %s", state.round,
            len(best.clients), len(chosen), ", ".join(answers.missing) or "nobody",
            ", ".join(sorted(best.kept)) or "nobody"
        )  # fmt: skip
    return with_head(state, best.head(known(state, len(task.classes)), method.trained_rows(state)))


def final_judgement(
    fleet: Fleet,
    method: Method,
    state: ServerState,
    policy: FederationConfig,
    hooks: Hooks,
    clock: Callable[[], float] = time.monotonic,
) -> RoundReport:
    """Every site that can be reached gets the final parts, keeps its personal model and says how good it is."""
    chosen = fleet.names(policy.min_clients, policy.wait)
    order = make_order(method, state, state.round, train=False, judge=True)

    def accept(reply: Reply) -> None:
        if (reply.round, reply.model) != (order.round, order.model):
            raise Refused("of another model than the final one")

    return _report(order, state, len(chosen), chosen, _collect(fleet, order, chosen, policy, hooks, clock, accept))


def choose(names: Sequence[str], fraction: float, seed: int, round: int) -> list[str]:
    """max(int(fraction * K), 1) sites, uniformly without replacement, the same for the same seed and round."""
    ordered = sorted(names)
    if not ordered:
        return []
    many = max(int(fraction * len(ordered)), 1)
    picked = torch.randperm(len(ordered), generator=generator(seed, "sites", round))[:many]
    return [ordered[i] for i in sorted(picked.tolist())]


@dataclass(frozen=True)
class _Answers:
    counts: bool  # whether they are a quorum
    accepted: dict[str, tuple[dict[str, float], Judgement]]
    refused: dict[str, str]
    missing: tuple[str, ...]
    seconds: float


def make_order(method: Method, state: ServerState, round: int, *, train: bool, judge: bool) -> Order:
    shared = {part: t for part, t in state.parts.items() if part in method.shared}
    return Order(
        round=round,
        model=label({f"{part}/{name}": t for part, group in shared.items() for name, t in group.items()}),
        shared=shared,
        fixed={part: t for part, t in state.parts.items() if part in method.issued},
        train=train,
        judge=judge,
    )


def _collect(
    fleet: Fleet,
    order: Order,
    chosen: Sequence[str],
    policy: FederationConfig,
    hooks: Hooks,
    clock: Callable[[], float],
    accept: Callable[[Reply], None],
) -> _Answers:
    """Send the order and hand every reply to `accept`, which may refuse it, until the round closes."""
    began = clock()
    quorum = max(math.ceil(policy.quorum * len(chosen) - 1e-9), 1)  # 0.07 of 100 is 7, not 8 because of rounding
    standing = Standing(order.round, order.train, tuple(chosen), set(chosen))
    accepted: dict[str, tuple[dict[str, float], Judgement]] = {}
    early: dict[str, Reply] = {}  # with fold = "name": replies that came before those of sites named before them
    waiting = standing.waiting

    def take(reply: Reply) -> None:
        try:
            accept(reply)
        except Refused as reason:
            standing.refused[reply.client] = str(reason)
            log.warning("round %d: the reply of %s is refused: %s", order.round, reply.client, reason)
        else:
            accepted[reply.client] = reply.metrics, reply.judged

    answer: Reply | Failure | None = None
    closes = began + policy.deadline
    hooks.during(standing)
    exchange = fleet.broadcast(order, chosen, policy.deadline)
    with hooks.waiting(order):
        while waiting and (left := closes - clock()) > 0:
            answer = None  # a reply is large: the last one goes before the next one comes
            answer = exchange.next(left)
            if answer is None:
                continue
            if answer.client not in waiting:
                log.warning("round %d: an answer from %s, which is not awaited, is ignored", order.round, answer.client)
                continue
            waiting.discard(answer.client)
            before = len(accepted) + len(early)
            if isinstance(answer, Failure):
                standing.refused[answer.client] = answer.reason
                log.warning("round %d: %s failed: %s", order.round, answer.client, answer.reason)
            elif policy.fold == "name":
                early[answer.client] = answer
            else:
                take(answer)
            for name in sorted(early):
                if any(other < name for other in waiting):
                    break
                take(early.pop(name))
            if before < quorum <= len(accepted) + len(early):
                closes = min(closes, clock() + policy.grace)
            hooks.during(standing)
        exchange.close()
        answer = None
        for name in sorted(early):
            take(early.pop(name))
    return _Answers(
        counts=bool(chosen) and len(accepted) >= quorum,
        accepted=accepted,
        refused=standing.refused,
        missing=tuple(sorted(waiting)),
        seconds=clock() - began,
    )


def _lack(report: RoundReport, policy: FederationConfig) -> str:
    """Why a round did not count."""
    if not report.chosen:
        return f"sites reached: {report.reached} of {policy.min_clients}"
    reasons = "; ".join(f"{name}: {reason}" for name, reason in report.refused.items())
    return (
        f"sites reached: {len(report.chosen)}; missing: {', '.join(report.missing) or 'nobody'}; "
        f"refused: {reasons or 'nobody'}"
    )


def _report(order: Order, state: ServerState, reached: int, chosen: Sequence[str], answers: _Answers) -> RoundReport:
    return RoundReport(
        round=order.round,
        state=state,
        reached=reached,
        chosen=tuple(chosen),
        folded=tuple(answers.accepted),
        refused=answers.refused,
        missing=answers.missing,
        metrics={name: metrics for name, (metrics, _) in answers.accepted.items()},
        judged={name: judged for name, (_, judged) in answers.accepted.items() if judged},
        seconds=answers.seconds,
    )
