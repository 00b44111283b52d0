"""The frame: support, lengths, angles, refusals, transport, and the gradients the solvers are made of."""

import hashlib
import math
import time
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from common import frame_solver
from common.errors import UserError
from common.frame import FrameSpec, angles, build, conditions, digest, keys, mask, pack, simplex_limit, unpack
from common.frame_solver import angle_bound


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- the support --------------------------------------------------------------------------------------------


def test_golden_keys_and_mask():
    assert [f"{key:016x}" for key in keys(0, 0, 3)] == ["bfef8030ddc2d772", "5f552ce482f2aa47", "70335fc3daf3d8a7"]
    packed = np.packbits(mask(512, 100, 0.6, 0).numpy()).tobytes()
    assert hashlib.sha256(packed).hexdigest().startswith("55af9dd8f0f3d8d5")


def test_golden_keys_of_another_seed():
    """Pins our own choice of how a seed enters the stream: frames made today must be readable tomorrow."""
    assert [f"{key:016x}" for key in keys(3407, 0, 2)] == ["7a693c6b26fd0a8f", "20dbd80b9d41ebe5"]


def test_keys_are_one_stream():
    np.testing.assert_array_equal(keys(7, 0, 50)[20:], keys(7, 20, 30))


@settings(deadline=None, max_examples=40)
@given(
    dim=st.integers(1, 60),
    classes=st.integers(2, 60),
    sparsity=st.floats(0, 0.99),
    seed=st.integers(0, 2**63 - 1),
)
def test_mask_has_the_asked_zeros(dim: int, classes: int, sparsity: float, seed: int):
    support = mask(dim, classes, sparsity, seed)
    assert support.shape == (dim, classes)
    assert int((~support).sum()) == int(sparsity * dim * classes)


# --- what is built ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dim", "classes"), [(512, 100), (512, 10), (64, 10), (64, 48), (64, 2), (128, 100)])
def test_simplex_is_reached(dim: int, classes: int):
    frame = build(FrameSpec(dim, classes))
    report = frame.report
    assert report.solver == "gram"
    assert report.stopped == "bound"
    assert report.bound_deg == pytest.approx(math.degrees(math.acos(-1 / (classes - 1))))
    assert report.bound_deg - report.min_angle_deg <= 1e-3
    assert report.norm_std <= 1e-6
    assert report.zeros == int(0.6 * dim * classes)
    assert frame.weight.dtype == torch.float32
    assert frame.weight.shape == (classes, dim)
    torch.testing.assert_close(frame.weight.norm(dim=1), torch.full((classes,), 0.1))
    assert torch.equal(frame.weight != 0, mask(dim, classes, 0.6, 0).T)


def test_simplex_costs_no_time():
    build(FrameSpec(16, 4))  # the first call pays for the libraries' start
    before = time.process_time()
    build(FrameSpec(512, 100))
    assert time.process_time() - before < 2


def test_full_simplex_uses_every_dimension():
    frame = build(FrameSpec(16, 17, sparsity=0))
    assert frame.report.bound_deg - frame.report.min_angle_deg <= 1e-3


@pytest.mark.parametrize(("classes", "least"), [(100, 89.9), (128, 89.9), (200, 85.0)])
def test_more_classes_than_dimensions(classes: int, least: float):
    report = build(FrameSpec(64, classes)).report
    assert report.solver == "lse"
    assert least <= report.min_angle_deg <= report.bound_deg
    assert report.norm_std <= 1e-6
    assert report.zeros == int(0.6 * 64 * classes)


@settings(deadline=None, max_examples=15)
@given(
    dim=st.integers(4, 40),
    classes=st.integers(2, 60),
    sparsity=st.floats(0, 0.7),
    norm=st.floats(0.01, 10),
    seed=st.integers(0, 99),
)
def test_any_frame_has_exact_zeros_and_lengths(dim: int, classes: int, sparsity: float, norm: float, seed: int):
    spec = FrameSpec(dim, classes, norm, sparsity, seed=seed, best_effort=True, max_evaluations=30)
    support = mask(dim, classes, sparsity, seed)
    if not bool(support.any(dim=0).all()):
        with pytest.raises(UserError, match="empty"):
            build(spec)
        return
    frame = build(spec)
    assert bool((frame.weight.T[~support] == 0).all())
    torch.testing.assert_close(frame.weight.norm(dim=1), torch.full((classes,), norm))
    assert frame.report.min_angle_deg <= frame.report.bound_deg + 1e-3
    assert torch.equal(unpack(pack(frame.weight, support), spec), frame.weight)


@pytest.mark.parametrize("classes", [10, 90])
def test_same_spec_same_bytes(classes: int):
    spec = FrameSpec(64, classes, max_evaluations=200)
    assert build(spec).digest == build(spec).digest
    assert build(spec).digest != build(replace(spec, seed=1)).digest


