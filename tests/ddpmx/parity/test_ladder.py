"""The parity ladder on a model known in closed form: a right network passes, and a wrong one fails at the right check."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

import ddpmx
from ddpmx.diffusion.noise import Purpose, normal
from ddpmx.errors import InputError, NumericError, SpecError
from ddpmx.parity.check import BOUNDS, Check
from ddpmx.parity.free_chain import drifted
from ddpmx.parity.ladder import ParityReport, check_record_of, run_ladder
from ddpmx.parity.propagation import DRIFT
from ddpmx.parity.reference import Reference
from oracles.parity import (
    ALL,
    ALPHA_BAR,
    BATCH,
    BITS,
    EPS,
    FORCED,
    FORCED_STEP,
    FREE,
    LEVELS,
    LIGHT,
    PATTERN,
    PIXEL,
    ROWS,
    SEED,
    SHAPE,
    SIZE,
    SPEC,
    STEP,
    STEPS,
    T_CHAIN,
    T_CHECKED,
    Faulty,
    T,
    a_bias,
    biased,
    channels_swapped,
    check,
    eps_by_hand,
    failed,
    make_reference,
    neighbours_leak,
    noise_at_one_t,
    noise_on_the_chain_only,
    noisy,
    nothing_at_all,
    row_0_alone_is_right,
    rows_swapped,
    t_is_one_late,
    upside_down,
)
from oracles.toy_backend import ToyBackend


@pytest.fixture(scope="module")
def reference() -> Reference:
    return make_reference()


@pytest.fixture(scope="module")
def untrained() -> Reference:
    return make_reference(loss=0.5)


# --- a right network passes --------------------------------------------------------------------------------------------


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
        result = run_ladder(pipeline._runner._backend, pipeline.spec, reference)
    assert [check.name for check in result.checks] == ALL
    assert failed(result) == []
    assert result.passed
    assert result.verdict == "PASSED: the PyTorch model, 10 of 10 bounds hold; 1 not judged"
    assert "onnxruntime" in result.ran_on
    for name in (EPS, PIXEL, STEP, BITS, FORCED):
        measured = check(result, name)
        figure(f"closed form in onnxruntime against float64: {name}", measured.value, at_most=measured.bound)
    figure("closed form in onnxruntime against float64: pixels", check(result, FREE).value, at_least=0.999)
    assert result.finals.shape == (4, 8, 8, 3)
    assert result.finals.dtype == np.uint8


def test_the_closed_form_in_numpy_passes_and_its_curves_fit_the_record(reference):
    result = run_ladder(ToyBackend(), SPEC, reference)
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
    assert check(result, ROWS).worst == check(result, BATCH).worst == "equal bit for bit"


def test_errors_are_in_units_of_the_outputs(reference):
    assert reference.scale == pytest.approx(np.sqrt(np.mean(reference.out.astype(np.float64) ** 2)))
    result = run_ladder(noisy(1e-3 * reference.scale), SPEC, reference)
    assert result.curves["eps"] == pytest.approx(1e-3 * np.sqrt((PATTERN[reference.t] ** 2).mean((1, 2, 3))), rel=1e-2)
    assert check(result, EPS).value == result.curves["eps"].max()
    assert check(result, PIXEL).value == pytest.approx(1e-3 * np.abs(PATTERN[reference.t]).max(), rel=1e-2)


def test_one_step_and_the_bound_are_what_the_formulas_say(reference):
    """Equation 7 for x_{t−1}, equation 10 for the bits, both by hand in float64."""
    size = 1e-3
    result = run_ladder(noisy(size), SPEC, reference)
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
        guesses = [((x - np.sqrt(1 - kept) * eps) / np.sqrt(kept)).clip(-1, 1) for eps in (wrong, eps_by_hand(x, t))]
        steps.append(to_x0 * np.sqrt(np.mean((guesses[0] - guesses[1]) ** 2)))
        if t:
            terms = [to_x0**2 * np.mean((clean - guess) ** 2) / (2 * beta[t]) for guess in guesses]
            bits += np.array(terms) * np.count_nonzero(owners == i) / np.log(2)
    # float32: an update of numbers near 1 is exact to about 1e-7
    assert result.curves["step"] == pytest.approx(steps, rel=1e-2, abs=2e-7)
    assert check(result, BITS).value == pytest.approx(abs(bits[0] - bits[1]), rel=2e-2, abs=1e-7)
    assert f"{bits[1]:.4f} by PyTorch" in check(result, BITS).worst


@pytest.mark.parametrize("batch", [1, 3, 16, 100])
def test_the_batch_changes_no_check_of_an_exact_backend(reference, batch):
    usual, other = run_ladder(ToyBackend(), SPEC, reference), run_ladder(ToyBackend(), SPEC, reference, batch=batch)
    assert other.passed
    assert repr(other.checks[2:]) == repr(usual.checks[2:])  # as text: NaN is no longer equal to itself in Python 3.13
    assert np.array_equal(other.finals, usual.finals)
    assert {r.skipped for r in other.checks[:2]} == ({"a batch of one"} if batch == 1 else {None})


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_nothing_exceeds_the_batch(reference, batch):
    """Also not the free chain, whose images are as many as the record has: a plan may take no more."""
    backend = ToyBackend()
    run_ladder(backend, SPEC, reference, batch=batch)
    assert {size for _, size in backend.calls} == {1, batch, min(batch, len(reference.final))}


@pytest.mark.parametrize("batch", [0, -1, 1 << 17])
def test_a_batch_out_of_range_is_refused(reference, batch):
    with pytest.raises(InputError, match="batch"):
        run_ladder(ToyBackend(), SPEC, reference, batch=batch)


@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize("what", ["reference", "untrained", "nothing"])
def test_progress_counts_to_its_total(request, what, batch):
    record = None if what == "nothing" else request.getfixturevalue(what)
    backend, calls = ToyBackend(), []
    run_ladder(backend, SPEC, record, batch=batch, progress=lambda done, total: calls.append((done, total)))
    total = calls[0][1]
    assert calls == [(i, total) for i in range(1, total + 1)]
    assert len(backend.calls) == total


# --- each check can fail ----------------------------------------------------------------------------------------------


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
def test_a_fault_is_found_by_its_check(reference, fault, first, others, worst):
    result = run_ladder(Faulty(fault), SPEC, reference)
    assert not result.passed
    assert failed(result)[0] == first
    assert others <= set(failed(result))
    assert result.verdict.startswith(f"FAILED: this is not the PyTorch model: {first}: ")
    if worst is not None:
        assert check(result, first).worst == f"worst at t = {worst}"
        assert f"(worst at t = {worst})" in result.verdict
    more = len(failed(result)) - 1
    assert result.verdict.endswith(f"; and {more} more") == (more > 0)


def test_noise_at_one_t_spoils_no_other_point_of_the_curves(reference):
    curves = run_ladder(Faulty(noise_at_one_t), SPEC, reference).curves
    bad = reference.t == T_CHECKED
    assert np.all(curves["eps"][bad] > 10 * BOUNDS["fp32"].eps)
    assert np.all(curves["eps"][~bad] < BOUNDS["fp32"].eps / 10)
    assert curves["forced"].max() < BOUNDS["fp32"].eps / 10


def test_one_pixel_of_one_image_cannot_hide_in_the_average(reference):
    """The RMS over 384 elements divides it by 20."""
    k = 20
    image = reference.inputs(k)[1]

    def fault(x, t, out):
        out[(x == image).all(axis=(1, 2, 3)), 2, 7, 3] += np.float32(3e-4 * reference.scale)

    result = run_ladder(Faulty(fault), SPEC, reference)
    assert failed(result) == [PIXEL]
    assert f"(worst at t = {reference.t[k]})" in result.verdict
    assert check(result, PIXEL).value == pytest.approx(3e-4, rel=1e-2)
    assert check(result, EPS).value < BOUNDS["fp32"].eps


@pytest.mark.parametrize("channel", range(3))
@pytest.mark.parametrize("corner", [(0, 0), (0, 7), (7, 0), (7, 7)])
def test_no_corner_of_a_small_image_goes_unseen(reference, channel, corner):
    def fault(x, t, out):
        out[:, channel, corner[0], corner[1]] += np.float32(1e-3)

    assert {PIXEL, FORCED} <= set(failed(run_ladder(Faulty(fault), SPEC, reference)))


def test_a_bias_that_no_single_step_shows_is_seen_in_the_free_chain(reference):
    """Noise of the same size averages out. The closed form forgets errors quickly, so all bounds hold."""
    spec, size = SPEC.replace(precision="bf16"), 0.025 * reference.scale
    bias, noise = run_ladder(biased(size), spec, reference), run_ladder(noisy(size), spec, reference)
    for name in (EPS, STEP, FORCED, FORCED_STEP):
        assert check(bias, name).passed
        assert check(bias, name).value < 1.1 * check(noise, name).value
    assert biggest_drift(bias) > 3 * biggest_drift(noise)
    equal = [result.curves["levels_apart"][0] / (4 * SIZE) for result in (bias, noise)]
    assert equal[0] < 0.2 < 0.5 < equal[1]
    assert f"{equal[0]:.2%} equal" in check(bias, FREE).worst


@pytest.mark.parametrize(("difference", "passes"), [(1, True), (2, False)])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_free_chain_may_be_off_by_one_of_256_levels_but_not_by_two(reference, difference, passes, sign):
    final = reference.final.astype(int) + sign * difference
    assert 0 <= final.min() <= final.max() <= 255
    result = run_ladder(ToyBackend(), SPEC, dataclasses.replace(reference, final=final.astype(np.uint8)))
    assert check(result, FREE).value == passes
    assert failed(result) == ([] if passes else [FREE])
    assert f"at most {difference} apart, PSNR {20 * np.log10(255 / difference):.1f} dB" in check(result, FREE).worst


def test_a_fault_between_the_recorded_states_shows_in_the_free_chain(reference):
    """18 of its 50 steps are not recorded."""
    chain = np.round(np.linspace(0, T - 1, STEPS)).astype(int)
    unseen = np.setdiff1d(chain, [*chain[::-1][reference.at], *reference.t])
    assert len(unseen) >= 10

    def fault(x, t, out):
        out[np.isin(t, unseen)] += np.float32(1)

    result = run_ladder(Faulty(fault), SPEC, reference)
    assert failed(result) == [FREE]
    assert result.verdict.startswith(f"FAILED: this is not the PyTorch model: {FREE}: ")
    assert "< 99.9%" in str(check(result, FREE))
    assert "PSNR" in check(result, FREE).worst
    apart = np.abs(result.finals.astype(int) - reference.final.transpose(0, 2, 3, 1))
    assert check(result, FREE).value == np.mean(apart <= 1)
    assert result.curves["levels_apart"].tolist() == np.bincount(apart.reshape(-1)).tolist()


def biggest_drift(result: ParityReport) -> float:
    return float(result.curves["free"].max())


def test_the_curve_of_the_free_chain_shows_errors_that_add_up(reference):
    """All bounds hold, yet the drift is several times the error of one step."""
    result = run_ladder(biased(1e-5), SPEC, reference)
    assert result.passed
    curves = result.curves
    assert curves["free"].max() > 5 * curves["forced_step"].max()
    assert curves["free"].max() > 10 * biggest_drift(run_ladder(ToyBackend(), SPEC, reference))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("step", [T_CHECKED, T_CHAIN, 0, T - 1])
def test_outputs_that_are_not_finite_are_an_error_that_names_t(reference, value, step):
    with pytest.raises(NumericError, match=f"t = {step} is not finite"):
        run_ladder(ToyBackend(poison=(step, value)), SPEC, reference)


def test_outputs_that_are_not_finite_are_found_without_a_reference():
    with pytest.raises(NumericError, match="t = 999 is not finite"):
        run_ladder(ToyBackend(poison=(999, np.nan)), SPEC, None)


# --- what a judge of images sees --------------------------------------------------------------------------------------


def bits_of_levels(x0: np.ndarray, mean: np.ndarray, sigma: float) -> float:
    """−log₂ of a Gaussian's integral over a level, to infinity at the outermost ones (equation 13), in the mean."""

    def cdf(z):
        return 0.5 * math.erfc(-z / math.sqrt(2))

    total = 0.0
    for x, m in zip(x0.reshape(-1).tolist(), mean.reshape(-1).tolist(), strict=True):
        high = 1.0 if x > 0.999 else cdf((x + 1 / 255 - m) / sigma)
        low = 0.0 if x < -0.999 else cdf((x - 1 / 255 - m) / sigma)
        total -= math.log2(high - low)
    return total / x0.size


