"""Pipeline.evaluate: what the network says of states of one's own, with the bits that a chain has there."""

from __future__ import annotations

import numpy as np
import pytest

import ddpmx
from ddpmx.diffusion.samplers import PREDICTIONS, x0_coefficients
from ddpmx.errors import Cancelled, InputError, NumericError
from ddpmx.pipeline import Pipeline
from ddpmx.sampling import chain
from oracles import conditioning, gaussian
from oracles.conditioning import KINDS, as_arguments, conditioning_of
from oracles.cuda_on_host import Toy
from oracles.plans import SPEC
from oracles.toy_backend import ToyBackend

SHAPE = gaussian.SHAPE
TIMES = np.array([999, 0, 500, 3, 1])


def states(n=5, shape=SHAPE):
    return chain.initial(7, np.arange(n), shape)


def toy(spec=gaussian.SPEC, **faults):
    return Pipeline(spec, ToyBackend(**faults))


def same(a, b):
    return all((x is None) == (y is None) and (x is None or np.array_equal(x, y)) for x, y in zip(a, b, strict=True))


# --- what it says ----------------------------------------------------------------------------------------------------


def test_eps_and_x0_of_a_known_network(figure):
    x, schedule = states(), gaussian.SPEC.make_schedule()
    with toy() as pipeline:
        got = pipeline.evaluate(x, TIMES)
    eps = np.stack([gaussian.optimal_eps(x[i : i + 1].astype(float), schedule, t)[0] for i, t in enumerate(TIMES)])
    kept = schedule.alpha_bar[TIMES][:, None, None, None]
    x0 = ((x - np.sqrt(1 - kept) * eps) / np.sqrt(kept)).clip(-1, 1)
    figure("ε of evaluate against E[ε | x_t]", np.abs(got.eps - eps).max(), at_most=2e-6)
    figure("x̂_0 of evaluate, which multiplies the error by up to 157", np.abs(got.x0 - x0).max(), at_most=2e-4)
    assert got.var is None


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_eps_follows_from_every_prediction(prediction, figure):
    """x_t = √ᾱ·x_0 + √(1−ᾱ)·ε with the x_0 of the output before it is clipped."""
    spec = gaussian.SPEC.replace(prediction=prediction, clip=None)
    x, schedule = states(), spec.make_schedule()
    with toy(spec) as pipeline:
        got = pipeline.evaluate(x, TIMES)
    p, q = (c[TIMES][:, None, None, None] for c in x0_coefficients(schedule, prediction))
    x0 = p * x + q * got.out.astype(float)
    kept = schedule.alpha_bar[TIMES][:, None, None, None]
    again = np.sqrt(kept) * x0 + np.sqrt(1 - kept) * got.eps
    figure(f"x_t put together again, {prediction}", np.abs(again - x).max(), at_most=1e-4)
    with toy(spec.replace(clip=0.5)) as pipeline:
        clipped = pipeline.evaluate(x, TIMES)
    assert np.array_equal(clipped.x0, got.x0.clip(-0.5, 0.5))
    assert np.array_equal(clipped.eps, got.eps)


@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
@pytest.mark.parametrize("kind", ["nothing", *KINDS])
def test_x0_has_the_bits_of_a_chain(kind, variance):
    spec = gaussian.SPEC.replace(variance=variance, **KINDS.get(kind, {}))
    named = as_arguments(conditioning_of(spec))
    with toy(spec, v=0.3) as pipeline:
        steps = list(pipeline.stream(3, seed=3, steps=7, **named))
        before = np.zeros_like(steps[0].x0)
        for step in steps:
            x0_prev = {"x0_prev": before} if spec.self_condition else {}
            got = pipeline.evaluate(step.x, step.t, **named, **x0_prev)
            assert np.array_equal(got.x0, step.x0), step.t
            before = step.x0
        if variance == "learned_range":
            assert np.array_equal(got.var, np.full_like(got.out, 0.3))
        if spec.self_condition:
            first = pipeline.evaluate(steps[0].x, steps[0].t, **named)  # 0 is the default
            assert np.array_equal(first.x0, steps[0].x0)


