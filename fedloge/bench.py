"""`fedloge bench`: measured comparisons. They come with the checkout, not with the installed package, and run as a
program of their own, `benchmarks`, which also knows what there is."""

import argparse
import os
import sys
from pathlib import Path

from common.errors import UserError


def add_verbs(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = verbs.add_parser("bench", help="measure what everything costs here", add_help=False)
    parser.add_argument("--help", "-h", action="store_true", help="what can be measured")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the name of a benchmark and its options")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    root = Path(__file__).resolve().parents[1]
    if not (root / "benchmarks" / "__main__.py").is_file():
        raise UserError("the benchmarks come with the checkout only: install from it (pip install --editable .)")
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    words = ["--help"] if options.help else options.arguments
    os.execve(sys.executable, [sys.executable, "-P", "-m", "benchmarks", *words], {**os.environ, "PYTHONPATH": path})
