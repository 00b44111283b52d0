"""`fedloge frame`: build a frame and look at it."""

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from common import frame
from common.config import FrameConfig
from common.net import best_device

EXAMPLE = "example: fedloge frame --dim 512 --classes 100 --json"


def add_verbs(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = verbs.add_parser("frame", help="build and inspect a sparse equiangular frame (SSE-C)", epilog=EXAMPLE)
    default = FrameConfig()
    parser.add_argument("--dim", type=int, required=True, help="dimension of the features")
    parser.add_argument("--classes", type=int, required=True, help="number of classes; may exceed the dimension")
    parser.add_argument("--sparsity", type=float, default=default.sparsity, help="share of exact zeros (%(default)s)")
    parser.add_argument("--norm", type=float, default=default.norm, help="length of every column (%(default)s)")
    parser.add_argument("--solver", choices=("auto", "reference", "gram", "lse"), default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu", help="to solve on (%(default)s)")
    parser.add_argument("--best-effort", action="store_true", help="build it even where no exact simplex exists")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=build)


def build(options: argparse.Namespace) -> None:
    spec = frame.FrameSpec(
        dim=options.dim,
        classes=options.classes,
        norm=options.norm,
        sparsity=options.sparsity,
        solver=options.solver,
        seed=options.seed,
        best_effort=options.best_effort,
    )
    progress = _show if sys.stderr.isatty() else None
    built = frame.build(spec, device=str(best_device(options.device)), progress=progress)
    report: dict[str, Any] = {**asdict(built.report), "digest": built.digest}
    if options.json:
        print(json.dumps(report))
        return
    for key, value in report.items():
        print(f"{key:16} {value}")


def _show(evaluations: int, best_angle_deg: float) -> None:
    """Frames of thousands of classes take minutes."""
    sys.stderr.write(f"\r\x1b[K{evaluations} evaluations, smallest angle {best_angle_deg:.3f} degrees\r")
    sys.stderr.flush()
