"""How far one SuperLink goes: rounds per hour, memory and processor time, by the number of sites and the model's size.

Real federations of resident nodes, many of them as threads of a few processes, with TLS and keys, without training:
what is left is what federating costs. The sites share this machine's processor with the server, so a server with a
machine of its own is quicker: its own processor seconds are in the record beside the sites'. The first round of each
federation does not count. A federation that this machine cannot carry is a row that says why.

A model of the cost is fitted to what was measured (benchmarks/cost.py) and asked for more. The server's side without
the network goes on in simulation.
"""

import argparse
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import cost, simulate_cost
from benchmarks.arguments import positive
from benchmarks.figures import spread
from benchmarks.overhead.measure import federation, say, together
from benchmarks.overhead.processes import processor_seconds
from common.errors import UserError

ABOUT = "rounds per hour, memory and processor of the server, by sites"
EXAMPLE = "--sites 4 12 32 --models tiny medium --rounds 3"
SMALL: Mapping[str, object] = {}  # seconds and bytes, not a ratio of two speeds
LIMITS = {"tiny": 512, "medium": 128, "large": 32}  # sites of this model that are measured for real
EXCHANGES = {"tiny": 192, "medium": 96, "large": 24}  # of all sites, at least: few of them make quick rounds
SERVER = ("flower-superlink", "flwr-serverapp")
ASKED = ((512, 45.0), (1000, 1.0), (20, 100.0), (100, 10.0), (500, 1.0))  # sites and megabytes to predict


def options(parser: argparse.ArgumentParser) -> None:
    sites = [4, 12, 32, 128, 512]
    parser.add_argument("--sites", nargs="+", type=positive, default=sites, help="to compare (%(default)s)")
    about = "; beyond " + ", ".join(f"{many} sites {model}" for model, many in LIMITS.items()) + " is left out"
    parser.add_argument("--models", nargs="+", choices=LIMITS, default=list(LIMITS), help=f"(%(default)s){about}")
    parser.add_argument("--rounds", type=positive, default=3, help="that count, at least (%(default)s)")
    parser.add_argument("--simulated", nargs="*", type=positive, default=[512, 2000], help="clients (%(default)s)")


def measure(sites: Sequence[int], models: Sequence[str], rounds: int, simulated: Sequence[int]) -> dict[str, Any]:
    rows = []
    for model in models:
        for many in sorted(many for many in sites if many <= LIMITS[model]):
            rows.append(row := measured(model, many, max(rounds, math.ceil(EXCHANGES[model] / many))))
            say(line(row))
    return {
        "rows": rows,
        "model": cost.fitted([row for row in rows if "failed" not in row], ASKED),
        "simulated": simulate_cost.measure(["mlp"], ["fedavg"], simulated)["rows"],
    }


def measured(model: str, sites: int, rounds: int) -> dict[str, Any]:
    """One federation. Processor seconds are those between the ends of its first and its last round."""
    with federation(model, sites, {"federation.rounds": rounds + 1, **together(sites)}) as place:
        row = {"model": model, "megabytes": round(place.size / 1e6, 3), "sites": sites, "rounds": rounds}
        try:
            with place:
                began = time.monotonic()
                pids = place.start("resident")
                online = time.monotonic() - began
                seconds, spent = [], []
                for done in place.run("resident", rounds + 1):
                    if done["sites"] < sites:
                        raise UserError(f"round {done['round']} had {done['sites']} sites")
                    seconds.append(done["seconds"])
                    of_sites = sum(processor_seconds(pid) for pid in pids)
                    spent.append({**place.processor_seconds(), "sites": of_sites})
        except UserError as error:
            say(str(error))
            return {**row, "failed": str(error).partition(": see ")[0]}
    each = {}
    for name in (*SERVER, "sites"):
        figures = [found[name] for found in spent if name in found]  # the ServerApp may be gone after its last round
        each[name] = round((figures[-1] - figures[0]) / max(len(figures) - 1, 1), 4)
    return {
        **row,
        "online_seconds": round(online, 1),
        "seconds": spread(seconds[1:]),
        "rounds_per_hour": round(3600 / statistics.median(seconds[1:]), 1),
        "processor_seconds": each,
        "peak_megabytes": {name: round(peak, 1) for name, peak in place.peaks.items()},
    }


def table(record: Mapping[str, Any]) -> str:
    lines = [*map(line, record["rows"]), "", *cost.shown(record["model"])]
    if record["simulated"]:
        lines += ["", "simulated, without a network:", simulate_cost.table({"rows": record["simulated"]})]
    return "\n".join(lines)


def line(row: Mapping[str, Any]) -> str:
    start = f"{row['model']:7}{row['megabytes']:8.2f} MB{row['sites']:5} sites"
    if "failed" in row:
        return f"{start}: {row['failed']}"
    s, peak = row["processor_seconds"], row["peak_megabytes"]
    return (
        f"{start}: {row['rounds_per_hour']:8.0f} rounds an hour ({row['seconds']['median']:.2f} s each); processor s: "
        f"SuperLink {s['flower-superlink']:.2f}, ServerApp {s['flwr-serverapp']:.2f}, sites {s['sites']:.2f}; peak MB: "
        f"{peak['flower-superlink']:.0f}, {peak['flwr-serverapp']:.0f}; online after {row['online_seconds']:.0f} s"
    )


def ratios(record: Mapping[str, Any]) -> dict[str, float]:
    del record
    return {}
