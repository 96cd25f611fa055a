"""The likelihood against closed forms, the published procedure, and distributions whose entropy is known."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

from ddpmx.diffusion.noise import Purpose, normal
from ddpmx.diffusion.samplers import PREDICTIONS, VARIANCES, x0_coefficients
from ddpmx.diffusion.schedule import make_schedule
from ddpmx.errors import Cancelled, InputError, NumericError
from ddpmx.formats.spec import ModelSpec
from ddpmx.pipeline import Pipeline
from ddpmx.sampling.pixels import to_nhwc
from ddpmx.tasks.likelihood import Likelihood, groups, nll
from oracles import gaussian
from oracles.conditioning import KINDS
from oracles.toy_backend import ToyBackend

SHAPE, T = gaussian.SHAPE, 50
SHORT = gaussian.SPEC.replace(timesteps=T)
HO = gaussian.SPEC.make_schedule()
PHI = np.vectorize(NormalDist().cdf, otypes=[float])


def toy(spec=SHORT, **faults):
    return Pipeline(spec, ToyBackend(**faults))


def drawn(n, seed=0):
    """Images of the Gaussian that the toy network knows, rounded to 256 levels: uint8 [n, H, W, C]."""
    z = np.random.default_rng(seed).standard_normal((n, *SHAPE))
    return to_nhwc((gaussian.MU + gaussian.S * z).astype(np.float32))


def as_model(images):
    return (images.astype(np.float64) / 127.5 - 1).transpose(0, 3, 1, 2)


def noise(seed, indices, t, shape=SHAPE):
    return normal(seed, indices, t, Purpose.LIKELIHOOD, int(np.prod(shape))).reshape(len(indices), *shape)


# --- the published procedure -----------------------------------------------------------------------------------------


def kl(mean, log_variance, mean_p, log_variance_p):
    """KL of two Gaussians in nats, as in any textbook."""
    q, p = np.exp(log_variance), np.exp(log_variance_p)
    return 0.5 * (log_variance_p - log_variance + (q + (mean - mean_p) ** 2) / p - 1)


def tanh_cdf(x):
    """Page's approximation of Φ, of Ho's and OpenAI's code."""
    return 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def by_hand(spec, images, *, seed, clip=1.0, v=0.0, variance=None, cdf=None):
    """The loop of Ho et al.'s and guided-diffusion's evaluation, in float64: terms [n, T], L_T [n], squares [n, T]."""
    x0, schedule, variance, cdf = as_model(images), spec.make_schedule(), variance or spec.variance, cdf or PHI
    beta = schedule.betas
    kept = np.cumprod(1 - beta)
    before = np.concatenate([[1.0], kept[:-1]])
    posterior = beta * (1 - before) / (1 - kept)
    posterior[0] = posterior[1]  # "clipped"
    large = np.concatenate([posterior[1:2], beta[1:]])
    slope, offset = gaussian.coefficients(HO)
    dims = (1, 2, 3)
    terms, squares = np.empty((len(x0), len(beta))), np.empty((len(x0), len(beta)))
    for t in range(len(beta)):
        x_t = (np.sqrt(kept[t]) * x0 + np.sqrt(1 - kept[t]) * noise(seed, range(len(x0)), t)).astype(np.float32)
        out = slope[t] * x_t - offset[t] * gaussian.MU
        guess = {
            "eps": lambda x, out, t=t: (x - np.sqrt(1 - kept[t]) * out) / np.sqrt(kept[t]),
            "x0": lambda x, out: out,
            "v": lambda x, out, t=t: np.sqrt(kept[t]) * x - np.sqrt(1 - kept[t]) * out,
            "mu": lambda x, out, t=t: (
                (out - np.sqrt(1 - beta[t]) * (1 - before[t]) / (1 - kept[t]) * x)
                / (np.sqrt(before[t]) * beta[t] / (1 - kept[t]))
            ),
        }[spec.prediction](x_t, out)
        guess = guess if clip is None else guess.clip(-clip, clip)

        def mean(x, t=t, x_t=x_t):
            return (np.sqrt(before[t]) * beta[t] * x + np.sqrt(1 - beta[t]) * (1 - before[t]) * x_t) / (1 - kept[t])

        f = (v + 1) / 2
        log_variance = {
            "fixed_small": np.log(posterior[t]),
            "fixed_large": np.log(large[t]),
            "learned": v,
            "learned_range": f * np.log(beta[t]) + (1 - f) * np.log(posterior[t]),
        }[variance]
        if t == 0:
            scale = np.exp(-0.5 * log_variance)
            above, below = cdf((x0 + 1 / 255 - mean(guess)) * scale), cdf((x0 - 1 / 255 - mean(guess)) * scale)
            inside = np.log(np.maximum(above - below, 1e-12))
            ends = np.log(np.maximum(above, 1e-12)), np.log(np.maximum(1 - below, 1e-12))
            values = -np.where(x0 < -0.999, ends[0], np.where(x0 > 0.999, ends[1], inside))
        else:
            values = kl(mean(x0), np.log(posterior[t]), mean(guess), log_variance)
        terms[:, t] = values.mean(dims) / math.log(2)
        squares[:, t] = ((guess - x0) ** 2).mean(dims)
    prior = kl(np.sqrt(kept[-1]) * x0, np.log(1 - kept[-1]), 0.0, 0.0).mean(dims) / math.log(2)
    return terms, prior, squares


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_it_is_the_published_procedure_on_the_same_noise(prediction, variance):
    v = {"learned": -5.0, "learned_range": 0.3}.get(variance, 0.0)
    spec, images = SHORT.replace(prediction=prediction, variance=variance), drawn(3)
    with toy(spec, v=v) as pipeline:
        found = nll(pipeline, images, seed=5)
    terms, prior, squares = by_hand(spec, images, seed=5, v=v)
    if prediction == "eps":  # elsewhere the toy is no network, and its x̂_0 is 10 σ away, where their Φ is 0
        np.testing.assert_allclose(found.bits[0], terms[:, 0].mean(), rtol=1e-4)
        np.testing.assert_allclose(found.images, terms.sum(1) + prior, rtol=1e-4)
    np.testing.assert_allclose(found.bits[1:], terms.mean(0)[1:], rtol=1e-4)
    np.testing.assert_allclose(found.bits_error[1:], (terms.std(0, ddof=1) / math.sqrt(3))[1:], rtol=1e-3)
    np.testing.assert_allclose(found.mse, squares.mean(0), rtol=1e-4)
    np.testing.assert_allclose(found.prior, prior, rtol=1e-6)


