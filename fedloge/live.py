"""How a running federation looks: a table that rewrites itself on a terminal, a line an event in a log.

A `View` is everything there is to show at one moment; what becomes of it as text are pure functions. The `Screen`
is where logging goes too, so that a warning stays above the table instead of through it.
"""

import logging
import shutil
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TextIO

from fedloge.table import megabytes, percent
from server.status import Status

SHOWN = 6  # names of sites in a list; of more the number is given
PHASES = {
    "starting": "starting",
    "waiting": "waiting for sites",
    "training": "training",
    "judging": "judging the final models",
    "finished": "finished",
    "gave-up": "given up",
}


@dataclass(frozen=True)
class View:
    name: str  # of the federation
    address: str
    running: bool
    status: Status
    sites: tuple[str, ...] = ()  # those that may take part
    online: frozenset[str] = frozenset()
    shut_out: Mapping[str, str] = field(default_factory=dict)  # site that may not any more -> why


def table(view: View, now: float) -> list[str]:
    """The view at time `now` (seconds since 1970), one row a line."""
    status = view.status
    state = PHASES[status.phase] if view.running else f"not running (last: {PHASES[status.phase]})"
    head = f"{view.name}  {view.address}  {state}"
    if status.rounds:
        head += f", round {status.round} of {status.rounds}"
    if view.running and status.left:
        head += f", about {duration(status.left)} left"
    rows = [head]

    def row(label: str, text: str) -> None:
        rows.append(f"  {label:<12}{text}")

    absent = [name for name in view.sites if name not in view.online]
    online = f"{len(view.online)} of {len(view.sites)} online" + (f"; absent: {names(absent)}" if absent else "")
    row("sites", online if view.running else f"{len(view.sites)} registered: {names(view.sites)}")
    if view.running and status.phase in ("training", "judging"):
        row("replies", _replies(status, now))
    if status.traffic:
        row("bytes", ", ".join(f"{_mean(status, way)} {way}" for way in ("down", "up")) + " a site in this round")
    for name, reason in list(status.refused.items())[:SHOWN]:
        row("refused", f"{name}: {reason}")
    for name, latest in list(status.quarantined.items())[:SHOWN]:
        if name not in status.refused:
            row("refused", f"{name}: {latest.get('reason')} (round {latest.get('round')})")
    for name, reason in list(status.bad_cards.items())[:SHOWN]:
        row("unfit", f"{name}: {reason}")
    for name, reason in list(view.shut_out.items())[:SHOWN]:
        row("shut out", f"{name}: {reason}")
    for label, accuracy in zip(("accuracy", ""), _accuracies(status), strict=False):
        row(label, accuracy)
    if status.message:
        row("note", status.message)
    return rows


def events(before: View | None, after: View) -> list[str]:
    """What happened to sites between two views, as lines for a log."""
    status, lines = after.status, []
    was = before or View(after.name, after.address, after.running, Status(), after.sites)
    count = f"{len(after.online)} of {len(after.sites)} online"
    lines += [f"{name} is online ({count})" for name in sorted(after.online - was.online)]
    lines += [f"{name} is offline ({count})" for name in sorted(was.online - after.online)]
    lines += [f"{name} was invited" for name in after.sites if name not in {*was.sites, *was.shut_out}]
    lines += [f"{name} is shut out: {why}" for name, why in after.shut_out.items() if name in was.sites]
    lines += [
        f"{name} cannot take part: {reason}"
        for name, reason in status.bad_cards.items()
        if was.status.bad_cards.get(name) != reason
    ]
    if status.judged_round not in (0, was.status.judged_round):  # 0: a new run has not said yet what there was
        lines.append(_at_home(status))
    if status.phase != was.status.phase and {status.phase, was.status.phase} != {"waiting", "training"}:  # every round
        lines.append(PHASES[status.phase])
    if status.message and status.message != was.status.message:
        lines.append(status.message)
    return lines


def round_line(entry: Mapping[str, Any], rounds: int) -> str:
    """A finished round, from its event in events.jsonl."""
    replies = len(entry["sites"])
    parts = [f"round {entry['round']} of {rounds}: {replies} {'reply' if replies == 1 else 'replies'}"]
    if entry["refused"]:
        parts.append("refused " + "; ".join(f"{name} ({reason})" for name, reason in entry["refused"].items()))
    if entry["missing"]:
        parts.append(f"missing {names(entry['missing'])}")
    for figures in list(entry.get("evaluation", {}).get("generic", {}).values())[:1]:
        parts.append(f"generic {percent(figures['top1'])} % on the test set")
    return ", ".join(parts)


def names(of: Collection[str]) -> str:
    listed = sorted(of)
    if len(listed) > SHOWN:
        return f"{', '.join(listed[: SHOWN - 1])} and {len(listed) - SHOWN + 1} more"
    return ", ".join(listed) or "nobody"


def duration(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 1:
        return f"{max(round(seconds), 1)} s"
    return f"{round(minutes)} min" if minutes < 100 else f"{round(minutes / 60)} h"


class Screen(logging.Handler):
    """Standard error: with a table at its end where that is a terminal, lines only where it is not."""

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__()
        self._stream = stream or sys.stderr
        self.live = self._stream.isatty()
        self.setLevel(logging.WARNING if self.live else logging.INFO)  # the table says what events would
        self._drawn: list[str] = []

    def show(self, view: View) -> None:
        if self.live:
            size = shutil.get_terminal_size()  # what does not fit cannot be rewritten in place
            self._draw([line[: size.columns - 1] for line in table(view, time.time())[: size.lines - 1]])

    def emit(self, record: logging.LogRecord) -> None:
        drawn = self._drawn
        self._draw([])
        self._write(self.format(record) + "\n")
        self._draw(drawn)

    def close(self) -> None:
        """The table stays as it is; what is printed next goes below it."""
        if self._drawn:
            self._write("\n")
        self._drawn = []
        super().close()

    def _draw(self, lines: list[str]) -> None:
        up = f"\x1b[{len(self._drawn)}F\x1b[J" if self._drawn else ""
        self._drawn = lines
        self._write(up + "".join(f"{line}\n" for line in lines))

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # the terminal is gone; the federation goes on
            self.live = False


def _replies(status: Status, now: float) -> str:
    answered = len(status.chosen) - len(status.waiting) - len(status.refused)
    text = f"{max(answered, 0)} in, {len(status.waiting)} awaited"
    if status.waiting:
        text += f": {names(status.waiting)}"
        if status.deadline and status.deadline > now:
            text += f" (for {duration(status.deadline - now)} at most)"
    return text


def _mean(status: Status, way: str) -> str:
    """Over the sites that have sent or got anything yet."""
    sizes = [both[way] for both in status.traffic.values() if both.get(way)]
    return megabytes(sum(sizes) / max(len(sizes), 1))


def _accuracies(status: Status) -> list[str]:
    """In rows of their own: together they would not fit into 80 columns."""
    rows = []
    if status.generic is not None:
        rows.append(f"generic {percent(status.generic)} % on the test set")
    if status.judged_round:
        rows.append(_at_home(status))
    return rows


def _at_home(status: Status) -> str:
    figures = f"generic {percent(status.generic_local)} %, personal {percent(status.personal)} %"
    return f"at the sites after round {status.judged_round}: {figures}"
