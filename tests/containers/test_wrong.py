"""What is wrong is said in one line, by the engine where it is the engine's matter, and everything ends."""

import socket
from pathlib import Path

import pytest

from tests.containers.project import LONG, Project, documented

OTHER = """FROM fedloge-client
USER root
RUN sed -i 's/^Version: .*/Version: 9.9/' /opt/fedloge/lib/python3*/site-packages/fedloge-*.dist-info/METADATA
USER 1000:1000
"""


def lines(text: str, part: str) -> list[str]:
    return [line for line in text.splitlines() if part in line]


def test_a_folder_that_is_not_there(project: Project) -> None:
    missing = project.folder / "pictures"
    with project.up(DATA=str(missing), SITES="1") as up:
        up.wait(LONG)
        said = project.said()
    # newer ones of Compose make the folder before anybody is asked
    assert lines(said, f"bind source path does not exist: {missing}") or lines(said, f"fedloge: {missing}: no image")


def test_a_folder_without_images(project: Project) -> None:
    (project.folder / "empty").mkdir()
    with project.up(DATA=str(project.folder / "empty"), SITES="1") as up:
        said = project.finish(up)
        codes = project.exit_codes()
    assert len(lines(said, "fedloge: ")) == 1
    assert "no image in any subfolder: put images of class NAME into" in said
    assert sorted(codes.values()) == [0, 0, 1]
    assert not list(project.runs.iterdir())


def test_no_gpu_for_the_profile(project: Project) -> None:
    file = project.folder / "docker-compose.yml"
    text = file.read_text(encoding="utf-8")
    assert "image: fedloge-client:cuda\n" in text
    # a build of it would bring gigabytes that are not needed to be refused
    file.write_text(text.replace("image: fedloge-client:cuda\n", "image: fedloge-client\n"), encoding="utf-8")
    with project.up(documented("docker compose --profile gpu up --scale client=0"), SITES="1") as up:
        assert up.wait(LONG) != 0
        assert lines(project.output(), 'could not select device driver "nvidia" with capabilities: [[gpu]]')


def test_a_kit_that_the_user_may_not_read(project: Project, tmp_path: Path) -> None:
    kit = tmp_path / "kit"
    kit.mkdir()
    (kit / "site.kit").write_text("{}")
    (kit / "site.kit").chmod(0o600)
    run = ["run", "--rm", "--read-only", "--tmpfs", "/tmp", "--user", "4321:4321", "--volume", f"{kit}:/kit:ro"]
    done = project.docker(*run, "fedloge-client", check=False)
    assert done.returncode == 1
    assert done.stderr == "fedloge: /kit/site.kit: cannot be read (Permission denied): name the kit the operator sent\n"


def test_a_port_that_is_taken(project: Project) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        words = ["run", "--rm", "--publish", f"127.0.0.1:{port}:9092", "fedloge-server"]
        done = project.docker(*words, check=False)
    assert done.returncode == 125
    assert lines(done.stderr, f"127.0.0.1:{port}: bind: address already in use")


@pytest.mark.parametrize("target", ["server", "client"])
def test_a_container_that_has_nothing_is_not_healthy(project: Project, target: str) -> None:
    done = project.docker(
        "run",
        "--rm",
        "--read-only",
        "--user",
        "4321:4321",
        f"fedloge-{target}",
        "status",
        "/tmp",
        "--healthy",
        check=False,
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert project.inspect(f"fedloge-{target}")["Config"]["Volumes"] is None  # they would pile up


def test_images_of_different_versions_name_both(project: Project) -> None:
    (project.folder / "Other").write_text(OTHER)
    project.docker(
        "build", "--tag", "fedloge-client:other", "--file", str(project.folder / "Other"), str(project.folder)
    )
    file = project.folder / "docker-compose.yml"
    text = file.read_text(encoding="utf-8")
    named = "image: fedloge-client\n    build: {<<: *build, target: client}\n"
    assert named in text
    file.write_text(text.replace(named, "image: fedloge-client:other\n"), encoding="utf-8")
    try:
        with project.up(SITES="1"):
            project.wait(lambda: lines(project.output(), "it runs fedloge 9.9, the server 0.1.0"))
            project.wait(lambda: lines(project.output(), "the server runs fedloge 0.1.0, this site 9.9"))
    finally:
        project.docker("rmi", "--force", "fedloge-client:other")
