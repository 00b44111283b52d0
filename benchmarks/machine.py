"""On what a record was measured."""

import importlib.metadata
from typing import Any

from server.run_folder import environment


def machine() -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in ("flwr", "grpcio")}
    return {**environment(), **versions}
