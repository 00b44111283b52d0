"""The ways to run on real machines: what their files say is what starts a federation and brings it to its end.

No service manager and no cluster are needed: the command lines are taken from the systemd units, and the batch script
is run as Slurm runs it, with a stand-in for the one command of Slurm that it calls.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.network.study import ROOT, Study
from tests.network.superlink import until

SETTINGS = {
    "federation.rounds": 4, "federation.min_clients": 2, "federation.quorum": 1.0, "federation.deadline": 600.0,
    "evaluation.every": 1,
}  # fmt: skip
REQUEUE = '#!/bin/sh\necho "$@" >>"$REQUEUED"\n'
pytestmark = pytest.mark.timeout(600)


def command(unit: str, places: dict[str, str], environment: dict[str, str]) -> list[str]:
    """ExecStart of a unit with our places instead of the system's, and variables as systemd puts them in."""
    text = (ROOT / "docker" / "systemd" / unit).read_text(encoding="utf-8")
    (line,) = re.findall(r"^ExecStart=(.*)$", text, re.M)
    words = shlex.split(line)
    for old, new in places.items():
        words = [word.replace(old, new) for word in words]
    return [re.sub(r"\$\{(\w+)\}", lambda found: environment[found[1]], word) for word in words]


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """What a job sees: where it was submitted from, a disk of the node, and `scontrol`."""
    scripts = tmp_path / "cluster"
    (scripts / ".venv" / "bin").mkdir(parents=True)
    fedloge = scripts / ".venv" / "bin" / "fedloge"
    fedloge.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m fedloge "$@"\n')
    (scripts / "scontrol").write_text(REQUEUE)
    for program in (fedloge, scripts / "scontrol"):
        program.chmod(0o755)
    (scripts / "scratch").mkdir()
    return {
        **os.environ,
        "PATH": f"{scripts}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(scripts),
        "SLURM_JOB_ID": "77",
        "TMPDIR": str(scripts / "scratch"),
        "REQUEUED": str(scripts / "requeued"),
    }


def test_units_and_a_batch_job_make_a_federation(
    tmp_path: Path, cluster: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Study(tmp_path / "place", SETTINGS, ("north", "south")) as study:
        kits, states = study.folder / "kits", tmp_path / "states"
        own = {"/opt/fedloge/.venv/bin/fedloge": sys.executable}
        server = command("fedloge-server.service", {**own, "/var/lib/fedloge/study": str(study.folder)}, {})
        places = {**own, "/etc/fedloge": str(kits), "/var/lib/fedloge-sites": str(states), "%i": "north"}
        north = command("fedloge-client@.service", places, {"DATA": str(study.data / "north.npz")})
        children = {
            name: study.start(name, words[0], "-m", "fedloge", *words[1:])
            for name, words in (("server", server), ("north", north))
        }

        for name, value in cluster.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("KIT", str(kits / "south.kit"))
        monkeypatch.setenv("DATA", str(study.data / "south.npz"))
        script, requeued = ROOT / "docker" / "slurm" / "client.sbatch", Path(cluster["REQUEUED"])
        scratch = Path(cluster["TMPDIR"])
        job = study.start("job", "bash", script)
        until(study.events, "the first round", 300.0)
        assert [path.name for path in scratch.glob("fedloge.*/*")] == ["south.npz"]
        (shell,) = [pid for pid, line in running(str(script)) if line.startswith("bash")]
        os.kill(shell, signal.SIGTERM)  # what `--signal=B:TERM` sends: to the script alone
        until(lambda: requeued.exists() and requeued.read_text(), "the script to queue its job again")
        assert requeued.read_text() == "requeue 77\n"
        until(lambda: not running(str(script)), "the end of the job")
        until(lambda: job.poll() is not None, "the last of what it said")
        assert "stopped; what finished rounds gave is kept" in study.said("job")
        assert list(scratch.glob("fedloge.*")) == []

        children["again"] = study.start("again", "bash", script)
        for name, child in children.items():
            study.finish(child, name)
        assert [event["sites"] for event in study.events()] == [["north", "south"]] * 4
        for state in (states / "north", kits / "south"):
            assert (state / "models" / "personal.safetensors").exists()
        assert len(requeued.read_text().splitlines()) == 1  # it is over, so it is not queued any more
        assert list(scratch.glob("fedloge.*")) == []


def running(script: str) -> list[tuple[int, str]]:
    """Processes with the script on their command line, but for the guard that started it."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if script in words and "guard.py" not in "".join(words):
            found.append((int(entry.name), " ".join(words)))
    return found


def test_a_batch_job_without_what_it_needs_says_so(cluster: dict[str, str]) -> None:
    script = ROOT / "docker" / "slurm" / "client.sbatch"
    bare = {name: value for name, value in cluster.items() if name not in ("KIT", "DATA")}
    done = subprocess.run(["bash", script], env=bare, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "KIT: name the kit; its key is beside it" in done.stderr
    assert list(Path(cluster["TMPDIR"]).iterdir()) == []
