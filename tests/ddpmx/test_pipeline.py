"""load and Pipeline: the same images however they are drawn, and every refusal says why."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

import ddpmx
from ddpmx.backends.base import Buffers
from ddpmx.errors import BackendError, Cancelled, FileFormatError, InputError, NumericError, SpecError
from ddpmx.formats.spec import ModelSpec
from ddpmx.pipeline import Pipeline
from ddpmx.sampling.pixels import to_nhwc
from oracles import gaussian, protobuf
from oracles.toy_backend import ToyBackend

ort = pytest.importorskip("onnxruntime", reason="not verified here: the pipeline (no onnxruntime)")


@pytest.fixture(scope="module")
def toy(gaussian_onnx):
    with ddpmx.load(gaussian_onnx, threads=1) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def eight(toy):
    return toy.generate(8, seed=42, steps=20)


# --- the same images -------------------------------------------------------------------------------------------------


def test_images_are_what_they_should_be(eight):
    assert eight.shape == (8, 8, 8, 3)
    assert eight.dtype == np.uint8
    # each pixel lies about its μ, so an axis in the wrong place would be far off
    middle = (gaussian.MU.transpose(1, 2, 0) + 1) * 127.5
    assert np.corrcoef(eight.mean(axis=0).ravel(), middle.ravel())[0, 1] > 0.95


@pytest.mark.parametrize("batch", [1, 3, 5, 8, 100])
def test_the_batch_makes_no_difference(toy, eight, batch):
    np.testing.assert_array_equal(toy.generate(8, seed=42, steps=20, batch=batch), eight)


@pytest.mark.parametrize(
    "sampling", [{}, {"sampler": "ddim", "steps": 25}, {"sampler": "ddim", "eta": 1.0, "steps": 25}]
)
def test_parts_make_the_whole(toy, sampling):
    whole = toy.generate(8, seed=1, **sampling)
    halves = [toy.generate(4, seed=1, first=first, **sampling) for first in (0, 4)]
    np.testing.assert_array_equal(np.concatenate(halves), whole)
    for first in (0, 3, 7):
        np.testing.assert_array_equal(toy.generate(1, seed=1, first=first, **sampling)[0], whole[first])


def test_another_process_draws_the_same(gaussian_onnx, eight):
    code = """
import sys, ddpmx
with ddpmx.load(sys.argv[1], threads=2) as pipeline:
    sys.stdout.buffer.write(pipeline.generate(5, seed=42, first=3, steps=20, batch=2).tobytes())
"""
    result = subprocess.run([sys.executable, "-c", code, str(gaussian_onnx)], capture_output=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout == eight[3:].tobytes()


def test_seeds_and_indices_make_a_difference(toy, eight):
    assert not np.array_equal(toy.generate(8, seed=43, steps=20), eight)
    assert len({image.tobytes() for image in eight}) == 8
    last = toy.generate(1, seed=2**64 - 1, first=2**32 - 1, steps=5)
    assert last.shape == (1, 8, 8, 3)


def test_numpy_numbers_are_numbers(toy, eight):
    drawn = toy.generate(np.int64(4), seed=np.uint64(42), first=np.int32(2), batch=np.int16(3), steps=np.int64(20))
    np.testing.assert_array_equal(drawn, eight[2:6])


def answer(pipeline, x, t):
    """The network's answer itself, all of ``x`` in one batch."""
    buffers = Buffers.of(len(x), pipeline.spec.shape)
    pipeline._runner._backend.bind(buffers)
    buffers.x[...], buffers.t[...] = x, t
    pipeline._runner._backend.enqueue()
    return buffers.out


def test_the_toy_s_floats_do_not_depend_on_the_batch(toy):
    x = np.random.default_rng(0).standard_normal((16, *toy.spec.shape)).astype(np.float32)
    for t in (0, 500, 999):
        whole = answer(toy, x, t)
        for batch in (1, 2, 3, 7):
            parts = [answer(toy, x[start : start + batch], t) for start in range(0, 16, batch)]
            np.testing.assert_array_equal(np.concatenate(parts), whole)


