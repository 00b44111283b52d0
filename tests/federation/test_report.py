"""The HTML page of a run: whole, self-contained, and honest about what went wrong."""

import json
import re
import xml.dom.minidom
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fedloge import main, report
from fedloge.simulate import simulate
from tests.federation.test_simulate import quiet, small


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "run"
    simulate(small(), folder, quiet)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    for name in ("metrics.json", "events.jsonl", "environment.json"):
        (tmp_path / name).write_text((finished / name).read_text())
    return tmp_path


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for key, value in attrs if key in ("src", "href")]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.tables and self.tables[-1] and self.tables[-1][-1]:
            self.tables[-1][-1][-1] += data


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    return reader


def test_figures_are_those_of_the_run(run: Path) -> None:
    page = read(report.write(run))
    metrics = json.loads((run / "metrics.json").read_text())
    for kind, label in report.KINDS.items():
        shown = {row[1]: row[2] for row in page.tables[0] if row[0] == label}
        assert shown == {name: f"{100 * values['top1']:.1f}" for name, values in metrics[kind].items()}
    sites = {row[0]: row[2] for row in page.tables[1][1:]}
    assert sites == {name: f"{100 * top1:.1f}" for name, top1 in metrics["personal"]["phi+psi_k"]["per_site"].items()}
    assert "no reply was refused" in page.text


def test_the_page_needs_nothing_else_and_its_picture_is_well_formed(run: Path) -> None:
    path = report.write(run)
    assert read(path).fetched == []
    text = path.read_text()
    svg = text[text.index("<svg") : text.index("</svg>") + 6]
    lines = [line.strip() for line in svg.replace(" />", "/>").split("<polyline")]
    assert len(lines) == 1 + len(report.KINDS)
    xml.dom.minidom.parseString(quoted(svg))


def quoted(svg: str) -> str:
    """HTML may leave attribute values bare, XML may not."""
    return re.sub(r"=([a-zA-Z0-9.#]+)(?=[ />])", r'="\1"', svg)


def test_troubled_rounds_are_told_and_cannot_inject(run: Path) -> None:
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    events[0] |= {"missing": ["north"], "refused": {"<b>south": "part <script>alert(1)</script> is missing"}}
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    path = report.write(run, run / "other.html")
    assert "<script>" not in path.read_text()
    told = [cell.strip() for cell in read(path).tables[2][1]]
    assert told == ["1", "north", "<b>south: part <script>alert(1)</script> is missing"]


def test_a_folder_that_is_no_finished_run_is_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["report", str(run / "nowhere")]) == 1
    (run / "metrics.json").write_text("{}")
    assert main.run(["report", str(run)]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 2


def test_the_verb_says_where_the_page_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["report", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(run / "report.html")}