def at_zero(reference) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """(x_0, x_t at t = 0, ε there, σ of the decoder), by hand."""
    before, kept = ALPHA_BAR[:2]
    small = (1 - before) / (1 - kept) * (1 - kept / before)  # β̃ of the next step: that of the first is 0
    clean = reference.x0 / 127.5 - 1
    x = reference.inputs(0).astype(np.float64)
    return clean, x, eps_by_hand(x, 0), math.sqrt(small)


def test_the_bits_of_the_levels_are_those_of_equation_13(reference):
    clean, x, eps, sigma = at_zero(reference)
    size = 1e-2
    guesses = [
        ((x - math.sqrt(1 - ALPHA_BAR[0]) * e) / math.sqrt(ALPHA_BAR[0])).clip(-1, 1)
        for e in (eps, eps + size * PATTERN[0])
    ]
    right, wrong = (bits_of_levels(clean, guess, sigma) for guess in guesses)
    found = check(run_ladder(noisy(size), SPEC, reference), LEVELS)
    assert found.value == pytest.approx(abs(wrong - right), rel=1e-3)
    assert found.worst == f"{right:.4f} by PyTorch, {wrong:.4f} by the file"


def test_an_error_of_allowed_size_that_spoils_every_pixel_costs_bits(reference):
    """Along the slope of L_0, as no rounding is; no other check sees it."""
    clean, x, eps, sigma = at_zero(reference)
    guess = (x - math.sqrt(1 - ALPHA_BAR[0]) * eps) / math.sqrt(ALPHA_BAR[0])
    worse = np.clip(guess - clean, -2 * sigma, 2 * sigma)  # away from the image
    along = (-worse / np.sqrt(np.mean(worse**2))).astype(np.float32)  # x̂_0 falls where ε rises

    def fault(x, t, out):
        for row, step in enumerate(t.tolist()):
            for i, state in enumerate(reference.inputs(0)):
                if step == 0 and np.array_equal(x[row], state):
                    out[row] += np.float32(0.95 * BOUNDS["fp32"].eps * reference.scale) * along[i]

    result = run_ladder(Faulty(fault), SPEC, reference)
    assert failed(result) == [LEVELS]
    assert check(result, EPS).value < BOUNDS["fp32"].eps


