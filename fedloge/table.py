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


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def megabytes(count: float) -> str:
    return f"{count / 1e6:.{1 if count >= 1e7 else 2}f} MB"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for number, row in enumerate(rows):
        cells = [cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
        if number == 0:
            lines.append("  ".join("-" * w for w in widths))
    return "\n".join(lines)