def test_their_approximation_of_phi_makes_some_difference(figure):
    """Ho's and OpenAI's codes take a tanh for Φ, which is off in the tails; the published numbers have it in them."""
    images = drawn(8)
    with toy() as pipeline:
        found = nll(pipeline, images, seed=5)
    for cdf, most in ((PHI, 1e-5), (tanh_cdf, 0.02)):
        terms, prior, _ = by_hand(SHORT, images, seed=5, cdf=cdf)
        apart = np.abs(found.images - terms.sum(1) - prior).max()
        figure(f"bits/dim against the published procedure, with {'Φ' if cdf is PHI else 'a tanh'}", apart, at_most=most)
    assert apart > 1e-4  # control: it is not ours


def test_clip_and_variance_may_be_others():
    spec, images = SHORT.replace(clip=0.3), drawn(3)
    with toy(spec) as pipeline:
        default, small = nll(pipeline, images), nll(pipeline, images, variance="fixed_small")
    for found, variance in ((default, "fixed_large"), (small, "fixed_small")):
        terms, _, _ = by_hand(spec, images, seed=0, clip=0.3, variance=variance)
        np.testing.assert_allclose(found.bits[1:], terms.mean(0)[1:], rtol=1e-4)
        assert found.variance == variance
    assert abs(default.bits_per_dim - small.bits_per_dim) > 1e-3


# --- closed forms ----------------------------------------------------------------------------------------------------