def test_without_t_0_in_the_record_its_levels_are_not_judged(reference):
    later = dataclasses.replace(reference, t=reference.t[1:], out=reference.out[1:])
    result = run_ladder(ToyBackend(), SPEC, later)
    assert "t = 0 is not among" in check(result, LEVELS).skipped
    assert result.passed


def drifting(levels: float, **changes) -> Reference:
    return make_reference(drift=np.full(64, levels, np.float32), **changes)


def test_the_light_judge_sees_no_difference_of_a_right_file():
    result = run_ladder(ToyBackend(), SPEC, drifting(0.02))
    assert check(result, LIGHT).passed
    assert check(result, LIGHT).value < 0.1 * check(result, LIGHT).bound
    assert result.verdict == "PASSED: the PyTorch model, 11 of 11 bounds hold"


def test_the_light_judge_sees_a_part_of_the_images_that_the_share_of_pixels_allows():
    """A fifth of the pixels may be off in bfloat16; that all of them are so by 60 levels is another image."""
    record = drifting(0.02)
    final = record.final.copy()
    final[:, :, 3:6, 2:6] = np.where(
        final[:, :, 3:6, 2:6] > 128, final[:, :, 3:6, 2:6] - 60, final[:, :, 3:6, 2:6] + 60
    )
    result = run_ladder(ToyBackend(), SPEC.replace(precision="bf16"), dataclasses.replace(record, final=final))
    assert check(result, FREE).value == pytest.approx(1 - 12 / 64)
    assert failed(result) == [LIGHT]
    assert "at 8 pixels, of 4 images" in check(result, LIGHT).worst


