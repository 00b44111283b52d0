"""`fedloge bench NAME`, or `python -m benchmarks NAME`: measure, print, and write a record if asked.

`check` measures the small forms of all and fails if a ratio has fallen. What there is: benchmarks/registry.py.
"""

import argparse
import json
import os
import signal
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks import check
from benchmarks.machine import machine
from benchmarks.registry import NAMES, benchmark
from common import files
from common.errors import UserError

CHECK = "check"
WIDTH = 79


def main() -> int:
    signal.signal(signal.SIGTERM, terminate)
    try:
        options = vars(parse(sys.argv[1:]))
        name, as_json = options.pop("name"), options.pop("json")
        if name == CHECK:
            return check.run(**options, as_json=as_json)
        return run(name, as_json, options.pop("out"), options)
    except UserError as error:
        print(f"fedloge: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nfedloge: stopped; nothing is kept of it", file=sys.stderr)
        return 1


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
    parser.add_argument("name", choices=[*NAMES, CHECK], metavar="NAME", help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its options: see NAME --help")
    if words[:1] and words[0].startswith("-"):  # only then, as it needs them all
        abouts = {name: benchmark(name).ABOUT for name in NAMES} | {CHECK: check.ABOUT}
        lines = [f"  {name:10}{about}" for name, about in abouts.items()]
        parser.epilog = "\n".join([f"example: fedloge bench overhead {benchmark('overhead').EXAMPLE}", *lines])
    given = parser.parse_args(words)
    chosen = check if given.name == CHECK else benchmark(given.name)
    paragraphs = (chosen.__doc__ or "").strip().split("\n\n")
    own = argparse.ArgumentParser(
        prog=f"fedloge bench {given.name}",
        description="\n\n".join(textwrap.fill(paragraph, WIDTH) for paragraph in paragraphs),
        epilog=f"example: fedloge bench {given.name} {chosen.EXAMPLE}",
        formatter_class=raw,
    )
    chosen.options(own)
    own.add_argument("--json", action="store_true", help="print one JSON object")
    if chosen is not check:
        own.add_argument("--out", type=Path, metavar="FILE", help="write the record to this file")
    own.set_defaults(name=given.name)
    return own.parse_args(given.arguments)


def terminate(signum: int, frame: FrameType | None) -> None:
    del signum, frame
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
