"""The resident node against a real SuperLink: what it answers, and that nothing is lost when either side dies."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.fleet_pb2_grpc import FleetStub
from flwr.supercore.inflatable.inflatable_object import get_object_tree, iterate_object_tree
from flwr.superlink.grid import GrpcGrid

from client.fleet_api import FleetApi
from client.node import Node
from common.errors import UserError
from tests.network.relay import Relay
from tests.network.superlink import Authority, SiteKit, SuperLink, until

ROOT = Path(__file__).parents[2]
VALUES = np.arange(2**18, dtype=np.float32)  # 1 MB
MANY = (
    np.random.default_rng(1).standard_normal(3 * 2**20).astype(np.float32)
)  # 12 MB: chunks of 5 MB, so several objects

pytestmark = pytest.mark.timeout(400)  # a machine that may be busy


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SuperLink]:
    with SuperLink(tmp_path_factory.mktemp("superlink")) as made:
        yield made


class Site:
    """A site process."""

    def __init__(self, kit: SiteKit, folder: Path, fault: str = "") -> None:
        table = {**vars(kit), "ca": kit.ca.decode(), "key": kit.key.decode()}
        command = [sys.executable, "-m", "tests.network.site_process", json.dumps(table), str(folder), fault]
        self.log = folder.with_suffix(".log")
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=log, stderr=log)

    def go(self) -> None:
        """On with one that is held."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(30)

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")


@contextmanager
def site(kit: SiteKit, folder: Path, fault: str = "") -> Iterator[Site]:
    made = Site(kit, folder, fault)
    try:
        yield made
    finally:
        made.kill()
        print(made.said())


@contextmanager
def next_start(kit: SiteKit, folder: Path) -> Iterator[Site]:
    """Of a site that is about to be killed: ready to `go` before the server notices that it is gone."""
    with site(kit, folder, "held") as made:
        until(lambda: "held\n" in made.said(), "the next start")
        yield made


def message(node: int, do: str = "echo", values: np.ndarray = VALUES, kind: str = "train", ttl: float = 300) -> Message:
    content = RecordDict({"wish": ConfigRecord({"do": do}), "arrays": ArrayRecord({"flat": Array(values)})})
    return Message(content, node, kind, ttl=ttl)


def reply(grid: GrpcGrid, message_id: str) -> Message:
    found: list[Message] = []

    def pulled() -> bool:
        found.extend(grid.pull_messages([message_id]))
        return bool(found)

    until(pulled, "a reply")
    return found[0]


def ask(grid: GrpcGrid, sent: Message) -> Message:
    (message_id,) = grid.push_messages([sent])
    return reply(grid, message_id)


def echoed(answer: Message, values: np.ndarray = VALUES) -> bool:
    return bool(np.array_equal(answer.content["arrays"]["flat"].numpy(), values))


def test_messages_are_answered_in_one_process_until_it_is_over(link: SuperLink, tmp_path: Path) -> None:
    kit = link.kit("a")
    with site(kit, tmp_path / "a") as running, link.run() as grid:
        until(lambda: link.online(kit), "the site to be online")
        node = link.node(kit).node_id
        assert grid.get_node_ids() == [node]
        first, second = ask(grid, message(node)), ask(grid, message(node))
        assert echoed(first)
        assert echoed(second)
        assert first.content["said"]["pid"] == second.content["said"]["pid"] == running.process.pid
        assert [first.content["said"]["messages"], second.content["said"]["messages"]] == [1, 2]

        failed = ask(grid, message(node, "fail"))
        assert failed.error.code == 2
        assert failed.error.reason == "RuntimeError: no such file: <path> or <path>"
        assert echoed(ask(grid, message(node))), "the node goes on after an error"

        over = ask(grid, message(node, kind="query.over"))
        assert over.content["said"]["over"] is True
        assert running.process.wait(60) == 0
    assert "GetFab" not in link.log()
    assert not list((tmp_path / "a" / "outbox").rglob("*.*"))
    assert (tmp_path / "a" / "heard").exists()


def test_a_site_killed_in_training_says_so_and_goes_on(link: SuperLink, tmp_path: Path) -> None:
    kit = link.kit("b")
    with link.run() as grid, next_start(kit, tmp_path / "b") as second:
        with site(kit, tmp_path / "b"):
            until(lambda: link.online(kit), "the site to be online")
            node = link.node(kit).node_id
            (waiting,) = grid.push_messages([message(node, "wait")])
            until((tmp_path / "b" / "mark").exists, "the training to begin")
        second.go()
        lost = reply(grid, waiting)
        assert (lost.error.code, lost.metadata.src_node_id) == (8, node), "the site says it, not the SuperLink"
        assert echoed(ask(grid, message(node)))
        assert link.node(kit).node_id == node


