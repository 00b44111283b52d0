"""The model of what a round costs, and the page that is made from it."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import cost, scale, scale_page

SIZES = [(4, 0.1), (32, 0.1), (512, 0.1), (4, 1.0), (128, 1.0), (4, 45.0), (32, 45.0)]


def row(sites: int, megabytes: float) -> dict[str, Any]:
    """Of a machine that does exactly as the model says."""
    median = 0.05 + 0.02 * sites + 0.01 * sites * megabytes
    return {
        "model": "tiny", "sites": sites, "megabytes": megabytes, "rounds_per_hour": 3600 / median,
        "online_seconds": 9.0, "seconds": {"median": median, "least": median, "most": median},
        "processor_seconds": {"flower-superlink": median / 2, "flwr-serverapp": median / 4, "sites": median},
        "peak_megabytes": {"flower-superlink": 120 + sites * megabytes, "flwr-serverapp": 790 + 5 * megabytes},
    }  # fmt: skip


def record() -> dict[str, Any]:
    rows = [row(*size) for size in SIZES]
    failed = {"model": "tiny", "megabytes": 0.1, "sites": 9999, "rounds": 3, "failed": "the sites do not come online"}
    environment = {"processor": "abacus", "cores": 2, "code": "0123"}
    model = cost.fitted(rows, [(100, 10.0)])
    return {
        "rows": [*rows, failed], "model": model, "simulated": [], "load_before": [0.1], "environment": environment
    }  # fmt: skip


def test_the_model_finds_what_a_round_is_made_of() -> None:
    model = record()["model"]
    found = model["coefficients"]
    assert list(found["seconds"].values()) == pytest.approx([0.05, 0.02, 0.01])
    assert list(found["server_processor_seconds"].values()) == pytest.approx([0.0375, 0.015, 0.0075])
    assert list(found["superlink_megabytes"].values()) == pytest.approx([120, 0, 1], abs=1e-6)
    assert list(found["serverapp_megabytes"].values()) == pytest.approx([790, 0, 5], abs=1e-6)
    assert all(abs(error[name]) <= 0.02 for error in model["relative_errors"] for name in cost.FITTED)
    [said] = model["predictions"]
    assert said["seconds"] == pytest.approx(0.05 + 2 + 10)


def test_nothing_costs_less_than_nothing() -> None:
    rows = [row(*size) for size in SIZES]
    for one in rows:
        one["seconds"]["median"] = 1.0 - 0.001 * one["sites"]  # no model with these terms can say so
    found = cost.fit(rows, *cost.FITTED["seconds"])
    assert list(found) == list(cost.MOVED)
    assert min(found.values()) >= 0
    assert found["a round"] > 0


def test_the_error_of_a_row_that_is_not_as_the_model_says_is_told() -> None:
    rows = [row(*size) for size in SIZES]
    rows[2]["seconds"]["median"] *= 3  # the one with 512 sites
    errors = cost.fitted(rows, [])["relative_errors"]
    assert min(errors, key=lambda error: error["seconds"])["sites"] == 512


def test_two_federations_are_too_few_for_a_model() -> None:
    assert cost.fitted([row(4, 1.0), row(8, 1.0)], []) == {}
    assert cost.shown({}) == ["no model of the cost: it takes 3 federations"]


def test_the_table_has_every_row_also_of_what_failed() -> None:
    shown = scale.table(record())
    assert "9999 sites: the sites do not come online" in shown
    assert "100 sites,    10 MB" in shown
    assert len(shown.splitlines()) == len(SIZES) + 1 + 1 + len(cost.FITTED) + 1


def test_tables_replace_what_stood_in_their_places_only() -> None:
    page = "before\n<!-- table: model -->\nold\n<!-- end -->\nbetween\n<!-- table: measured -->\n<!-- end -->\nafter\n"
    made = scale_page.filled(page, ("2026-01-02.json", record()))
    assert "old" not in made
    assert [made.count(word) for word in ("before\n", "between\n", "after\n", "<!-- end -->\n")] == [1, 1, 1, 2]
    assert "| 512 | 0.1 MB |" in made
    assert "| 9999 | 0.1 MB | failed |" in made
    assert scale_page.filled(made, ("2026-01-02.json", record())) == made


def test_the_page_is_what_the_newest_record_gives() -> None:
    page = scale_page.PAGE.read_text(encoding="utf-8")
    assert page == scale_page.filled(page, scale_page.newest(scale_page.RECORDS)), "run `make tables`"


def test_a_record_of_the_same_day_is_newer_by_its_number(tmp_path: Path) -> None:
    for name in ("2026-11-20.json", "2026-11-20-2.json", "2026-11-19-7.json"):
        (tmp_path / name).write_text("{}")
    assert scale_page.newest(tmp_path)[0] == "2026-11-20-2.json"
