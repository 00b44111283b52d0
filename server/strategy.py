"""FedLoGe, and every other method of this library, as a Flower Strategy for a project of your own.

Its clients run `client.app`, or a ClientApp of yours that speaks `common.wire`. The settings are those of a
federation.toml (docs/deploy.md). A whole ServerApp:

    from flwr.serverapp import ServerApp
    from server.strategy import FedLoGe

    app = ServerApp()

    @app.main()
    def main(grid, context):
        strategy = FedLoGe.of("federation.toml")
        result = strategy.start(grid, folder="run")
        print(result.evaluate_metrics_clientapp)

`start` folds replies as they come, closes rounds at their deadline, keeps checkpoints in `folder` and goes on from
them. Flower's own loop works as well: `Strategy.start(strategy, grid, strategy.initial(), num_rounds=10)`; then a round
ends with its last reply or the timeout, all replies are in memory at once, and nothing is kept. Either way a reply is
checked before it is folded, and one that is not good is named and left out.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.app.metadata import Metadata
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from flwr.superlink.grid import GrpcGrid

from common import deployment
from common.deployment import Deployment
from common.errors import UsageError, UserError
from common.messages import Judgement, Order, Reply
from common.methods.method import ServerState
from common.net import build
from common.packed import fixed_digest
from common.parts import Tensors
from common.wire import JUDGE, TRAIN, decode_reply, encode_order
from server import checkpoint, run_folder
from server.broadcast import opened
from server.federate import federate
from server.flower_fleet import POLL, FlowerFleet
from server.flower_objects import reason
from server.fold import Fold, Refused
from server.models import FIGURES, over_sites
from server.rounds import GaveUp, choose, make_order
from server.status import Board

log = logging.getLogger(__name__)


class FedLoGe(Strategy):
    """Any method of `common.methods`: the one that the deployment names."""

    def __init__(self, plan: Deployment) -> None:
        self.plan = plan
        self.method, self.task = plan.config.method, plan.task
        self._net = build(self.method, self.task)
        self._state: ServerState | None = None
        self._holding: dict[int, str] = {}  # node -> digest of the fixed parts it has got
        self._asked: list[
            Metadata
        ] = []  # of the messages of this round: Flower gives them their ids when it sends them
        self._order: Order | None = None  # that is under way

    @classmethod
    def of(cls, path: str | Path, *overrides: str) -> "FedLoGe":
        """By a federation.toml; an override is `section.key=value`."""
        return cls(deployment.load(Path(path), overrides))

    @property
    def state(self) -> ServerState:
        """Where the server is; before the first round it makes the fixed parts, which may take a while."""
        if self._state is None:
            self._state = self.method.init(self._net, self.task)
        return self._state

    def initial(self) -> ArrayRecord:
        """What the first round begins with: shared and fixed parts, one Array for every tensor."""
        return arrays_of(self.state)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        del config  # sites train by the settings of the plan
        self._take(arrays, server_round - 1)
        policy, seed = self.plan.config.federation, self.plan.config.seed
        nodes = {str(node): node for node in self._online(grid)}
        chosen = [nodes[name] for name in choose(list(nodes), policy.fraction, seed, server_round)]
        return self._messages(make_order(self.method, self.state, server_round, train=True, judge=False), chosen)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        order, policy = self._order, self.plan.config.federation
        assert order is not None
        fold = Fold(
            order, self.method.statistics(self._net), self.method.objection, policy.max_examples, policy.max_update
        )
        reported = {}
        for reply in self._good(order, replies):
            try:
                fold.add(reply)
            except Refused as refusal:
                log.warning("round %d: the reply of %s is refused: %s", server_round, reply.client, refusal)
            else:
                reported[reply.client] = reply.metrics
        if not fold.clients or len(fold.clients) < policy.quorum * len(self._asked) - 1e-9:
            log.warning("round %d has no quorum: %d of %d", server_round, len(fold.clients), len(self._asked))
            return None, None
        mean, sums = fold.result()
        self._state = replace(self.method.update(self.state, mean, sums, self._net), round=server_round)
        told = {"sites": len(fold.clients), "examples": fold.examples, **run_folder.mean_metrics(reported)}
        return arrays_of(self._state), record(told)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Every few rounds (`evaluation.every`) all sites judge the new parts and keep their personal models."""
        del config
        self._asked = []
        if not run_folder.evaluated(self.plan.config, server_round):
            return []
        self._take(arrays, server_round)
        order = make_order(self.method, self.state, server_round, train=False, judge=True)
        return self._messages(order, list(grid.get_node_ids()))

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        del server_round
        if not self._asked or self._order is None:
            return None
        order = self._order
        judged: dict[str, Judgement] = {
            reply.client: reply.judged
            for reply in self._good(order, replies)
            if (reply.round, reply.model) == (order.round, order.model)
        }
        return figures({kind: over_sites(judged, kind) for kind in ("generic", "personal")})

    def summary(self) -> None:
        config = self.plan.config
        log.info("method %s, model %s, %d classes", self.method.name, config.model.name, len(self.task.classes))

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
        *,
        folder: str | Path = "run",
    ) -> Result:
        """Run the federation, or go on with it, in `folder`. `num_rounds` and `timeout` stand for federation.rounds
        and federation.deadline. The sites stay when it is over."""
        if train_config is not None or evaluate_config is not None or evaluate_fn is not None:
            raise UsageError(
                "sites go by the settings of federation.toml and the server judges by its server.test: leave "
                "train_config, evaluate_config and evaluate_fn out, or use Strategy.start(strategy, grid, ...)"
            )
        if not isinstance(grid, GrpcGrid):
            raise UsageError("this grid is not that of a SuperLink: use Strategy.start(strategy, grid, ...)")
        config, place = self.plan.config, Path(folder)
        policy = replace(
            config.federation,
            rounds=num_rounds or config.federation.rounds,
            deadline=timeout or config.federation.deadline,
        )
        plan = replace(self.plan, config=replace(config, federation=policy))
        if initial_arrays is not None:
            self._take(initial_arrays, 0)
        board = Board(place, run=str(grid.run.run_id))
        fleet = FlowerFleet(
            grid,
            plan.settings(),
            wire=policy.wire,
            count=lambda traffic: board.show(traffic=traffic),
            notify=lambda sites, problems: board.show(sites=sites, bad_cards=problems),
        )
        self.summary()
        try:
            federate(plan, place, fleet, board, initial=self._state)
        finally:
            fleet.close()
        return _result(place)

    def _take(self, arrays: ArrayRecord, round: int) -> None:
        """The state that Flower's loop carries from round to round; what is a method's own stays here."""
        self._state = replace(self.state, round=round, parts=parts_of(arrays, self.state))

    def _online(self, grid: Grid) -> list[int]:
        policy = self.plan.config.federation
        until = time.monotonic() + policy.wait
        while len(nodes := list(grid.get_node_ids())) < policy.min_clients:
            if time.monotonic() > until:
                raise GaveUp(
                    f"{len(nodes)} sites are online and federation.min_clients = {policy.min_clients}: "
                    "bring more sites or lower it"
                )
            time.sleep(POLL)
        return nodes

    def _messages(self, order: Order, nodes: list[int]) -> list[Message]:
        """The order to each of them, with the fixed parts for those that have not got them."""
        self._order, policy = order, self.plan.config.federation
        held = {node: self._holding.get(node, "") for node in nodes}
        contents = {
            holds: encode_order(
                order, self.plan.settings(), holds=holds, wire=policy.wire, frame=self.plan.config.frame
            )
            for holds in set(held.values())
        }
        kind = TRAIN if order.train else JUDGE
        messages = [Message(contents[held[node]], node, kind, ttl=policy.deadline) for node in nodes]
        self._asked = [message.metadata for message in messages]
        return messages

    def _good(self, order: Order, replies: Iterable[Message]) -> Iterable[Reply]:
        """The replies that can be read; of others is said whose they are and what is wrong."""
        wire = self.plan.config.federation.wire
        asked = {sent.message_id: sent.dst_node_id for sent in self._asked}
        for message in replies:
            # an error that the SuperLink has made up itself bears its own id
            node = asked.get(message.metadata.reply_to_message_id, message.metadata.src_node_id)
            if message.has_error():
                self._holding.pop(node, None)
                said = reason(message.error.code, message.error.reason or "")
                log.warning("round %d: node %d failed: %s", order.round, node, said)
                continue
            try:
                reply = opened(decode_reply(message.content, f"node {node}", wire), order, wire)
            except ValueError as error:
                log.warning("round %d: the reply of node %d is not one: %s", order.round, node, error)
                continue
            self._holding[node] = fixed_digest(order.fixed)
            yield reply


