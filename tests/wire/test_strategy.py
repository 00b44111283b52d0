"""FedLoGe as a Flower Strategy: in Flower's own loop with the sites' real app in this process, and in its own."""

import itertools
import logging
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Result, Strategy
from flwr.supercore.run import Run

from client import app as site
from common.errors import UsageError, UserError
from common.methods import METHODS
from common.wire import JUDGE, TRAIN, decode_order, decode_reply, encode_reply
from server import strategy as module
from server.federate import federate
from server.fleet import LocalFleet
from server.rounds import GaveUp
from server.status import Board
from server.strategy import FedLoGe, arrays_of, parts_of
from tests.members import NAMES, Handler, Ticket, deployment, images, members
from tests.serverappio import Node, SuperLink

TOML = """
seed = 3
[method]
name = "fedloge"
[model]
name = "mlp"
width = 16
[frame]
norm = 1.0
sparsity = 0.3
[train]
epochs = 1
batch = 16
lr = 0.1
[federation]
rounds = 2
min_clients = 3
quorum = 1.0
[evaluation]
every = 1
[images]
classes = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
size = 8
channels = 1
[run]
device = "cpu"
"""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images(tmp_path_factory.mktemp("data"))


@pytest.fixture
def contexts(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Context]:
    """What a node hands to the sites' app; a kit is as good as its name here."""
    monkeypatch.setattr(site, "open_kit", lambda path, _: Ticket(path.stem))
    monkeypatch.setattr(site, "_members", {})
    made = {}
    for name in NAMES:
        config = {"kit": f"{name}.kit", "data": str(data / f"{name}.npz"), "state": str(tmp_path / "sites" / name)}
        made[name] = Context(1, 1, node_config={**config, "device": "cpu"}, state=RecordDict(), run_config={})
    return made


def app_of(context: Context) -> Callable[[Message], Message]:
    """What a node does with a message."""

    def answer(message: Message) -> Message:
        try:
            return site.app(message, context)
        except Exception as error:
            return Message(Error(2, f"{type(error)}:<'{error}'>"), reply_to=message)

    return answer


class InProcess(Grid):
    """Nodes 1, 2, 3, ... in this process; each answers when it is sent something."""

    def __init__(self, nodes: Iterable[Callable[[Message], Message]]) -> None:
        self.nodes = dict(enumerate(nodes, 1))
        self.sent: list[Message] = []
        self._ids = itertools.count()

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        del timeout
        replies = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"message-{next(self._ids)}"
            message.metadata.__dict__["_src_node_id"] = 1
            self.sent.append(message)
            replies.append(self.nodes[message.metadata.dst_node_id](message))
        return replies

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        raise NotImplementedError


@pytest.fixture
def grid(contexts: dict[str, Context]) -> InProcess:
    return InProcess(app_of(context) for context in contexts.values())


def stock(strategy: FedLoGe, grid: Grid, rounds: int) -> Result:
    """Flower's own loop."""
    return Strategy.start(strategy, grid, strategy.initial(), num_rounds=rounds)


# --- Flower's own loop -----------------------------------------------------------------------------------------------


def test_flowers_own_loop_gives_what_ours_gives(data: Path, tmp_path: Path, grid: InProcess) -> None:
    plan = deployment(data)
    result = stock(FedLoGe(plan), grid, 3)
    handlers = {n: Handler(m, plan.settings()) for n, m in members(data, tmp_path / "others").items()}
    figures = federate(plan, tmp_path / "run", LocalFleet(handlers), Board(tmp_path / "run"))
    ours = module._result(tmp_path / "run")
    assert result.arrays.keys() == ours.arrays.keys()
    assert {"backbone", "frame", "global_head"} == {name.partition("/")[0] for name in result.arrays}
    for name, array in result.arrays.items():
        assert array.data == ours.arrays[name].data, name
    (last,) = [e for e in figures["evaluations"] if e["round"] == 2]
    told = result.evaluate_metrics_clientapp[2]
    assert told["personal/phi+psi_k/top1"] == pytest.approx(last["personal"]["phi+psi_k"]["top1"])
    assert told["generic/psi/balanced"] == pytest.approx(last["generic_local"]["psi"]["balanced"])
    assert sorted(result.evaluate_metrics_clientapp) == [2, 3]  # every second, and the last of the plan
    assert [result.train_metrics_clientapp[n]["sites"] for n in (1, 2, 3)] == [3, 3, 3]
    losses = [result.train_metrics_clientapp[n]["loss 0"] for n in (1, 2, 3)]
    assert losses[2] < losses[0]
    kinds = [message.metadata.message_type for message in grid.sent]
    assert kinds == [TRAIN] * 6 + [JUDGE] * 3 + [TRAIN] * 3 + [JUDGE] * 3
    assert (tmp_path / "sites" / "west" / "models" / "personal.safetensors").exists()


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_runs_in_it(data: Path, grid: InProcess, method: str) -> None:
    model = {"name": "cnn", "norm": "local"} if method == "fedbn" else {}
    strategy = FedLoGe(deployment(data, method, model=model, evaluation={"every": 1, "start": 2}))
    before = strategy.initial()
    result = stock(strategy, grid, 2)
    assert [result.train_metrics_clientapp[n]["sites"] for n in (1, 2)] == [3, 3]
    assert any(name.startswith("personal/") for name in result.evaluate_metrics_clientapp[2])
    moved = {name.partition("/")[0] for name, a in (result.arrays or before).items() if a.data != before[name].data}
    assert moved <= strategy.method.shared
    assert moved or method == "local"


