"""Results as plain text: one row a predictor, every column named."""

from collections.abc import Iterable, Sequence
from typing import Any

COLUMNS = ("method", "model", "predictor", "top-1", "many", "medium", "few", "balanced", "macro-F1", "ECE")


def result_table(results: Iterable[dict[str, Any]], rule: str = "share") -> str:
    """All predictors of all results; shares in percent."""
    rows: list[Sequence[str]] = []
    for result in results:
        for kind in ("generic", "personal"):
            for name, values in result[kind].items():
                by_group = values["groups"][rule]
                figures = [values["top1"], *(by_group[g] for g in ("many", "medium", "few"))]
                figures += [values["balanced"], values["macro_f1"], values["ece"]]
                rows.append([result["method"], kind, name, *map(percent, figures)])
    return aligned([COLUMNS, *rows])


NAMES = {"fedavg-ft": "FedAvg", "fedloge": "FedLoGe"}
NOTES = {
    "tuned": "global model fine-tuned at the site",
    "global": "global model as it is",
    "psi realigned": "realigned global head",
    "phi+psi_k": "site's head + realigned global head",
}


def comparison(results: Iterable[dict[str, Any]]) -> str:
    """What a newcomer compares: each method's own generic and personal model, and FedAvg's fine-tuned one."""
    rows: list[Sequence[str]] = [("method", "model", "", "all", "many", "medium", "few")]
    for result in results:
        for kind in ("generic", "personal"):
            shown = 2 if result["method"] == "fedavg-ft" and kind == "personal" else 1
            for name in list(result[kind])[:shown]:
                values = result[kind][name]
                figures = [values["top1"], *(values["groups"]["share"][g] for g in ("many", "medium", "few"))]
                rows.append([NAMES[result["method"]], kind, NOTES.get(name, ""), *map(percent, figures)])
    return aligned(rows)


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for number, row in enumerate(rows):
        cells = [cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
        if number == 0:
            lines.append("  ".join("-" * w for w in widths))
    return "\n".join(lines)