def test_guidance(figure):
    spec = gaussian.SPEC.replace(classes=5, null_class=True)
    x, y = states(), np.array([0, 1, 2, 3, 4])
    with toy(spec) as pipeline:
        none, of_y, guided = (
            pipeline.evaluate(x, TIMES, **arguments).out.astype(float)
            for arguments in ({}, {"labels": y}, {"labels": y, "guidance": 2.5})
        )
        assert np.array_equal(pipeline.evaluate(x, TIMES, labels=y, guidance=0).out, none)
    figure("guided ε", np.abs(guided - (none + 2.5 * (of_y - none))).max(), at_most=2e-6)
    assert np.abs(of_y - none).max() > 0.05


# --- an image and its neighbours -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sways", [None, "size", "place"])
@pytest.mark.parametrize("guidance", [1, 3])
def test_an_image_does_not_depend_on_its_neighbours(sways, guidance):
    spec = gaussian.SPEC.replace(classes=5, null_class=True, variance="learned")
    x, y = states(), np.array([0, 1, 2, 3, 4])
    with toy(spec, sways=sways) as pipeline:
        whole = pipeline.evaluate(x, TIMES, labels=y, guidance=guidance, batch=4)
        for at, n in ((0, 1), (1, 2), (4, 1)):
            rows = slice(at, at + n)
            part = pipeline.evaluate(x[rows], TIMES[rows], labels=y[rows], guidance=guidance, batch=4, first=at)
            assert same(part, [None if array is None else array[rows] for array in whole])


class InParts(ToyBackend):
    """A backend that computes in parts: an image's bits depend on its place in its part, as MNN's do."""

    largest_part, part = 2, 1

    def use_part(self, part):
        self.part = part

    def enqueue(self):
        super().enqueue()
        self.buffers.out[...] += np.float32(1e-3) * (np.arange(len(self.buffers.x)) % self.part)[:, None, None, None]


def test_in_parts_an_image_has_its_place_by_its_index():
    x = states()
    with Pipeline(gaussian.SPEC, InParts()) as pipeline:
        whole = pipeline.evaluate(x, TIMES, batch=4)
        assert same(
            pipeline.evaluate(x[1:4], TIMES[1:4], batch=4, first=1),
            [None if array is None else array[1:4] for array in whole],
        )
        moved = pipeline.evaluate(x[1:4], TIMES[1:4], batch=4, first=2)
        assert not np.array_equal(moved.out, whole.out[1:4])  # control


def test_progress_and_cancel():
    seen = []
    with toy() as pipeline:
        pipeline.evaluate(states(), 5, batch=2, progress=lambda *now: seen.append(now))
        assert seen == [(2, 5), (4, 5), (5, 5)]
        with pytest.raises(Cancelled):
            pipeline.evaluate(states(), 5, batch=2, cancel=lambda: len(seen) == 3 or seen.clear())
        pipeline.evaluate(states(), 5)  # it goes on


# --- on a device -----------------------------------------------------------------------------------------------------


def test_a_plan_says_what_the_host_says(plan, fake_tensorrt):
    x, t = states(11, SPEC.shape), np.arange(11) % SPEC.timesteps
    with Pipeline(SPEC, Toy(SPEC.shape)) as host, ddpmx.load(plan) as device:
        wanted = host.evaluate(x, t)
        images = device.generate(2, seed=1, steps=3)
        for batch in (None, 4, 3):
            assert same(device.evaluate(x, t, batch=batch), wanted)
        assert same(device.evaluate(x[:1], t[:1]), [None if array is None else array[:1] for array in wanted])
        assert np.array_equal(device.generate(2, seed=1, steps=3), images)


class Jealous(Toy):
    """A network whose output for an image depends on the image's place in the batch."""

    def enqueue(self):
        super().enqueue()
        self.buffers.out[1:] += np.float32(0.5)


@pytest.mark.parametrize("profiles", [((1, 4, 8),), ((2, 4, 8),)], ids=str)
def test_on_a_device_where_neighbours_matter_images_run_one_by_one(plan, fake_tensorrt, profiles):
    fake_tensorrt.make, fake_tensorrt.profiles = (lambda: Jealous(SPEC.shape)), profiles
    x = states(3, SPEC.shape)
    with Pipeline(SPEC, Toy(SPEC.shape)) as host, ddpmx.load(plan) as device:
        assert same(device.evaluate(x, 2, batch=4), host.evaluate(x, 2))


