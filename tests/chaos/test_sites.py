"""Sites that come late, leave, die and return: the run goes on as long as there are enough, and stops in good order
when there are not."""

from pathlib import Path

import pytest

from common import parts
from tests.chaos.arena import Arena

pytestmark = pytest.mark.timeout(900)


def waits_for_a_round(arena: Arena) -> bool:
    """Not for sites that can take part in the survey of the one before, which is then not done."""
    status = arena.status()
    return status.phase == "waiting" and status.round == arena.rounds()[-1]["round"]


def test_sites_leave_die_return_and_come_late(tmp_path: Path) -> None:
    often = ["partition.clients=4", "federation.rounds=40", "evaluation.every=1"]  # so a survey follows every round
    with Arena(tmp_path / "arena", often) as arena:
        stays, dies, leaves, other = arena.names
        arena.serve("--min-clients", 2, "--quorum", 0.5, "--grace", 20)
        for name in (stays, dies, leaves):
            arena.join(name)
        arena.until(lambda: arena.rounds() and len(arena.rounds()[-1]["sites"]) == 3, "a round with all three")

        assert arena.terminate(leaves) == 1
        arena.until(lambda: arena.rounds()[-1]["sites"] == [stays, dies], "a round without the site that left")
        arena.go_on(9, "ten rounds")

        arena.kill(dies)
        arena.until(lambda: not arena.online(dies), "the dead site to be noticed")
        arena.until(lambda: waits_for_a_round(arena), "the server to wait, as one site is too few")
        assert arena.rounds()[-1]["sites"] in ([stays], [stays, dies]), "it may have died in that round's survey"

        arena.invite("late")
        arena.join("late", data=other)
        before = arena.rounds()[-1]["round"]
        assert before >= 10
        arena.go_on(before, "a round with the site that came late")
        assert arena.rounds()[before]["sites"] == ["late", stays]
        assert arena.trained("late", before + 1) == 1
        frames = [parts.read(arena.site(name) / "fixed.safetensors")[0]["frame/weight"] for name in ("late", stays)]
        assert frames[0].equal(frames[1])

        arena.kill("late")
        before = arena.rounds()[-1]["round"]
        arena.join("late", data=other)
        arena.go_on(before + 1, "two more rounds")
        without = [entry["round"] for entry in arena.rounds()[before:] if "late" not in entry["sites"]]
        assert len(without) <= 1, "no round but the one that was open is without a site that came back"

        arena.finish()
        assert arena.rounds()[-1]["sites"] == ["late", stays]
        assert arena.heads(leaves)
        assert arena.heads(dies)


def test_with_too_few_sites_the_server_stops_with_all_saved_and_later_goes_on(arena: Arena, reference: Path) -> None:
    flags = ("--rounds", 8, "--set", "federation.wait=10", "--set", "federation.failures=2")

    def look_for_it(starts: dict[str, int]) -> None:
        """The server waits for sites no longer than it takes to start one: they are there before it is."""
        arena.until(
            lambda: all(arena.log(name).count("connecting to") == times for name, times in starts.items()),
            "the sites to look for the server",
        )

    for name in arena.names:
        arena.join(name)
    look_for_it(dict.fromkeys(arena.names, 1))
    arena.serve(*flags)
    arena.go_on(1, "two rounds")
    gone = arena.names[2]
    assert arena.terminate(gone) == 1
    assert arena.ended("server") == [1]
    done = arena.done()
    last = arena.said("server").splitlines()[-1]
    assert f"fedloge: round {done + 1} found no quorum 2 times in a row (sites reached: 2 of 3)" in last
    assert "bring the sites back" in last
    assert (arena.status().phase, arena.status().message) == ("gave-up", last.partition("fedloge: ")[2])
    assert sorted(arena.running) == sorted(set(arena.names) - {gone}), "the others wait for the server"

    arena.join(gone)
    look_for_it({gone: 2})
    arena.serve(*flags)
    arena.finish()
    assert arena.done() == 8
    arena.assert_equal(reference)