def test_a_message_that_was_lost_on_its_way_is_given_up_at_once(link: SuperLink, tmp_path: Path) -> None:
    kit = link.kit("p")
    with site(kit, tmp_path / "p", "a lost answer"), link.run() as grid:
        until(lambda: link.online(kit), "the site to be online")
        node = link.node(kit).node_id
        assert ask(grid, message(node)).error.code == ErrorCode.NODE_UNAVAILABLE, "long before its ttl is over"
        until(lambda: link.online(kit), "the site to be back")
        assert echoed(ask(grid, message(node)))


@pytest.mark.parametrize("when", ["before the announcement", "after the announcement", "in the upload"])
def test_a_site_killed_while_it_replies_finishes_that(link: SuperLink, tmp_path: Path, when: str) -> None:
    kit = link.kit("c")
    with link.run() as grid, ThreadPoolExecutor(1) as pool, next_start(kit, tmp_path / "c") as second:
        with site(kit, tmp_path / "c", when) as first:
            until(lambda: link.online(kit), "the site to be online")
            node = link.node(kit).node_id
            sent = pool.submit(ask, grid, message(node, values=MANY))  # may be in the middle of pulling the reply
            assert first.process.wait(60) == -signal.SIGKILL
        second.go()
        assert echoed(sent.result(90), MANY)
        assert sent.result().content["said"]["pid"] == first.process.pid
        assert ask(grid, message(node)).content["said"]["pid"] == second.process.pid


