"""The benchmark of the survey: both sides are done for real, and what is sent is what it says."""

from benchmarks import survey_bench


def test_a_survey_is_compared_with_a_round() -> None:
    found = survey_bench.measure(models=["resnet8"], images=20, epochs=1, batch=8, turns=1)
    [row] = found["rows"]
    assert row["numbers"] == row["allowed"] == 10 + 10 * 64 + 64**2
    assert 0 < row["of_a_round"] < 1
    assert survey_bench.ratios(found) == {"resnet8: round / survey": round(1 / row["of_a_round"], 2)}
    assert "a survey is" in survey_bench.table(found)
