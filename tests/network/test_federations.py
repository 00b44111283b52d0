"""Real federations as the benchmark of scale measures them."""

import tempfile
from pathlib import Path

import pytest

from benchmarks import scale
from benchmarks.overhead import federation

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.timeout(200)  # a busy machine needs a minute to start a federation


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As `fedloge bench` has it, for the processes that are started."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_a_federation_is_measured() -> None:
    row = scale.measured("tiny", 3, 2)
    assert (row["sites"], row["rounds"], len(row["seconds"]["all"])) == (3, 2, 2)
    assert row["rounds_per_hour"] == pytest.approx(3600 / row["seconds"]["median"], rel=0.02)
    assert set(row["processor_seconds"]) == {*scale.SERVER, "sites"}
    assert set(scale.SERVER) <= set(row["peak_megabytes"])
    assert row["online_seconds"] > 0
    assert "3 sites" in scale.line(row)


def test_one_that_this_machine_cannot_carry_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(federation, "START", 0.0)
    row = scale.measured("tiny", 2, 2)
    assert row["failed"] == "the sites do not come online"
    assert "the sites do not come online" in scale.line(row)
