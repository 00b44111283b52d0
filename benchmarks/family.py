"""Run a family of experiments: every method and seed that belongs together, what is missing of it.

    python -m benchmarks.family cpu-scale --data FOLDER [--jobs 2] [--only fedloge] [--list]
    python -m benchmarks.family demo-choice
    python -m benchmarks.family ladder-cifar10-r30 --data FOLDER
    python -m benchmarks.family cifar100-k40-a0.5-if0.01 --data FOLDER --only fedloge

Runs go to `runs/FAMILY/NAME`; each resumes where it stopped, finished ones are skipped, and every finished run
becomes a record. FOLDER is what the experiment's source reads (for CIFAR-10 the folder of cifar-10-batches-py); for the
published settings, whose families are called as their files are, the folder that benchmarks.unpack has written. These
want a GPU: docs/experiments.md.
"""

import argparse
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import records

HERE = Path(__file__).parent
THREE = (1, 2, 3)


@dataclass(frozen=True)
class Row:
    """One line of a family's table: the experiment file with some keys set, for some seeds."""

    name: str
    seeds: tuple[int, ...]
    method: str
    settings: tuple[str, ...] = ()


# FedAvg needs no run of its own: fedavg-ft trains it to the bit (a test says so) and reports its global model too.
CPU_SCALE = (
    Row("fedavg-ft", THREE, "fedavg-ft", ("method.probes=true",)),
    Row("fedloge-norm1", THREE, "fedloge"),
    Row("fedloge-norm0.1", THREE, "fedloge", ("frame.norm=0.1",)),
    Row("balanced-global", THREE, "balanced", ("method.prior=global",)),
    Row("fedrod", THREE, "fedrod"),
    Row("local", (1,), "local"),
    Row("fedprox", (1,), "fedprox"),
    Row("fedper", (1,), "fedper"),
    Row("fedrep", (1,), "fedrep"),
    Row("fedbabu", (1,), "fedbabu"),
    Row("fedbn", (1,), "fedbn", ("model.norm=local",)),
    Row("ditto", (1,), "ditto"),
    Row("apfl", (1,), "apfl"),
    Row("fedlc", (1,), "fedlc"),
    Row("fedetf", (1,), "fedetf"),
    Row("creff", (1,), "creff"),
)
# The fp32 row of both is cpu-scale's fedloge-norm1.
PRECISION = (Row("bf16", THREE, "fedloge", ("train.precision=bf16",)),)
WIRE = tuple(Row(wire, THREE, "fedloge", (f"federation.wire={wire}",)) for wire in ("bf16", "int8", "topk"))
# How the demo's frame norm and rounds were chosen: on images put aside from every site's training set.
DEMO_CHOICE = tuple(
    Row(f"norm{norm}-rounds{rounds}", (1,), "fedloge",
        (f"frame.norm={norm}", f"federation.rounds={rounds}", "partition.holdout=0.25", "evaluation.on=holdout"))
    for norm in ("0.1", "0.3", "1.0", "3.0") for rounds in (10, 20, 40)
)  # fmt: skip
# A rung of the ladder: FedLoGe+ and what it must beat, each with heads computed from class statistics as well.
LADDER = (
    Row("fedloge+", THREE, "fedloge+"),
    Row("fedavg-ft", THREE, "fedavg-ft", ("method.probes=true",)),
    Row("balanced-global", THREE, "balanced", ("method.prior=global",)),
    Row("fedloge", THREE, "fedloge"),
    Row("fedloge-published", THREE, "fedloge", ("frame.norm=0.1",)),
    Row("fedrod", THREE, "fedrod"),
    Row("fedetf", THREE, "fedetf"),
    Row("fedper", THREE, "fedper"),
    Row("fedrep", THREE, "fedrep"),
    Row("ditto", THREE, "ditto"),
    Row("creff", THREE, "creff"),
)


def _rung(path: Path) -> tuple[Row, ...]:
    """The rows of one rung; where its data are files of the folder, each is looked for there."""
    data = tomllib.loads(path.read_text(encoding="utf-8"))["data"]
    files = {key: Path(data[key]).name for key in ("path", "test_path") if data["source"] == "npz"}
    place = tuple(f"data.{key}={{data}}/{name}" for key, name in files.items())
    return tuple(replace(row, settings=(*place, *row.settings)) for row in LADDER)


