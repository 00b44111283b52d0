"""`fedloge bench`: measured comparisons. They come with the checkout, not with the installed package, and run as a
program of their own, `benchmarks/overhead`."""

import argparse
import os
import sys
from pathlib import Path

from common.errors import UserError

NAMES = ("overhead", "memory", "idle", "dead")
ABOUT = """example: fedloge bench overhead --sites 4 --rounds 6 --blocks 2 --json
  overhead  seconds a round beyond training: these nodes, Flower's own, and the floor of bare gRPC
  memory    of the server, by the number of sites
  idle      processor time of the server while all sites wait
  dead      memory of the server while a site stays dead"""


def add_verbs(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = verbs.add_parser("bench", help="measure what federating costs here", epilog=ABOUT, formatter_class=raw)
    parser.add_argument("name", choices=NAMES, metavar="NAME", help="one of those below")
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="...", help="its options: see `fedloge bench NAME --help`"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    root = Path(__file__).resolve().parents[1]
    if not (root / "benchmarks" / "overhead").is_dir():
        raise UserError("the benchmarks come with the checkout only: install from it (pip install --editable .)")
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-P", "-m", "benchmarks.overhead", options.name, *options.arguments]
    os.execve(sys.executable, command, {**os.environ, "PYTHONPATH": path})
