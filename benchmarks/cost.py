"""A model of what a round costs, fitted to measured federations: a number a round, one a site, one a megabyte moved.

    y = a + b sites + c sites megabytes        seconds of a round, processor seconds of the server, SuperLink's memory
    y = a + b sites + c megabytes              the ServerApp's memory: a few models; b should be nothing

Least squares on relative errors, as the sizes span orders of magnitude; a coefficient that would be negative is zero.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Terms = Mapping[str, tuple[int, int]]  # what a coefficient stands for -> powers of sites and of megabytes
MOVED: Terms = {"a round": (0, 0), "a site": (1, 0), "a site and megabyte": (1, 1)}
HELD: Terms = {"a round": (0, 0), "a site": (1, 0), "a megabyte": (0, 1)}
Value = Callable[[Mapping[str, Any]], float]
FITTED: dict[str, tuple[Terms, Value]] = {
    "seconds": (MOVED, lambda row: row["seconds"]["median"]),
    "server_processor_seconds": (
        MOVED, lambda row: row["processor_seconds"]["flower-superlink"] + row["processor_seconds"]["flwr-serverapp"]
    ),
    "superlink_megabytes": (MOVED, lambda row: row["peak_megabytes"]["flower-superlink"]),
    "serverapp_megabytes": (HELD, lambda row: row["peak_megabytes"]["flwr-serverapp"]),
}  # fmt: skip
TITLES = {
    "seconds": "seconds a round, sites on the same machine",
    "server_processor_seconds": "processor seconds a round of SuperLink and ServerApp",
    "superlink_megabytes": "peak megabytes of the SuperLink",
    "serverapp_megabytes": "peak megabytes of the ServerApp",
}


def fitted(rows: Sequence[Mapping[str, Any]], asked: Iterable[tuple[int, float]]) -> dict[str, Any]:
    """Coefficients, the error of every row and what they say of the sizes asked for; nothing with too few rows."""
    if len(rows) < len(MOVED):
        return {}
    found = {name: fit(rows, terms, value) for name, (terms, value) in FITTED.items()}
    errors = []
    for row in rows:
        said = predict(found, row["sites"], row["megabytes"])
        wrong = {name: round(said[name] / value(row) - 1, 3) for name, (_, value) in FITTED.items()}
        errors.append({"sites": row["sites"], "megabytes": row["megabytes"], **wrong})
    return {
        "coefficients": found,
        "relative_errors": errors,
        "predictions": [{"sites": s, "megabytes": m, **predict(found, s, m)} for s, m in asked],
    }


def fit(rows: Sequence[Mapping[str, Any]], terms: Terms, value: Value) -> dict[str, float]:
    """A term that would take something away is dropped, the worst one first."""
    left = dict(terms)
    while True:
        sizes = np.array([[size(row["sites"], row["megabytes"], powers) for powers in left.values()] for row in rows])
        values = np.array([value(row) for row in rows])
        solution, *_ = np.linalg.lstsq(sizes / values[:, None], np.ones(len(rows)), rcond=None)
        if (solution >= 0).all():
            return {**dict.fromkeys(terms, 0.0), **dict(zip(left, map(float, solution), strict=True))}
        shares = dict(zip(left, solution * (sizes / values[:, None]).mean(axis=0), strict=True))
        del left[min(shares, key=lambda name: shares[name])]


def predict(coefficients: Mapping[str, Mapping[str, float]], sites: float, megabytes: float) -> dict[str, float]:
    return {
        name: round(sum(coefficients[name][part] * size(sites, megabytes, powers) for part, powers in terms.items()), 3)
        for name, (terms, _) in FITTED.items()
    }


def size(sites: float, megabytes: float, powers: tuple[int, int]) -> float:
    return float(sites ** powers[0] * megabytes ** powers[1])


def shown(model: Mapping[str, Any]) -> list[str]:
    if not model:
        return [f"no model of the cost: it takes {len(MOVED)} federations"]
    lines = []
    for name, parts in model["coefficients"].items():
        worst = max(abs(row[name]) for row in model["relative_errors"])
        text = " + ".join(f"{value:.4g} {part}" for part, value in parts.items())
        lines.append(f"{TITLES[name]}: {text}   (wrong by {worst:.0%} at most)")
    for row in model["predictions"]:
        lines.append(
            f"  {row['sites']:5} sites, {row['megabytes']:5.0f} MB: {row['seconds']:8.1f} s a round; server: "
            f"{row['server_processor_seconds']:7.1f} processor s, {row['superlink_megabytes']:7.0f} + "
            f"{row['serverapp_megabytes']:5.0f} MB"
        )
    return lines
