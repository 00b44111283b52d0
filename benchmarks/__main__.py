"""`fedloge bench NAME`, or `python -m benchmarks NAME`: measure, print, and write a record if asked.

Every benchmark is a module that says what it is (`ABOUT`, `EXAMPLE`), which options it has, how it is measured and
how its figures are shown. `ratios` are those of them that must not fall (benchmarks/check.py), on any machine.
"""

import argparse
import importlib
import json
import os
import signal
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from benchmarks.machine import machine
from common import files
from common.errors import UserError

NAMES = {
    "step": "benchmarks.step.update",
    "eval": "benchmarks.step.judging",
    "overhead": "benchmarks.overhead.rounds",
    "memory": "benchmarks.overhead.memory",
    "idle": "benchmarks.overhead.idle",
    "dead": "benchmarks.overhead.dead",
    "frame": "benchmarks.frame_bench",
}
WIDTH = 79


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


def main() -> int:
    signal.signal(signal.SIGTERM, terminate)
    try:
        options = vars(parse(sys.argv[1:]))
        return run(options.pop("name"), options.pop("json"), options.pop("out"), options)
    except UserError as error:
        print(f"fedloge: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nfedloge: stopped; nothing is kept of it", file=sys.stderr)
        return 1


def benchmark(name: str) -> Benchmark:
    module: Any = importlib.import_module(NAMES[name])
    return module  # type: ignore[no-any-return]


def run(name: str, as_json: bool, out: Path | None, options: dict[str, Any]) -> int:
    record = recorded(name, options)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        files.write(out, json.dumps(record, indent=1) + "\n")
    print(json.dumps(record) if as_json else benchmark(name).table(record))
    return 0


def recorded(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    load = os.getloadavg()
    found = benchmark(name).measure(**options)
    return {"benchmark": name, **found, "options": options, "load_before": load, "environment": machine()}


def parse(words: list[str]) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="fedloge bench",
        description="Measured comparisons. Each prints a table or, with --json, its whole record.",
        formatter_class=raw,
    )
    parser.add_argument("name", choices=NAMES, metavar="NAME", help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its options: see NAME --help")
    if words[:1] and words[0].startswith("-"):  # only then, as it needs them all
        lines = [f"  {name:10}{benchmark(name).ABOUT}" for name in NAMES]
        parser.epilog = "\n".join([f"example: fedloge bench overhead {benchmark('overhead').EXAMPLE}", *lines])
    given = parser.parse_args(words)
    chosen = benchmark(given.name)
    paragraphs = (chosen.__doc__ or "").strip().split("\n\n")
    own = argparse.ArgumentParser(
        prog=f"fedloge bench {given.name}",
        description="\n\n".join(textwrap.fill(paragraph, WIDTH) for paragraph in paragraphs),
        epilog=f"example: fedloge bench {given.name} {chosen.EXAMPLE}",
        formatter_class=raw,
    )
    chosen.options(own)
    own.add_argument("--json", action="store_true", help="print one JSON object")
    own.add_argument("--out", type=Path, metavar="FILE", help="write the record to this file")
    own.set_defaults(name=given.name)
    return own.parse_args(given.arguments)


def terminate(signum: int, frame: FrameType | None) -> None:
    del signum, frame
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
