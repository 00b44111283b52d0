"""The command `fedloge`: finds the verb, and turns what goes wrong into one line and an exit code.

0 success, 1 the work failed, 2 wrong usage. With `--debug` an error shows its traceback.
"""

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from common.errors import UserError
from fedloge import experiments, frames


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="fedloge",
        description="One generic model for everybody and one personal model per site, federated.",
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks and debug logs")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for group in (experiments, frames):
        group.add_verbs(verbs)
    options = parser.parse_args(arguments)
    level = logging.DEBUG if options.debug else logging.INFO
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        options.run(options)
    except UserError as error:
        if options.debug:
            raise
        print(f"fedloge: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(
            "\nfedloge: stopped; the state of the last finished round is kept, the same command goes on",
            file=sys.stderr,
        )
        return 1
    return 0


def _terminate(signum: int, frame: FrameType | None) -> None:
    del signum, frame
    raise KeyboardInterrupt
