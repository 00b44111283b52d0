"""The figures of a soak as one SVG, a panel for each kind."""

import math
from collections.abc import Iterable, Sequence
from html import escape

from benchmarks.soak.watch import Series

PANELS = (
    ("resident", "resident memory, MB", 1.0),
    ("own", "memory that comes from no file, MB", 1.0),
    ("handles", "open files", 1.0),
    ("threads", "threads", 1.0),
    ("bytes", "folders without logs, MB", 1e6),
    ("rounds", "rounds", 1.0),
    ("sites", "sites", 1.0),
)
COLOURS = ("#1b6ca8", "#d1692c", "#3a8f4d", "#8c4fa3", "#b8962e", "#5c6b73", "#c2426a", "#2ba3a3")
WIDTH, HEIGHT, LEFT, RIGHT, GAP = 640, 170, 50, 150, 44
POINTS = 240  # of a curve
GAPS = 6  # so many of them in a row without a figure are a gap
STYLE = "text{font:11px system-ui,sans-serif;fill:#555}.head{font-size:13px;fill:#222}"


def drawn(series: Iterable[Series], title: str) -> str:
    listed = list(series)
    last = max((one.at[-1] for one in listed if one.at), default=1.0)
    body = [f'<text class="head" x="{LEFT}" y="18">{escape(title)}</text>']
    for number, (what, head, unit) in enumerate(PANELS):
        of_kind = [one for one in listed if one.what == what]
        body.append(
            f'<g transform="translate(0,{28 + number * (HEIGHT + GAP)})">{_panel(of_kind, head, unit, last)}</g>'
        )
    height = 28 + len(PANELS) * (HEIGHT + GAP)
    size = f'viewBox="0 0 {WIDTH + RIGHT} {height}" width="{WIDTH + RIGHT}" height="{height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style>\n' + "\n".join(body) + "\n</svg>\n"


def _panel(series: Sequence[Series], head: str, unit: float, last: float) -> str:
    top = max((max(one.figures) for one in series), default=1.0) / unit or 1.0
    parts = [f'<text class="head" x="{LEFT}" y="12">{head}</text>']
    for share in (0.0, 0.5, 1.0):
        y = _y(share)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{top * share:.3g}</text>')
        parts.append(
            f'<text x="{_x(share):.1f}" y="{HEIGHT + 14}" text-anchor="middle">{last * share / 60:.2g} min</text>'
        )
    for number, one in enumerate(series):
        colour = COLOURS[number % len(COLOURS)]
        for points in _pieces(one, last / POINTS):
            path = " ".join(f"{_x(at / last):.1f},{_y(figure / unit / top):.1f}" for at, figure in points)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        y = 24 + 14 * number
        parts.append(f'<text x="{WIDTH + 10}" y="{y}" style="fill:{colour}">{escape(one.of)}</text>')
    return "".join(parts)


def _pieces(series: Series, apart: float) -> list[list[tuple[float, float]]]:
    """Points at least so far apart, in a new piece where there are none for long: the process was not there."""
    pieces: list[list[tuple[float, float]]] = [[]]
    before = -math.inf
    for at, figure in zip(series.at, series.figures, strict=True):
        if at - before > GAPS * apart and pieces[-1]:
            pieces.append([])
        if not pieces[-1] or at - pieces[-1][-1][0] >= apart:
            pieces[-1].append((at, figure))
        before = at
    return pieces


def _x(share: float) -> float:
    return LEFT + (WIDTH - LEFT) * share


def _y(share: float) -> float:
    return 20 + (HEIGHT - 20) * (1 - share)