def test_budget_ends_the_search_and_progress_is_heard():
    heard: list[tuple[int, float]] = []
    report = build(FrameSpec(64, 200, max_evaluations=50), progress=lambda n, deg: heard.append((n, deg))).report
    assert report.stopped == "evaluations"
    assert [n for n, _ in heard] == list(range(1, 51))
    assert heard[-1][1] == pytest.approx(report.min_angle_deg, abs=1e-4)
    assert build(FrameSpec(64, 200, max_work=1.0)).report.evaluations == 1
    assert build(FrameSpec(64, 200, max_seconds=1e-9)).report.stopped == "seconds"


def test_reference_procedure():
    frame = build(FrameSpec(512, 10, solver="reference", reference_steps=1500))  # a sixth of the published steps
    report = frame.report
    assert report.solver == "reference"
    assert report.mean_angle_deg == pytest.approx(96.379, abs=0.02)
    assert 0 < report.bound_deg - report.min_angle_deg < 0.5
    assert frame.weight.norm(dim=1).mean().item() == pytest.approx(0.1, abs=0.01)
    assert report.norm_std < 0.02
    assert report.zeros == int(0.6 * 512 * 10)


# --- refusals -----------------------------------------------------------------------------------------------


def test_conditions_hold_where_the_simplex_is_reached():
    for dim, classes in ((512, 100), (512, 10), (64, 10), (64, 49), (64, 200), (2048, 1000)):
        assert conditions(FrameSpec(dim, classes)) == []


def test_count_condition():
    assert [int(simplex_limit(dim, 0.6)) for dim in (64, 128, 512, 2048)] == [49, 100, 408, 1636]
    with pytest.raises(UserError, match=r"count: 1216 degrees of freedom for 1225 pairs .* about 49 classes"):
        build(FrameSpec(64, 50))


def test_overlap_condition():
    spec = FrameSpec(64, 20, sparsity=0.8)
    (failure,) = conditions(spec)
    assert failure.startswith("overlap: ")
    with pytest.raises(UserError, match=r"overlap: \d+ of 190 pairs .* 90 and not 93\.017 degrees"):
        build(spec)
    report = build(replace(spec, best_effort=True)).report
    assert report.solver == "lse"
    assert report.min_angle_deg == pytest.approx(90, abs=1e-3)


def test_both_conditions_are_named_and_best_effort_reports_the_angle():
    spec = FrameSpec(64, 20, sparsity=0.9)
    with pytest.raises(UserError, match=r"count: .*overlap: ") as refusal:
        build(spec)
    assert "\n" not in str(refusal.value)
    report = build(replace(spec, best_effort=True)).report
    assert 89.9 < report.min_angle_deg <= 90
    assert report.zeros == int(0.9 * 64 * 20)


def test_best_effort_near_the_limit():
    report = build(FrameSpec(64, 52, best_effort=True)).report
    assert 1e-3 < report.bound_deg - report.min_angle_deg < 0.1


@pytest.mark.parametrize("best_effort", [False, True])
@pytest.mark.parametrize("classes", [20, 200])
def test_class_without_a_free_entry_is_always_refused(classes: int, best_effort: bool):
    with pytest.raises(UserError, match=r"empty: \d+ of \d+ classes have no free entry"):
        build(FrameSpec(64, classes, sparsity=0.98, best_effort=best_effort))


@pytest.mark.parametrize("solver", ["reference", "gram"])
def test_solvers_that_cannot_do_more_classes_than_dimensions(solver: str):
    with pytest.raises(UserError, match=rf"solver '{solver}' .*use solver 'auto'"):
        build(FrameSpec(64, 80, solver=solver))


@pytest.mark.parametrize(
    "knob", [{"classes": 1}, {"norm": 0}, {"sparsity": 1}, {"solver": "fast"}, {"seed": -1}, {"max_work": 0}]
)
def test_spec_refuses_impossible_values(knob: dict[str, float | str]):
    with pytest.raises(UserError, match=f"{next(iter(knob))} = "):
        FrameSpec(**{"dim": 64, "classes": 10} | knob)  # type: ignore[arg-type]


# --- measuring and transport --------------------------------------------------------------------------------


