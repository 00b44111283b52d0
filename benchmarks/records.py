"""Records: small, complete and never edited. Tables are made from them by a command.

    python -m benchmarks.records add FAMILY RUN_FOLDER...   copy what a reader needs of finished runs (NAME-sSEED)
    python -m benchmarks.records tables                     write benchmarks/RESULTS.md from all records

A record is `benchmarks/records/FAMILY/RUN/` with config.json, environment.json, log.jsonl (a line a round: loss,
seconds, evaluations) and metrics.json (the result: means over the last evaluations, and the curve).
"""

import argparse
import json
import shutil
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RECORDS = HERE / "records"
RESULTS = HERE / "RESULTS.md"
GROUPS = ("many", "medium", "few")
# Rows whose training is another method's to the bit: that one, and which predictors are their own.
SAME_TRAINING = {"fedavg-ft": ("fedavg", ("tuned",))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    adder = verbs.add_parser("add", help="make records of finished runs")
    adder.add_argument("family")
    adder.add_argument("runs", nargs="+", type=Path)
    verbs.add_parser("tables", help="write RESULTS.md from all records")
    options = parser.parse_args()
    if options.verb == "add":
        for run in options.runs:
            print(add(options.family, run))
    else:
        RESULTS.write_text(results(), encoding="utf-8")
        print(RESULTS)


def add(family: str, run: Path) -> Path:
    """Copy a finished run; a record that is already there is left as it is."""
    record = RECORDS / family / run.name
    if record.exists():
        return record
    if not (run / "metrics.json").exists():
        raise SystemExit(f"{run}: has no metrics.json: finish the run first")
    final, record = record, record.with_name(f".{record.name}.partial")
    shutil.rmtree(record, ignore_errors=True)
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    record.mkdir(parents=True)
    for name in ("config.json", "environment.json"):
        shutil.copyfile(run / name, record / name)
    config = json.loads((record / "config.json").read_text(encoding="utf-8"))
    config["data"]["path"] = Path(config["data"]["path"]).name  # where the data lay is of no use to a reader
    _write(record / "config.json", config)
    with (record / "log.jsonl").open("w", encoding="utf-8") as log:
        for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines():
            log.write(json.dumps(_log_line(json.loads(line))) + "\n")
    kept = {key: value for key, value in metrics.items() if key not in ("evaluations", "loss")}
    _write(record / "metrics.json", kept)
    return record.rename(final)


def _log_line(event: dict[str, Any]) -> dict[str, Any]:
    line = {"round": event["round"], "sites": len(event["sites"]), "loss": event["loss"], "seconds": event["seconds"]}
    if event["refused"] or event["missing"]:
        line |= {"refused": event["refused"], "missing": event["missing"]}
    if "evaluation" in event:
        for kind in ("generic", "personal"):
            line[kind] = {name: result["top1"] for name, result in event["evaluation"][kind].items()}
    return line


def results() -> str:
    """All tables as Markdown."""
    text = [
        "# Results",
        "",
        "Made by `python -m benchmarks.records tables` from `benchmarks/records/`; every row names its records there.",
        "Top-1 in percent; many / medium / few by the `share` rule (classes up to 75 % / 95 % of all training images).",
        "GM: generic predictor on the balanced global test. PM: unweighted mean over sites of accuracy on the local",
        "test, among classes the site trained on. Values are means of a run's last evaluations; ± is the standard",
        "deviation over seeds. Δ is the mean paired difference to the reference row, seed by seed, ± its standard",
        "error.",
    ]
    for family in sorted({path.parents[1] for path in RECORDS.glob("*/*/metrics.json")}):
        text += ["", f"## {family.name}", *_about(family)]
        for kind, title in (("generic", "Generic models (GM)"), ("personal", "Personal models (PM)")):
            text += ["", f"### {title}", "", *_table(family, kind)]
    return "\n".join(text) + "\n"


def _about(family: Path) -> list[str]:
    note = family / "README.md"
    return ["", note.read_text(encoding="utf-8").strip()] if note.exists() else []


def _table(family: Path, kind: str) -> list[str]:
    rows: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for record in sorted(family.glob("*/metrics.json")):
        metrics = json.loads(record.read_text(encoding="utf-8"))
        for name, values in metrics[kind].items():
            by_seed = rows.setdefault((_label(record.parent.name, name), name), {})
            if metrics["seed"] in by_seed:
                raise SystemExit(f"{record.parent}: its row {name} has a result for seed {metrics['seed']} already")
            by_seed[metrics["seed"]] = values
    if not rows:
        return ["(no predictor of this kind)"]
    reference = _reference(rows, kind)
    lines = [
        f"| method | predictor | seeds | top-1 | many | medium | few | Δ to {' / '.join(reference)} |",
        "|---|---|---|---|---|---|---|---|",
    ]
    ordered = sorted(rows.items(), key=lambda item: -statistics.mean(v["top1"] for v in item[1].values()))
    for (label, name), by_seed in ordered:
        values = list(by_seed.values())
        cells = [label, name, ", ".join(map(str, sorted(by_seed))), _spread(v["top1"] for v in values)]
        cells += [_spread(v["groups"]["share"][g] for v in values) for g in GROUPS]
        cells.append(_paired(by_seed, rows[reference]) if (label, name) != reference else "")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _label(record: str, predictor: str) -> str:
    """The row of a family a record belongs to: its name without the seed."""
    label = record.rpartition("-s")[0]
    plain, own = SAME_TRAINING.get(label, (label, ()))
    return label if predictor in own else plain


def _reference(rows: dict[tuple[str, str], Any], kind: str) -> tuple[str, str]:
    """FedAvg's own model where there is one."""
    fedavg = ("fedavg", "head" if kind == "generic" else "global")
    return fedavg if fedavg in rows else next(iter(rows))


def _spread(shares: Iterable[float | None]) -> str:
    known = [100 * s for s in shares if s is not None]
    if not known:
        return "-"
    mean = f"{statistics.mean(known):.1f}"
    return f"{mean} ± {statistics.stdev(known):.1f}" if len(known) > 1 else mean


def _paired(mine: dict[int, dict[str, Any]], theirs: dict[int, dict[str, Any]]) -> str:
    gaps: Sequence[float] = [100 * (mine[s]["top1"] - theirs[s]["top1"]) for s in sorted(mine.keys() & theirs.keys())]
    if not gaps:
        return "-"
    mean = f"{statistics.mean(gaps):+.1f}"
    return f"{mean} ± {statistics.stdev(gaps) / len(gaps) ** 0.5:.1f}" if len(gaps) > 1 else mean


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