def test_the_message_goes_last(link: SuperLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When it is there the server takes the reply for complete, though its site may be gone by then."""
    answer = Message(message(7).content, reply_to=message(7))
    objects = {part.object_id for part in iterate_object_tree(get_object_tree(answer))}
    given: list[set[str]] = []
    monkeypatch.setattr(FleetApi, "announce", lambda *_: (True, set(objects)))
    monkeypatch.setattr(FleetApi, "upload", lambda *called: given.append(set(called[2])))
    node = Node(link.kit("o"), tmp_path / "o", lambda message, _: message, {})  # type: ignore[arg-type]
    node._outbox.begin(b"")
    node._deliver(node._keep(answer, 0.0))
    assert given == [objects - {answer.object_id}, {answer.object_id}]
    assert len(given[0]) > 3


def test_a_reply_survives_a_cut_of_the_network(link: SuperLink, tmp_path: Path) -> None:
    with Relay(link.port) as relay:
        kit = SiteKit(**{**vars(link.kit("k")), "port": relay.port})
        with site(kit, tmp_path / "k") as running, link.run() as grid, ThreadPoolExecutor(1) as pool:
            until(lambda: link.online(kit), "the site to be online")
            node = link.node(kit).node_id
            relay.cut_after(6 * 2**20)
            sent = pool.submit(ask, grid, message(node, values=MANY))
            until(lambda: "trying again" in running.said(), "the site to notice the cut")
            relay.mend()
            assert echoed(sent.result(90), MANY)
            assert ask(grid, message(node)).content["said"]["messages"] == 2


def test_a_wrong_clock_is_named(link: SuperLink, tmp_path: Path) -> None:
    kit = link.kit("l")
    with site(kit, tmp_path / "l", "clock") as running:
        until(lambda: "the clocks of this machine and of the server differ" in running.said(), "word of the clock")
        assert running.process.poll() is None
        assert not link.online(kit)


def test_a_superlink_that_is_started_again_is_joined_again(link: SuperLink, tmp_path: Path) -> None:
    kit = link.kit("d")
    with site(kit, tmp_path / "d") as running:
        until(lambda: link.online(kit), "the site to be online")
        before = link.node(kit).node_id
        with link.run() as grid:
            assert echoed(ask(grid, message(before)))
        link.stop()
        link.start()
        until(lambda: "does not know the key" in running.said(), "the site to find itself unknown")
        link.register(kit)
        until(lambda: link.online(kit), "the site to be online again")
        after = link.node(kit).node_id
        assert after != before
        with link.run() as grid:
            assert ask(grid, message(after)).content["said"]["pid"] == running.process.pid


def test_a_stopped_site_leaves_at_once(link: SuperLink, tmp_path: Path) -> None:
    kit = link.kit("e")
    with site(kit, tmp_path / "e") as running, link.run() as grid:
        until(lambda: link.online(kit), "the site to be online")
        (waiting,) = grid.push_messages([message(link.node(kit).node_id, "wait")])
        until((tmp_path / "e" / "mark").exists, "the training to begin")
        running.process.terminate()
        assert running.process.wait(60) != 0
        assert "KeyboardInterrupt" in running.said()
        assert not link.online(kit)
        assert reply(grid, waiting).error.code == 5, "the SuperLink answers for it, without waiting for heartbeats"


def test_what_a_finished_run_wanted_is_dropped(link: SuperLink, tmp_path: Path) -> None:
    kit = link.kit("m")
    with site(kit, tmp_path / "m"), link.run() as grid:
        until(lambda: link.online(kit), "the site to be online")
        node = link.node(kit).node_id
        grid.push_messages([message(node, "wait")])
        until((tmp_path / "m" / "mark").exists, "the training to begin")
    with site(kit, tmp_path / "m") as running, link.run() as grid:
        until(lambda: "the reply is dropped: Run is finished." in running.said(), "the reply to be dropped")
        assert echoed(ask(grid, message(node)))


def test_a_heartbeat_that_breaks_ends_the_process(link: SuperLink, tmp_path: Path) -> None:
    with site(link.kit("n"), tmp_path / "n", "heart") as running:
        assert running.process.wait(60) == 1
        assert "the heartbeat failed as it never should" in running.said()


def test_one_client_a_folder_and_one_a_key(link: SuperLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kit = link.kit("f")
    monkeypatch.setattr("client.membership.ALIVE", 1.0)
    with site(kit, tmp_path / "f"):
        until(lambda: link.online(kit), "the site to be online")
        assert failure(kit, tmp_path / "f") == f"{tmp_path / 'f'}: another client is using this folder: stop it first"
        assert "f is online from elsewhere: another client uses this kit" in failure(kit, tmp_path / "other")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_client_that_comes_back_while_another_has_its_place(
    link: SuperLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: signal.Signals
) -> None:
    """As on a machine that was moved to another one and is then started again: both know the node, and would share
    its messages without a word."""
    kit = link.kit(f"twin-{how}")
    monkeypatch.setattr("client.membership.ALIVE", 1.0)
    with site(kit, tmp_path / "old") as old:
        until(lambda: "connected to" in old.said(), "the site to know its place")
        old.process.send_signal(how)
        old.process.wait(30)
    until(lambda: not link.online(kit), "the server to know that it is gone")
    with site(kit, tmp_path / "new"):
        until(lambda: link.online(kit), "the other one to be online")
        if how is signal.SIGKILL:
            heard = tmp_path / "old" / "heard"
            assert time.time() - heard.stat().st_mtime > 19.0  # the server would have noticed no earlier
        assert f"{kit.name} is online from elsewhere" in failure(kit, tmp_path / "old")
        assert link.online(kit), "the one that was there stays"


def test_a_late_reply_is_not_sent(link: SuperLink, tmp_path: Path) -> None:
    kit = link.kit("g")
    with link.run() as grid:
        with site(kit, tmp_path / "g"):
            until(lambda: link.online(kit), "the site to be online")
            node = link.node(kit).node_id
            (waiting,) = grid.push_messages([message(node, "wait", ttl=15)])
            until((tmp_path / "g" / "mark").exists, "the training to begin")
            assert reply(grid, waiting).has_error()
        with site(kit, tmp_path / "g") as running:
            until(lambda: "nobody waits for the reply any more" in running.said(), "the reply to be dropped")
            assert echoed(ask(grid, message(node)))


def failure(kit: SiteKit, folder: Path, patience: float = 1.0) -> str:
    """What a node says that cannot work, in one line."""
    with pytest.raises(UserError) as caught:
        Node(kit, folder, lambda message, _: message, {}, patience=patience).run()  # type: ignore[arg-type]
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_an_unknown_or_revoked_key_is_refused(link: SuperLink, tmp_path: Path) -> None:
    kit = link.kit("h", registered=False)
    said = f"the server at {kit.address} does not accept the key of h: it was revoked, or replaced"
    assert said in failure(kit, tmp_path / "h")
    assert "No SuperNode found with the given public key" in link.log()
    link.register(kit)
    with site(kit, tmp_path / "h") as running:
        until(lambda: link.online(kit), "the site to be online")
        link.unregister(kit)
        assert running.process.wait(90) != 0
        assert said in running.said()


def test_a_server_that_is_not_the_right_one_is_refused(link: SuperLink, tmp_path: Path) -> None:
    kit = link.kit("i")
    other = SiteKit(**{**vars(kit), "ca": Authority().pem})
    assert "its certificate is from another authority" in failure(other, tmp_path / "i")
    elsewhere = SiteKit(**{**vars(kit), "host": "127.0.0.1"})  # the certificate is made out to localhost
    assert "is not made out to 127.0.0.1" in failure(elsewhere, tmp_path / "i")
    link.stop()
    link.start(link.authority.certify("localhost", begin=-2, end=-1))
    assert f"the certificate of {kit.address} has expired" in failure(kit, tmp_path / "i")
    link.stop()
    link.start()


def test_nothing_goes_without_tls(link: SuperLink, tmp_path: Path) -> None:
    kit = link.kit("j")
    with grpc.insecure_channel(kit.address) as channel, pytest.raises(grpc.RpcError) as caught:
        FleetStub(channel).PullMessages(PullMessagesRequest(), timeout=30)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "has no authority in it" in failure(SiteKit(**{**vars(kit), "ca": b""}), tmp_path / "j")


def test_a_signature_is_asked_for(link: SuperLink) -> None:
    credentials = grpc.ssl_channel_credentials(link.authority.pem)
    with grpc.secure_channel(f"localhost:{link.port}", credentials) as channel, pytest.raises(grpc.RpcError) as caught:
        FleetStub(channel).PullMessages(PullMessagesRequest(), timeout=30)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