def expected_terms(images):
    """L_1 … L_{T−1} of each image under the optimal network, σ² = β: mean and variance over the noise, float64 [n, T−1].

    x̂_0 = μ + k·(x_t − √ᾱ·μ) with k = √ᾱ·s²/(ᾱ·s² + 1 − ᾱ), so x_0 − x̂_0 = (1 − k√ᾱ)·(x_0 − μ) − k·√(1−ᾱ)·z.
    """
    beta = np.linspace(1e-4, 0.02, 1000)
    kept = np.cumprod(1 - beta)
    before = np.concatenate([[1.0], kept[:-1]])
    apart = as_model(images) - gaussian.MU
    square = (apart**2).mean((1, 2, 3))[:, None]
    k = np.sqrt(kept) * gaussian.S**2 / (kept * gaussian.S**2 + 1 - kept)
    of_image, of_noise = (1 - k * np.sqrt(kept)) ** 2 * square, k**2 * (1 - kept)
    ratio, weight = (1 - before) / (1 - kept), before * beta / (1 - kept) ** 2  # β̃/β, and that of the mean's error
    with np.errstate(divide="ignore"):
        terms = 0.5 * (ratio - 1 - np.log(ratio) + weight * (of_image + of_noise))
    variance = (0.5 * weight) ** 2 * (4 * of_image * of_noise + 2 * of_noise**2) / apart[0].size
    return terms[:, 1:] / math.log(2), variance[:, 1:] / math.log(2) ** 2


@pytest.fixture(scope="module")
def of_the_gaussian():
    """Images, and their likelihood by the whole chain."""
    images = drawn(16)
    with toy(gaussian.SPEC) as pipeline:
        return images, nll(pipeline, images, seed=1)


def test_of_a_gaussian_the_terms_are_those_of_the_closed_form(of_the_gaussian, figure):
    images, found = of_the_gaussian
    wanted, variance = expected_terms(images)
    apart, error = found.bits[1:] - wanted.mean(0), np.sqrt(variance.sum(0)) / 16
    figure("Σ L_t against its expectation, in standard errors", abs(apart.sum()) / np.hypot.reduce(error), at_most=3.3)
    figure("each L_t, mean square in standard errors", np.mean((apart / error) ** 2), at_most=1.15)
    figure("and no less", np.mean((apart / error) ** 2), at_least=0.85)
    kept = HO.alpha_bar
    posterior = gaussian.S * np.sqrt((1 - kept) / (kept * gaussian.S**2 + 1 - kept))
    figure("RMSE against the posterior's σ", np.abs(found.rmse / (127.5 * posterior) - 1).max(), at_most=0.05)
    # the paper: L_T is about 1e-5 bits per dimension
    figure("L_T of Ho's schedule, bits/dim", found.prior.mean(), at_most=2e-5)
    assert found.prior.mean() == pytest.approx(
        (kept[-1] * ((as_model(images) ** 2).mean()) / 2) / math.log(2), rel=1e-3
    )


def test_the_bound_is_above_the_entropy_of_the_gaussian(of_the_gaussian, figure):
    """−log₂ p of a level under N(μ, s²) itself, which no model is better than on average."""
    images, found = of_the_gaussian
    cdf = np.vectorize(NormalDist(0, gaussian.S).cdf)
    apart = as_model(images) - gaussian.MU
    truth = -np.log2(cdf(apart + 1 / 255) - cdf(apart - 1 / 255)).mean()
    figure("bound − entropy of the Gaussian, bits/dim", found.bits_per_dim - truth, at_least=0.05)
    figure("and not far above", found.bits_per_dim - truth, at_most=0.5)


LOW, HIGH = 64, 192


class TwoLevels:
    """The optimal network, which predicts x_0, where every number is level 64 or 192 with equal odds: 1 bit."""

    description = "two levels"

    def __init__(self, spec):
        self.kept = spec.make_schedule().alpha_bar

    def bind(self, buffers):
        self.buffers = buffers

    def enqueue(self):
        kept = self.kept[self.buffers.t][:, None, None, None]
        low, high = LOW / 127.5 - 1, HIGH / 127.5 - 1
        middle, half = (high + low) / 2, (high - low) / 2
        odds = np.sqrt(kept) * half * (self.buffers.x - np.sqrt(kept) * middle) / (1 - kept)
        self.buffers.out[...] = middle + half * np.tanh(odds)

    def close(self):
        pass


