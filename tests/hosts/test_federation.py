"""Federations of several machines over bad links, with cables pulled and machines that move: they finish, every round
folds what it should and nothing else, and every site keeps its head.

What was folded is shown by invariants.broken, which does all rounds again in one process.
"""

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from common import config
from fedloge.demo import DEMO
from fedloge.simulate import simulate
from tests.chaos.arena import Arena
from tests.chaos.invariants import broken
from tests.hosts.network import CLEAN, DEAD, FAR, LOSSY, SLOW, Line, Network

NAME = "fl.test"  # by which sites know the server
ENDLESS = ("--rounds", 100_000)
KEEP = ("--set", "run.keep=99")
VERY_SLOW = Line(rate=5e5)  # 2 MB in 32 seconds; a site is missed after 20
GRACE = 8.0  # seconds; sites over links of the same kind are no further apart

pytestmark = pytest.mark.timeout(600)


@contextmanager
def started(network: Network, place: Path, settings: Sequence[str], *flags: object) -> Iterator[Arena]:
    """A server and sites on machines of their own, after their first round. The server's machine is the one that the
    name calls."""
    with Arena(place, settings, NAME, lambda name: network.on(network.called if name == "server" else name)) as arena:
        network.plug("server", *arena.names)
        network.call(NAME, "server")
        arena.serve(*ENDLESS, *KEEP, *flags)
        for name in arena.names:
            arena.join(name)
        arena.go_on(0, "the first round")
        yield arena


def go_on(arena: Arena, many: int) -> None:
    """See the round that is open through, and some more."""
    done = arena.done()
    arena.until(lambda: arena.done() > done + many, f"{many} rounds after round {done + 1}")


def assert_same_processes(arena: Arena) -> None:
    """No site was started again: each looked for the server once, when it began."""
    assert [arena.log(name).count("connecting to") for name in arena.names] == [1] * len(arena.names)


def test_every_site_is_in_every_round_whatever_the_links(network: Network, tmp_path: Path) -> None:
    settings = ["method=fedloge", "partition.clients=3", "model.width=400", "train.epochs=1", "evaluation.every=1"]
    with started(network, tmp_path / "arena", settings) as arena:
        first, second, third = arena.names
        for line in (FAR, LOSSY, SLOW):
            network.cables(arena.names, line)
            go_on(arena, 1)

        # pulled for 5 seconds in the middle of an upload: nobody has to do anything again
        arena.until(lambda: arena.uploads(third), "an upload")
        network.pull(third)
        done = arena.done()
        time.sleep(5)
        assert arena.uploads(third)
        assert arena.done() == done
        network.cable(third, SLOW, SLOW)
        go_on(arena, 0)
        assert [arena.trained(name, done + 1) for name in arena.names] == [1] * 3
        network.cables(arena.names, CLEAN)

        # the server's cable is pulled, and meanwhile a site gets another address
        network.pull("server")
        network.move(second)
        arena.until(lambda: not any(arena.online(name) for name in arena.names), "the sites to be missed")
        network.cable("server")
        go_on(arena, 0)

        # a site gets another address
        network.move(first)
        go_on(arena, 1)

        # the server moves to another machine with its folder: it is stopped, the folder is carried over, the name is
        # given the address of that machine, and the same command is started there
        assert arena.terminate("server") == 1
        network.pull("server")
        network.plug("another")
        network.call(NAME, "another")
        arena.move(tmp_path / "arena" / "moved")
        arena.serve("--rounds", arena.done() + 2, *KEEP)
        arena.finish()

        assert all(entry["sites"] == arena.names for entry in arena.rounds())
        assert_same_processes(arena)
        assert broken(arena.place, arena.names, settings, quorum=1.0) == []
        rounds = f"federation.rounds={arena.done()}"
        simulate(config.load(DEMO, [*settings, rounds, "run.keep=99"]), tmp_path / "reference", lambda _: None)
        arena.assert_equal(tmp_path / "reference")


def test_sites_are_cut_off_for_a_minute_and_return(network: Network, tmp_path: Path) -> None:
    settings = ["method=fedloge", "partition.clients=4", "model.width=700", "train.epochs=1", "evaluation.every=5"]
    policy = ("--min-clients", 2, "--quorum", 0.5, "--grace", GRACE)
    with started(network, tmp_path / "arena", settings, *policy) as arena:
        pulled, deaf, *others = arena.names
        arena.until(lambda: arena.rounds()[-1]["sites"] == arena.names, "a round with all four")
        before = len(arena.rounds())
        held = [arena.stop_while(name, arena.trains) for name in (pulled, deaf)]  # so each owes the server a reply
        began = time.monotonic()
        network.pull(pulled)
        network.cable(deaf, into=DEAD)  # the server hears it, and it does not hear the server
        for pid in held:
            os.kill(pid, signal.SIGCONT)
        arena.until(lambda: arena.rounds()[-1]["sites"] == others, "a round without the two")
        cut = [entry for entry in arena.rounds()[before:] if entry["missing"]]
        assert [name for entry in cut for name in entry["missing"]] == [pulled, deaf], "each once, mostly in one round"
        assert (cut[-1]["sites"], [entry["refused"] for entry in cut]) == (others, [{}] * len(cut))
        assert all(entry["seconds"]["training"] >= GRACE for entry in cut), "closed when the time of grace was over"

        for name in others:  # they send for longer than it takes to be missed, and are not missed
            network.cable(name, VERY_SLOW, SLOW)
        arena.until(lambda: not arena.online(pulled) and not arena.online(deaf), "the two to be missed")
        arena.until(lambda: time.monotonic() > began + 60, "a minute to pass")
        network.cables(arena.names, SLOW)
        under_way = len(arena.rounds())
        arena.until(lambda: arena.online(pulled) and arena.online(deaf), "the two to be back")
        back = len(arena.rounds())
        arena.until(lambda: arena.rounds()[-1]["sites"] == arena.names, "a round with all four again")
        sites = [entry["sites"] for entry in arena.rounds()]
        assert all(there == others for there in sites[cut[-1]["round"] : under_way])
        assert arena.names in sites[back : back + 3], "no later than two rounds after the one that was under way"
        assert [name for name in others if f"{name} is offline" in arena.said("server")] == []
        assert_same_processes(arena)

        assert arena.terminate("server") == 1
        network.cables(arena.names, CLEAN)
        arena.serve("--rounds", arena.done() + 1, *KEEP, "--min-clients", len(arena.names))
        arena.finish()
        assert arena.rounds()[-1]["sites"] == arena.names
        assert broken(arena.place, arena.names, settings) == []