def test_its_bound_follows_from_the_drift():
    """A pixel that moves by 0.3 levels is off by one in 3 of 10 cases; one that moves by 2.5 by 2 or 3, as often."""

    def drift(levels):
        return np.full(64, levels, np.float32)

    assert drifted(drift(0.1), 2 * DRIFT) == pytest.approx(math.sqrt(0.01 + 0.1), rel=1e-5)
    assert drifted(drift(2.5), 2 * DRIFT) == pytest.approx(math.sqrt((4 + 9) / 2), rel=1e-5)
    tight, wide = (check(run_ladder(ToyBackend(), SPEC, drifting(levels)), LIGHT).bound for levels in (0.02, 2.0))
    assert wide > 3 * tight
    old = run_ladder(ToyBackend(), SPEC, make_reference())
    assert "did not measure how far a chain drifts" in check(old, LIGHT).skipped


# --- bounds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "passes"),
    [
        (1e-6, {"fp32", "fp16", "bf16", "int8", "fp8"}),
        (1e-3, {"fp16", "bf16", "int8", "fp8"}),
        (1e-2, {"bf16", "int8", "fp8"}),
        (0.1, {"int8", "fp8"}),  # whose bounds are on the chain, where such errors average out
        (0.3, set()),
    ],
)
def test_the_bounds_depend_on_the_precision(reference, size, passes):
    found = {p for p in BOUNDS if run_ladder(noisy(size), SPEC.replace(precision=p), reference).passed}
    assert found == passes


