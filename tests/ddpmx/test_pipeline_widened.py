"""Files in half precision, computed in float32: by :func:`ddpmx.load` and by :meth:`ddpmx.Pipeline.in_float32`."""

from __future__ import annotations

import numpy as np
import pytest

import ddpmx
from ddpmx import ModelSpec
from ddpmx.errors import FileFormatError, InputError
from ddpmx.tasks.codec import compress, decompress
from oracles import protobuf
from oracles.protobuf import FLOAT, FLOAT16, INT32, INT64, field, node, tensor

pytest.importorskip("onnxruntime", reason="not verified here: widened files (no onnxruntime)")

SPEC = ModelSpec((1, 8, 8), timesteps=60, precision="fp16", weights="ab" * 32)
SLOPE = 0.3


def to(kind):
    return field(1, "to") + field(3, kind) + field(20, 2)


def write(path, kind=FLOAT16, slope=SLOPE, **changes):
    """A file of ε = slope·x, which is computed in ``kind``; float32 has the slope that half has, too.

    ONNX Runtime's CPU takes away casts to half and back. Some that only move numbers get them in half, and so rounded.
    """
    spec, dtype = SPEC.replace(**changes), {FLOAT: np.float32, FLOAT16: np.float16}[kind]
    nodes = [
        node("Cast", ["x"], ["h"], to(kind)),
        node("Concat", ["h", "h"], ["both"], field(1, "axis") + field(3, 1) + field(20, 2)),
        node("Mul", ["both", "slopes"], ["scaled"]),
        node("Cast", ["scaled"], ["s"], to(FLOAT)),
        node("ReduceSum", ["s", "channels"], ["e"]),
        node("Gather", ["zeros", "t"], ["nothing"]),
        node("Add", ["e", "nothing"], ["eps"]),
    ]
    constants = [
        tensor("slopes", kind, [2, 1, 1], np.array([slope, 0], np.float16).astype(dtype).tobytes()),
        tensor("channels", INT64, [1], np.array([1]).tobytes()),
        tensor("zeros", FLOAT, [60, 1, 1, 1], bytes(240)),
    ]
    path.write_bytes(
        protobuf.model(
            {"x": (FLOAT, ("batch", 1, 8, 8)), "t": (INT32, ("batch",))},
            {"eps": (FLOAT, ("batch", 1, 8, 8))},
            metadata={"ddpmx": spec.to_text()},
            graph=b"".join(field(1, each) for each in nodes) + b"".join(field(5, each) for each in constants),
        )
    )
    return path


def exact(pipeline):
    """Whether it computes in float32: x holds numbers that half does not have."""
    x = np.random.default_rng(0).standard_normal((2, 1, 8, 8)).astype(np.float32)
    return np.array_equal(pipeline.evaluate(x, 3).eps, np.float32(np.float16(SLOPE)) * x)


def test_a_file_is_computed_in_float32(tmp_path):
    path = write(tmp_path / "half.onnx")
    with ddpmx.load(path) as pipeline, ddpmx.load(path, widen=True) as wide:
        assert (pipeline.arithmetic, wide.arithmetic) == ("fp16", "fp32")
        assert pipeline.spec == wide.spec == SPEC
        assert not exact(pipeline), "control: ONNX Runtime rounds x to half"
        assert exact(wide)
        assert wide.backend == f"{pipeline.backend}, in float32"
        with wide.share() as shared:
            assert shared.arithmetic == "fp32"
            assert exact(shared)


def test_an_open_pipeline_has_another_in_float32(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "half.onnx")
    monkeypatch.chdir(tmp_path)
    with ddpmx.load("half.onnx") as pipeline:
        monkeypatch.chdir(tmp_path / "elsewhere")
        for each in (pipeline, pipeline.share()):
            with each.in_float32() as wide:
                assert wide.arithmetic == "fp32"
                assert exact(wide)
                with wide.in_float32() as same:
                    assert same is wide
            with pytest.raises(InputError, match="is closed"):
                exact(wide)
            assert not exact(each)
        write(tmp_path / "half.onnx", weights="cd" * 32)
        with pytest.raises(FileFormatError, match=r"half\.onnx: has changed since"), pipeline.in_float32():
            pass
    with pytest.raises(InputError, match="is closed"), pipeline.in_float32():
        pass


def test_what_is_in_float32_stays_as_it_is(tmp_path):
    path = write(tmp_path / "float32.onnx", FLOAT, precision="fp32")
    with ddpmx.load(path) as pipeline, ddpmx.load(path, widen=True) as wide:
        assert exact(pipeline)
        assert (wide.arithmetic, wide.backend) == (pipeline.arithmetic, pipeline.backend)
        with pipeline.in_float32() as same:
            assert same is pipeline
        assert exact(pipeline), "it is not closed"


def test_a_file_that_says_nothing_of_its_half_is_widened(tmp_path):
    with ddpmx.load(write(tmp_path / "half.onnx", precision="fp32")) as pipeline, pipeline.in_float32() as wide:
        assert exact(wide)


def test_a_plan_computes_as_it_was_built(plan, fake_tensorrt):
    with pytest.raises(InputError, match="a plan computes in the precision that it was built in"):
        ddpmx.load(plan, widen=True)
    with ddpmx.load(plan) as pipeline, pipeline.in_float32() as same:
        assert same is pipeline


def test_the_codec_computes_in_float32(tmp_path):
    """Files in half and in float32, of one network: the same states and images, and headers that tell them apart."""
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1), np.uint8)
    half, float32 = write(tmp_path / "half.onnx"), write(tmp_path / "float32.onnx", FLOAT, precision="fp32")
    done = {}
    for path in (half, float32):
        with ddpmx.load(path) as pipeline:
            done[path] = compress(pipeline, images, stop=20, steps=3, book=8, lossless=True)
            assert np.array_equal(decompress(pipeline, done[path].data).pixels, images)
    assert done[half].sent == done[float32].sent
    begin, same = 16 + 20, done[half].data
    assert same[begin : begin + 2] == b"\1\0"
    assert done[float32].data[begin : begin + 2] == b"\0\0"
    assert same[begin + 2 :] == done[float32].data[begin + 2 :]
    assert (done[half].header.precision, done[half].header.arithmetic) == ("fp16", "fp32")
    with ddpmx.load(half, widen=True) as wide:
        assert np.array_equal(decompress(wide, same).pixels, images)
    with ddpmx.load(float32) as pipeline, pytest.raises(InputError, match="compressed by the fp16 file of this model"):
        decompress(pipeline, same)