def test_the_fixed_parts_travel_once_and_again_after_a_failure(data: Path, grid: InProcess) -> None:
    answer = grid.nodes[3]
    failures = [2]

    def failing(message: Message) -> Message:
        number = decode_order(message.content).order.round
        if number in failures:
            failures.remove(number)
            return Message(Error(8, "gone"), reply_to=message)
        return answer(message)

    grid.nodes[3] = failing
    stock(FedLoGe(deployment(data, federation={"quorum": 0.5, "rounds": 99}, evaluation={"start": 9})), grid, 4)
    fixed: dict[int, list[bool]] = {node: [] for node in grid.nodes}
    for message in grid.sent:
        fixed[message.metadata.dst_node_id].append(bool(decode_order(message.content).order.fixed))
    assert fixed == {1: [True, False, False, False], 2: [True, False, False, False], 3: [True, False, True, False]}


def lies(
    answer: Callable[[Message], Message], make: Callable[[RecordDict], RecordDict]
) -> Callable[[Message], Message]:
    def lie(message: Message) -> Message:
        return Message(make(answer(message).content), reply_to=message)

    return lie


def huge(record: RecordDict) -> RecordDict:
    reply = decode_reply(record, "x")
    return encode_reply(replace(reply, examples=2**40))


def stale(record: RecordDict) -> RecordDict:
    reply = decode_reply(record, "x")
    return encode_reply(replace(reply, round=reply.round + 7))


def poisoned(record: RecordDict) -> RecordDict:
    reply = decode_reply(record, "x")
    shared = {p: {n: t * float("nan") for n, t in group.items()} for p, group in reply.shared.items()}
    return encode_reply(replace(reply, shared=shared))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (huge, "examples are not between"),
        (poisoned, "not finite"),
        (stale, "this is round 1"),
        (lambda _: RecordDict(), "holds no reply"),
        (lambda _: RecordDict({"reply": ConfigRecord({"schema": 9}), "parts": ArrayRecord()}), "schema 9"),
        (lambda _: RecordDict({"a": ArrayRecord({"b": Array("int8", (3,), "x", b"123")})}), "holds no reply"),
    ],
)
def test_a_bad_reply_is_named_and_left_out(
    data: Path, grid: InProcess, caplog: pytest.LogCaptureFixture, make: Callable[[RecordDict], RecordDict], why: str
) -> None:
    plan = deployment(data, federation={"quorum": 0.5, "min_clients": 2, "rounds": 99})
    expected = stock(FedLoGe(plan), InProcess([grid.nodes[1], grid.nodes[2]]), 1)
    grid.nodes[3] = lies(grid.nodes[3], make)
    result = stock(FedLoGe(plan), grid, 1)
    assert result.train_metrics_clientapp[1]["sites"] == 2
    for name, array in result.arrays.items():
        assert array.data == expected.arrays[name].data
    said = [r.getMessage() for r in caplog.records if r.name.startswith("server")]
    assert len(said) == 1
    assert "node 3" in said[0]
    assert why in said[0]


def test_a_site_that_fails_is_named_by_its_message(
    data: Path, grid: InProcess, caplog: pytest.LogCaptureFixture
) -> None:
    """The SuperLink signs the errors it makes up with its own id."""

    def offline(message: Message) -> Message:
        reply = Message(Error(5, "Error: Node Unavailable"), reply_to=message)
        reply.metadata.__dict__["_src_node_id"] = 1
        return reply

    grid.nodes[3] = offline
    grid.nodes[2] = lambda message: Message(
        Error(2, "<class 'client.refusal.Refusal'>:<'its disk is full'>"), reply_to=message
    )
    stock(FedLoGe(deployment(data, federation={"quorum": 0.3, "rounds": 99})), grid, 1)
    assert "node 3 failed: went offline" in caplog.text
    assert "node 2 failed: its disk is full" in caplog.text


def test_without_a_quorum_nothing_moves(data: Path, grid: InProcess, caplog: pytest.LogCaptureFixture) -> None:
    grid.nodes[3] = lies(grid.nodes[3], lambda _: RecordDict())
    strategy = FedLoGe(deployment(data))
    result = stock(strategy, grid, 1)
    assert result.arrays == {}
    assert result.train_metrics_clientapp == {}
    assert strategy.initial().keys()
    assert "round 1 has no quorum: 2 of 3" in caplog.text


def test_too_few_sites_are_said_and_not_waited_for_for_ever(data: Path) -> None:
    with pytest.raises(GaveUp, match=r"0 sites are online and federation\.min_clients = 3"):
        stock(FedLoGe(deployment(data, federation={"wait": 0.3})), InProcess([]), 1)


