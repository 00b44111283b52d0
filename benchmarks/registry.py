"""Which benchmarks there are, and what each of them is: a module that says so itself."""

import argparse
import importlib
from collections.abc import Mapping
from typing import Any, Protocol

NAMES = {
    "step": "benchmarks.step.update",
    "eval": "benchmarks.step.judging",
    "engine": "benchmarks.engine_bench",
    "overhead": "benchmarks.overhead.rounds",
    "memory": "benchmarks.overhead.memory",
    "idle": "benchmarks.overhead.idle",
    "dead": "benchmarks.overhead.dead",
    "frame": "benchmarks.frame_bench",
    "survey": "benchmarks.survey_bench",
    "scale": "benchmarks.scale",
    "simulate": "benchmarks.simulate_cost",
    "wire": "benchmarks.wire_bench",
}


class Benchmark(Protocol):
    ABOUT: str
    EXAMPLE: str
    SMALL: Mapping[str, object]  # arguments of `measure` for the check of ratios; empty: it takes no part there

    def options(self, parser: argparse.ArgumentParser) -> None: ...
    def measure(self, **options: Any) -> dict[str, Any]:
        """Figures only: nothing of the machine."""
        ...

    def table(self, record: Mapping[str, Any]) -> str:
        """For people, with the aim beside each figure that has one."""
        ...

    def ratios(self, record: Mapping[str, Any]) -> dict[str, float]:
        """Larger is better for each."""
        ...


def benchmark(name: str) -> Benchmark:
    module: Any = importlib.import_module(NAMES[name])
    return module  # type: ignore[no-any-return]