def test_the_bound_of_a_mixture_comes_down_to_its_entropy(figure):
    """With T steps of the same noise: β is 1000/T times Ho's. The decoder's σ falls as well, until the levels are sharp."""
    rng = np.random.default_rng(0)
    images = np.where(rng.random((128, 4, 4, 1)) < 0.5, LOW, HIGH).astype(np.uint8)
    found = []
    for steps in (250, 1000, 8000, 64000):
        params = {"beta_start": 0.1 / steps, "beta_end": 20 / steps}
        spec = ModelSpec((1, 4, 4), timesteps=steps, schedule_params=params, prediction="x0", variance="fixed_small")
        with Pipeline(spec, TwoLevels(spec)) as pipeline:
            found.append(nll(pipeline, images, terms=60, batch=128))
        gap = found[-1].bits_per_dim - 1
        figure(f"bound − 1 bit, T = {steps}, in standard errors", gap / found[-1].standard_error, at_least=-3)
    gaps = [each.bits_per_dim - 1 for each in found]
    assert gaps == sorted(gaps, reverse=True)
    figure("bound − 1 bit with T = 64000", gaps[-1], at_most=0.03)
    figure("bound − 1 bit with T = 250", gaps[0], at_least=1)
    figure("L_0 with T = 64000", found[-1].distortion, at_most=1e-3)


# --- fewer terms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("T", "terms"), [(1000, 2), (1000, 3), (1000, 20), (1000, 999), (1000, 1000), (50, 49), (2, 2)]
)
@pytest.mark.parametrize("schedule", ["linear", "cosine", "jsd"])
def test_groups_are_a_partition(schedule, T, terms):
    first = groups(make_schedule(schedule, T), terms)
    assert len(first) == terms
    assert first[0] == 0
    assert first[1] == 1
    assert (np.diff(first) > 0).all()
    assert first[-1] < T


def test_log_snr_falls_by_about_the_same_in_every_group():
    first = groups(HO, 20)
    edges = np.append(first[1:], 1000) - 1
    falls = -np.diff(np.log(HO.alpha_bar / (1 - HO.alpha_bar))[edges])
    assert falls.max() < 1.6 * falls.mean()
    assert (np.diff(first)[:2] == 1).all()
    assert np.diff(first).max() < 110


def test_every_timestep_is_a_group_where_all_are_computed():
    assert np.array_equal(groups(HO), np.arange(1000))
    assert np.array_equal(groups(make_schedule("linear", 1)), [0])
    for wrong in (0, 1, 1001, 2.5, True, "all"):
        with pytest.raises(InputError, match="terms must be a whole number from 2 to 1000"):
            groups(HO, wrong)


def test_few_terms_are_right_on_average_and_their_standard_error_is_honest(figure):
    """Sixty estimates of 16 images each: their mean is that of the closed form, their spread what each of them states."""
    with toy(gaussian.SPEC) as pipeline:
        found = [nll(pipeline, drawn(16, seed=i), terms=8, seed=i) for i in range(60)]
    sums = np.array([each.bits[1:].sum() for each in found])
    wanted = np.mean([expected_terms(drawn(16, seed=i))[0].sum(1).mean() for i in range(60)])
    error = abs(sums.mean() - wanted) / (sums.std(ddof=1) / math.sqrt(60))
    figure("Σ L_t of few terms against its expectation, in standard errors", error, at_most=3)
    spread = np.std([each.bits_per_dim for each in found], ddof=1)
    stated = math.sqrt(np.mean([each.standard_error**2 for each in found]))
    figure("spread of estimates over their standard error", spread / stated, at_most=1.3)
    figure("and no less", spread / stated, at_least=0.75)


def test_a_few_terms_of_an_image_do_not_depend_on_its_neighbours():
    images = drawn(7)
    with toy(gaussian.SPEC) as pipeline:
        whole = nll(pipeline, images, terms=5, seed=3, batch=4)
        part = nll(pipeline, images[2:4], indices=np.array([2, 3]), terms=5, seed=3)
        other = nll(pipeline, images[2:4], indices=np.array([2, 4]), terms=5, seed=3)
    assert np.array_equal(part.images, whole.images[2:4])
    assert part.images[0] == other.images[0] != other.images[1]
    assert part.images[1] != other.images[1]


