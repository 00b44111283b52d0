"""Tests on several machines need a machine on which they can be made."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.network import Network, objection


@pytest.fixture(scope="session")
def machines() -> None:
    """All skips are from here, so they are one line of pytest's summary."""
    if why := objection():
        pytest.skip(f"no machines can be made here: root, /dev/net/tun and nsenter are needed ({why})")


@pytest.fixture
def network(machines: None, tmp_path: Path) -> Iterator[Network]:  # noqa: ARG001
    with Network(tmp_path) as made:
        yield made
