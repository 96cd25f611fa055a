"""Conditioned models in a pipeline: a class, x̂_0 of the step before, a condition. On the host and on a device."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from ddpmx import pipeline
from ddpmx.backends.base import EXECUTORS
from ddpmx.errors import InputError
from ddpmx.pipeline import Pipeline
from ddpmx.sampling import chain
from ddpmx.sampling.pixels import to_nhwc
from oracles import conditioning, gaussian
from oracles.conditioning import CHANNELS, CLASSES, KINDS, as_arguments, conditioning_of, spec_of
from oracles.cuda_on_host import Toy
from oracles.device_chain import array_at
from oracles.toy_backend import ToyBackend

TOY = {kind: gaussian.SPEC.replace(**fields) for kind, fields in KINDS.items()}
"""The specs of ToyBackend."""


def generate(spec, n=4, *, backend=None, **options):
    options = {"seed": 3, "steps": 7, **options}
    with Pipeline(spec, backend or ToyBackend()) as p:
        return p.generate(n, **options)


# --- on the host -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [1.0, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_a_conditioned_chain_is_algorithm_2(kind, clip, tmp_path, figure):
    """A hand-written ONNX file in ONNX Runtime, against the paper's formulas in float64."""
    pytest.importorskip("onnxruntime", reason="not verified here: chains of files (no ONNX Runtime)")
    spec = spec_of(kind, clip=clip)
    path = tmp_path / "model.onnx"
    path.write_bytes(conditioning.onnx(spec, metadata={"ddpmx": spec.to_text()}))
    wanted = conditioning.chain_by_hand(spec, conditioning_of(spec), seed=11, n=3, clip=clip)
    with pipeline.load(path) as p:
        steps = list(p.stream(3, seed=11, **as_arguments(conditioning_of(spec))))
        pixels = p.generate(3, seed=11, **as_arguments(conditioning_of(spec)))
    worst = max(np.abs(step.x0 - x0).max() for step, x0 in zip(steps, wanted, strict=True))
    figure(f"x̂_0 of a network conditioned on {kind}, clip {clip}, against float64", worst, at_most=2e-5)
    assert pixels.tobytes() == to_nhwc(steps[-1].x0).tobytes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sways", [None, "size", "place"])
def test_an_image_depends_on_its_own_label_and_condition_alone(kind, sways):
    spec = TOY[kind]
    mine = conditioning_of(spec, 5)
    all_of_them = generate(spec, 5, backend=ToyBackend(sways=sways), batch=4, **as_arguments(mine))
    for first, n in ((0, 1), (3, 2), (4, 1)):
        part = {name: array[first : first + n] for name, array in as_arguments(mine).items()}
        alone = generate(spec, n, backend=ToyBackend(sways=sways), batch=4, first=first, **part)
        assert alone.tobytes() == all_of_them[first : first + n].tobytes()
    for name, other in conditioning_of(spec, 5, seed=9).items():
        changed = {**mine, name: mine[name].copy()}
        changed[name][2] = (mine["y"][2] + 1) % CLASSES if name == "y" else other[2]
        got = generate(spec, 5, backend=ToyBackend(sways=sways), batch=4, **as_arguments(changed))
        assert [not np.array_equal(a, b) for a, b in zip(got, all_of_them, strict=True)] == [
            False,
            False,
            True,
            False,
            False,
        ]