# --- the same everywhere ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sways", [None, "size", "place"])
def test_the_batch_makes_no_difference(sways):
    images = drawn(7)
    with toy(sways=sways) as pipeline:
        # where neighbours matter the size of a batch may, but not who else is in it
        whole, again = nll(pipeline, images, batch=4), nll(pipeline, images[:5], batch=4)
        assert np.array_equal(again.images, whole.images[:5])
        if sways is None:
            for batch in (1, 3, 16):
                other = nll(pipeline, images, batch=batch)
                assert np.array_equal(other.images, whole.images)
                np.testing.assert_allclose(other.bits, whole.bits, rtol=1e-12)
                np.testing.assert_allclose(other.bits_error, whole.bits_error, rtol=1e-9)


def test_the_seed_makes_a_difference():
    with toy() as pipeline:
        one, two = (nll(pipeline, drawn(3), seed=seed) for seed in (0, 2**64 - 1))
    assert not np.any(one.images == two.images)
    assert np.array_equal(one.prior, two.prior)


# --- conditioning ----------------------------------------------------------------------------------------------------


def test_classes_conditions_and_guidance():
    spec = SHORT.replace(**{**KINDS["all"], "null_class": True})
    images, cond = drawn(3), np.random.default_rng(0).uniform(-1, 1, (3, 2, 8, 8)).astype(np.float32)
    with toy(spec) as pipeline:

        def of(**arguments):
            return nll(pipeline, images, **{"cond": cond, "batch": 2, **arguments}).images

        three, turns = of(labels=3), of(labels=[3, 1, 3])
        assert np.array_equal(three == turns, [True, False, True])
        assert not np.any(of() == three)
        assert np.array_equal(of(labels=3, guidance=0), of())
        assert not np.any(of(labels=3, guidance=2) == three)
        moved = cond.copy()
        moved[2] = 0
        assert np.array_equal(of(cond=moved) == of(), [True, True, False])
        with pytest.raises(InputError, match="3 images and 2 conditions"):
            of(cond=cond[:2])
        with pytest.raises(InputError, match="missing cond"):
            of(cond=None)
        with pytest.raises(InputError, match="there is no class 5"):
            of(labels=[0, 1, 5])


# --- the table -------------------------------------------------------------------------------------------------------


def made(first, last, bits, mse=None, T=10):
    first, last, bits = np.array(first), np.array(last), np.array(bits, float)
    mse = np.linspace(0.1, 1, len(bits)) ** 2 if mse is None else mse
    total = np.array([0.5 + bits.sum()])
    return Likelihood(
        "fixed_large", T, len(bits), 0, total, np.array([0.5]), first, last, bits, np.zeros_like(bits), mse
    )


def test_rate_and_distortion():
    """Table 4 of the paper: at T − t steps, the bits for x_T … x_t, and the error of x̂_0 from x_t."""
    found = made(range(4), range(4), [8.0, 4.0, 2.0, 1.0], T=4)
    assert found.bits_per_dim == 15.5
    assert found.distortion == 8.0
    assert found.rate == 7.5
    np.testing.assert_allclose(found.rates, [7.5, 3.5, 1.5, 0.5])
    np.testing.assert_allclose(found.rmse, 127.5 * np.array([0.1, 0.4, 0.7, 1.0]))


def test_rate_in_a_group_is_the_mean_over_it():
    """Three equal terms in one group: at its timesteps 0, 1 and 2 of them are spent."""
    single = made(range(6), range(6), [8.0, 4.0, 2.0, 2.0, 2.0, 1.0])
    grouped = made([0, 1, 2, 5], [0, 1, 4, 5], [8.0, 4.0, 6.0, 1.0])
    np.testing.assert_allclose(grouped.rates[[0, 1, 3]], single.rates[[0, 1, 5]])
    assert grouped.rates[2] == pytest.approx(single.rates[2:5].mean())
    assert [row["t"] for row in grouped.rows()] == [0, 1, 3, 5]


def test_of_one_image_there_is_no_standard_error():
    with toy() as pipeline:
        found = nll(pipeline, drawn(1))
    assert math.isnan(found.standard_error)
    values = found.to_json()
    assert values["standard_error"] is None
    assert {row["standard_error"] for row in values["by_t"]} == {None}
    assert values["bits_per_dim"] == pytest.approx(values["rate"] + values["distortion"])


# --- schedules at the edge -------------------------------------------------------------------------------------------