def assert_company_makes_no_difference(path, threads, *, batch=4, steps=3, **spec):
    """Bit for bit, in the floats of every step, for every way to group the images within one size of batch."""
    with ddpmx.load(path, threads=threads, **spec) as pipeline:

        def states(n, first):
            previews = pipeline.stream(n, first=first, seed=8, batch=batch, sampler="ddim", steps=steps)
            return np.stack([preview.x0 for preview in previews], axis=1)

        whole = states(batch, 0)
        assert np.isfinite(whole).all()
        assert np.median(np.abs(whole)) > 0.05
        for first in range(batch):
            for n in range(1, batch - first + 1):
                np.testing.assert_array_equal(states(n, first), whole[first : first + n])


@pytest.mark.parametrize("threads", [0, 1, 2, 4, 8])
def test_an_attention_s_floats_do_not_depend_on_the_company(tmp_path, threads):
    """x·(xᵀ·x) over 16×16 pixels. How a matrix product is shared out among threads may decide in which order it is
    summed, and with few images in a batch it is shared out otherwise than with many."""
    channels, pixels = 64, 256
    constants = {
        "flat": (protobuf.INT64, [3], np.array([0, channels, pixels], "<i8")),
        "image": (protobuf.INT64, [4], np.array([0, channels, 16, 16], "<i8")),
        "small": (protobuf.FLOAT, [], np.array(1 / 150, "<f4")),
    }
    nodes = [
        protobuf.node("Reshape", ["x", "flat"], ["rows"]),
        protobuf.node("Transpose", ["rows"], ["columns"], protobuf.ints("perm", [0, 2, 1])),
        protobuf.node("MatMul", ["columns", "rows"], ["weights"]),
        protobuf.node("MatMul", ["rows", "weights"], ["mixed"]),
        protobuf.node("Reshape", ["mixed", "image"], ["large"]),
        protobuf.node("Mul", ["large", "small"], ["eps"]),
    ]
    graph = b"".join(protobuf.field(1, node) for node in nodes)
    for name, (data_type, dims, value) in constants.items():
        graph += protobuf.field(5, protobuf.tensor(name, data_type, dims, value.tobytes()))
    picture = (protobuf.FLOAT, ("batch", channels, 16, 16))
    model = protobuf.model({"x": picture, "t": (protobuf.INT32, ("batch",))}, {"eps": picture}, graph=graph)
    (tmp_path / "model.onnx").write_bytes(model)
    spec = ModelSpec((channels, 16, 16), clip=None)
    assert_company_makes_no_difference(tmp_path / "model.onnx", threads, steps=1, spec=spec)


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("threads", [0, 1, 2])
def test_a_trained_network_s_floats_do_not_depend_on_the_company(trained, precision, threads):
    assert_company_makes_no_difference(getattr(trained, precision), threads)


@pytest.mark.parametrize(("sways", "executed"), [("size", {4}), ("place", {1})])
def test_where_the_company_could_be_felt_it_is_made_the_same(sways, executed):
    backend = ToyBackend(sways=sways)
    pipeline = Pipeline(gaussian.SPEC, backend)
    whole = pipeline.generate(8, seed=1, steps=5, batch=4)
    for n, first in ((3, 4), (1, 7), (6, 0), (5, 2)):
        drawn = pipeline.generate(n, seed=1, first=first, steps=5, batch=4)
        np.testing.assert_array_equal(drawn, whole[first : first + n])
    backend.calls.clear()  # by now the pipeline knows how this backend sways
    pipeline.generate(7, steps=5, batch=4)
    assert {batch for _, batch in backend.calls} == executed


