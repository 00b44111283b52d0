"""One engine and one build of the images for the whole suite, and a project of its own for every test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.containers import engine
from tests.containers.project import Project, clone, documented


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(1200))  # with the build of the images in the first


@pytest.fixture(scope="session")
def docker() -> Iterator[dict[str, str]]:
    try:
        with engine.engine() as environment:
            engine.compose(environment)
            engine.ready_base(environment)
            yield environment
    except engine.NoEngine as reason:
        pytest.skip(f"containers are not tested here: {reason}")


@pytest.fixture(scope="session")
def images(docker: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Their build, by the command of the page."""
    builder = Project(clone(tmp_path_factory.mktemp("build")), docker)
    builder.call(documented("docker compose build"), patience=1200.0)
    return docker


@pytest.fixture
def project(images: dict[str, str], tmp_path: Path) -> Iterator[Project]:
    made = Project(clone(tmp_path), images)
    yield made
    made.forget()
