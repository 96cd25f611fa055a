"""A request: both spellings are one, and everything that is wrong with it is said in one place."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from ddpmx import Conditioning, ModelSpec, Pipeline, Sampling
from ddpmx.errors import InputError
from ddpmx.sampling.request import MAX_BATCH_ELEMENTS, check_batch, check_request, default_batch, largest_batch
from oracles import conditioning
from oracles.conditioning import as_arguments, conditioning_of
from oracles.toy_backend import ToyBackend

SPEC = ModelSpec((3, 8, 8), timesteps=20)


@pytest.fixture
def pipeline():
    with Pipeline(SPEC, ToyBackend()) as made:
        yield made


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"steps": 7},
        {"sampler": "ddim", "steps": 5, "eta": 0.5},
        {"spacing": "leading", "steps": 4, "variance": "fixed_small"},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "default",
)
def test_an_object_and_keywords_give_the_same_images(pipeline, options):
    by_keywords = pipeline.generate(3, seed=5, **options)
    np.testing.assert_array_equal(pipeline.generate(3, seed=5, sampling=Sampling(**options)), by_keywords)
    *_, last = pipeline.stream(3, seed=5, sampling=Sampling(**options))
    *_, same = pipeline.stream(3, seed=5, **options)
    assert last.x0.tobytes() == same.x0.tobytes()
    assert pipeline.table(Sampling(**options)).rows.tobytes() == pipeline.table(**options).rows.tobytes()


def test_every_field_of_sampling_is_a_keyword(pipeline):
    for field in dataclasses.fields(Sampling):
        pipeline.table(**{field.name: field.default})


@pytest.mark.parametrize("call", ["generate", "stream", "table", "check_request"])
def test_one_spelling_at_a_time(pipeline, call):
    def run(**arguments):
        result = getattr(pipeline, call)(**({} if call == "table" else {"n": 1}), **arguments)
        return list(result) if call == "stream" else result

    with pytest.raises(InputError, match="sampling was passed, and steps as well"):
        run(sampling=Sampling(), steps=5)
    with pytest.raises(TypeError, match="there is no option 'stpes'; there are sampler, steps"):
        run(stpes=5)
    with pytest.raises(TypeError, match="there is no option 'stpes'"):
        run(sampling=Sampling(), stpes=5)
    for wrong in ("ddim", {"steps": 5}, {}, 0, Conditioning(), Sampling):
        with pytest.raises(InputError, match=r"sampling must be a ddpmx\.Sampling, not "):
            run(sampling=wrong)


@pytest.mark.parametrize("call", ["generate", "stream", "check_request"])
def test_conditioning_is_a_conditioning_and_passed_once(call):
    with Pipeline(conditioning.spec_of("classes"), ToyBackend()) as pipeline:

        def run(**arguments):
            result = getattr(pipeline, call)(2, **arguments)
            return list(result) if call == "stream" else result

        for wrong in ([1], np.array([1]), {"labels": 1}, "x", 0, Sampling(), Conditioning):
            with pytest.raises(InputError, match=r"conditioning must be a ddpmx\.Conditioning, not "):
                run(conditioning=wrong)
        with pytest.raises(InputError, match="conditioning was passed, and labels as well"):
            run(conditioning=Conditioning(labels=1), labels=1)
        with pytest.raises(InputError, match="there is no class 99"):
            run(conditioning=Conditioning(labels=99))


@pytest.mark.parametrize("kind", ["classes", "condition", "all"])
def test_conditioning_in_one_object_gives_the_same_images(kind):
    spec = conditioning.spec_of(kind)
    arguments = as_arguments(conditioning_of(spec, 3))
    with Pipeline(spec, ToyBackend()) as pipeline:
        by_keywords = pipeline.generate(3, seed=2, **arguments)
        np.testing.assert_array_equal(pipeline.generate(3, seed=2, conditioning=Conditioning(**arguments)), by_keywords)


def test_requests_with_arrays_can_be_compared():
    """By identity: arrays have no truth value."""
    one, other = (Conditioning(labels=np.array([1, 2])) for _ in range(2))
    assert one == one != other
    assert len({one, other}) == 2


def test_a_checked_request_has_pythons_own_numbers():
    request = check_request(SPEC, np.int64(5), seed=np.uint64(7), first=np.int32(3), batch=np.int8(2))
    assert [type(value) for value in (request.n, request.seed, request.first, request.batch)] == [int] * 4
    assert [indices.tolist() for _, indices in request.batches()] == [[3, 4], [5, 6], [7]]
    assert len(request.table) == 20


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 1, 1), (3, 4096, 4096)])
def test_the_largest_batch_is_the_largest_that_is_taken(shape):
    spec = ModelSpec(shape)
    largest = largest_batch(spec)
    assert 1 <= default_batch(spec) <= 16
    if np.prod(shape) <= MAX_BATCH_ELEMENTS:
        check_batch(spec, largest)
    with pytest.raises(InputError, match="do not fit into memory"):
        check_batch(spec, largest + 1)


def test_a_large_condition_counts():
    assert largest_batch(ModelSpec((1, 64, 64), condition=64)) == largest_batch(ModelSpec((64, 64, 64)))
