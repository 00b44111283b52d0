"""The line that says where a run is, on a terminal and in a log file, by a clock that is set by hand."""

import io
import re
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from fedloge.progress import LINES, WIDTH, ProgressLine

ERASE = "\r\x1b[K"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("fedloge.progress.time", SimpleNamespace(monotonic=made.monotonic))
    return made


def judged(top1: float | None, personal: float | None = 0.75, generic: bool = True) -> dict[str, Any]:
    return {
        "generic": {"psi realigned": {"top1": top1}, "psi": {"top1": 0.999}} if generic else {},
        "personal": {"phi+psi_k": {"top1": personal}, "phi": {"top1": 0.999}},
        "never_trained": [],
    }


def shown(stream: io.StringIO) -> list[str]:
    """Every state of the line, in order."""
    text = stream.getvalue()
    return [part for part in re.split(rf"{re.escape(ERASE)}|\n", text) if part]


def left(text: str) -> str:
    found = re.search(r" (\S+) left", text)
    assert found is not None
    return found[1]


# --- content ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()], ids=["terminal", "file"])
def test_the_line_says_round_time_and_the_newest_figures_of_the_first_predictors(
    clock: Clock, stream: io.StringIO
) -> None:
    line = ProgressLine(stream)
    line.show(1, 4, judged(0.1))
    clock.now += 45
    line.show(2, 4, judged(0.4123))
    assert shown(stream)[-1] == (
        "round 2/4 [############------------] 1:30 left  generic (psi realigned) 41.2 %  personal (phi+psi_k) 75.0 %"
    )


def test_before_the_first_evaluation_it_has_no_figures(clock: Clock) -> None:
    stream = io.StringIO()
    line = ProgressLine(stream)
    line.show(1, 3, None)
    clock.now += 9
    line.show(2, 3, None)
    assert shown(stream) == ["round 1/3 [########----------------]", "round 2/3 [################--------] 0:09 left"]


def test_without_a_generic_model_it_shows_the_personal_one(clock: Clock) -> None:
    del clock
    stream = io.StringIO()
    ProgressLine(stream).show(2, 2, judged(None, generic=False))
    assert shown(stream) == [f"round 2/2 [{'#' * WIDTH}]  personal (phi+psi_k) 75.0 %"]


def test_a_figure_that_is_none_is_no_crash(clock: Clock) -> None:
    del clock
    stream = io.StringIO()
    ProgressLine(stream).show(1, 1, judged(None, None))
    assert shown(stream)


def test_the_bar_grows_and_is_full_only_at_the_end(clock: Clock) -> None:
    stream = Terminal()
    line = ProgressLine(stream)
    for n in range(1, 501):
        clock.now += 1
        line.show(n, 500, None)
    done = [text.count("#") for text in shown(stream)]
    assert done == sorted(done)
    assert all(re.search(rf"\[[#-]{{{WIDTH}}}\]", text) for text in shown(stream))
    assert done.index(WIDTH) == 499


# --- where it goes ---------------------------------------------------------------------------------------------------


def test_on_a_terminal_one_line_is_written_over_itself(clock: Clock) -> None:
    stream = Terminal()
    line = ProgressLine(stream)
    for n in range(1, 201):
        clock.now += 1
        line.show(n, 200, judged(n / 200))
    text = stream.getvalue()
    assert text.count(ERASE) == 200
    assert text.count("\n") == 1
    assert text.endswith("\n")
    assert "\n" not in text[:-1]


@pytest.mark.parametrize("rounds", [1, 7, 29, 30, 31, 60, 500, 1009])
def test_a_log_file_gets_few_lines_and_the_last_round(clock: Clock, rounds: int) -> None:
    stream = io.StringIO()
    line = ProgressLine(stream)
    for n in range(1, rounds + 1):
        clock.now += 1
        line.show(n, rounds, None)
    text = stream.getvalue()
    assert "\r" not in text
    assert "\x1b" not in text
    lines = text.splitlines()
    assert len(lines) == min(rounds, LINES)
    assert lines[-1].startswith(f"round {rounds}/{rounds} ")
    at = [0] + [int(line.split()[1].split("/")[0]) for line in lines]
    gaps = [b - a for a, b in pairwise(at)]
    assert max(gaps) - min(gaps) <= 1  # evenly


def test_every_line_can_be_read_at_once(clock: Clock) -> None:
    """Behind a pipe nothing is flushed but what is flushed by hand."""
    del clock
    buffer = io.BytesIO()
    line = ProgressLine(io.TextIOWrapper(buffer, write_through=False))
    line.show(1, 2, None)
    assert buffer.getvalue().startswith(b"round 1/2 ")


def test_it_goes_to_standard_error_unless_told(capsys: pytest.CaptureFixture[str]) -> None:
    ProgressLine().show(1, 1, None)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("round 1/1 ")


# --- time left -------------------------------------------------------------------------------------------------------


def test_time_left_is_the_mean_of_the_rounds_since_the_first_times_those_to_come(clock: Clock) -> None:
    """What comes before the first is shown, such as reading the data, is no measure of a round."""
    stream = Terminal()
    line = ProgressLine(stream)
    clock.now += 10_000
    line.show(1, 5, None)
    for n, seconds in ((2, 10), (3, 30), (4, 80), (5, 0)):
        clock.now += seconds
        line.show(n, 5, None)
    first, *others = shown(stream)
    assert " left" not in first
    assert [left(text) for text in others] == ["0:30", "0:40", "0:40", "0:00"]


def test_a_run_that_goes_on_counts_only_its_own_rounds(clock: Clock) -> None:
    """Rounds before it cost it no time."""
    stream = Terminal()
    line = ProgressLine(stream)
    for n in range(91, 95):
        clock.now += 60
        line.show(n, 100, None)
    assert [left(text) for text in shown(stream)[1:]] == ["8:00", "7:00", "6:00"]


def test_equal_rounds_take_off_their_time_from_round_to_round(clock: Clock) -> None:
    stream = Terminal()
    line = ProgressLine(stream)
    for n in range(1, 51):
        clock.now += 7
        line.show(n, 50, None)
    expected = [f"{7 * (50 - n) // 60}:{7 * (50 - n) % 60:02d}" for n in range(2, 51)]
    assert [left(text) for text in shown(stream)[1:]] == expected


def test_a_log_file_counts_the_rounds_it_does_not_show(clock: Clock) -> None:
    stream = io.StringIO()
    line = ProgressLine(stream)
    for n in range(1, 301):
        clock.now += 6
        line.show(n, 300, None)
    assert [left(text) for text in shown(stream)] == [f"{30 - n}:00" for n in range(1, 31)]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0:00"), (9, "0:09"), (59.7, "1:00"), (61, "1:01"), (3599, "59:59"), (3599.6, "1:00:00"),
     (3725, "1:02:05"), (360_000, "100:00:00")],
)  # fmt: skip
def test_time_left_reads_like_a_clock(clock: Clock, seconds: float, text: str) -> None:
    stream = Terminal()
    line = ProgressLine(stream)
    line.show(1, 3, None)
    clock.now += seconds
    line.show(2, 3, None)
    assert [left(state) for state in shown(stream)[1:]] == [text]
