"""docker-compose.yml on a real engine: from a clone to the result, through kills, a stop and a second start."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from tests.containers.project import Project, documented, rounds

UP = "docker compose up"
EIGHT = "docker compose up --scale client=8"
HEALTH = "docker compose exec -T server fedloge status /operator/federation --healthy"
STRANGER = 4321  # a user that neither the machine nor the image knows
LENGTH = 120  # rounds: enough for what happens meanwhile


def kill(project: Project, container: str) -> None:
    """kill -9 of all processes in it, but the first, which only waits for the others."""
    project.docker("exec", container, "sh", "-c", "kill -9 -1", check=False)


def restarted(project: Project, container: str) -> Callable[[], bool]:
    def look() -> bool:
        found = project.inspect(container)
        return bool(found["RestartCount"] == 1 and found["State"]["Running"])

    return look


def test_a_clone_comes_to_its_result_whatever_is_killed(project: Project) -> None:
    settings = f"federation.rounds={LENGTH} train.epochs=10 evaluation.every=10"
    with project.up(documented(UP), SET=settings) as up:
        project.wait_for_round(1)
        clients, [server] = project.containers("client"), project.containers("server")
        assert len(clients) == 4
        kill(project, clients[0])
        project.wait(restarted(project, clients[0]))
        reached = len(rounds_done(project, server))
        project.wait_for_round(reached + 2)
        assert "4 sites online" in project.call(documented(HEALTH)).stdout
        for client in clients:
            said = project.docker("exec", client, "fedloge", "status", "/tmp/site", "--healthy").stdout
            assert said.startswith("the server answered")
        missed = project.output().count("is offline")
        project.docker("pause", clients[1])
        project.wait(lambda: project.output().count("is offline") > missed)
        project.docker("unpause", clients[1])
        project.wait_for_round(len(rounds_done(project, server)) + 2)
        kill(project, server)
        project.wait(restarted(project, server))
        assert len(rounds_done(project, server)) < LENGTH
        # what they wrote lies in their volumes, and nothing on the root of an image
        assert all(project.inspect(container)["HostConfig"]["ReadonlyRootfs"] for container in [server, *clients])
        said = project.finish(up)
        assert set(project.exit_codes().values()) == {0}
    result = json.loads((project.runs / "metrics.json").read_text(encoding="utf-8"))
    names = [f"site-00{number}" for number in range(4)]
    assert result["rounds"] == LENGTH
    for name in names:
        personal = next(iter(result["personal"].values()))["per_site"][name]
        assert f"{100 * personal:.1f}" in next(line for line in reversed(said.splitlines()) if line.startswith(name))
    assert [(each["round"], each["sites"]) for each in rounds(project.runs)] == [
        (number, names) for number in range(1, LENGTH + 1)
    ]
    assert (project.runs / "models" / "generic.safetensors").stat().st_size > 1000
    assert "<svg" in (project.runs / "report.html").read_text(encoding="utf-8")

    before = (project.runs / "metrics.json").read_bytes()
    (project.runs / "report.html").unlink()
    with project.up(UP, SET=settings) as up:
        again = project.finish(up)
        assert set(project.exit_codes().values()) == {0}
    table = said[said.index("model     judged on") : said.index("model of all")].strip()
    assert table in again
    assert "the federation of 4 sites is there already" in again
    assert (project.runs / "metrics.json").read_bytes() == before
    assert (project.runs / "report.html").exists()


def test_eight_sites_of_a_folder_of_images_go_on_after_a_stop_as_any_user(project: Project) -> None:
    images = pictures(project.folder / "pictures")
    variables = {
        "DATA": str(images), "OWNER": f"{STRANGER}:{STRANGER}",
        "SET": f"federation.rounds={LENGTH} train.epochs=3 data.size=12 partition.kind=iid evaluation.every=20",
    }  # fmt: skip
    with project.up(documented(EIGHT), **variables):
        project.wait_for_round(1)
        clients = project.containers("client")
        assert len(clients) == 8
        # one machine is lost, and somebody means it too well: of two new ones one takes the place, one is not needed
        project.docker("rm", "--force", clients[0])
        project.call("docker compose up --detach --no-recreate --scale client=9", **variables)
        project.wait(lambda: "this replica is not needed" in project.call("docker compose logs client").stdout)
        reached = len(rounds_done(project, project.containers("server")[0]))
        project.wait_for_round(reached + 1)
        project.call(documented("docker compose stop"))
    done = len(rounds_done_in(project))
    assert 0 < done < LENGTH
    with project.up(EIGHT, **variables) as up:
        said = project.finish(up)
        assert set(project.exit_codes().values()) == {0}
    assert f"round {LENGTH} of {LENGTH}: 8 replies" in said
    assert f"round {done} of {LENGTH}:" not in said
    result = json.loads((project.runs / "metrics.json").read_text(encoding="utf-8"))
    assert len(next(iter(result["personal"].values()))["per_site"]) == 8
    assert [each["round"] for each in rounds(project.runs)] == list(range(1, LENGTH + 1))
    assert {path.stat().st_uid for path in [project.runs, *project.runs.rglob("*")]} == {STRANGER}


def pictures(folder: Path) -> Path:
    """A folder of images as people have them, which only their owner may read."""
    for number, name in enumerate(("jay", "owl", "crow")):
        (folder / name).mkdir(parents=True)
        for i in range(64):
            pixels = np.random.RandomState(100 * number + i).randint(0, 128, (20, 24, 3))
            pixels[..., number] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.jpg")
    folder.chmod(0o700)
    return folder


def rounds_done(project: Project, server: str) -> list[str]:
    return project.docker("exec", server, "cat", "/operator/federation/run/events.jsonl").stdout.splitlines()


def rounds_done_in(project: Project) -> list[str]:
    """Of a federation whose containers are gone: what its volume holds."""
    words = ["run", "--rm", "--volume", f"{project.name}_operator:/operator", "--entrypoint", "cat", "fedloge-server"]
    return project.docker(*words, "/operator/federation/run/events.jsonl").stdout.splitlines()
