"""A run as one HTML page that needs nothing else: what came out, how it came about, and what went wrong on the way.

It is made from the files of a run folder alone, of a simulation or of a real federation, so it can be made again.
"""

import argparse
import json
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from common.errors import UserError
from fedloge.table import percent

KINDS = {
    "generic": "Generic, on the common test set",
    "generic_local": "Generic, at the sites",
    "personal": "Personal, at the sites",
}
COLOURS = {"generic": "#1b6ca8", "generic_local": "#7fb2d6", "personal": "#d1692c"}
WIDTH, HEIGHT, LEFT, BOTTOM = 640, 240, 44, 28
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:44rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.5rem;margin-bottom:0}h2{font-size:1.1rem;margin-top:2rem}p.about{color:#666;margin-top:.2rem}
table{border-collapse:collapse;width:100%}th,td{padding:.25rem .6rem;border-bottom:1px solid #ddd;text-align:right}
th:first-child,td:first-child,.text{text-align:left}th{color:#666;font-weight:normal}tr.own{font-weight:bold}
svg{width:100%;height:auto}svg text{font-size:12px;fill:#666}.key{display:inline-block;width:.8em;height:.8em}
"""


def add_verbs(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = verbs.add_parser(
        "report", help="a run as one HTML page", epilog="example: fedloge report runs/demo/federation/run"
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help="a finished run's folder, with metrics.json")
    parser.add_argument("--out", type=Path, help="the file to write (default: RUN/report.html)")
    parser.add_argument("--json", action="store_true", help="print the path as one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    path = write(options.folder, options.out)
    print(json.dumps({"report": str(path)}) if options.json else path)


def write(folder: Path, out: Path | None = None) -> Path:
    """Make the report of a finished run; returns where it is."""
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        lines = (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
        environments = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
        page = _page(metrics, [json.loads(line) for line in lines], environments)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: is not there: name the folder of a run that has finished") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: its files cannot be read as those of a run ({error!r})") from None
    path = out or folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _page(metrics: dict[str, Any], events: list[dict[str, Any]], environments: list[dict[str, Any]]) -> str:
    title = f"{escape(metrics['name'])}: {escape(metrics['method'])}"
    used = environments[-1]
    judged = ", ".join(map(str, metrics["mean_of_rounds"]))
    about = (
        f"{metrics['rounds']} rounds, seed {metrics['seed']}, figures are "
        f"{'means over rounds' if ',' in judged else 'those of round'} {judged}; code {escape(str(used['code']))}, "
        f"torch {escape(str(used['torch']))}, {escape(str(used['gpu'] or used['processor']))}"
    )
    return "\n".join(
        [
            f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>",
            f"<h1>{title}</h1><p class=about>{about}</p>",
            "<h2>Result</h2>", _results(metrics),
            "<h2>Accuracy over rounds</h2>", _curves(metrics["evaluations"]),
            "<h2>At every site</h2>", _sites(metrics),
            "<h2>Rounds</h2>", _rounds(events),
            "</html>\n",
        ]
    )  # fmt: skip


def _results(metrics: dict[str, Any]) -> str:
    rows = []
    for kind, label in KINDS.items():
        for number, (name, values) in enumerate((metrics[kind] or {}).items()):
            own = " class=own" if number == 0 else ""
            figures = [values["top1"], values["balanced"], values["macro_f1"], values["ece"]]
            rows.append(f"<tr{own}><td>{label}<td class=text>{escape(name)}{_cells(map(percent, figures))}")
    head = _head("", "predictor", "top-1 %", "balanced %", "macro-F1 %", "ECE %")
    head = head.replace("<th>predictor", "<th class=text>predictor")
    return f"<table>{head}{''.join(rows)}</table><p class=about>In bold the method's own predictors.</p>"


def _curves(evaluations: list[dict[str, Any]]) -> str:
    lines: dict[str, list[tuple[int, float]]] = {}
    for evaluation in evaluations:
        for kind in KINDS:
            own = next(iter((evaluation.get(kind) or {}).values()), None)
            if own and own["top1"] is not None:
                lines.setdefault(kind, []).append((evaluation["round"], own["top1"]))
    last = max((evaluation["round"] for evaluation in evaluations), default=1)
    drawn = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = _y(share)
        drawn.append(f'<line x1={LEFT} x2={WIDTH} y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        drawn.append(f'<text x={LEFT - 6} y="{y + 4:.1f}" text-anchor=end>{share:.0%}</text>')
    for round in sorted({1, (last + 1) // 2, last}):
        drawn.append(f'<text x="{_x(round, last):.1f}" y={HEIGHT - 8} text-anchor=middle>{round}</text>')
    for kind, points in lines.items():
        path = " ".join(f"{_x(round, last):.1f},{_y(share):.1f}" for round, share in points)
        drawn.append(f'<polyline points="{path}" fill=none stroke="{COLOURS[kind]}" stroke-width=2 />')
        drawn += [
            f'<circle cx="{_x(round, last):.1f}" cy="{_y(share):.1f}" r=3 fill="{COLOURS[kind]}" />'
            for round, share in points
        ]
    keys = " &nbsp; ".join(
        f'<span class=key style="background:{COLOURS[kind]}"></span> {KINDS[kind]}' for kind in lines
    )
    return f'<svg viewBox="0 0 {WIDTH + 12} {HEIGHT}">{"".join(drawn)}</svg><p class=about>{keys}</p>'


def _sites(metrics: dict[str, Any]) -> str:
    own: dict[str, dict[str, Any]] = {
        kind: next(iter((metrics[kind] or {}).values()), {}) for kind in ("generic_local", "personal")
    }
    names = sorted({name for found in own.values() for name in found.get("per_site", {})})
    never = set(metrics["never_trained"])
    rows = []
    for name in names:
        generic, personal = (own[kind].get("per_site", {}).get(name) for kind in ("generic_local", "personal"))
        gain = "-" if generic is None or personal is None else f"{100 * (personal - generic):+.1f}"
        note = " (never trained)" if name in never else ""
        rows.append(f"<tr><td>{escape(name)}{note}{_cells([percent(generic), percent(personal), gain])}")
    return f"<table>{_head('site', 'generic %', 'personal %', 'gain')}{''.join(rows)}</table>"


def _rounds(events: list[dict[str, Any]]) -> str:
    """Seconds of all rounds in one line, and every round in which something was missing or refused."""
    seconds = sorted(event["seconds"]["training"] for event in events)
    if not seconds:
        return "<p>No round was finished.</p>"
    text = f"<p>Median {seconds[len(seconds) // 2]:.1f} s a round, the longest {seconds[-1]:.1f} s.</p>"
    troubled = [event for event in events if event["refused"] or event["missing"]]
    if not troubled:
        return text + "<p>Every site that was asked answered, and no reply was refused.</p>"
    rows = []
    for event in troubled:
        reasons = [f"{escape(name)}: {escape(reason)}" for name, reason in event["refused"].items()]
        missing = ", ".join(map(escape, event["missing"])) or "-"
        rows.append(f"<tr><td>{event['round']}<td class=text>{missing}<td class=text>{'<br>'.join(reasons) or '-'}")
    return text + f"<table>{_head('round', 'no answer', 'refused')}{''.join(rows)}</table>"


def _x(round: int, last: int) -> float:
    return LEFT + (WIDTH - LEFT) * (round - 1) / max(last - 1, 1)


def _y(share: float) -> float:
    return 8 + (HEIGHT - BOTTOM - 8) * (1 - share)


def _head(*names: str) -> str:
    return "<tr>" + "".join(f"<th>{name}" for name in names)


def _cells(values: Iterable[str]) -> str:
    return "".join(f"<td>{value}" for value in values)