def arrays_of(state: ServerState) -> ArrayRecord:
    """Every tensor of shared and fixed parts as an Array called `part/name`."""
    return ArrayRecord(
        {
            f"{part}/{name}": Array(t.detach().cpu().contiguous().numpy())
            for part, group in state.parts.items()
            for name, t in group.items()
        }
    )


def parts_of(arrays: ArrayRecord, like: ServerState) -> dict[str, Tensors]:
    """The other way; UserError unless names and shapes are those of `like`."""
    parts: dict[str, Tensors] = {}
    wanted = {f"{part}/{name}" for part, group in like.parts.items() for name in group}
    if arrays.keys() != wanted:
        odd = sorted(arrays.keys() ^ wanted)
        raise UserError(f"initial_arrays: {odd[0]} is {'missing' if odd[0] in wanted else 'unknown'}: see initial()")
    for part, group in like.parts.items():
        parts[part] = {}
        for name, t in group.items():
            found = torch.from_numpy(arrays[f"{part}/{name}"].numpy().copy())
            if (found.shape, found.dtype) != (t.shape, t.dtype):
                raise UserError(
                    f"initial_arrays: {part}/{name} is {found.dtype} {tuple(found.shape)} instead of "
                    f"{t.dtype} {tuple(t.shape)}: see initial()"
                )
            parts[part][name] = found.to(t.device)
    return parts


def figures(found: dict[str, dict[str, Any]]) -> MetricRecord | None:
    """Means over the sites as `kind/predictor/measure`."""
    flat = {
        f"{kind}/{predictor}/{key}": float(measures[key])
        for kind, predictors in found.items()
        for predictor, measures in predictors.items()
        for key in FIGURES
        if measures.get(key) is not None
    }
    return record(flat) if flat else None


def record(values: Mapping[str, float]) -> MetricRecord:
    return MetricRecord(dict(values))


def _result(folder: Path) -> Result:
    found = checkpoint.latest(folder / "checkpoints")
    assert found is not None
    result = Result(arrays_of(found.state))
    for entry in found.history:
        result.train_metrics_clientapp[entry["round"]] = record({"sites": len(entry["sites"]), **entry["loss"]})
        evaluation = entry.get("evaluation", {})
        of_sites = {"generic": evaluation.get("generic_local", {}), "personal": evaluation.get("personal", {})}
        for into, told in (
            (result.evaluate_metrics_clientapp, figures(of_sites)),
            (result.evaluate_metrics_serverapp, figures({"generic": evaluation.get("generic", {})})),
        ):
            if told is not None:
                into[entry["round"]] = told
    return result
