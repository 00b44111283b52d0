"""The benchmark of a simulated client: real rounds, without training."""

from benchmarks import simulate_cost


def test_a_row_is_of_real_rounds_with_all_clients() -> None:
    row = simulate_cost.cost("mlp", "fedloge", 3)
    assert (row["clients"], row["model"], row["method"]) == (3, "mlp", "fedloge")
    assert row["megabytes"] > 0
    assert row["ms_per_client"] > row["floor_ms"] > 0
    name, found = simulate_cost.ratios({"rows": [row]}).popitem()
    assert name == "mlp fedloge 3: floor / cost"
    assert 0 < found < 1
    assert "3 clients" in simulate_cost.table({"rows": [row]})


def test_there_are_images_for_any_number_of_clients() -> None:
    assert len(simulate_cost.images(2000).train) == 2000 * simulate_cost.IMAGES