def test_the_toys_do_sway():
    """The control of the one above: without the precaution the images would differ."""
    one, many = ({}, {}), ({}, {})
    for sways, results in (("size", one), ("place", many)):
        for batch, found in zip((2, 4), results, strict=True):
            x, t = np.ones((batch, 3, 8, 8), np.float32), np.full(batch, 500)
            pipeline = Pipeline(gaussian.SPEC, ToyBackend(sways=sways))
            found["first"], found["last"] = answer(pipeline, x, t)[[0, -1]]
    assert np.all(one[0]["first"] != one[1]["first"])
    assert np.all(many[0]["first"] != many[0]["last"])
    np.testing.assert_array_equal(many[0]["first"], many[1]["first"])


def test_where_the_company_cannot_be_felt_nothing_is_filled_up():
    backend = ToyBackend()
    pipeline = Pipeline(gaussian.SPEC, backend)
    pipeline.generate(5, steps=2, batch=3)
    backend.calls.clear()
    pipeline.generate(5, steps=2, batch=3)
    assert backend.calls == [(999, 3), (0, 3), (999, 2), (0, 2)]


@pytest.mark.parametrize(
    ("shape", "batch"), [((3, 8, 8), 16), ((3, 256, 256), 16), ((3, 1024, 1024), 1), ((3, 4096, 4096), 1)]
)
def test_the_default_batch_depends_on_the_shape_alone(shape, batch):
    assert Pipeline(ModelSpec(shape), ToyBackend()).default_batch == batch


def test_a_condition_counts_where_it_is_larger_than_the_image():
    pipeline = Pipeline(ModelSpec((1, 256, 256), condition=64), ToyBackend())
    assert pipeline.default_batch == 1
    with pytest.raises(InputError, match="9 images of 256×256 at once do not fit"):
        pipeline.check_request(9, batch=9)


# --- watching and stopping -------------------------------------------------------------------------------------------


def test_a_stream_shows_every_step_and_ends_with_the_image(toy, eight):
    previews = list(toy.stream(8, seed=42, steps=20))
    assert [preview.t for preview in previews] == toy.table(steps=20).timesteps.tolist()
    np.testing.assert_array_equal(to_nhwc(previews[-1].x0), eight)
    for preview in previews:
        assert preview.x.shape == preview.x0.shape == (8, 3, 8, 8)
        assert np.abs(preview.x0).max() <= 1
    # copies: the first is still what it was when the last one came
    np.testing.assert_array_equal(previews[0].x, next(iter(toy.stream(8, seed=42, steps=20))).x)
    assert not np.array_equal(previews[0].x, previews[1].x)


def test_a_stream_can_be_left_early():
    backend = ToyBackend()
    pipeline = Pipeline(gaussian.SPEC, backend)
    for preview in pipeline.stream(1, steps=10):
        if preview.t < 500:
            break
    assert backend.calls[-1][0] == preview.t  # nothing was computed that was not looked at
    assert preview.t == 444
    assert pipeline.generate(1, steps=3).shape == (1, 8, 8, 3)  # and the pipeline is still of use


def test_a_stream_starts_anywhere(toy, eight):
    *_, last = toy.stream(2, seed=42, first=5, steps=20)
    np.testing.assert_array_equal(to_nhwc(last.x0), eight[5:7])