def test_only_some_sites_are_asked_if_the_plan_says_so(data: Path, grid: InProcess) -> None:
    stock(FedLoGe(deployment(data, federation={"fraction": 0.4, "rounds": 99}, evaluation={"start": 9})), grid, 3)
    assert len(grid.sent) == 3


# --- our own loop ----------------------------------------------------------------------------------------------------


@pytest.fixture
def link(contexts: dict[str, Context]) -> Iterator[SuperLink]:
    logging.getLogger("flwr").setLevel(logging.WARNING)
    made = SuperLink()

    def behave(node: Node, message: Message) -> None:
        node.announce(app_of(contexts[node.name])(message)).go_on()

    for name in NAMES:
        made.join(name, behave)
    yield made
    made.close()


def example() -> str:
    """The code in the module's own docstring."""
    assert module.__doc__ is not None
    lines = module.__doc__.splitlines()
    return textwrap.dedent("\n".join(line for line in lines if line.startswith("    ") or not line))


def test_the_example_of_the_documentation_runs(
    link: SuperLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("federation.toml").write_text(TOML)
    scope: dict[str, Any] = {}
    exec(compile(example(), "example", "exec"), scope)
    app = scope["app"]
    assert isinstance(app, ServerApp)
    app(grid=link.grid, context=Context(1, 1, {}, RecordDict(), {}))
    assert "personal/phi+psi_k/top1" in capsys.readouterr().out
    assert (tmp_path / "run" / "metrics.json").exists()
    assert (tmp_path / "run" / "models" / "generic.safetensors").exists()
    assert len([line for line in example().splitlines() if line.strip()]) <= 10


def test_our_loop_goes_on_where_it_was(data: Path, link: SuperLink, tmp_path: Path) -> None:
    plan = deployment(data)
    first = FedLoGe(plan).start(link.grid, num_rounds=1, folder=tmp_path / "run")
    assert sorted(first.train_metrics_clientapp) == [1]
    result = FedLoGe(plan).start(link.grid, num_rounds=3, timeout=50.0, folder=tmp_path / "run")
    assert sorted(result.train_metrics_clientapp) == [1, 2, 3]
    assert sorted(result.evaluate_metrics_clientapp) == [1, 2, 3]
    assert result.evaluate_metrics_serverapp[3]["generic/psi realigned/top1"] > 0
    handlers = {n: Handler(m, plan.settings()) for n, m in members(data, tmp_path / "others").items()}
    federate(plan, tmp_path / "local", LocalFleet(handlers), Board(tmp_path / "local"))
    ours = module._result(tmp_path / "local")
    for name, array in result.arrays.items():
        assert array.data == ours.arrays[name].data, name


def test_our_loop_begins_with_what_it_is_given(data: Path, link: SuperLink, tmp_path: Path) -> None:
    strategy = FedLoGe(deployment(data, train={"lr": 1e-30}))
    given = {name: Array(array.numpy() + 1) for name, array in strategy.initial().items()}
    result = strategy.start(link.grid, ArrayRecord(given), 1, folder=tmp_path / "run")
    for name, array in result.arrays.items():
        assert torch.allclose(torch.from_numpy(array.numpy()), torch.from_numpy(given[name].numpy())), name


def test_what_our_loop_does_not_do_is_said(data: Path, grid: InProcess, tmp_path: Path) -> None:
    strategy = FedLoGe(deployment(data))
    for more in ({"train_config": ConfigRecord()}, {"evaluate_fn": lambda *_: MetricRecord()}):
        with pytest.raises(UsageError, match=r"Strategy\.start\(strategy, grid"):
            strategy.start(grid, folder=tmp_path, **more)
    with pytest.raises(UsageError, match="not that of a SuperLink"):
        strategy.start(grid, folder=tmp_path)


def test_arrays_go_both_ways_and_odd_ones_are_refused(data: Path) -> None:
    strategy = FedLoGe(deployment(data))
    arrays = strategy.initial()
    back = parts_of(arrays, strategy.state)
    for part, group in strategy.state.parts.items():
        assert all(torch.equal(t, back[part][name]) for name, t in group.items())
    assert arrays_of(replace(strategy.state, parts=back)).object_id == arrays.object_id
    name = next(iter(arrays))
    for wrong, why in [
        ({n: a for n, a in arrays.items() if n != name}, "is missing"),
        ({**arrays, "more/w": arrays[name]}, "more/w is unknown"),
        ({**arrays, name: Array(arrays[name].numpy()[:1])}, "instead of"),
        ({**arrays, name: Array(arrays[name].numpy().astype("float64"))}, "float64"),
    ]:
        with pytest.raises(UserError, match=why):
            parts_of(ArrayRecord(wrong), strategy.state)


def test_a_strategy_of_a_file_takes_overrides(tmp_path: Path) -> None:
    (tmp_path / "federation.toml").write_text(TOML)
    strategy = FedLoGe.of(tmp_path / "federation.toml", "method=fedavg", "federation.rounds=7")
    assert (strategy.method.name, strategy.plan.config.federation.rounds) == ("fedavg", 7)