def test_on_a_device_with_conditioning_and_guidance(conditioned_plan):
    spec = conditioning.spec_of("all", SPEC.shape, null_class=True)
    named = as_arguments(conditioning_of(spec))
    x = states(3, spec.shape)
    with Pipeline(spec, Toy(spec.shape)) as host, ddpmx.load(conditioned_plan(spec)) as device:
        for guidance in (1, 2.5):
            arguments = {**named, "guidance": guidance, "x0_prev": x[::-1].copy()}
            assert same(device.evaluate(x, 2, **arguments), host.evaluate(x, 2, **arguments))


# --- refused ---------------------------------------------------------------------------------------------------------

WRONG = {
    "a t beyond T": ({"t": 1000}, "t must be from 0 to 999, not 1000"),
    "a negative t": ({"t": [0, -1, 2, 3, 4]}, "t must be from 0 to 999, not -1"),
    "a t for every other image": ({"t": [0, 1]}, "t must be one timestep, or 5 of them"),
    "half a timestep": ({"t": 0.5}, "t must be one timestep"),
    "an image of another size": ({"x": np.zeros((5, 3, 8, 9), np.float32)}, r"x must be float32 \[5, 3, 8, 8\]"),
    "a number": ({"x": np.float32(1)}, r"x must be float32"),
    "no images": ({"x": np.zeros((0, *SHAPE), np.float32)}, "n must be a whole number from 1"),
    "float64": ({"x": np.zeros((5, *SHAPE))}, "x must be float32"),
    "NaN": ({"x": np.full((5, *SHAPE), np.nan, np.float32)}, "x holds NaN"),
    "labels without classes": ({"labels": 3}, "the model has no classes"),
    "a condition without one": ({"cond": states()}, "the model takes no condition"),
    "x0_prev without self-conditioning": ({"x0_prev": states()}, "does not condition on itself"),
    "a batch of nothing": ({"batch": 0}, "batch must be a whole number from 1"),
    "an image before the first": ({"first": -1}, "first must be a whole number from 0"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_refused(wrong):
    arguments, message = WRONG[wrong]
    with toy() as pipeline, pytest.raises(InputError, match=message):
        pipeline.evaluate(**{"x": states(), "t": 5, **arguments})


def test_missing_conditioning_is_refused():
    for kind, what in {"classes": "missing labels", "condition": "missing cond"}.items():
        with toy(gaussian.SPEC.replace(**KINDS[kind])) as pipeline, pytest.raises(InputError, match=what):
            pipeline.evaluate(states(), 5)


def test_what_is_on_the_gpu_is_refused(plan, fake_tensorrt):
    class OnDevice:
        __cuda_array_interface__ = {
            "shape": (1, *SPEC.shape),
            "typestr": "<f4",
            "data": (256, True),
            "version": 3,
            "stream": None,
        }

    with ddpmx.load(plan) as device, pytest.raises(InputError, match="x is in GPU memory"):
        device.evaluate(OnDevice(), 5)


@pytest.mark.parametrize("poisoned", ["out", "var"])
def test_an_output_that_is_not_finite_names_t_and_image(poisoned):
    backend = ToyBackend(poison=(500, np.inf), poisoned=poisoned)
    with Pipeline(gaussian.SPEC.replace(variance="learned"), backend) as pipeline:
        with pytest.raises(NumericError, match="output at t = 500 is not finite") as error:
            pipeline.evaluate(states(), TIMES, first=40)
        assert error.value.note == "image 42; toy"


def test_not_while_a_chain_runs_nor_once_it_is_closed():
    with toy() as pipeline:
        stream = pipeline.stream(1, steps=3)
        next(stream)
        pipeline.evaluate(states(), 5)
        with pytest.raises(InputError, match="another chain was started"):
            next(stream)
        with pytest.raises(InputError, match="already running a chain"):
            pipeline.generate(1, steps=3, preview=lambda *_: pipeline.evaluate(states(), 5))
    with pytest.raises(InputError, match="closed"):
        pipeline.evaluate(states(), 5)