def test_one_label_applies_to_all_images():
    spec = TOY["classes"]
    wanted = generate(spec, 3, labels=[2, 2, 2]).tobytes()
    for labels in (2, np.int64(2), np.array(2), np.full(3, 2, np.uint8), (2, 2, 2)):
        assert generate(spec, 3, labels=labels).tobytes() == wanted
    assert generate(spec, 3, labels=1).tobytes() != wanted


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("classes", {}, f"missing labels: the model has {CLASSES} classes"),
        ("classes", {"labels": CLASSES}, f"there is no class {CLASSES}"),
        ("classes", {"labels": [0, -1]}, "there is no class -1"),
        ("classes", {"labels": [0, 10**30]}, "one whole number, or 2"),
        ("classes", {"labels": [0, 1, 2]}, "one whole number, or 2"),
        ("classes", {"labels": [[0, 1]]}, "one whole number, or 2"),
        ("classes", {"labels": [[0], [1, 2]]}, "one whole number, or 2"),
        ("classes", {"labels": []}, "one whole number, or 2"),
        ("classes", {"labels": 0.5}, "one whole number, or 2"),
        ("classes", {"labels": True}, "one whole number, or 2"),
        ("classes", {"labels": "zero"}, "no class 'zero'"),
        ("classes", {"labels": ["0", "zero"]}, "no class 'zero'"),
        ("classes", {"labels": b"0"}, "bytes is not an array"),
        ("classes", {"labels": np.array([0.0, 1.0])}, "one whole number, or 2"),
        ("classes", {"labels": 0, "cond": np.zeros((2, 1, 8, 8), np.float32)}, "takes no condition"),
        ("condition", {}, "missing cond: the model takes a condition image"),
        ("condition", {"labels": 0, "cond": None}, "no classes"),
        ("condition", {"cond": np.zeros((2, CHANNELS + 1, 8, 8), np.float32)}, r"cond must be float32 \[2, 2, 8, 8\]"),
        ("condition", {"cond": np.zeros((1, CHANNELS, 8, 8), np.float32)}, r"cond must be float32 \[2, 2, 8, 8\]"),
        ("condition", {"cond": np.zeros((2, CHANNELS, 8, 8))}, r"cond must be float32 \[2, 2, 8, 8\]"),
        ("condition", {"cond": [[1.0]]}, "list is not an array"),
        ("itself", {"labels": 0}, "no classes"),
        ("itself", {"cond": np.zeros((2, 1, 8, 8), np.float32)}, "takes no condition"),
    ],
)
def test_conditioning_that_does_not_fit_is_refused(kind, options, message):
    for run in (
        lambda p: p.generate(2, steps=2, **options),
        lambda p: list(p.stream(2, steps=2, **options)),
    ):
        backend = ToyBackend()
        with Pipeline(TOY[kind], backend) as p, pytest.raises(InputError, match=message):
            run(p)
        assert backend.calls == []


def test_labels_are_checked_before_anything_is_prepared():
    with Pipeline(TOY["classes"], ToyBackend()) as p:
        p.check_request(2, labels=[0, 4])
        with pytest.raises(InputError, match="no class 5"):
            p.check_request(2, labels=[0, 5])


class OnGpu:
    """Another library's array in device memory."""

    def __init__(self, address, shape, typestr):
        self.__cuda_array_interface__ = {"shape": shape, "typestr": typestr, "data": (address, False), "version": 3}


def test_a_condition_on_a_gpu_is_refused_by_a_chain_on_the_host():
    spec = TOY["condition"]
    with pytest.raises(InputError, match="cond is in GPU memory"):
        generate(spec, 1, cond=OnGpu(1 << 20, (1, CHANNELS, 8, 8), "<f4"))


# --- on a device -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_plan_gives_the_images_of_the_chain_in_numpy(conditioned_plan, kind, executor):
    spec = spec_of(kind, timesteps=6)
    mine = conditioning_of(spec, 5)
    with Pipeline(spec, Toy(spec.shape)) as p:
        wanted = p.generate(5, seed=3, **as_arguments(mine))
    with pipeline.load(conditioned_plan(spec), executor=executor) as p:
        for batch in (5, 3):
            assert p.generate(5, seed=3, batch=batch, **as_arguments(mine)).tobytes() == wanted.tobytes()
        *_, last = p.stream(5, seed=3, **as_arguments(mine))
        assert to_nhwc(last.x0).tobytes() == wanted.tobytes()


def test_images_that_run_one_by_one_keep_their_own_conditioning(conditioned_plan, monkeypatch):
    """Conditions at device addresses, too."""
    spec = spec_of("all", timesteps=4)
    mine = conditioning_of(spec, 3)
    monkeypatch.setattr(chain, "executed_batch", lambda *_: 1)
    with Pipeline(spec, Toy(spec.shape)) as p:
        wanted = p.generate(3, seed=3, **as_arguments(mine))
    with pipeline.load(conditioned_plan(spec)) as p:
        driver = p._runner.driver
        assert p.generate(3, seed=3, **as_arguments(mine)).tobytes() == wanted.tobytes()
        with driver.current(), driver.allocate(mine["cond"].nbytes, "the caller's") as memory:
            array_at(memory.value, mine["cond"].shape, ctypes.c_float)[...] = mine["cond"]
            there = OnGpu(memory.value, mine["cond"].shape, "<f4")
            for batch in (3, 2):
                got = p.generate(3, seed=3, batch=batch, labels=mine["y"], cond=there)
                assert got.tobytes() == wanted.tobytes()
            with pytest.raises(InputError, match="labels are in GPU memory"):
                p.generate(3, labels=OnGpu(memory.value, (3,), "<i4"), cond=there)