def test_bounds_widen_with_fewer_bits():
    for name in ("eps", "eps_pixel"):
        assert getattr(BOUNDS["fp32"], name) < getattr(BOUNDS["fp16"], name) < getattr(BOUNDS["bf16"], name)
    assert BOUNDS["fp32"].pixels > BOUNDS["fp16"].pixels > BOUNDS["bf16"].pixels > 0.5
    assert BOUNDS["fp32"].eps >= 2**-24, "what float32 can keep"


@pytest.mark.parametrize(
    ("check", "passed", "text"),
    [
        (Check("ε", 1e-6, 2e-5, worst="worst at t = 999"), True, "ε: 1e-06 ≤ 2e-05 (worst at t = 999)"),
        (Check("ε", 2e-5, 2e-5), True, "ε: 2e-05 ≤ 2e-05"),
        (Check("ε", 3e-5, 2e-5), False, "ε: 3e-05 > 2e-05"),
        (Check("pixels", 0.9995, 0.999, at_least=True), True, "pixels: 99.95% ≥ 99.9%"),
        (Check("pixels", 0.5, 0.999, at_least=True, worst="9 apart"), False, "pixels: 50.00% < 99.9% (9 apart)"),
        (Check("pixels", math.nan, 0.999, at_least=True, skipped="no chain"), True, "pixels: not judged, no chain"),
        (Check("ε", math.nan, 2e-5), False, "ε: nan > 2e-05"),
        (Check("pixels", math.nan, 0.9, at_least=True), False, "pixels: nan% < 90%"),
    ],
)
def test_a_check_as_text(check, passed, text):
    assert check.passed is passed
    assert str(check) == text


# --- checks that are skipped -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [0.5, 1.0, 3.0])
def test_the_free_chain_of_an_untrained_network_is_skipped_with_the_reason(loss):
    result = run_ladder(biased(1.0), SPEC, make_reference(loss=loss))
    free = result.checks[-1]
    assert free.name == FREE
    assert free.passed
    assert "not trained" in free.skipped
    assert f"{loss:.2f}" in str(free)
    assert result.finals is None
    assert "free" not in result.curves
    assert {EPS, FORCED} <= set(failed(result)), "the other checks are made"


def test_a_verdict_counts_the_checks_that_were_skipped(untrained, reference):
    assert run_ladder(ToyBackend(), SPEC, untrained).verdict == (
        "PASSED: the PyTorch model, 9 of 9 bounds hold; 1 not judged"
    )
    assert make_reference(loss=0.49).trained
    assert not untrained.trained


@pytest.mark.parametrize("size", [0, 1e-7, 1e-5])
def test_a_network_whose_outputs_are_zero_is_no_reference(reference, size):
    silent = dataclasses.replace(reference, out=np.full_like(reference.out, size))
    with pytest.raises(SpecError, match="outputs are almost zero, so any file would pass"):
        run_ladder(ToyBackend(), SPEC, silent)


def test_without_a_reference_a_file_is_compared_with_itself():
    result = run_ladder(ToyBackend(), SPEC, None)
    assert [check.name for check in result.checks] == [ROWS, BATCH]
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
def test_without_a_reference_a_wrongly_computed_batch_fails(backend, found):
    result = run_ladder(backend, SPEC, None)
    assert failed(result)[0] == found
    assert result.verdict.startswith("FAILED")