@pytest.mark.parametrize("sampling", [{"steps": 20}, {"sampler": "ddim", "eta": 1.0, "steps": 20}, {"steps": 7}])
def test_a_chain_goes_on_from_any_of_its_states(toy, sampling):
    """The noise depends on t, not on how many steps came before, so that the images are the same to the last bit."""
    whole = toy.generate(5, seed=42, first=2, batch=5, **sampling)
    states = list(toy.stream(5, seed=42, first=2, batch=5, **sampling))
    for k in (0, 1, len(states) // 2, len(states) - 2, len(states) - 1):
        seen = []
        t, x = states[k].t, states[k].x
        rest = toy.generate(
            5, seed=42, first=2, batch=5, x=x, start=t, preview=lambda _, p, seen=seen: seen.append(p), **sampling
        )
        np.testing.assert_array_equal(rest, whole)
        assert [p.t for p in seen] == [state.t for state in states[k:]]
        for mine, theirs in zip(seen, states[k:], strict=True):
            np.testing.assert_array_equal(mine.x, theirs.x)
            np.testing.assert_array_equal(mine.x0, theirs.x0)


def test_another_start_leads_to_another_image(toy):
    """The control of the one above: what a state is taken for makes a difference."""
    states = list(toy.stream(1, seed=42, steps=20))
    right, wrong = (toy.generate(1, seed=42, x=states[10].x, start=states[k].t, steps=20) for k in (10, 8))
    assert not np.array_equal(right, wrong)


def test_a_chain_with_a_start_needs_its_states():
    backend = ToyBackend()
    pipeline = Pipeline(gaussian.SPEC, backend)
    with pytest.raises(InputError, match=r"t = 500 needs its states(.|\n)*\[2, 3, 8, 8\]"):
        pipeline.generate(2, steps=3, start=500)
    with pytest.raises(InputError, match=r"not at t = 500(.|\n)*preview"):
        next(pipeline.stream(2, steps=3, start=500))
    with pytest.raises(InputError, match="from 0 to 999, not 1001"):
        pipeline.generate(2, x=np.zeros((2, 3, 8, 8), np.float32), steps=3, start=1001)
    assert backend.calls == []
    with pytest.warns(UserWarning, match="begins at 500, the nearest"):
        pipeline.generate(2, x=np.zeros((2, 3, 8, 8), np.float32), steps=3, start=501)
    pipeline.generate(2, x=np.zeros((2, 3, 8, 8), np.float32), steps=3, start=500)  # which also learns how it sways
    backend.calls.clear()
    pipeline.generate(2, x=np.zeros((2, 3, 8, 8), np.float32), steps=3, start=500)
    assert backend.calls == [(500, 2), (0, 2)]


def test_progress_counts_all_steps_of_all_batches(toy):
    seen = []
    toy.generate(5, batch=2, steps=4, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 12) for done in range(1, 13)]


def test_previews_say_where_their_picturebelong(toy):
    seen = []
    drawn = toy.generate(5, batch=2, steps=3, preview=lambda start, step: seen.append((start, step.t, step.x0.copy())))
    assert [(start, t) for start, t, _ in seen] == [(start, t) for start in (0, 2, 4) for t in (999, 500, 0)]
    for start, t, x0 in seen:
        assert len(x0) == min(2, 5 - start)
        if t == 0:
            np.testing.assert_array_equal(to_nhwc(x0), drawn[start : start + len(x0)])


def test_previews_of_a_padded_batch_have_no_padding():
    seen = []
    pipeline = Pipeline(gaussian.SPEC, ToyBackend(sways="size"))
    pipeline.generate(3, batch=8, steps=2, preview=lambda start, step: seen.append((len(step.x), len(step.x0))))
    assert seen == [(3, 3), (3, 3)]


@pytest.mark.parametrize("after", [0, 1, 7])
def test_cancelling_stops_before_the_next_step(after):
    backend = ToyBackend()
    with pytest.raises(Cancelled):
        Pipeline(gaussian.SPEC, backend).generate(2, batch=1, steps=5, cancel=lambda: len(backend.calls) >= after)
    assert len(backend.calls) == after


def test_an_answer_that_is_no_number_ends_the_drawing():
    with pytest.raises(NumericError, match="t = 500 "):
        Pipeline(gaussian.SPEC, ToyBackend(poison=(500, np.nan))).generate(2, steps=3)


def test_leaving_the_block_closes_the_backend():
    backend = ToyBackend()
    with Pipeline(gaussian.SPEC, backend):
        assert backend.closed == 0
    assert backend.closed == 1


def test_the_chain_obeys_the_spec_s_clip():
    free = Pipeline(gaussian.SPEC.replace(clip=None), ToyBackend())
    tight = Pipeline(gaussian.SPEC.replace(clip=0.25), ToyBackend())
    assert max(np.abs(step.x0).max() for step in tight.stream(1, steps=10)) == 0.25
    assert max(np.abs(step.x0).max() for step in free.stream(1, steps=10)) > 0.25


