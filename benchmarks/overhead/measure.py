"""The four benchmarks. Each gives what its record holds: figures and nothing of the machine."""

import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree
from typing import Any

from benchmarks.figures import spread
from benchmarks.overhead import floor
from benchmarks.overhead.federation import Federation
from common.errors import UserError

KINDS = ("resident", "stock", "floor", "resident bf16")
RATIOS = (("stock", "resident"), ("resident", "floor"), ("resident bf16", "floor"))
NEVER = 10**6  # rounds or seconds
DEAD_AFTER = 60  # rounds: by then a SuperLink has the memory it works with
WINDOW = 20  # rounds that are one figure of memory: it goes up and down with Python's garbage, about as often


def overhead(models: Sequence[str], sites: int, rounds: int, blocks: int) -> dict[str, Any]:
    """Seconds a round of everything there is to compare, in turns; the first round of every block does not count."""
    rows = []
    for model in models:
        seconds: dict[str, list[float]] = {name: [] for name in KINDS}
        about = {}
        for block in range(blocks):
            for name in KINDS:
                wire = {"federation.wire": name.partition(" ")[2] or "fp32"}
                with federation(model, sites, {"federation.rounds": rounds + 1, **wire, **together(sites)}) as place:
                    about = {"megabytes": round(place.size / 1e6, 3), "tensors": place.tensors}
                    took = block_of(name, place, sites, rounds + 1)[1:]
                say(f"{model}, block {block + 1} of {blocks}: {name} {statistics.median(took):.3f} s a round")
                seconds[name] += took
        figures = {name: spread(found) for name, found in seconds.items()}
        medians = {name: statistics.median(found) for name, found in seconds.items()}
        ratios = {f"{a} / {b}": round(medians[a] / medians[b], 2) for a, b in RATIOS}
        rows.append({"model": model, **about, "seconds": figures, "ratios": ratios})
    return {"rows": rows}


def block_of(name: str, place: Federation, sites: int, rounds: int) -> list[float]:
    if name == "floor":
        return floor.measure(place.folder, sites, place.size, rounds)
    with place:
        if name == "stock":
            place.start("stock")
            lines = list(place.run("stock", rounds))
        else:
            place.start("resident")
            lines = list(place.run("resident", rounds))
    if any(line["sites"] < sites for line in lines):
        raise UserError(f"{name}: a site was missing in a round: measure again on a machine that is less busy")
    return [line["seconds"] for line in lines]


def memory(model: str, sites: Sequence[int], rounds: int) -> dict[str, Any]:
    """Peak memory by the number of sites; by how many models, and by what factor, the ServerApp's is larger for most
    sites than for fewest; and by how many models it is larger than with next to none, the tiny one."""
    rows: list[dict[str, Any]] = []
    for what, many in [("tiny", min(sites)), *((model, many) for many in sorted(sites))]:
        with federation(what, many, {"federation.rounds": rounds, **together(many)}) as place, place:
            place.start("resident")
            seconds = [line["seconds"] for line in place.run("resident", rounds)]
            size = place.size / 1e6
            peaks = {name: round(megabytes, 1) for name, megabytes in place.peaks.items()}
        rows.append({"sites": many, "peak_megabytes": peaks, "seconds": spread(seconds[1:] or seconds)})
        say(f"{what}, {many} sites: {peaks}")
    empty, *rows = rows
    none, least, most = (row["peak_megabytes"]["flwr-serverapp"] for row in (empty, rows[0], rows[-1]))
    return {
        "model": model,
        "megabytes": round(size, 3),
        "rows": rows,
        "more_in_models": round((most - least) / size, 2),
        "growth": round(most / least, 3),
        "empty_megabytes": none,
        "models_above_empty": round((max(least, most) - none) / size, 2),
    }


def idle(sites: int, seconds: float, settle: float) -> dict[str, Any]:
    """Processor cores in use while sites wait for something to do, without and with a ServerApp that waits as well."""
    rows = []
    for waiting in (False, True):
        settings = {"federation.rounds": NEVER, "federation.min_clients": sites + 1, "federation.wait": NEVER}
        with federation("tiny", sites, settings) as place, place:
            if waiting:
                place.wait()
            place.start("resident")
            time.sleep(settle if waiting else 0.0)  # a site that just answered asks more often for a while
            before, began = place.processor_seconds(), time.monotonic()
            time.sleep(seconds)
            after, took = place.processor_seconds(), time.monotonic() - began
        if before.keys() != after.keys():
            raise UserError(f"a process ended or began while it was measured: see {place.folder}/run/logs")
        cores = {name: round((after[name] - before[name]) / took, 4) for name in before}
        rows.append({"serverapp": waiting, "seconds": round(took, 1), "cores": cores})
        say(f"{sites} sites idle, {'with' if waiting else 'without'} a ServerApp: {cores}")
    return {"sites": sites, "rows": rows}


def dead(model: str, sites: int, rounds: int) -> dict[str, Any]:
    """Memory of the SuperLink, by round, while one site is dead and stays so."""
    settings = {"federation.rounds": NEVER, "federation.min_clients": sites - 1}
    without, by_round = [], []
    with federation(model, sites, settings) as place, place:
        pids = place.start("resident", processes=sites)
        size = place.size / 1e6
        for line in place.run("resident", NEVER):
            now = place.superlink()["now"]
            by_round.append(now)
            if line["round"] == DEAD_AFTER:
                os.kill(pids[-1], signal.SIGKILL)
            elif line["sites"] < sites:
                without.append(now)
            if len(without) == rounds:
                break
    first, last = statistics.median(without[:WINDOW]), statistics.median(without[-WINDOW:])
    return {
        "model": model,
        "megabytes": round(size, 3),
        "sites": sites,
        "rounds_without_the_dead": len(without),
        "superlink_megabytes": {
            "first": round(first, 1),
            "last": round(last, 1),
            "by_round": [round(now, 1) for now in by_round],
        },
        "more_in_models": round((last - first) / size, 2),
    }


def together(sites: int) -> Mapping[str, object]:
    """Every round has all sites."""
    return {"federation.min_clients": sites, "federation.quorum": 1.0, "federation.deadline": 600.0}


@contextmanager
def federation(model: str, sites: int, settings: Mapping[str, object]) -> Iterator[Federation]:
    """In a folder that stays only when something failed, for its logs."""
    folder = Path(tempfile.mkdtemp(prefix="fedloge-bench-"))
    try:
        yield Federation(folder, model, sites, settings)
    except UserError:
        raise
    except BaseException:
        rmtree(folder, ignore_errors=True)
        raise
    rmtree(folder, ignore_errors=True)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