def test_angles_agree_with_the_definition(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("common.frame.BLOCK", 7)
    W = torch.randn(30, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    U = W / W.norm(dim=1, keepdim=True)
    pairs = (U @ U.T)[torch.ones(30, 30).triu(1).bool()].arccos().rad2deg()
    measured = angles(3 * W)
    assert measured.min_deg == pytest.approx(float(pairs.min()))
    assert measured.mean_deg == pytest.approx(float(pairs.mean()))


def test_angle_bounds():
    assert angle_bound(64, 65) == pytest.approx(math.degrees(math.acos(-1 / 64)))
    assert angle_bound(64, 66) == angle_bound(64, 128) == 90
    assert angle_bound(64, 200) == pytest.approx(89.01, abs=5e-3)
    assert angle_bound(2048, 8142) == pytest.approx(89.945, abs=5e-4)


def test_round_trip_is_bit_exact_and_digest_guards_it():
    spec = FrameSpec(64, 10)
    frame = build(spec)
    values = pack(frame.weight, mask(64, 10, 0.6, 0))
    assert values.numel() == 640 - 384
    weight = unpack(values, spec, frame.digest)
    assert weight.numpy().tobytes() == frame.weight.numpy().tobytes()
    assert digest(weight) == frame.digest == hashlib.sha256(frame.weight.numpy().astype("<f4").tobytes()).hexdigest()

    values[3] = torch.nextafter(values[3], torch.tensor(1.0))
    with pytest.raises(UserError, match="digest"):
        unpack(values, spec, frame.digest)
    with pytest.raises(UserError, match=r"shape \(255,\).*same frame settings"):
        unpack(values[:-1], spec)
    with pytest.raises(UserError, match="digest"):
        unpack(pack(frame.weight, mask(64, 10, 0.6, 0)), replace(spec, seed=1), frame.digest)


def test_pack_refuses_a_mask_that_would_lose_values():
    frame = build(FrameSpec(64, 10))
    with pytest.raises(UserError, match="not zero outside its mask"):
        pack(frame.weight, mask(64, 10, 0.6, 1))
    with pytest.raises(UserError, match="does not fit"):
        pack(frame.weight, mask(64, 11, 0.6, 0))


def test_report_is_plain_data():
    assert all(isinstance(value, int | float | str) for value in asdict(build(FrameSpec(16, 4)).report).values())


# --- the objectives -----------------------------------------------------------------------------------------


def upper(W: Tensor) -> Tensor:
    return (W @ W.T)[torch.ones(len(W), len(W)).triu(1).bool()]


def lse_by_definition(W: Tensor) -> Tensor:
    return torch.logsumexp(50 * upper(W), dim=0) / 50


def gram_by_definition(W: Tensor) -> Tensor:
    return (upper(W) + 1 / (len(W) - 1)).square().sum()


@pytest.mark.parametrize(
    ("objective", "definition"),
    [
        (lambda W: frame_solver.log_sum_exp(W, 50.0), lse_by_definition),
        (frame_solver.gram_energy, gram_by_definition),
        (frame_solver.frame_potential, gram_by_definition),  # differs by a constant on unit rows
    ],
)
def test_gradients_by_hand(objective: frame_solver.Objective, definition: object, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(frame_solver, "BLOCK", 7)
    generator = torch.Generator().manual_seed(0)
    W = torch.nn.functional.normalize(torch.randn(30, 12, dtype=torch.float64, generator=generator), dim=1)
    W.requires_grad_()
    assert callable(definition)
    (expected,) = torch.autograd.grad(definition(W), W)
    value, grad, worst = objective(W.detach())

    def tangent(G: Tensor) -> Tensor:
        return G - (G * W).sum(dim=1, keepdim=True) * W

    torch.testing.assert_close(tangent(grad), tangent(expected))
    if objective is not frame_solver.frame_potential:
        assert value == pytest.approx(definition(W).item())
        assert worst == pytest.approx(upper(W).max().item())


# --- memory and devices -------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Remembers how many numbers the largest tensor had that was made."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(t.numel() for t in (out,) if isinstance(t, Tensor))])
        return out


def test_no_matrix_of_all_pairs_is_ever_held(monkeypatch: pytest.MonkeyPatch):
    for module in ("common.frame", "common.frame_solver"):
        monkeypatch.setattr(f"{module}.BLOCK", 16)
    with Largest() as largest:
        build(FrameSpec(24, 400, max_evaluations=20))
    assert largest.numbers == 24 * 400  # those of the frame; a block has 16 * 400, all pairs are 400 * 400


def test_blocks_do_not_change_what_is_found(monkeypatch: pytest.MonkeyPatch):
    spec = FrameSpec(64, 200, max_evaluations=40)
    whole = build(spec).weight
    monkeypatch.setattr(frame_solver, "BLOCK", 16)
    torch.testing.assert_close(build(spec).weight, whole, atol=1e-6, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("classes", [10, 200])
def test_a_frame_from_a_gpu_is_as_good(classes: int):
    spec = FrameSpec(64, classes, max_evaluations=200)
    here, there = build(spec), build(spec, device="cuda")
    assert there.weight.device.type == "cpu"
    assert there.report.min_angle_deg == pytest.approx(here.report.min_angle_deg, abs=0.1)
    assert torch.equal(there.weight != 0, here.weight != 0)