def test_nothing_passes_if_every_check_was_skipped():
    assert not run_ladder(Faulty(neighbours_leak), SPEC, None, batch=1).verdict.startswith("PASSED")


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
        check_record_of(SPEC.replace(**mine), record)
    assert named in caught.value.note
    with pytest.raises(SpecError, match="another model"):
        run_ladder(ToyBackend(), SPEC.replace(**mine), record)


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
    check_record_of(SPEC.replace(**mine), dataclasses.replace(reference, spec=SPEC.replace(**theirs)))


# --- pixels that agree whatever the file computes ------------------------------------------------------------------------


def saturating(share: float, **changes) -> Reference:
    """A record whose chain ends in white for this share of its pixels."""
    record = make_reference(**changes)
    white = np.random.default_rng(3).random(record.final.shape) < share
    return dataclasses.replace(record, final=np.where(white, 255, record.final).astype(np.uint8))


class Saturating(Faulty):
    """Answers what makes the same pixels white in the end, and an error elsewhere."""

    def __init__(self, record: Reference, error: float) -> None:
        white = record.final == 255

        def fault(x, t, out):
            if len(out) == len(white) and t[0] == 0:
                out[white] = -1e3
                out[~white] += np.float32(error)

        super().__init__(fault)


def test_saturated_pixels_count_for_nothing():
    """Half of the pixels agree by being white; of the rest hardly any. Counted, they would be 50 %."""
    record = saturating(0.5)
    result = run_ladder(Saturating(record, 10.0), SPEC, record)
    assert check(result, FREE).value < 0.05
    assert "saturated on both sides and not counted" in check(result, FREE).worst
    assert result.curves["levels_apart"].sum() == np.count_nonzero(record.final != 255)


@pytest.mark.parametrize(("share", "judged"), [(0.5, True), (0.85, True), (0.93, False), (1.0, False)])
def test_a_chain_that_is_almost_all_saturated_is_not_judged(share, judged):
    record = saturating(share)
    result = run_ladder(Saturating(record, 0.0), SPEC, record)
    free = check(result, FREE)
    assert (free.skipped is None) == judged
    if not judged:
        assert "saturated on both sides" in free.skipped
        assert result.verdict.endswith("; 1 not judged") or not result.passed
        assert "levels_apart" not in result.curves


def test_a_pixel_that_is_saturated_on_one_side_alone_counts():
    record = make_reference()
    white = np.where(np.random.default_rng(3).random(record.final.shape) < 0.95, 255, record.final).astype(np.uint8)
    result = run_ladder(ToyBackend(), SPEC, dataclasses.replace(record, final=white))
    assert not check(result, FREE).passed
    assert check(result, FREE).value < 0.1


# --- bounds follow from the table --------------------------------------------------------------------------------------


def test_the_bound_on_one_step_is_the_tables_own_factor():
    """|A·q| = β/(√(1−ᾱ)·√α) for ε, by hand; what is above it is float32's rounding."""
    record = make_reference()
    result = run_ladder(ToyBackend(), SPEC, record)
    before = np.append(1.0, ALPHA_BAR[:-1])
    beta = 1 - ALPHA_BAR / before
    factor = (beta / np.sqrt((1 - ALPHA_BAR) * (1 - beta)))[record.t]
    by_hand = factor * 2e-5 * record.scale
    assert np.all(result.curves["step_bound"] > by_hand)
    assert np.all(result.curves["step_bound"] < by_hand + 2e-6)
    assert check(result, STEP).why.startswith("|A·q|")


def test_a_chain_that_amplifies_has_its_bound_from_its_recorded_drift():
    moved = np.full(64, 300.0, np.float32)  # levels, under an error of 1e-3: 1.5 under 5e-6, so half stay within one
    amplified = make_reference(drift=moved)
    result = run_ladder(ToyBackend(), SPEC, amplified)
    assert check(result, FREE).skipped is not None
    assert "amplifies" in check(result, FREE).skipped
    mild = make_reference(drift=np.linspace(0, 300, 64).astype(np.float32))
    assert check(run_ladder(ToyBackend(), SPEC, mild), FREE).bound == pytest.approx(
        1 - 2 * 0.5 * 0.5 / 1.5 / 2, abs=0.02
    )
    calm = make_reference(drift=np.full(64, 10.0, np.float32))
    assert check(run_ladder(ToyBackend(), SPEC, calm), FREE).bound == 0.999


def test_the_verdict_says_that_a_network_ignores_t():
    result = run_ladder(ToyBackend(), SPEC, make_reference(ignores_time=True))
    assert result.verdict.endswith("the network ignores t, as its export states")
