"""The benchmark of the frame's solver: what it says of both, and what it counts as faster."""

import pytest

from benchmarks import frame_bench

SMALL = {"dim": 64, "classes": 10, "steps": 300, "turns": 1}


def test_both_are_built_and_compared() -> None:
    found = frame_bench.measure(**SMALL)
    assert found["faster"] > 1
    assert found["min_angle_deg"]["ours"] == pytest.approx(found["bound_deg"], abs=1e-3)
    assert found["min_angle_deg"]["reference"] < found["min_angle_deg"]["ours"]
    assert frame_bench.ratios(found) == {"reference / ours": found["faster"]}
    assert "aim" not in frame_bench.table(found)  # it is for the size of the published experiments


def test_a_solver_with_a_smaller_angle_is_not_faster_at_anything() -> None:
    angles = {"reference": 96.0, "ours": 95.9}
    seconds = {"median": 1.0, "least": 1.0, "most": 1.0, "all": [1.0]}
    record = {
        **frame_bench.AIMED, "faster": 50.0, "min_angle_deg": angles, "mean_angle_deg": angles, "bound_deg": 96.4,
        "processor_seconds": {"reference": seconds, "ours": seconds},
    }  # fmt: skip
    assert frame_bench.ratios(record) == {"reference / ours": 0.0}
    shown = frame_bench.table(record)
    assert "aim: at least 100" in shown
    assert "0.1000 degrees smaller" in shown
