"""How long a round takes over bad links, as a ratio to clean ones: `python -m benchmarks.links`.

A server and sites on machines of their own (tests/hosts), each behind a cable that is clean, then far, lossy or slow,
in turns within one federation: what else the machine does falls on all of them alike. It is the real thing, with
training, checkpoints and TLS; a round counts if the links were the same from its beginning to its end. Needs root.
"""

import argparse
import io
import json
import os
import statistics
import sys
import tempfile
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.figures import spread
from benchmarks.machine import machine
from common import deployment, files
from common.net import build, roles
from tests.chaos.arena import Arena
from tests.hosts.network import CLEAN, FAR, LOSSY, SLOW, Line, Network, objection

NAME = "fl.test"
MODELS = {"tiny": 64, "large": 1200}  # width of the demo's network
LINKS: dict[str, Line] = {
    "100 ms": Line(delay=FAR.delay),
    "100 ms + 20 ms jitter": FAR,
    "5 % loss": LOSSY,
    "2 Mbit/s": SLOW,
}
SETTINGS = ["train.epochs=1", "federation.rounds=1000000", "evaluation.every=1000000"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=3, help="number of sites (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count, each time (%(default)s)")
    parser.add_argument(
        "--blocks", type=int, default=3, help="times that all links are measured in turns (%(default)s)"
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="(%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the record to this file")
    options = parser.parse_args()
    if why := objection():
        raise SystemExit(f"no machines can be made here: {why}")
    load = os.getloadavg()
    rows = [measure(model, options.sites, options.rounds, options.blocks) for model in options.models]
    record = {
        "benchmark": "links",
        "links": {name: asdict(line) for name, line in LINKS.items()},
        "rows": rows,
        "options": {"sites": options.sites, "rounds": options.rounds, "blocks": options.blocks},
        "load_before": load,
        "environment": machine(),
    }
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        files.write(options.out, json.dumps(record, indent=1) + "\n")
    print(table(record))


def measure(model: str, sites: int, rounds: int, blocks: int) -> dict[str, Any]:
    """Seconds of rounds over every kind of link, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in ("clean", *LINKS)}
    settings = [*SETTINGS, f"partition.clients={sites}", f"model.width={MODELS[model]}"]
    with (
        tempfile.TemporaryDirectory(prefix="fedloge-links-") as folder,
        Network(Path(folder)) as network,
        redirect_stdout(io.StringIO()),
        Arena(Path(folder) / "arena", settings, NAME, network.on) as arena,
    ):
        network.plug("server", *arena.names)
        network.call(NAME, "server")
        arena.start()
        size = model_bytes(arena)
        for block in range(blocks):
            for name, line in (("clean", CLEAN), *LINKS.items()):
                network.cables(arena.names, line)
                took = whole_rounds(arena, rounds)
                seconds[name] += took
                print(f"{model}, block {block + 1} of {blocks}: {name} {statistics.median(took):.3f} s a round",
                      file=sys.stderr, flush=True)  # fmt: skip
        network.cables(arena.names, CLEAN)
        arena.terminate("server")
    clean = statistics.median(seconds["clean"])
    return {
        "model": model,
        "megabytes": round(size / 1e6, 3),
        "seconds": {name: spread(found) for name, found in seconds.items()},
        "ratios": {name: round(statistics.median(seconds[name]) / clean, 2) for name in LINKS},
    }


def whole_rounds(arena: Arena, many: int) -> list[float]:
    """Of the next rounds that begin from now on."""
    begun = len(arena.rounds()) + 1
    for round in range(begun, begun + many + 1):
        arena.go_on(round - 1, "a round over this link")
    return [entry["seconds"]["training"] for entry in arena.rounds()[begun : begun + many]]


def model_bytes(arena: Arena) -> int:
    """What goes to every site in a round, and comes back."""
    plan = deployment.load(arena.federation / "federation.toml")
    net = build(plan.config.method, plan.task)
    shared, _, _ = roles(plan.config.method, net)
    return sum(t.numel() * t.element_size() for part in shared for t in net.parts()[part].values())


def table(record: dict[str, Any]) -> str:
    lines = []
    for row in record["rows"]:
        lines.append(f"{row['model']}: {row['megabytes']} MB; seconds a round")
        for name, s in row["seconds"].items():
            ratio = f"   {row['ratios'][name]:6.2f} x clean" if name in row["ratios"] else ""
            lines.append(f"  {name:22}{s['median']:9.3f}   ({s['least']:.3f} to {s['most']:.3f}){ratio}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
