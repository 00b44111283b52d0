"""The command `fedloge`: finds the verb, and turns what goes wrong into one line and an exit code.

0 success, 1 the work failed, 2 wrong usage. With `--debug` an error shows its traceback.
"""

import argparse
import importlib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from common.errors import UserError

VERBS = {  # of every module
    "demo": ("demo",),
    "provision": ("init", "join", "invite", "revoke"),
    "serve": ("server", "status"),
    "site": ("client",),
    "check": ("check",),
    "experiments": ("simulate",),
    "shares": ("shares",),
    "report": ("report",),
    "use": ("predict", "judge", "personalize", "export"),
    "frames": ("frame",),
    "bench": ("bench",),
    "lobby": ("lobby",),
}


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    debug = False
    signal.signal(signal.SIGTERM, _terminate)
    try:
        options = _parse(arguments)
        debug = options.debug
        level = logging.DEBUG if debug else logging.INFO
        logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
        options.run(options)
    except UserError as error:
        if debug:
            raise
        print(f"fedloge: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # who reads what is printed has had enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a file or folder that is not there, not ours to write, or on a full disk
        if debug:
            raise
        print(f"fedloge: {error.filename or 'a file'}: {error.strerror}: check its folder and disk", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nfedloge: stopped; what finished rounds gave is kept, the same command goes on", file=sys.stderr)
        return 1
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fedloge", description="One generic model for everybody and one personal model per site, federated."
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks and debug logs")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name in _modules(sys.argv[1:] if arguments is None else arguments):
        importlib.import_module(f"fedloge.{name}").add_verbs(verbs)
    return parser.parse_args(arguments)


def _modules(arguments: Sequence[str]) -> list[str]:
    """The one that has the verb asked for: most import torch, which takes seconds. All of them if none has it."""
    verb = next((word for word in arguments if not word.startswith("-")), "")
    return [name for name, own in VERBS.items() if verb in own] or list(VERBS)


def _terminate(signum: int, frame: FrameType | None) -> None:
    del signum, frame
    raise KeyboardInterrupt
