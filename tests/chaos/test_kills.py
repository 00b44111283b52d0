"""kill -9 of whatever there is, again and again: the run finishes, and nobody can tell from what came out."""

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.arena import CLOSELY, Arena

pytestmark = pytest.mark.timeout(900)  # many starts of processes that import torch, on a machine that may be busy


def assert_no_head_is_lost(arena: Arena, done: int) -> None:
    """Every site has the personal head of a round that is done."""
    for name in arena.names:
        assert done in arena.heads(name), (name, done, arena.heads(name))


def failed(arena: Arena, name: str, round: int) -> bool:
    """Whether the site was the reason why a round had to be tried again."""
    return bool(arena.status().quarantined.get(name, {}).get("round") == round)


def started_again(arena: Arena, why: str) -> int:
    """The round after which the server says that it has started again."""
    line = re.compile(rf"{why}: starting again after round (\d+)\n")
    arena.until(lambda: line.search(arena.said("server")), f"the server to say: {why}")
    [done] = line.findall(arena.said("server"))
    return int(done)


def test_a_site_is_killed_while_it_trains_and_while_it_uploads(arena: Arena, reference: Path) -> None:
    arena.start()
    arena.kill_while("site-001", arena.trains)
    done = arena.rounds()[-1]["round"]
    assert_no_head_is_lost(arena, done)
    before = arena.trained("site-001", done + 1)  # it may have come to the end, and not to its reply
    arena.join("site-001")
    arena.go_on(done, "the round in which a site was killed while it trained")
    assert "train message was under way when this client was stopped: the server is told" in arena.log("site-001")
    assert failed(arena, "site-001", done + 1), "all sites are needed, so it was tried again"
    assert arena.trained("site-000", done + 1) == 2
    assert arena.trained("site-001", done + 1) == before + 1

    arena.kill_while("site-002", arena.uploads)
    done = arena.rounds()[-1]["round"]
    assert_no_head_is_lost(arena, done)
    arena.join("site-002")
    arena.go_on(done, "the round in which a site was killed while it uploaded")
    # it gives the reply it had, unless the server has noticed in the meantime that it was gone
    again = failed(arena, "site-002", done + 1)
    assert [arena.trained(name, done + 1) for name in arena.names] == [1 + again] * 3

    arena.finish()
    arena.assert_equal(reference)


def test_the_serverapp_and_the_superlink_are_killed(arena: Arena, reference: Path) -> None:
    arena.start()
    for program, said in (("flwr-serverapp", "the ServerApp was killed"), ("flower-superlink", "the SuperLink died")):
        arena.until(lambda: arena.status().phase == "training", "an open round")
        before = arena.done()
        os.kill(arena.program(program), signal.SIGKILL)
        done = started_again(arena, said)
        assert done >= before
        assert_no_head_is_lost(arena, done)
        arena.go_on(done, f"a round after {program} was killed")
    arena.finish()  # with the sites that were there from the beginning
    arena.assert_equal(reference)


def kill_the_server(arena: Arena) -> None:
    """With its supervisor all it started has to go; the sites stay."""
    arena.kill("server")
    arena.until(lambda: len(arena.processes()) == 2 * len(arena.names), "the end of what the server started")


@pytest.mark.parametrize("kill", [kill_the_server, Arena.kill_all])
def test_the_server_or_everything_is_killed_and_started_again(
    arena: Arena, reference: Path, kill: Callable[[Arena], None]
) -> None:
    arena.start()
    arena.until(lambda: arena.status().phase == "training", "an open round")
    kill(arena)
    done = arena.done()
    assert_no_head_is_lost(arena, done)
    arena.serve("--rounds", done + 2)
    for name in arena.names:
        if name not in arena.running:
            arena.join(name)
    arena.finish()
    assert arena.done() == done + 2
    assert [entry["round"] for entry in arena.rounds()] == list(range(1, done + 3))
    arena.assert_equal(reference)


def test_the_server_is_killed_before_it_could_say_that_it_is_over(tmp_path: Path) -> None:
    with Arena(tmp_path / "arena", ["partition.clients=3", "federation.rounds=2"]) as arena:
        arena.start()
        app = arena.program("flwr-serverapp")
        arena.until((arena.run / "metrics.json").exists, "the result", CLOSELY)
        os.kill(app, signal.SIGKILL)
        arena.kill("server")
        arena.serve()
        arena.finish()
        assert [arena.trained(name, 2) for name in arena.names] == [1] * 3, "nothing is run again"
        arena.serve()
        assert arena.ended("server") == [0]
        assert arena.said("server").count("open for sites") == 2, "nobody is left to be told"
