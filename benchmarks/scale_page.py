"""`python -m benchmarks.scale_page` writes the tables of docs/scale.md from the newest record of `fedloge bench scale`.

A table stands between a line that names it and a line that ends it; the words around are written by hand.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.cost import predict
from benchmarks.figures import by_date

HERE = Path(__file__).parent
RECORDS = HERE / "records" / "scale"
PAGE = HERE.parent / "docs" / "scale.md"
PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->\n)", re.S)
CORES = 2  # of the machine that everything is said of
FEDERATIONS = (
    ("20 hospitals, ResNet-50", 20, 100.0),
    ("100 field stations, 10 MB", 100, 10.0),
    ("500 sites, 1 MB", 500, 1.0),
    ("1000 sites, 1 MB", 1000, 1.0),
    ("512 sites, ResNet-18", 512, 45.0),
)
QUARTER = 0.25  # of the sites in a round
SMALLER = {"bf16": 0.5, "int8": 0.26}  # of the bytes
Record = Mapping[str, Any]


def main() -> None:
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), newest(RECORDS)), encoding="utf-8")
    print(PAGE)


def newest(records: Path) -> tuple[str, Record]:
    path = by_date(list(records.glob("*.json")))[0]
    return path.name, json.loads(path.read_text(encoding="utf-8"))


def filled(page: str, found: tuple[str, Record]) -> str:
    """The page with its tables made anew."""
    name, record = found
    tables: dict[str, Callable[[Record], Iterator[str]]] = {
        "source": lambda record: source(name, record),
        "measured": measured,
        "model": model,
        "federations": federations,
    }
    return PLACE.sub(lambda at: at[1] + "\n".join(["", *tables[at[2]](record), "", ""]) + at[3], page)


def source(name: str, record: Record) -> Iterator[str]:
    on = record["environment"]
    yield (
        f"The tables are made from `benchmarks/records/scale/{name}`: {on['processor']}, {on['cores']} cores, "
        f"load {record['load_before'][0]:.1f} before, code {on['code']}."
    )


def measured(record: Record) -> Iterator[str]:
    yield "| sites | model | rounds an hour | seconds a round | processor s: SuperLink | ServerApp | sites | peak MB: SuperLink | ServerApp | online after |"  # noqa: E501
    yield "|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
    for row in record["rows"]:
        start = f"| {row['sites']} | {row['megabytes']:.1f} MB |"
        if "failed" in row:
            yield f"{start} failed | | | | | | | |"
            continue
        s, spent, peak = row["seconds"], row["processor_seconds"], row["peak_megabytes"]
        yield (
            f"{start} {row['rounds_per_hour']:.0f} | {s['median']:.2f} ({s['least']:.2f} to {s['most']:.2f}) | "
            f"{spent['flower-superlink']:.2f} | {spent['flwr-serverapp']:.2f} | {spent['sites']:.2f} | "
            f"{peak['flower-superlink']:.0f} | {peak['flwr-serverapp']:.0f} | {row['online_seconds']:.0f} s |"
        )


def model(record: Record) -> Iterator[str]:
    yield "| of a round | constant | a site | a site and megabyte | a megabyte | wrong by at most |"
    yield "|---|--:|--:|--:|--:|--:|"
    parts = ("a round", "a site", "a site and megabyte", "a megabyte")
    for name, found in record["model"]["coefficients"].items():
        worst = max(abs(row[name]) for row in record["model"]["relative_errors"])
        cells = [f"{found[part]:.3g}" if part in found else "" for part in parts]
        yield f"| {name.replace('_', ' ')} | {' | '.join(cells)} | {worst:.0%} |"


def federations(record: Record) -> Iterator[str]:
    """Seconds that the server needs for a round, training left out, and what makes them fewer."""
    found = record["model"]["coefficients"]

    def seconds(sites: float, megabytes: float) -> float:
        return predict(found, sites, megabytes)["server_processor_seconds"] / CORES

    yield "| federation | everybody, fp32 | a quarter of the sites | bf16 | int8 | regions | SuperLink | ServerApp |"
    yield "|---|--:|--:|--:|--:|--:|--:|--:|"
    for title, sites, megabytes in FEDERATIONS:
        regions = round(math.sqrt(sites))
        needed = [
            seconds(sites, megabytes),
            seconds(QUARTER * sites, megabytes),
            *(seconds(sites, share * megabytes) for share in SMALLER.values()),
        ]
        tree = seconds(sites / regions, megabytes) + seconds(regions, megabytes)
        memory = predict(found, sites, megabytes)
        yield (
            f"| {title} | {' | '.join(f'{s:.1f} s' for s in needed)} | {regions}: {tree:.1f} s | "
            f"{memory['superlink_megabytes'] / 1000:.1f} GB | {memory['serverapp_megabytes'] / 1000:.1f} GB |"
        )


if __name__ == "__main__":
    main()