def test_a_chain_of_one_step():
    with toy(SHORT.replace(timesteps=1, prediction="x0")) as pipeline:
        found = nll(pipeline, drawn(2))
    assert found.rate == pytest.approx(found.prior.mean())
    assert np.isfinite(found.images).all()


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_where_no_signal_is_left_l_t_is_0(prediction):
    """A schedule that ends at ᾱ = 0, for networks that do not predict ε."""
    spec = SHORT.replace(schedule="jsd", schedule_params={}, prediction=prediction)
    with toy(spec) as pipeline:
        found, few = (nll(pipeline, drawn(2), terms=terms) for terms in (None, 7))
    assert found.prior == pytest.approx(0, abs=1e-30)
    assert np.isfinite(found.images).all()
    assert np.isfinite(few.images).all()


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((3, 8, 8, 1), np.uint8)}, r"images must be uint8 \[n, 8, 8, 3\]"),
        ({"images": np.zeros((0, 8, 8, 3), np.uint8)}, "images must be uint8"),
        ({"images": np.zeros((3, 8, 8, 3))}, "images must be uint8"),
        ({"indices": np.array([0, 1])}, "indices must be 3 whole numbers"),
        ({"indices": np.array([0, 1, -1])}, "indices must be 3 whole numbers"),
        ({"variance": "learned"}, "no variance output"),
        ({"variance": "large"}, "there is no variance 'large'"),
        ({"labels": 1}, "no classes"),
        ({"guidance": 2}, "cannot be guided"),
        ({"cond": np.zeros((3, 1, 8, 8), np.float32)}, "takes no condition"),
        ({"batch": 0}, "batch must be"),
        ({"seed": -1}, "the seed must be"),
        ({"terms": 1}, "terms must be"),
    ],
)
def test_refused(change, message):
    with toy() as pipeline, pytest.raises(Exception, match=message) as error:
        nll(pipeline, **{"images": drawn(3), **change})
    assert isinstance(error.value, InputError) or "variance 'large'" in message


def test_missing_labels_are_refused():
    with toy(SHORT.replace(classes=5)) as pipeline, pytest.raises(InputError, match="missing labels"):
        nll(pipeline, drawn(2))


def test_what_is_not_finite_is_an_error_with_its_t():
    with toy(poison=(30, np.nan)) as pipeline, pytest.raises(NumericError, match="output at t = 30 is not finite"):
        nll(pipeline, drawn(2))
    with toy(SHORT.replace(variance="learned"), v=-1500.0) as pipeline:
        with pytest.raises(NumericError, match="the term of t = 0 is not finite") as error:
            nll(pipeline, drawn(2))
        assert error.value.note == "log σ² is from -1500 to -1500"


def test_progress_and_cancel():
    seen = []
    with toy() as pipeline:
        nll(pipeline, drawn(5), terms=3, batch=2, progress=lambda *now: seen.append(now))
        assert seen == [(done, 9) for done in range(1, 10)]
        seen.clear()
        with pytest.raises(Cancelled):
            nll(
                pipeline,
                drawn(5),
                terms=3,
                progress=lambda *now: seen.append(now),
                cancel=lambda: len(seen) == 2,
            )
        assert len(seen) == 2


# --- the picture -----------------------------------------------------------------------------------------------------


def test_the_picture_is_one(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="not verified here: the plot of a likelihood (no matplotlib)")
    from io import BytesIO

    from PIL import Image

    from ddpmx.tasks.likelihood_plot import draw

    with toy() as pipeline:
        found, one = nll(pipeline, drawn(3), terms=8), nll(pipeline, drawn(1))
    (tmp_path / "matplotlibrc").write_text("axes.facecolor: red\n")
    monkeypatch.chdir(tmp_path)
    for result in (found, one):
        with Image.open(BytesIO(draw(result, "title"))) as picture:
            assert picture.size == (990, 704)
            pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
        line = (np.abs(pixels.astype(int) - (0x1F, 0x5F, 0xA8)).sum(1) < 30).sum()
        assert line > 500


def test_x0_of_the_toy_follows_from_its_eps():
    """What by_hand relies on: the table's p and q are equation 15."""
    p, q = x0_coefficients(HO, "eps")
    np.testing.assert_allclose([p[-1], -q[-1]], [157.41, 157.40], rtol=1e-4)
