"""`python -m benchmarks.performance` writes PERFORMANCE.md: the newest record of every benchmark, as it is.

A record is benchmarks/records/FOLDER/...DATE.json and says which benchmark it is of. Rows about a model that a newer
record has as well are left out.
"""

import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.figures import by_date
from benchmarks.registry import NAMES

HERE = Path(__file__).parent
RECORDS = HERE / "records"
PERFORMANCE = HERE / "PERFORMANCE.md"
OTHERS = {"links": "benchmarks.links", "soak": "benchmarks.soak.__main__"}  # with commands of their own
VERSIONS = ("python", "torch", "torchvision", "flwr", "grpcio")
HEAD = """# Performance

Made by `make tables` from the newest records in `benchmarks/records/`; how to measure: [docs/performance.md]\
(../docs/performance.md).
Ratios are of turns next to each other on one machine. An aim is what the project set out for."""


def main() -> None:
    PERFORMANCE.write_text(performance(RECORDS), encoding="utf-8")
    print(PERFORMANCE)


def performance(records: Path) -> str:
    text = [HEAD]
    found: dict[str, list[Path]] = {}
    for path in records.glob("*/*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        if "environment" in record:
            found.setdefault(record.get("benchmark", ""), []).append(path)
    for name, place in {**NAMES, **OTHERS}.items():
        module: Any = importlib.import_module(place)
        described = importlib.import_module(place.removesuffix(".__main__"))
        text += ["", f"## {name}", "", about(described)]
        if name not in found:
            text += ["", "No record yet."]
        for path, record in current(found.get(name, [])):
            table = module.table(record)
            text += ["", f"`{path.relative_to(records)}`: {machine(record)}", "", "```", table, "```"]
    return "\n".join(text) + "\n"


def about(module: Any) -> str:
    """The first two paragraphs of what the module says of itself, without its command."""
    paragraphs = [part.strip() for part in module.__doc__.strip().split("\n\n")]
    return "\n\n".join(paragraphs[:2])


def current(paths: list[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Newest first, each with what none before it has."""
    seen: set[object] = set()
    for path in by_date(paths):
        record = json.loads(path.read_text(encoding="utf-8"))
        if any("model" in row for row in record.get("rows", [])):
            record["rows"] = [row for row in record["rows"] if row["model"] not in seen]
            subjects = {row["model"] for row in record["rows"]}
        else:
            subjects = {(record.get("dim"), record.get("classes"), record.get("model"))} - seen
        if subjects:
            yield path, record
        seen |= subjects


def machine(record: Mapping[str, Any]) -> str:
    on = record["environment"]
    versions = ", ".join(f"{name} {on[name]}" for name in VERSIONS if name in on)
    load = f", load {record['load_before'][0]:.1f} before" if "load_before" in record else ""
    return f"{on['processor']}, {on['cores']} cores, {on['gpu'] or 'no GPU'}{load}; {versions}; code {on['code']}"


if __name__ == "__main__":
    main()
