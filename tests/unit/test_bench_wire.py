"""Bytes of every wire on a small net, and accuracies as records give them."""

import json
from pathlib import Path

import pytest

from benchmarks import wire_bench
from common.codec import WIRES


def test_bytes_fall_from_wire_to_wire() -> None:
    record = wire_bench.measure(models=["cnn"], steps=1)
    figures = record["models"]["cnn"]
    both = [figures[wire]["bytes"]["both"] for wire in WIRES]
    assert both == sorted(both, reverse=True)
    assert figures["int8"]["of_fp32"]["both"] < 0.3
    assert figures["int8"]["bytes"]["down"] < 0.5 * figures["int8"]["first_round"]["down"]  # that one is whole
    assert figures["topk"]["bytes"]["up"] < 0.2 * figures["fp32"]["bytes"]["up"]
    ratios = wire_bench.ratios(record)
    assert sorted(ratios) == [f"cnn: bytes of fp32 to {wire}" for wire in ("bf16", "int8", "topk")]
    assert all(ratio > 1.8 for ratio in ratios.values())
    assert "aim" in wire_bench.table(record)


@pytest.fixture
def records(tmp_path: Path) -> Path:
    accuracies = {
        "cpu-scale/fedloge-norm1": (0.30, 0.32, 0.34),
        "wire/int8": (0.31, 0.32, 0.36),
        "wire/topk": (0.25,),
    }
    for row, values in accuracies.items():
        for seed, top1 in enumerate(values, 1):
            folder = tmp_path / f"{row}-s{seed}"
            folder.mkdir(parents=True)
            metrics = {kind: {"own": {"top1": top1}, "other": {"top1": 0}} for kind in ("generic", "personal")}
            (folder / "metrics.json").write_text(json.dumps(metrics))
    return tmp_path


def test_accuracies_stand_beside_what_noise_explains(records: Path) -> None:
    found = wire_bench.accuracy(records)
    assert sorted(found) == ["fp32", "int8", "topk"]
    assert found["fp32"]["generic"] == {"seeds": [1, 2, 3], "top1": {"mean": 0.32, "deviation": 0.02}}
    row = found["int8"]["personal"]
    assert row["difference"] == 0.01
    assert row["noise"] == pytest.approx(2 * ((0.02**2 + 0.0265**2) / 3) ** 0.5, abs=1e-4)
    assert found["topk"]["generic"] == {"seeds": [1], "top1": {"mean": 0.25}}
    text = wire_bench.table({"models": {}, "aims": wire_bench.AIMS, "accuracy": found})
    assert "difference +1.00, noise 3.83" in text