# --- numbers out of their range --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        {"n": 0},
        {"n": -1},
        {"n": 1.0},
        {"n": True},
        {"n": "3"},
        {"n": None},
        {"n": 2**32 + 1},
        {"n": 1, "first": -1},
        {"n": 2, "first": 2**32 - 1},
        {"n": 1, "first": 2**32},
        {"n": 1, "first": 0.5},
        {"n": 1, "batch": 0},
        {"n": 1, "batch": -4},
        {"n": 1, "batch": 2.0},
        {"n": 1, "batch": 2**31},
        {"n": 1, "seed": -1},
        {"n": 1, "seed": 2**64},
        {"n": 1, "seed": 1.5},
        {"n": 1, "steps": 0},
        {"n": 1, "steps": 1001},
        {"n": 1, "sampler": "euler"},
        {"n": 1, "sampler": "ddim", "eta": 2},
        {"n": 1, "eta": 0.5},
        {"n": 1, "steps": 3, "spacing": "random"},
        {"n": 1, "start": True},
        {"n": 1, "start": 1000},
    ],
)
def test_numbers_out_of_range_are_refused_before_any_work(call):
    backend = ToyBackend()
    pipeline = Pipeline(gaussian.SPEC, backend)
    with pytest.raises(InputError):
        pipeline.generate(**call)
    with pytest.raises(InputError):
        list(pipeline.stream(**call))
    assert backend.calls == []


def test_an_unknown_variance_is_refused(toy):
    with pytest.raises(SpecError, match="variance"):
        toy.generate(1, variance="learnt")


@pytest.mark.parametrize("batch", [2**32, 10**7])
def test_more_picturethan_memory_are_refused_before_memory_is_taken(batch):
    """In a process of its own that may not take much, so that a wrong answer costs nobody else anything."""
    code = f"""
import resource
from ddpmx.pipeline import Pipeline
from ddpmx.errors import InputError
from oracles import gaussian
from oracles.toy_backend import ToyBackend
pipeline = Pipeline(gaussian.SPEC, ToyBackend())
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
try:
    pipeline.generate(2**32, batch={batch})
except InputError as error:
    print("refused")
"""
    pytest.importorskip("resource", reason="not verified here: that a huge n is refused at once (no rlimit)")
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OPENBLAS_NUM_THREADS": "1"},
    )
    assert result.stdout == "refused\n", result.stderr[-500:]


# --- opening ---------------------------------------------------------------------------------------------------------


def test_a_pipeline_says_what_computes(toy):
    assert toy.spec == gaussian.SPEC
    assert toy.backend == f"onnxruntime {ort.__version__}, CPUExecutionProvider"


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(FileFormatError, match="cannot be read"):
        ddpmx.load(tmp_path / "missing.onnx")


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "model.onnx").touch()
    with pytest.raises(FileFormatError, match="empty"):
        ddpmx.load(tmp_path / "model.onnx")


def test_a_checkpoint_is_sent_to_export(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileFormatError, match="ddpmx export"):
        ddpmx.load(tmp_path)


def test_a_plan_is_named_with_its_version(tmp_path):
    (tmp_path / "model.plan").write_bytes(b"ftrt" + bytes(20) + bytes([10, 3, 0, 26]))
    with pytest.raises(SpecError) as caught:
        ddpmx.load(tmp_path / "model.plan")
    assert "TensorRT 10.3.0.26" in str(caught.value)


def test_a_graph_that_onnxruntime_refuses_is_a_format_error(tmp_path):
    """Good enough for the contract, but its output comes from nowhere."""
    image = (protobuf.FLOAT, ("batch", 3, 8, 8))
    model = protobuf.model({"x": image, "t": (protobuf.INT32, ("batch",))}, {"eps": image})
    (tmp_path / "model.onnx").write_bytes(model)
    with pytest.raises(FileFormatError, match="refuses this file"):
        ddpmx.load(tmp_path / "model.onnx", spec=gaussian.SPEC)


