"""`fedloge simulate`: a whole federation in one process."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from common import config, heap
from fedloge.progress import ProgressLine
from fedloge.simulate import Progress, simulate
from fedloge.table import result_table

EXAMPLE = "example: fedloge simulate fedloge/demo.toml --method fedavg --set train.lr=0.1"


def add_verbs(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = verbs.add_parser("simulate", help="run a federation in one process", epilog=EXAMPLE)
    parser.add_argument("file", type=Path, metavar="FILE.toml", help="the experiment")
    parser.add_argument("--method", help="run another method with its default knobs")
    parser.add_argument("--seed", type=int, help="seed of initial values, sampling and batches")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the file")
    parser.add_argument("--out", type=Path, help="run folder (default: runs/NAME-METHOD-sSEED)")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    experiment = config.load(options.file, _overrides(options))
    folder = options.out or Path("runs") / f"{experiment.name}-{experiment.method.name}-s{experiment.seed}"
    torch.set_num_threads(experiment.run.threads)
    heap.keep()
    result = simulate(experiment, folder, _shown())
    if options.json:
        print(json.dumps({**result, "folder": str(folder)}))
    else:
        print(result_table([result]))
        if result["never_trained"]:
            many = len(result["never_trained"])
            print(f"sites that never trained: {many}; their personal models hold untrained parts", file=sys.stderr)
        print(f"\nrun folder: {folder}  (metrics.json, events.jsonl, models/)", file=sys.stderr)


def _shown() -> Callable[[Progress], None]:
    line = ProgressLine()
    return lambda now: line.show(now.round, now.rounds, now.evaluation)


def _overrides(options: argparse.Namespace) -> list[str]:
    """Flags are overrides like any other; `--method` drops the knobs of the file's method, which are not its own."""
    flags = {"method": options.method, "seed": options.seed, "run.device": options.device}
    chosen = [f"{key}={json.dumps(value)}" for key, value in flags.items() if value is not None]
    return [*chosen, *options.set]
