"""The record, the ladder and the report, against a model known in closed form: what is right passes, what is not fails.

The reference here is made by hand in float64 from the paper's formulas. Of ddpmx it takes the noise alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import io
import json
import math
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ddpmx
import ddpmx.parity
from ddpmx.errors import DdpmxError, FileFormatError, InputError, NumericError, OutputError, SpecError
from ddpmx.noise import Purpose, normal
from ddpmx.parity import report
from ddpmx.parity.ladder import BOUNDS, Climb, Rung, check_same_model, climb
from ddpmx.parity.reference import Reference, diffuse, diffusion_noise, elements, recorded_steps
from ddpmx.spec import ModelSpec
from oracles import gaussian
from oracles.toy_backend import ToyBackend

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="not verified here: the plots of a report (no matplotlib)"
)

SPEC, SHAPE, SIZE = gaussian.SPEC, gaussian.SHAPE, math.prod(gaussian.SHAPE)
T, STEPS, SEED = 1000, 50, 7
ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, T))

ROWS, BATCH = "identical rows, largest difference", "batch against one by one, largest difference"
EPS, PIXEL, STEP = "ε, RMS", "ε, largest error", "one step, RMS of x_{t−1}"
BITS = "variational bound, change in bits/dim"
FORCED, FORCED_STEP = "teacher-forced chain, RMS of ε", "teacher-forced chain, RMS of x_{t−1}"
FREE = f"free chain of {STEPS} steps, pixels within one level"
ALL = [ROWS, BATCH, EPS, PIXEL, STEP, BITS, FORCED, FORCED_STEP, FREE]


# --- the oracle ------------------------------------------------------------------------------------------------------


def eps_by_hand(x: np.ndarray, t: int) -> np.ndarray:
    kept = ALPHA_BAR[t]
    return np.sqrt(1 - kept) * (x - np.sqrt(kept) * gaussian.MU) / (kept * gaussian.S**2 + 1 - kept)


def chain_by_hand(images: int) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """(timesteps, the state before each step, the samples) of Algorithm 2 with σ² = β over STEPS timesteps."""

    def draw(t: int, purpose: Purpose) -> np.ndarray:
        return normal(SEED, range(images), t, purpose, SIZE).reshape(images, *SHAPE).astype(np.float64)

    grid = np.round(np.linspace(0, T - 1, STEPS)).astype(int)
    kept = ALPHA_BAR[grid]
    before = np.append(1.0, kept[:-1])
    beta = 1 - kept / before
    x, states = draw(0, Purpose.INITIAL), []
    for i in reversed(range(STEPS)):
        states.append(x)
        x0 = (x - np.sqrt(1 - kept[i]) * eps_by_hand(x, grid[i])) / np.sqrt(kept[i])
        x0 = x0.clip(-1, 1)
        x = np.sqrt(before[i]) * beta[i] * x0 + np.sqrt(1 - beta[i]) * (1 - before[i]) * x
        x /= 1 - kept[i]
        if i:
            x += np.sqrt(beta[i]) * draw(int(grid[i]), Purpose.STEP)
    return grid[::-1], states, x


def make_reference(**changes: Any) -> Reference:
    t = np.round(np.linspace(0, T - 1, 32)).astype(np.int32)
    x0 = (gaussian.MU + gaussian.S * np.random.default_rng(0).standard_normal((2, *SHAPE))).clip(-1, 1)
    x0 = np.floor(127.5 * x0 + 128).astype(np.uint8)
    out, losses = [], []
    for step in t.tolist():
        z = normal(SEED, range(2), step, Purpose.DIFFUSE, SIZE).reshape(2, *SHAPE)
        x_t = np.sqrt(ALPHA_BAR[step]) * (x0 / 127.5 - 1) + np.sqrt(1 - ALPHA_BAR[step]) * z
        out.append(eps_by_hand(x_t, step).reshape(2, SIZE))
        losses.append(np.mean((out[-1] - z.reshape(2, SIZE)) ** 2))
    timesteps, states, samples = chain_by_hand(4)
    at = np.unique(np.round(np.linspace(0, STEPS - 1, 32)).astype(np.int64))
    parts: dict[str, Any] = {
        "spec": SPEC,
        "made_with": "NumPy, by hand",
        "seed": SEED,
        "real": True,
        "loss": float(np.median(losses)),
        "t": t,
        "x0": x0,
        "out": np.array(out, np.float32),
        "steps": STEPS,
        "at": at,
        "state": np.array([states[i][0] for i in at], np.float32),
        "state_out": np.array([eps_by_hand(states[i][0], timesteps[i]).reshape(SIZE) for i in at], np.float32),
        "final": np.floor(127.5 * samples + 128).clip(0, 255).astype(np.uint8),
    }
    return Reference(**{**parts, **changes})


@pytest.fixture(scope="module")
def reference() -> Reference:
    return make_reference()


@pytest.fixture(scope="module")
def untrained() -> Reference:
    return make_reference(loss=0.5)


T_CHECKED = int(np.round(np.linspace(0, T - 1, 32))[20])
"""Among the t of the first rungs, and not on the chain."""
T_CHAIN = int(np.round(np.linspace(0, T - 1, STEPS))[22])
"""The other way round."""
PATTERN = np.random.default_rng(1).standard_normal((T, *SHAPE)).astype(np.float32)
"""Noise that depends on t, and not on the batch."""


class Faulty:
    """The closed form, and then ``fault(x, t, out)`` has its way with ``out``."""

    description = "toy with a fault"

    def __init__(self, fault: Callable[[np.ndarray, np.ndarray, np.ndarray], None]) -> None:
        self._inner, self._fault = ToyBackend(), fault

    def bind(self, buffers) -> None:
        self._buffers = buffers
        self._inner.bind(buffers)

    def enqueue(self) -> None:
        self._inner.enqueue()
        self._fault(self._buffers.x, self._buffers.t, self._buffers.out)

    def close(self) -> None:
        pass


def failed(result: Climb) -> list[str]:
    return [rung.name for rung in result.rungs if not rung.passed]


def rung(result: Climb, name: str) -> Rung:
    (found,) = (rung for rung in result.rungs if rung.name == name)
    return found


def noisy(size: float) -> Faulty:
    def fault(x, t, out):
        out += np.float32(size) * PATTERN[t]

    return Faulty(fault)


def biased(size: float) -> Faulty:
    def fault(x, t, out):
        out += np.float32(size)

    return Faulty(fault)


# --- what is right passes --------------------------------------------------------------------------------------------


def test_the_two_grids_differ_where_the_faults_below_need_it(reference):
    chain = np.round(np.linspace(0, T - 1, STEPS)).astype(int)
    recorded = chain[::-1][reference.at]
    assert T_CHECKED in reference.t
    assert T_CHECKED not in chain
    assert T_CHAIN in recorded
    assert T_CHAIN not in reference.t


def test_the_file_in_onnxruntime_passes(reference, gaussian_onnx, figure):
    pytest.importorskip("onnxruntime", reason="not verified here: the ladder with a file (no onnxruntime)")
    with ddpmx.load(gaussian_onnx, threads=1) as pipeline:
        result = climb(pipeline._backend, pipeline.spec, reference)
    assert [rung.name for rung in result.rungs] == ALL
    assert failed(result) == []
    assert result.passed
    assert result.verdict == "PASSED: the PyTorch model, 9 of 9 bounds hold"
    assert "onnxruntime" in result.ran_on
    for name in (EPS, PIXEL, STEP, BITS, FORCED):
        measured = rung(result, name)
        figure(f"closed form in onnxruntime against float64: {name}", measured.value, at_most=measured.bound)
    figure("closed form in onnxruntime against float64: pixels", rung(result, FREE).value, at_least=0.999)
    assert result.finals.shape == (4, 8, 8, 3)
    assert result.finals.dtype == np.uint8


def test_the_closed_form_in_numpy_passes_and_its_curves_fit_the_record(reference):
    result = climb(ToyBackend(), SPEC, reference)
    assert failed(result) == []
    curves = result.curves
    for name in ("t", "eps", "eps_pixel", "step"):
        assert len(curves[name]) == 32
    for name in ("chain_t", "forced", "forced_step", "free"):
        assert len(curves[name]) == len(reference.at)
    assert curves["chain_t"][0] == T - 1
    assert curves["chain_t"][-1] == 0
    assert np.all(np.diff(curves["chain_t"]) < 0)
    assert curves["free"][0] == 0, "both chains start at the same x_T"
    assert curves["levels_apart"].sum() == 4 * SIZE
    assert rung(result, ROWS).worst == rung(result, BATCH).worst == "equal bit for bit"


def test_errors_are_given_in_units_of_the_answers(reference):
    assert reference.scale == pytest.approx(np.sqrt(np.mean(reference.out.astype(np.float64) ** 2)))
    result = climb(noisy(1e-3 * reference.scale), SPEC, reference)
    assert result.curves["eps"] == pytest.approx(1e-3 * np.sqrt((PATTERN[reference.t] ** 2).mean((1, 2, 3))), rel=1e-2)
    assert rung(result, EPS).value == result.curves["eps"].max()
    assert rung(result, PIXEL).value == pytest.approx(1e-3 * np.abs(PATTERN[reference.t]).max(), rel=1e-2)


def test_one_step_and_the_bound_are_what_the_formulas_say(reference):
    """Equation 7 for x_{t−1}, equation 10 for the bits, both by hand in float64."""
    size = 1e-3
    result = climb(noisy(size), SPEC, reference)
    before = np.append(1.0, ALPHA_BAR[:-1])
    beta = 1 - ALPHA_BAR / before
    steps, bits = [], np.zeros(2)
    owners = np.abs(np.arange(1, T)[:, None] - reference.t).argmin(axis=1)
    for i, t in enumerate(reference.t.tolist()):
        kept, to_x0 = ALPHA_BAR[t], np.sqrt(before[t]) * beta[t] / (1 - ALPHA_BAR[t])
        clean = reference.x0 / 127.5 - 1
        x = np.sqrt(kept) * clean + np.sqrt(1 - kept) * normal(SEED, range(2), t, Purpose.DIFFUSE, SIZE).reshape(
            2, *SHAPE
        )
        wrong = eps_by_hand(x, t) + size * PATTERN[t]
        guesses = [
            ((x - np.sqrt(1 - kept) * answer) / np.sqrt(kept)).clip(-1, 1) for answer in (wrong, eps_by_hand(x, t))
        ]
        steps.append(to_x0 * np.sqrt(np.mean((guesses[0] - guesses[1]) ** 2)))
        if t:
            terms = [to_x0**2 * np.mean((clean - guess) ** 2) / (2 * beta[t]) for guess in guesses]
            bits += np.array(terms) * np.count_nonzero(owners == i) / np.log(2)
    # float32: an update of numbers near 1 is exact to about 1e-7
    assert result.curves["step"] == pytest.approx(steps, rel=1e-2, abs=2e-7)
    assert rung(result, BITS).value == pytest.approx(abs(bits[0] - bits[1]), rel=2e-2, abs=1e-7)
    assert f"{bits[1]:.4f} by PyTorch" in rung(result, BITS).worst


@pytest.mark.parametrize("batch", [1, 3, 16, 100])
def test_the_batch_changes_no_rung_of_an_exact_backend(reference, batch):
    usual, other = climb(ToyBackend(), SPEC, reference), climb(ToyBackend(), SPEC, reference, batch=batch)
    assert other.passed
    assert other.rungs[2:] == usual.rungs[2:]
    assert np.array_equal(other.finals, usual.finals)
    assert {r.skipped for r in other.rungs[:2]} == ({"a batch of one"} if batch == 1 else {None})


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_no_run_of_the_ladder_is_larger_than_the_batch_but_the_free_chain(reference, batch):
    backend = ToyBackend()
    climb(backend, SPEC, reference, batch=batch)
    assert {size for _, size in backend.asked} == {1, batch, len(reference.final)}


@pytest.mark.parametrize("batch", [0, -1, 1 << 17])
def test_a_batch_out_of_range_is_refused(reference, batch):
    with pytest.raises(InputError, match="batch"):
        climb(ToyBackend(), SPEC, reference, batch=batch)


@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize("what", ["reference", "untrained", "nothing"])
def test_progress_counts_to_its_total(request, what, batch):
    held = None if what == "nothing" else request.getfixturevalue(what)
    backend, told = ToyBackend(), []
    climb(backend, SPEC, held, batch=batch, progress=lambda done, total: told.append((done, total)))
    total = told[0][1]
    assert told == [(i, total) for i in range(1, total + 1)]
    assert len(backend.asked) == total


# --- each rung can fail ----------------------------------------------------------------------------------------------


def noise_at_one_t(x, t, out):
    out[t == T_CHECKED] += np.float32(1e-3) * PATTERN[T_CHECKED]


def noise_on_the_chain_only(x, t, out):
    out[t == T_CHAIN] += np.float32(1e-3) * PATTERN[T_CHAIN]


def row_0_alone_is_right(x, t, out):
    out[1:] *= np.float32(1.01)


def neighbours_leak(x, t, out):
    out += np.float32(0.01) * x.mean(axis=0)


def rows_swapped(x, t, out):
    out[...] = out[::-1].copy()


def t_is_one_late(x, t, out):
    for row, step in enumerate(t.tolist()):
        out[row] = eps_by_hand(x[row].astype(np.float64), min(step + 1, T - 1))


def channels_swapped(x, t, out):
    out[...] = out[:, ::-1].copy()


def upside_down(x, t, out):
    out[...] = out[:, :, ::-1].copy()


def a_bias(x, t, out):
    out += np.float32(0.1)


def nothing_at_all(x, t, out):
    out[...] = 0


@pytest.mark.parametrize(
    ("fault", "first", "others", "worst"),
    [
        (noise_at_one_t, EPS, {PIXEL, STEP}, T_CHECKED),
        (noise_on_the_chain_only, FORCED, {FORCED_STEP}, T_CHAIN),
        (row_0_alone_is_right, ROWS, {BATCH}, None),
        (neighbours_leak, BATCH, set(), None),
        (rows_swapped, BATCH, set(), None),
        (t_is_one_late, EPS, {PIXEL, STEP, FORCED, FORCED_STEP}, 0),
        (a_bias, EPS, {PIXEL, STEP, FORCED, FORCED_STEP, FREE}, None),
        (channels_swapped, EPS, {PIXEL, STEP, FORCED, FORCED_STEP, FREE}, None),
        (upside_down, EPS, {PIXEL, STEP, FORCED, FORCED_STEP, FREE}, None),
        (nothing_at_all, EPS, {PIXEL, STEP, FORCED, FORCED_STEP, FREE}, None),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_fault_is_found_by_the_rung_that_it_concerns(reference, fault, first, others, worst):
    result = climb(Faulty(fault), SPEC, reference)
    assert not result.passed
    assert failed(result)[0] == first
    assert others <= set(failed(result))
    assert result.verdict.startswith(f"FAILED: this is not the PyTorch model: {first}: ")
    if worst is not None:
        assert rung(result, first).worst == f"worst at t = {worst}"
        assert f"(worst at t = {worst})" in result.verdict
    more = len(failed(result)) - 1
    assert result.verdict.endswith(f"; and {more} more") == (more > 0)


def test_noise_at_one_t_spoils_no_other_point_of_the_curves(reference):
    curves = climb(Faulty(noise_at_one_t), SPEC, reference).curves
    bad = reference.t == T_CHECKED
    assert np.all(curves["eps"][bad] > 10 * BOUNDS["fp32"].eps)
    assert np.all(curves["eps"][~bad] < BOUNDS["fp32"].eps / 10)
    assert curves["forced"].max() < BOUNDS["fp32"].eps / 10


def test_one_pixel_of_one_image_cannot_hide_in_the_average(reference):
    """RMS over 384 numbers makes it 1/20."""
    k = 20
    image = reference.inputs(k)[1]

    def fault(x, t, out):
        out[(x == image).all(axis=(1, 2, 3)), 2, 7, 3] += np.float32(3e-4 * reference.scale)

    result = climb(Faulty(fault), SPEC, reference)
    assert failed(result) == [PIXEL]
    assert f"(worst at t = {reference.t[k]})" in result.verdict
    assert rung(result, PIXEL).value == pytest.approx(3e-4, rel=1e-2)
    assert rung(result, EPS).value < BOUNDS["fp32"].eps


@pytest.mark.parametrize("channel", range(3))
@pytest.mark.parametrize("corner", [(0, 0), (0, 7), (7, 0), (7, 7)])
def test_no_corner_of_a_small_image_goes_unseen(reference, channel, corner):
    def fault(x, t, out):
        out[:, channel, corner[0], corner[1]] += np.float32(1e-3)

    assert {PIXEL, FORCED} <= set(failed(climb(Faulty(fault), SPEC, reference)))


def test_a_bias_that_no_single_step_shows_is_seen_in_the_free_chain(reference):
    """Against noise of the same size, which averages out. The closed form forgets quickly, so all bounds hold."""
    spec, size = SPEC.replace(precision="bf16"), 0.025 * reference.scale
    bias, noise = climb(biased(size), spec, reference), climb(noisy(size), spec, reference)
    for name in (EPS, STEP, FORCED, FORCED_STEP):
        assert rung(bias, name).passed
        assert rung(bias, name).value < 1.1 * rung(noise, name).value
    assert biggest_drift(bias) > 3 * biggest_drift(noise)
    equal = [result.curves["levels_apart"][0] / (4 * SIZE) for result in (bias, noise)]
    assert equal[0] < 0.2 < 0.5 < equal[1]
    assert f"{equal[0]:.2%} equal" in rung(bias, FREE).worst


@pytest.mark.parametrize(("levels", "passes"), [(1, True), (2, False)])
@pytest.mark.parametrize("sign", [1, -1])
def test_one_level_of_256_is_allowed_in_the_free_chain_and_two_are_not(reference, levels, passes, sign):
    final = reference.final.astype(int) + sign * levels
    assert 0 <= final.min() <= final.max() <= 255
    result = climb(ToyBackend(), SPEC, dataclasses.replace(reference, final=final.astype(np.uint8)))
    assert rung(result, FREE).value == passes
    assert failed(result) == ([] if passes else [FREE])
    assert f"at most {levels} apart, PSNR {20 * np.log10(255 / levels):.1f} dB" in rung(result, FREE).worst


def test_what_goes_wrong_between_the_recorded_states_is_seen_in_the_free_chain(reference):
    """18 of its 50 steps are recorded nowhere."""
    chain = np.round(np.linspace(0, T - 1, STEPS)).astype(int)
    unseen = np.setdiff1d(chain, [*chain[::-1][reference.at], *reference.t])
    assert len(unseen) >= 10

    def fault(x, t, out):
        out[np.isin(t, unseen)] += np.float32(1)

    result = climb(Faulty(fault), SPEC, reference)
    assert failed(result) == [FREE]
    assert result.verdict.startswith(f"FAILED: this is not the PyTorch model: {FREE}: ")
    assert "< 0.999" in str(rung(result, FREE))
    assert "PSNR" in rung(result, FREE).worst
    apart = np.abs(result.finals.astype(int) - reference.final.transpose(0, 2, 3, 1))
    assert rung(result, FREE).value == np.mean(apart <= 1)
    assert result.curves["levels_apart"].tolist() == np.bincount(apart.reshape(-1)).tolist()


def biggest_drift(result: Climb) -> float:
    return float(result.curves["free"].max())


def test_the_curve_of_the_free_chain_shows_what_adds_up(reference):
    """All rungs hold, and still the drift is several times what a step does."""
    result = climb(biased(1e-5), SPEC, reference)
    assert result.passed
    curves = result.curves
    assert curves["free"].max() > 5 * curves["forced_step"].max()
    assert curves["free"].max() > 10 * biggest_drift(climb(ToyBackend(), SPEC, reference))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("step", [T_CHECKED, T_CHAIN, 0, T - 1])
def test_answers_that_are_no_numbers_are_an_error_that_names_t(reference, value, step):
    with pytest.raises(NumericError, match=f"t = {step} is not finite"):
        climb(ToyBackend(poison=(step, value)), SPEC, reference)


def test_answers_that_are_no_numbers_are_found_without_a_reference():
    with pytest.raises(NumericError, match="t = 999 is not finite"):
        climb(ToyBackend(poison=(999, np.nan)), SPEC, None)


# --- bounds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "passes"),
    [(1e-6, {"fp32", "fp16", "bf16"}), (1e-3, {"fp16", "bf16"}), (1e-2, {"bf16"}), (0.1, set())],
)
def test_what_passes_depends_on_the_precision(reference, size, passes):
    found = {p for p in BOUNDS if climb(noisy(size), SPEC.replace(precision=p), reference).passed}
    assert found == passes


def test_bounds_widen_with_fewer_bits():
    for name in ("eps", "eps_pixel", "step", "bits"):
        assert getattr(BOUNDS["fp32"], name) < getattr(BOUNDS["fp16"], name) < getattr(BOUNDS["bf16"], name)
    assert BOUNDS["fp32"].pixels > BOUNDS["fp16"].pixels > BOUNDS["bf16"].pixels > 0.5
    assert BOUNDS["fp32"].eps >= 2**-24, "what float32 can keep"


@pytest.mark.parametrize(
    ("rung", "passed", "text"),
    [
        (Rung("ε", 1e-6, 2e-5, worst="worst at t = 999"), True, "ε: 1e-06 ≤ 2e-05 (worst at t = 999)"),
        (Rung("ε", 2e-5, 2e-5), True, "ε: 2e-05 ≤ 2e-05"),
        (Rung("ε", 3e-5, 2e-5), False, "ε: 3e-05 > 2e-05"),
        (Rung("pixels", 0.9995, 0.999, at_least=True), True, "pixels: 99.9500% ≥ 0.999"),
        (Rung("pixels", 0.5, 0.999, at_least=True, worst="9 apart"), False, "pixels: 50.0000% < 0.999 (9 apart)"),
        (Rung("pixels", math.nan, 0.999, at_least=True, skipped="no chain"), True, "pixels: not judged, no chain"),
        (Rung("ε", math.nan, 2e-5), False, "ε: nan > 2e-05"),
        (Rung("pixels", math.nan, 0.9, at_least=True), False, "pixels: nan% < 0.9"),
    ],
)
def test_a_rung_in_words(rung, passed, text):
    assert rung.passed is passed
    assert str(rung) == text


# --- what cannot be judged -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [0.5, 1.0, 3.0])
def test_the_free_chain_of_an_untrained_network_is_not_judged_and_that_is_said(loss):
    result = climb(biased(1.0), SPEC, make_reference(loss=loss))
    free = result.rungs[-1]
    assert free.name == FREE
    assert free.passed
    assert "not trained" in free.skipped
    assert f"{loss:.2f}" in str(free)
    assert result.finals is None
    assert "free" not in result.curves
    assert {EPS, FORCED} <= set(failed(result)), "the others are"


def test_a_verdict_says_how_many_bounds_were_not_judged(untrained, reference):
    assert climb(ToyBackend(), SPEC, untrained).verdict == (
        "PASSED: the PyTorch model, 8 of 8 bounds hold; 1 not judged"
    )
    assert make_reference(loss=0.49).trained
    assert not untrained.trained


@pytest.mark.parametrize("size", [0, 1e-7, 1e-5])
def test_a_network_that_answers_nothing_is_no_reference(reference, size):
    silent = dataclasses.replace(reference, out=np.full_like(reference.out, size))
    with pytest.raises(SpecError, match="answers nothing"):
        climb(ToyBackend(), SPEC, silent)


def test_without_a_reference_a_file_is_held_against_itself():
    result = climb(ToyBackend(), SPEC, None)
    assert [rung.name for rung in result.rungs] == [ROWS, BATCH]
    assert result.verdict.startswith("PASSED: consistent with itself, 2 of 2 bounds hold")
    assert "NOT VERIFIED" in result.verdict
    assert result.curves == {}
    assert result.finals is None


@pytest.mark.parametrize(
    ("backend", "found"),
    [
        (ToyBackend(sways="place"), ROWS),
        (ToyBackend(sways="size"), BATCH),
        (Faulty(row_0_alone_is_right), ROWS),
        (Faulty(neighbours_leak), BATCH),
    ],
    ids=["place", "size", "row 0", "neighbours"],
)
def test_without_a_reference_a_batch_that_is_computed_wrongly_fails(backend, found):
    result = climb(backend, SPEC, None)
    assert failed(result)[0] == found
    assert result.verdict.startswith("FAILED")


def test_where_nothing_was_judged_nothing_passed():
    assert not climb(Faulty(neighbours_leak), SPEC, None, batch=1).verdict.startswith("PASSED")


# --- the same model --------------------------------------------------------------------------------------------------

ONE, OTHER = "1" * 64, "2" * 64


@pytest.mark.parametrize(
    ("mine", "theirs", "named"),
    [
        ({"shape": (3, 8, 4)}, {}, "shape"),
        ({"schedule": "cosine", "schedule_params": {}}, {}, "schedule"),
        ({"schedule_params": {"beta_start": 2e-4}}, {}, "schedule_params"),
        ({"timesteps": 999}, {}, "timesteps"),
        ({"prediction": "v"}, {}, "prediction"),
        ({"variance": "fixed_small"}, {}, "variance"),
        ({"clip": None}, {}, "clip"),
        ({"weights": ONE}, {"weights": OTHER}, "weights"),
        ({"weights": ONE}, {}, "weights"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_the_record_of_another_model_is_refused(reference, mine, theirs, named):
    record = dataclasses.replace(reference, spec=SPEC.replace(**theirs))
    with pytest.raises(SpecError, match="another model") as caught:
        check_same_model(SPEC.replace(**mine), record)
    assert named in caught.value.note
    with pytest.raises(SpecError, match="another model"):
        climb(ToyBackend(), SPEC.replace(**mine), record)


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        ({}, {}),
        ({"precision": "fp16"}, {}),
        ({"ddpmx": "9.9"}, {}),
        ({"weights": ONE}, {"weights": ONE}),
        ({"weights": None}, {"weights": ONE}),
    ],
)
def test_precision_version_and_unknown_weights_do_not_matter(reference, mine, theirs):
    check_same_model(SPEC.replace(**mine), dataclasses.replace(reference, spec=SPEC.replace(**theirs)))


# --- the record as a file --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(reference, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("record") / "model.parity.npz"
    reference.save(path)
    return path


def test_a_record_comes_back_as_it_was(reference, saved):
    again = Reference.load(saved)
    for field in dataclasses.fields(Reference):
        before, after = getattr(reference, field.name), getattr(again, field.name)
        if isinstance(before, np.ndarray):
            assert before.dtype == after.dtype
            assert np.array_equal(before, after), field.name
        else:
            assert before == after
            assert type(before) is type(after)
    assert again.scale == reference.scale
    assert climb(ToyBackend(), SPEC, again).rungs == climb(ToyBackend(), SPEC, reference).rungs


def test_saving_is_all_or_nothing(reference, tmp_path, monkeypatch):
    path = tmp_path / "model.parity.npz"
    path.write_text("yesterday")
    monkeypatch.setattr(np, "savez_compressed", raising(OSError(28, "No space left on device")))
    with pytest.raises(OutputError):
        reference.save(path)
    assert path.read_text() == "yesterday"
    assert [p.name for p in tmp_path.iterdir()] == ["model.parity.npz"]


Parts = tuple[dict[str, np.ndarray], dict[str, Any]]


def tampered(saved: Path, path: Path, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> Path:
    """A record whose arrays and whose JSON ``change`` has edited."""
    with np.load(saved) as archive:
        arrays = {name: archive[name].copy() for name in archive.files}
    about = json.loads(arrays.pop("about").tobytes())
    change(arrays, about)
    np.savez(path, about=np.frombuffer(json.dumps(about).encode(), np.uint8), **arrays)
    return path


def refused(path: Path) -> DdpmxError:
    with pytest.raises((FileFormatError, SpecError)) as caught:
        Reference.load(path)
    assert str(path) in caught.value.fact
    return caught.value


def test_a_record_that_nobody_tampered_with_is_accepted(saved, tmp_path):
    """So that the refusals below are due to what was changed."""
    Reference.load(tampered(saved, tmp_path / "same.npz", lambda arrays, about: None))


ARRAYS = ["t", "x0", "out", "at", "state", "state_out", "final"]
TOLD = ["format", "spec", "made_with", "seed", "real", "loss", "steps"]


@pytest.mark.parametrize("name", ARRAYS)
def test_a_missing_array_is_refused(saved, tmp_path, name):
    refused(tampered(saved, tmp_path / "x.npz", lambda arrays, about: arrays.pop(name)))


@pytest.mark.parametrize("name", TOLD)
def test_a_missing_statement_is_refused(saved, tmp_path, name):
    refused(tampered(saved, tmp_path / "x.npz", lambda arrays, about: about.pop(name)))


def set_to(**values: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    """Changes the statement of that name."""
    return lambda arrays, about: about.update(values)


def array(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def apply(arrays, about):
        arrays[name] = change(arrays[name])

    return apply


def with_value(value: float, index: tuple[int, ...] | int = 0) -> Callable[[np.ndarray], np.ndarray]:
    def change(values):
        values[index] = value
        return values

    return change


TAMPERINGS: dict[str, Callable[[dict[str, Any], dict[str, Any]], Any]] = {
    "an array too many": lambda arrays, about: arrays.update(more=np.zeros(3)),
    "a statement too many": set_to(more=1),
    "another format": set_to(format="ddpmx-parity2"),
    "a format that is a number": set_to(format=1),
    "no spec": set_to(spec=None),
    "a spec without a shape": set_to(spec={}),
    "a damaged spec": lambda arrays, about: about["spec"].update(coefficients="00000000"),
    "a spec of another shape": lambda arrays, about: about["spec"].update(shape=[3, 8, 4]),
    "float64 answers": array("out", lambda a: a.astype(np.float64)),
    "half answers": array("state_out", lambda a: a.astype(np.float16)),
    "answers of the other byte order": array("out", lambda a: a.astype(">f4")),
    "int64 t": array("t", lambda a: a.astype(np.int64)),
    "float t": array("t", lambda a: a.astype(np.float32)),
    "int32 at": array("at", lambda a: a.astype(np.int32)),
    "float images": array("x0", lambda a: a.astype(np.float32)),
    "signed images": array("final", lambda a: a.astype(np.int8)),
    "an answer too few": array("out", lambda a: a[:, :, :-1]),
    "an image too few": array("x0", lambda a: a[:1]),
    "a t too many": array("t", lambda a: np.append(a, a[-1:])),
    "a state too few": array("state", lambda a: a[:-1]),
    "transposed states": array("state", lambda a: a.transpose(0, 2, 3, 1)),
    "no final image": array("final", lambda a: a[:0]),
    "final images of another size": array("final", lambda a: a[:, :, :4]),
    "no timesteps": lambda arrays, about: arrays.update(t=arrays["t"][:0], out=arrays["out"][:0]),
    "NaN in the answers": array("out", with_value(np.nan, (3, 1, 100))),
    "an infinity in a state": array("state", with_value(np.inf, (3, 1, 2, 2))),
    "NaN in a state's answer": array("state_out", with_value(-np.nan, (3, 1))),
    "t below 0": array("t", with_value(-1)),
    "t = T": array("t", with_value(T, -1)),
    "at below 0": array("at", with_value(-1)),
    "at beyond the chain": array("at", with_value(STEPS, -1)),
    "at twice the same": array("at", with_value(0, 1)),
    "at falling": array("at", lambda a: a[::-1]),
    "no step": set_to(steps=0),
    "more steps than T": set_to(steps=T + 1),
    "fewer steps than recorded": set_to(steps=STEPS - 1),
    "steps that are no whole number": set_to(steps=50.0),
    "steps that are a yes": set_to(steps=True),
    "steps in words": set_to(steps="50"),
    "a negative seed": set_to(seed=-1),
    "a seed of 65 bits": set_to(seed=2**64),
    "a fractional seed": set_to(seed=1.5),
    "a loss that is no number": set_to(loss=math.nan),
    "an infinite loss": set_to(loss=math.inf),
    "no loss": set_to(loss=None),
    "real as a number": set_to(real=1),
    "made with a number": set_to(made_with=5),
    "no statement at all": lambda arrays, about: about.clear(),
    "no images at all, as numbers": array("x0", lambda a: a[0, 0, 0, 0:1]),
}
CRASHES: dict[str, Callable[[dict[str, Any], dict[str, Any]], Any]] = {
    "t without a dimension": array("t", lambda a: a[0]),
    "at without a dimension": array("at", lambda a: a[0]),
    "x0 without a dimension": array("x0", lambda a: a[0, 0, 0, 0]),
    "final without a dimension": array("final", lambda a: a[0, 0, 0, 0]),
    "an array as a statement": lambda arrays, about: about.update(t=arrays.pop("t").tolist()),
    "a statement as an array": lambda arrays, about: arrays.update(spec=np.zeros(SHAPE)),
}


@pytest.mark.parametrize("what", TAMPERINGS)
def test_a_record_that_was_tampered_with_is_refused(saved, tmp_path, what):
    refused(tampered(saved, tmp_path / "x.npz", TAMPERINGS[what]))


@pytest.mark.parametrize("what", CRASHES)
def test_a_record_with_parts_of_another_kind_is_refused(saved, tmp_path, what):
    refused(tampered(saved, tmp_path / "x.npz", CRASHES[what]))


def test_foreign_archives_are_refused_and_what_they_hold_is_said(tmp_path):
    path = tmp_path / "images.npz"
    np.savez(path, images=np.zeros((2, 8, 8, 3), np.uint8))
    assert "images" in refused(path).note
    np.savez(path)
    refused(path)
    np.savez(path, about=np.zeros(3))
    refused(path)
    for text in (b"[]", b"null", b"{", b"\xff\xfe", b"[" * 100_000, b"{}"):
        np.savez(path, about=np.frombuffer(text, np.uint8))
        refused(path)


def test_objects_are_not_unpickled(saved, tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "trodden",)

    path = tmp_path / "x.npz"
    with np.load(saved) as archive:
        arrays = {name: archive[name] for name in archive.files}
    np.savez(path, **{**arrays, "t": np.array([Trap()], dtype=object)})
    refused(path)
    assert not (tmp_path / "trodden").exists()


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.6, 0.9, 0.99, 0.9999])
def test_a_truncated_record_is_refused(saved, tmp_path, share):
    data = saved.read_bytes()
    path = tmp_path / "x.npz"
    path.write_bytes(data[: int(len(data) * share)])
    refused(path)


def test_a_changed_byte_is_noticed_or_changes_nothing(reference, saved, tmp_path):
    data, path = saved.read_bytes(), tmp_path / "x.npz"
    noticed = 0
    for at in np.random.default_rng(0).integers(0, len(data), 100).tolist():
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        try:
            again = Reference.load(path)
        except (FileFormatError, SpecError):
            noticed += 1
        else:
            assert np.array_equal(again.out, reference.out)
            assert np.array_equal(again.state, reference.state)
    assert noticed > 90


def test_what_is_no_archive_is_refused(tmp_path):
    refused(tmp_path / "missing.npz")
    refused(tmp_path)
    (tmp_path / "text.npz").write_text("<html>")
    refused(tmp_path / "text.npz")


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path):
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        stream = io.BytesIO()
        np.save(stream, np.zeros(70 << 20, np.uint8))
        archive.writestr("about.npy", stream.getvalue())
    assert "MiB" in refused(path).fact


@pytest.mark.parametrize(
    ("shape", "images", "chains", "steps"),
    [((3, 32, 32), 2, 4, 50), ((3, 256, 256), 1, 1, 20), ((3, 32, 32), 2, 4, 1000), ((3, 256, 256), 1, 1, 1000)],
)
def test_a_record_takes_at_most_4_mb(tmp_path, figure, shape, images, chains, steps):
    """Of random numbers, which do not compress."""
    random, kept, at = np.random.default_rng(0), len(elements(shape)), recorded_steps(steps, shape)
    record = Reference(
        spec=ModelSpec(shape),
        made_with="torch",
        seed=0,
        real=False,
        loss=0.1,
        t=np.round(np.linspace(0, 999, 32)).astype(np.int32),
        x0=random.integers(0, 256, (images, *shape), np.uint8),
        out=random.standard_normal((32, images, kept), np.float32),
        steps=steps,
        at=at,
        state=random.standard_normal((len(at), *shape), np.float32),
        state_out=random.standard_normal((len(at), kept), np.float32),
        final=random.integers(0, 256, (chains, *shape), np.uint8),
    )
    record.save(tmp_path / "x.npz")
    size = (tmp_path / "x.npz").stat().st_size
    figure(f"MB of a record of {shape}, a chain of {steps} steps", size / 1e6, at_most=4)
    Reference.load(tmp_path / "x.npz")


# --- which numbers, and from which inputs ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1, 1), SHAPE, (1, 16, 16), (3, 32, 32), (1, 64, 64)])
def test_of_small_images_all_numbers_are_kept(shape):
    assert np.array_equal(elements(shape), np.arange(math.prod(shape)))


@pytest.mark.parametrize(
    "shape", [(3, 64, 64), (3, 256, 256), (1, 512, 512), (4, 33, 47), (3, 128, 96), (1, 65, 65), (3, 1024, 1024)]
)
def test_of_large_images_4096_numbers_are_kept_from_everywhere(shape):
    kept = elements(shape)
    assert len(kept) == len(set(kept.tolist())) == 4096
    assert kept.min() >= 0
    assert kept.max() < math.prod(shape)
    assert np.all(np.diff(kept) > 0)
    c, y, x = np.unravel_index(kept, shape)
    rows, columns = np.array_split(np.arange(shape[1]), 2), np.array_split(np.arange(shape[2]), 2)
    for channel in range(shape[0]):
        assert np.mean(c == channel) == pytest.approx(1 / shape[0], rel=0.1)
        for part_y in rows:
            for part_x in columns:
                share = np.mean((c == channel) & np.isin(y, part_y) & np.isin(x, part_x))
                wanted = len(part_y) * len(part_x) / math.prod(shape)
                assert share == pytest.approx(wanted, rel=0.25)
    for phase in range(2):
        assert np.mean(x % 2 == phase) == pytest.approx(0.5, abs=0.1), "no column parity is left out"
        assert np.mean(y % 2 == phase) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("steps", [1, 2, 3, 20, 32, 50, 1000])
@pytest.mark.parametrize("shape", [SHAPE, (3, 32, 32), (3, 256, 256)])
def test_states_are_recorded_from_the_first_step_to_the_last(steps, shape):
    at = recorded_steps(steps, shape)
    assert at.dtype == np.int64
    assert np.all(np.diff(at) > 0)
    assert at[-1] == steps - 1
    assert steps == 1 or at[0] == 0
    assert len(at) <= min(steps, 32)
    assert len(at) == min(steps, 2 if shape == (3, 256, 256) else 32)


@pytest.mark.parametrize("t", [0, 1, 17, 500, 998, 999])
def test_diffused_images_are_those_of_equation_4(t):
    x0 = np.random.default_rng(2).uniform(-1, 1, (3, *SHAPE)).astype(np.float32)
    z = normal(SEED, range(3), t, Purpose.DIFFUSE, SIZE).reshape(x0.shape)
    assert np.array_equal(diffusion_noise(x0, t, SEED), z)
    wanted = np.sqrt(ALPHA_BAR[t]) * x0.astype(np.float64) + np.sqrt(1 - ALPHA_BAR[t]) * z.astype(np.float64)
    found = diffuse(SPEC.make_schedule(), x0, t, SEED)
    assert found.dtype == np.float32
    assert np.abs(found - wanted).max() < 1e-6


@pytest.mark.parametrize("t", [0, 300, 999])
def test_diffused_images_have_the_mean_and_the_variance_of_q(t):
    x0 = np.full((1, 3, 128, 128), 0.5, np.float32)
    x = diffuse(SPEC.make_schedule(), x0, t, 3).astype(np.float64)
    variance, n = 1 - ALPHA_BAR[t], x.size
    assert abs(x.mean() - 0.5 * np.sqrt(ALPHA_BAR[t])) < 4 * np.sqrt(variance / n)
    assert abs(x.var() / variance - 1) < 4 * np.sqrt(2 / n)


def test_the_inputs_differ_from_image_to_image_and_from_t_to_t(reference):
    noises = [diffusion_noise(np.zeros((2, *SHAPE), np.float32), t, SEED) for t in (0, 1)]
    flat = np.concatenate([noise.reshape(2, -1) for noise in noises])
    assert np.abs(np.corrcoef(flat) - np.eye(4)).max() < 0.3
    again = dataclasses.replace(reference, seed=8)
    assert not np.allclose(again.inputs(10), reference.inputs(10))


def test_another_process_makes_the_same_inputs(reference, saved):
    program = (
        "import hashlib, sys; from ddpmx.parity.reference import Reference; r = Reference.load(sys.argv[1]);"
        "print(hashlib.sha256(b''.join(r.inputs(k).tobytes() for k in range(len(r.t)))).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", program, str(saved)], capture_output=True, text=True, check=True)
    mine = hashlib.sha256(b"".join(reference.inputs(k).tobytes() for k in range(len(reference.t)))).hexdigest()
    assert done.stdout.strip() == mine


def test_of_a_large_image_the_kept_numbers_are_compared(reference):
    """3×40×40 is more than 4096: two thirds of its numbers are kept, and those are put side by side in order."""
    shape = (3, 40, 40)
    spec, kept = ModelSpec(shape), elements(shape)
    assert len(kept) == 4096 < math.prod(shape)

    class Linear:
        description = "x times its place"
        weights = np.linspace(0.5, 1.5, math.prod(shape), dtype=np.float32).reshape(shape)

        def bind(self, buffers):
            self.buffers = buffers

        def enqueue(self):
            self.buffers.out[...] = self.buffers.x * self.weights

    t = np.array([0, 500, 999], np.int32)
    x0 = np.random.default_rng(0).integers(0, 256, (2, *shape), np.uint8)
    states = np.random.default_rng(1).standard_normal((2, *shape), np.float32)
    inputs = np.stack([diffuse(spec.make_schedule(), x0 / np.float32(127.5) - 1, int(i), 0) for i in t])
    record = Reference(
        spec=spec, made_with="by hand", seed=0, real=True, loss=0.9, t=t, x0=x0,
        out=(inputs * Linear.weights).reshape(3, 2, -1)[:, :, kept], steps=5, at=np.array([0, 4]), state=states,
        state_out=(states * Linear.weights).reshape(2, -1)[:, kept], final=x0[:1],
    )  # fmt: skip
    assert climb(Linear(), spec, record).passed
    wrong = Linear()
    wrong.weights = Linear.weights.copy()
    wrong.weights.reshape(-1)[kept[2000]] += 0.5
    assert {PIXEL, FORCED} <= set(failed(climb(wrong, spec, record)))


# --- the report ------------------------------------------------------------------------------------------------------


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.fixture(scope="module")
def climbs(reference, untrained) -> dict[str, Climb]:
    return {
        "passed": climb(ToyBackend(), SPEC, reference),
        "failed": climb(Faulty(channels_swapped), SPEC.replace(precision="fp16"), reference),
        "untrained": climb(ToyBackend(), SPEC, untrained),
        "itself": climb(ToyBackend(), SPEC, None),
        "itself, failed": climb(Faulty(neighbours_leak), SPEC, None),
        "itself, one": climb(ToyBackend(), SPEC, None, batch=1),
    }


CLIMBS = ["passed", "failed", "untrained", "itself", "itself, failed", "itself, one"]


@pytest.fixture
def no_matplotlib(monkeypatch):
    for name in {"matplotlib", *(name for name in sys.modules if name.startswith("matplotlib."))}:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "ddpmx.parity.plots", raising=False)
    monkeypatch.delattr(ddpmx.parity, "plots", raising=False)


@pytest.mark.parametrize("name", CLIMBS)
def test_the_json_is_valid_and_holds_every_figure(climbs, name):
    result = climbs[name]
    values = json.loads(json.dumps(report.to_json(result, "some/model.onnx", {"polygraphy": None}), allow_nan=False))
    assert values["file"] == "model.onnx"
    assert values["polygraphy"] is None
    assert values["passed"] is result.passed
    assert values["verdict"] == result.verdict
    assert ModelSpec.from_json(values["spec"]) == result.spec
    assert [r["name"] for r in values["rungs"]] == [r.name for r in result.rungs]
    for told, real in zip(values["rungs"], result.rungs, strict=True):
        assert told["passed"] is real.passed
        assert told["bound"] == real.bound
        assert told["value"] == (None if math.isnan(real.value) else real.value)
    assert set(values["curves"]) == set(result.curves)
    if result.reference is None:
        assert values["reference"] is None
    else:
        assert values["reference"]["chain"] == STEPS
        assert values["reference"]["images"] == "the user's"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_json_is_valid_for_answers_beyond_all_measure():
    spec = SPEC.replace(clip=None)
    record = make_reference(spec=spec, loss=1.0)
    result = climb(biased(1e38), spec, record)
    assert not result.passed
    json.dumps(report.to_json(result, "model.onnx"), allow_nan=False)


@pytest.mark.parametrize("name", CLIMBS)
def test_the_text_names_every_rung_with_its_bound(climbs, name):
    result = climbs[name]
    text = report.to_markdown(result, "some/model.onnx", {})
    assert text.startswith(f"# model.onnx: {'passed' if result.passed else 'FAILED'}\n")
    assert result.verdict in text
    rows = [line for line in text.splitlines() if line.startswith("| ") and "measured" not in line]
    assert len(rows) == len(result.rungs)
    for row, one in zip(rows, result.rungs, strict=True):
        title, figure, bound, mark = (cell.strip() for cell in row.strip("|").split("|"))
        assert title == one.name
        assert bound == (f"≥ {one.bound:.1%}" if one.at_least else f"≤ {one.bound:.0e}")
        assert mark == ("not judged" if one.skipped else "holds" if one.passed else "**FAILS**")
        assert (figure == "—") == (one.skipped is not None)
        (meaning,) = (line for line in text.splitlines() if line.startswith(f"- **{one.name}.** "))
        assert len(meaning) > len(one.name) + 30, "what it means"
    assert "nan" not in text.lower()


def test_a_bound_is_given_with_the_digits_that_it_has():
    """0.999 is not 1: "≥ 100 %" would be another bound."""
    for bounds in BOUNDS.values():
        assert float(f"{bounds.pixels:.1%}".rstrip("%")) / 100 == pytest.approx(bounds.pixels, abs=1e-9)
        for bound in (bounds.eps, bounds.eps_pixel, bounds.step, bounds.bits):
            assert float(f"{bound:.0e}") == bound


def test_a_report_without_a_reference_says_not_verified(climbs, tmp_path):
    names = [path.name for path in report.write(climbs["itself"], "model.onnx", tmp_path)]
    assert names == ["report.md", "report.json"]
    assert "NOT VERIFIED" in (tmp_path / "report.md").read_text()
    assert "NOT VERIFIED" not in report.to_markdown(climbs["passed"], "model.onnx", {})


def test_a_report_says_what_it_was_held_against(climbs):
    text = report.to_markdown(climbs["passed"], "model.onnx", {})
    assert "NumPy, by hand, on real images, 32 timesteps from 0 to 999, a chain of 50 steps" in text
    own = dataclasses.replace(climbs["passed"], reference=make_reference(real=False))
    assert "on the network's own images" in report.to_markdown(own, "model.onnx", {})
    assert "toy" in text


PLOTS = ["error.png", "chain.png", "levels.png"]


@needs_matplotlib
@pytest.mark.parametrize(
    ("name", "wanted"),
    [("passed", [*PLOTS, "images.png"]), ("failed", [*PLOTS, "images.png"]), ("untrained", PLOTS[:2])],
)
def test_a_report_has_its_pictures(climbs, tmp_path, name, wanted):
    folder = tmp_path / "new" / "report"
    written = report.write(climbs[name], "model.onnx", folder, extra={"more": 1})
    assert written == [folder / entry for entry in ("report.md", "report.json", *wanted)]
    assert sorted(path.name for path in folder.iterdir()) == sorted(["report.md", "report.json", *wanted])
    assert json.loads((folder / "report.json").read_text())["more"] == 1
    text = (folder / "report.md").read_text(encoding="utf-8")
    for entry in wanted:
        assert f"]({entry})" in text
        with Image.open(folder / entry) as picture:
            picture.load()
            assert picture.format == "PNG"
            width, height = picture.size
            assert 250 <= width <= 1600
            assert 200 <= height <= 1600
            assert len(set(picture.convert("L").tobytes())) > 2, "something is on it"
    assert "pip install matplotlib" not in text


@needs_matplotlib
def test_plots_are_drawn_without_a_screen():
    """pyplot would look for one."""
    program = "import sys, ddpmx.parity.plots; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_images_show_pytorchs_above_the_files_above_the_difference(climbs, tmp_path):
    report.write(climbs["failed"], "model.onnx", tmp_path)
    result = climbs["failed"]
    with Image.open(tmp_path / "images.png") as picture:
        sheet = np.asarray(picture)
    zoom = sheet.shape[1] // (4 * 9 + 1)
    small = sheet[zoom // 2 :: zoom, zoom // 2 :: zoom]
    assert small.shape == (3 * 9 + 1, 4 * 9 + 1, 3)
    theirs = result.reference.final.transpose(0, 2, 3, 1)
    for i in range(4):
        above, middle, below = (small[1 + 9 * row : 9 + 9 * row, 1 + 9 * i : 9 + 9 * i] for row in range(3))
        assert np.array_equal(above, theirs[i])
        assert np.array_equal(middle, result.finals[i])
        assert np.array_equal(below, (64 * np.abs(theirs[i].astype(int) - result.finals[i])).clip(0, 255))


@pytest.mark.usefixtures("no_matplotlib")
def test_without_matplotlib_the_images_are_there_and_the_plots_are_not(climbs, tmp_path):
    (tmp_path / "error.png").write_text("of yesterday")
    (tmp_path / "mine.png").write_text("not the report's")
    report.write(climbs["passed"], "model.onnx", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images.png", "mine.png", "report.json", "report.md"]
    with Image.open(tmp_path / "images.png") as picture:
        assert min(picture.size) >= 200
    assert "](images.png)" in (tmp_path / "report.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("no_matplotlib")
@pytest.mark.parametrize(
    "name",
    [
        "passed",
        "untrained",
    ],
)
def test_without_matplotlib_the_text_says_how_to_get_plots(climbs, tmp_path, name):
    report.write(climbs[name], "model.onnx", tmp_path)
    assert "pip install matplotlib" in (tmp_path / "report.md").read_text(encoding="utf-8")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


YESTERDAY = dict.fromkeys(["report.md", "report.json", *PLOTS, "images.png"], b"of yesterday")


def draw_nothing(climb: Climb, folder: Path) -> dict[str, str]:
    """Drawing takes half a second."""
    for name in PLOTS:
        (folder / name).write_bytes(b"of today")
    return dict.fromkeys(PLOTS, "drawn")


@pytest.mark.parametrize("before", [{}, YESTERDAY], ids=["new", "over another"])
@pytest.mark.parametrize("where", ["text", "json", "plots", "report.md", "report.json", "images.png"])
def test_a_report_is_written_as_a_whole_or_not_at_all(climbs, tmp_path, monkeypatch, before, where):
    folder = tmp_path / "report"
    folder.mkdir()
    for name, data in before.items():
        (folder / name).write_bytes(data)
    full = OSError(28, "No space left on device")
    if importlib.util.find_spec("matplotlib") is not None:
        from ddpmx.parity import plots

        monkeypatch.setattr(plots, "draw", raising(full) if where == "plots" else draw_nothing)
    elif where == "plots":
        pytest.skip("not verified here: the plots of a report (no matplotlib)")
    if where in ("text", "json"):
        write_text = Path.write_text

        def failing(self, *args, **kwargs):
            if self.suffix == {"text": ".md", "json": ".json"}[where]:
                raise full
            return write_text(self, *args, **kwargs)

        monkeypatch.setattr(Path, "write_text", failing)
    elif where != "plots":
        replace, failures = os.replace, [full]

        def failing(source, target):
            if Path(target) == folder / where and failures:
                raise failures.pop()
            replace(source, target)

        monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OutputError, match="report") as caught:
        report.write(climbs["passed"], "model.onnx", folder)
    assert "No space left" in caught.value.note
    monkeypatch.undo()
    assert content(folder) == before


def test_a_report_that_fails_removes_no_picture(climbs, tmp_path, monkeypatch):
    for name, data in YESTERDAY.items():
        (tmp_path / name).write_bytes(data)
    monkeypatch.setattr(os, "replace", raising(OSError(28, "No space left on device")))
    with pytest.raises(OutputError):
        report.write(climbs["itself"], "model.onnx", tmp_path)
    assert content(tmp_path) == YESTERDAY


def test_a_report_replaces_another_and_its_stale_pictures(climbs, tmp_path):
    for name, data in YESTERDAY.items():
        (tmp_path / name).write_bytes(data)
    written = report.write(climbs["itself"], "model.onnx", tmp_path)
    assert sorted(content(tmp_path)) == sorted(path.name for path in written) == ["report.json", "report.md"]
    assert b"of yesterday" not in content(tmp_path).values()


def test_a_folder_that_cannot_be_one(climbs, tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "report"):
        with pytest.raises(OutputError, match="file"):
            report.write(climbs["passed"], "model.onnx", folder)
    assert content(tmp_path) == {"file": b"x"}


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="not verified here: read-only folders (root may write)"
)
def test_a_folder_that_may_not_be_written(climbs, tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError):
            report.write(climbs["passed"], "model.onnx", tmp_path)
        assert content(tmp_path) == {}
    finally:
        tmp_path.chmod(0o700)