def test_a_file_that_describes_itself_needs_no_spec_and_takes_no_other(gaussian_onnx):
    ddpmx.load(gaussian_onnx, spec=gaussian.SPEC).close()
    with pytest.raises(SpecError, match="contradicts"):
        ddpmx.load(gaussian_onnx, spec=gaussian.SPEC.replace(clip=None))


def test_the_weights_that_are_read_are_the_weights_that_were_checked(tmp_path):
    """A model that is a symlink: what lies beside the link is not what lies beside the file."""
    picture = (protobuf.FLOAT, ("batch", 3, 8, 8))
    graph = protobuf.field(5, protobuf.external_tensor("w.bin")) + protobuf.field(
        1, protobuf.node("Mul", ["x", "w"], ["eps"])
    )
    model = protobuf.model({"x": picture, "t": (protobuf.INT32, ("batch",))}, {"eps": picture}, graph=graph)
    (tmp_path / "a" / "real").mkdir(parents=True)
    (tmp_path / "a" / "real" / "model.onnx").write_bytes(model)
    (tmp_path / "a" / "real" / "w.bin").write_bytes(np.float32(2).tobytes())
    (tmp_path / "secret").write_bytes(np.float32(7).tobytes())
    os.symlink("real/model.onnx", tmp_path / "a" / "model.onnx")
    os.symlink(tmp_path / "secret", tmp_path / "a" / "w.bin")
    try:
        pipeline = ddpmx.load(tmp_path / "a" / "model.onnx", spec=gaussian.SPEC)
    except FileFormatError:
        return  # refused is as good
    with pipeline:
        ones = np.ones((1, 3, 8, 8), np.float32)
        assert answer(pipeline, ones, 0).max() == 2


def test_without_onnxruntime_the_error_says_what_to_install(gaussian_onnx, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # importing it raises ImportError
    with pytest.raises(BackendError, match="pip install"):
        ddpmx.load(gaussian_onnx)


NO_CUDA = pytest.mark.skipif(
    "CUDAExecutionProvider" in ort.get_available_providers(),
    reason="not verified here: what happens without CUDA (this ONNX Runtime has it)",
)


@NO_CUDA
@pytest.mark.parametrize(
    "providers", [("cuda",), ("cuda", "cpu"), ("CUDAExecutionProvider", "cpu"), ("nonsense", "cpu")]
)
def test_a_provider_that_is_not_there_is_an_error(gaussian_onnx, providers):
    with pytest.raises(BackendError, match="has no"):
        ddpmx.load(gaussian_onnx, providers=providers)


@NO_CUDA
def test_another_provider_may_do_the_work_where_that_is_allowed(gaussian_onnx, eight):
    with ddpmx.load(gaussian_onnx, providers=("cuda", "cpu"), fallback=True) as pipeline:
        assert "CPUExecutionProvider" in pipeline.backend
        np.testing.assert_array_equal(pipeline.generate(8, seed=42, steps=20), eight)


@pytest.mark.parametrize("change", [{"providers": ()}, {"threads": -1}, {"threads": 5000}])
def test_impossible_settings_are_refused(gaussian_onnx, change):
    with pytest.raises(InputError):
        ddpmx.load(gaussian_onnx, **change)


def test_a_chain_that_is_looked_at_leaves_numpy_s_settings_alone(gaussian_onnx):
    with ddpmx.load(gaussian_onnx, threads=1) as pipeline:
        before = np.geterr()
        steps = pipeline.stream(1, steps=3)
        next(steps)
        assert np.geterr() == before
        steps.close()


@NO_CUDA
def test_a_fallback_says_why(gaussian_onnx):
    with ddpmx.load(gaussian_onnx, providers=("cuda",), fallback=True) as pipeline:
        assert "CPUExecutionProvider, not cuda (ONNX Runtime has no CUDAExecutionProvider here)" in pipeline.backend


def test_a_provider_that_nobody_knows_is_no_wish_for_another(gaussian_onnx):
    with pytest.raises(BackendError, match="has no cudaa"):
        ddpmx.load(gaussian_onnx, providers=("cudaa",), fallback=True)
