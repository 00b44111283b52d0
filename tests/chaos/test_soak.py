"""The soak's bookkeeping: what it writes down of a federation with churn, and when it says that something grows."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.soak import plot
from benchmarks.soak.__main__ import judged, soak, table
from benchmarks.soak.churn import DIES, STAYS
from benchmarks.soak.watch import FEWEST, Series, Watch, line, of_process, size, verdict

pytestmark = pytest.mark.timeout(900)
PROGRAMS = {"server", "flower-superlink", "flower-superexec", "flwr-serverapp", STAYS, f"guard of {STAYS}"}


def test_a_federation_with_churn_is_written_down(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    record, curves = soak(seconds=60.0, every=0.25)  # a busy machine needs some of it for one change
    assert list(tmp_path.glob("fedloge-soak-*")) == [], "its folder is left"
    assert record["rounds"] > 0
    assert sum(record["changes"].values()) >= 1
    series = {(one["of"], one["what"]): one for one in record["series"]}
    assert {of for of, what in series if what == "own"} >= PROGRAMS
    assert {of for of, what in series if what == "bytes"} == {"run", "checkpoints", f"state of {STAYS}"}
    for one in series.values():
        assert len(one["at"]) == len(one["figures"]) > 0
        assert one["at"] == sorted(one["at"])
    rounds = series["the federation", "rounds"]["figures"]
    assert rounds == sorted(rounds)
    assert rounds[-1] == record["rounds"]
    judgements = {(one["of"], one["what"]): one["flat"] for one in record["verdicts"]}
    assert judgements["server", "handles"] is not None
    assert judgements["server", "handles"] == ("server             handles" in flat_lines(table(record)))
    assert ElementTree.fromstring(curves).tag.endswith("svg")
    assert DIES in curves


def flat_lines(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if line.endswith("flat"))


def test_the_line_rises_by_what_the_figures_rise() -> None:
    at = [float(second) for second in range(11)]
    assert line(at, [3 * second + 5 for second in at]) == pytest.approx((30.0, 20.0))
    assert line(at, [7.0] * 11) == pytest.approx((0.0, 7.0))
    assert line([1.0], [4.0]) == (0.0, 4.0)


@pytest.mark.parametrize(
    ("what", "of", "rise", "flat"),
    [
        ("own", "server", 2.9, True),
        ("own", "server", 3.2, False),
        ("handles", "server", 1.9, True),
        ("handles", "server", 2.1, False),
        ("threads", "server", -50.0, True),
        ("bytes", "run", 290_000.0, True),
        ("bytes", "run", 310_000.0, False),
    ],
)
def test_what_grows_in_the_second_half_is_said_to(what: str, of: str, rise: float, flat: bool) -> None:
    """Here from 100, over 100 rounds; what it did in the first half does not count."""
    series = Series(of, what)
    for number in range(101):
        series.add(number, 100.0 + max(number - 50, 0) / 50 * rise if number >= 50 else 9e9)
    assert verdict(series, 50.0, 0.0, 100.0)["flat"] is flat


def test_what_cannot_be_judged_is_not() -> None:
    series = Series("site-001", "own")
    for number in range(101):
        series.add(number, 100.0 + number)
    assert verdict(series, 50.0, 51.0, 100.0)["flat"] is None, "it was started in the second half"
    assert verdict(series, 101.0 - FEWEST, 0.0, 100.0)["flat"] is False
    assert verdict(series, 102.0 - FEWEST, 0.0, 100.0)["flat"] is None, "there are too few figures"


def test_a_process_that_grows_is_noticed(tmp_path: Path) -> None:
    """A real one, which keeps 200 kB, a file and a thread more at every word it gets."""
    (tmp_path / "grows.py").write_text(
        "import sys, threading\n"
        "kept = []\n"
        "for line in sys.stdin:\n"
        "    kept += [bytearray(b'x' * 200_000), open(__file__)]\n"
        "    threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "    print(flush=True)\n"
    )
    watch = Watch()
    command = [sys.executable, str(tmp_path / "grows.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        for number in range(60):
            child.stdin.write("\n")
            child.stdin.flush()
            child.stdout.readline()
            watch.look({"it": child.pid, "we": os.getpid()}, {"run": tmp_path}, rounds=number, sites=1)
        child.stdin.close()
    # as if it had been a look a second
    for series in (*watch.series.values(), watch.rounds, watch.sites):
        series.at = [float(number) for number in range(60)]
    record, _ = judged(watch, {"date": "now", "changes": {}})
    found = {(one["of"], one["what"]): one["flat"] for one in record["verdicts"]}
    assert [found["it", what] for what in ("own", "handles", "threads")] == [False, False, False]
    assert [found["we", what] for what in ("handles", "threads")] == [True, True]
    assert not record["flat"]
    assert "GROWS" in table(record)


def test_figures_are_of_what_they_say(tmp_path: Path) -> None:
    found = of_process(os.getpid())
    assert 10 < found["own"] <= found["resident"] < 100_000
    with (tmp_path / "more").open("w", encoding="utf-8"):
        assert of_process(os.getpid())["handles"] == found["handles"] + 1
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.json").write_bytes(bytes(1000))
    (tmp_path / "server.log.1").write_bytes(bytes(5000))
    assert size(tmp_path) == 1000


def test_long_curves_stay_small() -> None:
    series = Series("server", "own")
    for number in range(20_000):
        series.add(number, 100.0 + number % 7)
    assert len(plot.drawn([series], "a <title>")) < 20_000