GUIDED = {
    "classes": {"classes": CLASSES, "null_class": True},
    "all": {**KINDS["all"], "null_class": True},
}


@pytest.mark.parametrize("kind", GUIDED)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_plan_gives_the_guided_images_of_the_chain_in_numpy(conditioned_plan, kind, executor):
    spec = spec_of("classes", timesteps=6, **GUIDED[kind])
    mine = as_arguments(conditioning_of(spec, 5))
    with Pipeline(spec, Toy(spec.shape)) as p:
        wanted = {w: p.generate(5, seed=3, guidance=w, **mine).tobytes() for w in (2.5, -1, 0, 1)}
    assert len(set(wanted.values())) == 4
    with pipeline.load(conditioned_plan(spec), executor=executor) as p:
        for w, images in wanted.items():
            for batch in (5, 3):  # the plan takes eight rows, so four images
                assert p.generate(5, seed=3, batch=batch, guidance=w, **mine).tobytes() == images, (w, batch)
        four = {name: array[:4] for name, array in mine.items()}
        *_, last = p.stream(4, seed=3, guidance=2.5, **four)
        assert to_nhwc(last.x0).tobytes() == wanted[2.5][: 4 * last.x0[0].size]
        with pytest.raises(InputError, match="at most 4"):
            next(p.stream(5, guidance=2.5, **mine))


def test_guidance_halves_what_a_plan_takes(conditioned_plan):
    spec = spec_of("classes", timesteps=4, **GUIDED["all"])
    mine = as_arguments(conditioning_of(spec, 3))
    with Pipeline(spec, Toy(spec.shape)) as p:
        wanted = p.generate(3, seed=3, guidance=2, **mine)
    for profiles, batch in ((((1, 4, 8),), 3), (((1, 1, 1), (4, 4, 4)), 2), (((1, 3, 3),), 1)):
        with pipeline.load(conditioned_plan(spec, profiles=profiles)) as p:
            assert p.check_request(3, batch=3, guidance=2, labels=mine["labels"]) == batch
            assert p.generate(3, seed=3, guidance=2, batch=3, **mine).tobytes() == wanted.tobytes()
    with pipeline.load(conditioned_plan(spec, profiles=((1, 1, 1), (3, 3, 3)))) as p:
        with pytest.raises(InputError, match="no even number of rows") as caught:
            p.generate(3, seed=3, guidance=2, **mine)
        assert caught.value.note == "it takes 1, 3"
        p.generate(3, seed=3, guidance=1, **mine)


def test_guided_images_that_run_one_by_one_keep_their_own_conditioning(conditioned_plan, monkeypatch):
    spec = spec_of("classes", timesteps=4, **GUIDED["all"])
    mine = conditioning_of(spec, 3)
    monkeypatch.setattr(chain, "executed_batch", lambda *_: 1)
    with Pipeline(spec, Toy(spec.shape)) as p:
        wanted = p.generate(3, seed=3, guidance=2, **as_arguments(mine))
    with pipeline.load(conditioned_plan(spec)) as p:
        driver = p._runner.driver
        assert p.generate(3, seed=3, guidance=2, **as_arguments(mine)).tobytes() == wanted.tobytes()
        with driver.current(), driver.allocate(mine["cond"].nbytes, "the caller's") as memory:
            array_at(memory.value, mine["cond"].shape, ctypes.c_float)[...] = mine["cond"]
            there = OnGpu(memory.value, mine["cond"].shape, "<f4")
            for batch in (3, 2):
                got = p.generate(3, seed=3, batch=batch, labels=mine["y"], cond=there, guidance=2)
                assert got.tobytes() == wanted.tobytes()
