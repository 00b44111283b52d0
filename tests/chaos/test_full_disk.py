"""Disks that are full, and folders that nobody may write to: one line says so, nothing is lost, and with room again
everything goes on. Here the disks are real ones, as a simulated error would not stop root."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos import disks
from tests.chaos.arena import Arena
from tests.chaos.disks import ReadOnly, SmallDisk

pytestmark = pytest.mark.timeout(900)
FULL, READ_ONLY = "No space left on device", "Read-only file system"


@pytest.fixture(autouse=True)
def mounts() -> None:
    if reason := disks.why_not():
        pytest.skip(f"no disk of one's own: {reason}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with SmallDisk(tmp_path / "disk", 1 << 20) as made:
        yield made


def fedloge(*words: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "fedloge", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


def assert_refused(done: "subprocess.CompletedProcess[str]", why: str) -> None:
    """With one line that names cause and mend."""
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"fedloge: .*{why}.*: check its folder and disk\n", done.stderr), done.stderr


def things(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != "ballast")


def test_a_federation_is_made_whole_or_not_at_all(disk: SmallDisk) -> None:
    study = disk.folder / "study"
    for command in (
        ("init", study, "--host", "localhost", "--classes", "owl,crow"),
        ("invite", study, "north"),
        ("join", "south", "--out", disk.folder),
    ):
        before = things(disk.folder)
        disk.fill()
        assert_refused(fedloge(*command), FULL)
        assert things(disk.folder) == before, "half of something is left"
        disk.free()
        done = fedloge(*command)
        assert done.returncode == 0, done.stderr
    assert {"study/kits/north.kit", "south.key", "south.csr"} < set(things(disk.folder))


def test_a_folder_nobody_may_write_to_is_named(tmp_path: Path) -> None:
    with Arena(tmp_path / "arena", ["partition.clients=2"]) as arena:
        name = arena.names[0]
        state = tmp_path / "states" / name
        state.mkdir(parents=True)
        before = things(arena.federation)
        with ReadOnly(tmp_path / "states"), ReadOnly(arena.federation):
            kit, data = arena.federation / "kits" / f"{name}.kit", arena.place / "data" / f"{name}.npz"
            site = ("client", kit, "--data", data, "--test", data, "--device", "cpu")
            for command in (
                ("init", tmp_path / "states" / "study", "--host", "localhost", "--classes", "owl,crow"),
                ("invite", arena.federation, "north"),
                ("server", arena.federation),
                (*site, "--state", state),
                (*site, "--state", tmp_path / "states" / "new"),
            ):
                done = fedloge(*command)
                assert done.returncode == 1, command
                assert done.stdout == ""
                assert re.fullmatch(rf"fedloge: .*{READ_ONLY}.*\n", done.stderr), done.stderr
        assert things(arena.federation) == before
        assert things(tmp_path / "states") == [name]


def test_the_disk_of_a_site_and_that_of_the_server_get_full(arena: Arena, reference: Path) -> None:
    name = arena.names[1]

    def fill_until_it_ends(disk: SmallDisk, name: str) -> str:
        """Gives its last line."""

        def ended() -> bool:
            disk.fill()
            return arena.over() == [name]

        arena.until(ended, f"{name} to end")
        assert arena.ended(name) == [1]
        return arena.said(name).splitlines()[-1]

    with SmallDisk(arena.run, 250_000_000) as of_server, SmallDisk(arena.site(name), 50_000_000) as of_site:
        try:
            arena.start()
            last = fill_until_it_ends(of_site, name)
            assert re.search(rf"fedloge: {arena.site(name)}.*{FULL}.*: check its folder and disk$", last), last
            assert arena.done() in arena.heads(name)
            of_site.free()
            arena.join(name)
            arena.go_on(arena.done(), "a round with the site whose disk was full")

            last = fill_until_it_ends(of_server, "server")
            done = arena.done()
            assert last.endswith(f"fedloge: {arena.run}: its disk is full: make room, then start again to go on "
                                 f"after round {done}"), last  # fmt: skip
            arena.serve()
            last = fill_until_it_ends(of_server, "server")
            assert re.search(rf"fedloge: {arena.run}.*({FULL}|are needed: make room)", last), last
            of_server.free()
            arena.serve("--rounds", done + 2)
            arena.finish()
            assert arena.done() == done + 2
            arena.assert_equal(reference)
        finally:
            arena.kill_all()  # so that no disk is in use any more