def _published(data: str, imbalance: str, seeds: tuple[int, ...] = (1,)) -> tuple[Row, ...]:
    """A published setting at its size, on the data sets that benchmarks.unpack makes: the same images in the same
    order as from the original files. TF32 is what the authors' convolutions were computed in."""
    train = {"0.02": "lt50", "0.01": "lt100"}[imbalance]
    place = ("data.source=npz", f"data.path={{data}}/{data}_{train}_train.npz",
             f"data.test_path={{data}}/{data}_test.npz", "data.imbalance=1.0", "data.augment=crop-flip")  # fmt: skip
    tf32, bf16 = (*place, "train.precision=tf32"), (*place, "train.precision=bf16")
    rows = (
        Row("fedloge", seeds, "fedloge", tf32),
        Row("fedavg-ft", seeds, "fedavg-ft", tf32),
        Row("fedloge-balanced", seeds, "fedloge", (*tf32, "method.psi_loss=balanced")),
        Row("balanced-global", seeds, "balanced", (*tf32, "method.prior=global")),
    )
    return rows if seeds != THREE else (*rows, Row("fedloge-bf16", seeds, "fedloge", bf16))


CHEAPEST = ("cifar10-k40-a0.5-if0.01", "cifar100-k40-a0.5-if0.01")  # of either data set: three seeds
PUBLISHED = {
    path.stem: (path, _published(path.stem.partition("-")[0], path.stem.rpartition("-if")[2],
                                 THREE if path.stem in CHEAPEST else (1,)))
    for path in sorted((HERE / "experiments").glob("cifar*.toml"))
}  # fmt: skip
FAMILIES = {
    "cpu-scale": (HERE / "experiments" / "cpu-scale.toml", CPU_SCALE),
    "wire": (HERE / "experiments" / "cpu-scale.toml", WIRE),
    "precision": (HERE / "experiments" / "cpu-scale.toml", PRECISION),
    "demo-choice": (HERE.parent / "fedloge" / "demo.toml", DEMO_CHOICE),
    **{f"ladder-{path.stem}": (path, _rung(path)) for path in sorted((HERE / "experiments" / "ladder").glob("*.toml"))},
    **PUBLISHED,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=sorted(FAMILIES))
    parser.add_argument("--data", default="", help="the folder or file of the data")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--only", default="", help="runs whose name (ROW-sSEED) contains this")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders go")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="for a trial: no record is made"
    )
    parser.add_argument("--list", action="store_true", help="print what is missing and leave")
    options = parser.parse_args()
    _, rows = FAMILIES[options.family]
    # seed by seed: after the first pass every row has a result
    todo = [
        (row, seed)
        for seed in THREE
        for row in rows
        if seed in row.seeds and options.only in f"{row.name}-s{seed}" and not _recorded(options, row, seed)
    ]
    if options.list:
        print("\n".join(f"{row.name}-s{seed}" for row, seed in todo) or "nothing is missing")
        return
    with ThreadPoolExecutor(options.jobs) as pool:
        failed = [name for name in pool.map(lambda item: _run(options, *item), todo) if name]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def _recorded(options: argparse.Namespace, row: Row, seed: int) -> bool:
    return (records.RECORDS / options.family / f"{row.name}-s{seed}").exists()


def _run(options: argparse.Namespace, row: Row, seed: int) -> str | None:
    """Run or resume one experiment and record it; returns its name if it failed."""
    name = f"{row.name}-s{seed}"
    folder = options.runs / options.family / (f"{name}-trial" if options.set else name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "fedloge", "simulate", str(FAMILIES[options.family][0])]
    command += ["--method", row.method, "--seed", str(seed), "--out", str(folder)]
    place = (f"data.path={options.data}",) if options.data else ()
    for setting in (*place, *(setting.replace("{data}", options.data) for setting in row.settings), *options.set):
        command += ["--set", setting]
    with folder.with_suffix(".log").open("a", encoding="utf-8") as log:
        code = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
    if code == 0 and not options.set:
        print(records.add(options.family, folder), flush=True)
    return None if code == 0 else name


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # the runs have got it too, and end in good order
        sys.exit("stopped: the same command goes on")
