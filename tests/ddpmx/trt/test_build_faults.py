"""Builds that fail: what is refused before or during a build, and that no file of it is left.

They use TensorRT-RTX, which builds without a GPU. Of TensorRT only the checks before the build are tested.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ddpmx.device.discovery import Gpus
from ddpmx.errors import BackendError, DdpmxError, FileFormatError, InputError, OutputError, SpecError
from ddpmx.formats.onnx_file import BFLOAT16, FLOAT8E4M3FN, INT8, GraphInfo
from ddpmx.formats.protobuf import fields
from ddpmx.trt import build as trt_build
from ddpmx.trt.build import BuildOptions
from ddpmx.trt.library import Library
from ddpmx.trt.precision import assert_precision, check_weights
from oracles import protobuf
from oracles.engines import NO_GPU, ORIN, SPEC, cast, content, external, fake, listed, onnx, with_external
from oracles.protobuf import FLOAT, FLOAT16

# --- what TensorRT refuses -------------------------------------------------------------------------------------------


def test_every_operator_that_the_parser_does_not_know_is_named(build, folder, library):
    nodes = [protobuf.node("Frobnicate", ["x"], ["y"]), protobuf.node("Defenestrate", ["y"], ["eps"])]
    path = folder / "model.onnx"
    path.write_bytes(onnx(nodes=nodes))
    with pytest.raises(FileFormatError, match="parser refuses this file") as caught:
        build(path)
    for part in (str(library), "Frobnicate", "Defenestrate"):
        assert part in str(caught.value)
    assert listed(folder) == ["model.onnx"]


def test_mixed_types_are_refused_with_their_node(build, folder):
    nodes = [cast("x", "half", FLOAT16), protobuf.node("Mul", ["x", "half"], ["eps"]) + protobuf.field(3, "mixed")]
    path = folder / "model.onnx"
    path.write_bytes(onnx(nodes=nodes))
    with pytest.raises(FileFormatError, match="parser refuses") as caught:
        build(path)
    assert "mixed" in str(caught.value)
    assert "Half" in str(caught.value)
    assert listed(folder) == ["model.onnx"]


@pytest.mark.parametrize("x", [("batch", 3, "h", 8), ("batch", None, 8, 8)])
def test_only_the_batch_may_be_dynamic(build, folder, x):
    path = folder / "model.onnx"
    path.write_bytes(onnx(x=x))
    with pytest.raises(FileFormatError, match="do not match its spec"):
        build(path)
    assert listed(folder) == ["model.onnx"]


def test_an_input_without_a_shape_is_refused(build, folder):
    path, whole = folder / "model.onnx", onnx()
    known = protobuf.field(11, protobuf.value_info("x", FLOAT, ("batch", 3, 8, 8)))
    unknown = protobuf.field(
        11, protobuf.field(1, "x") + protobuf.field(2, protobuf.field(1, protobuf.field(1, FLOAT)))
    )
    parts = [
        protobuf.field(number, value if isinstance(value, int) else bytes(value).replace(known, unknown))
        for number, value in fields(memoryview(whole))
    ]
    assert b"".join(parts) != whole
    path.write_bytes(b"".join(parts))
    with pytest.raises(DdpmxError):
        build(path)


def test_the_error_says_why_a_builder_failed(build, toy, library, monkeypatch):
    """With the library's own message, which only goes to its logger."""

    class Builder(library.trt.Builder):
        def build_serialized_network(self, network, config):
            library.logger.log(library.trt.ILogger.Severity.WARNING, "a warning")
            library.logger.log(library.trt.ILogger.Severity.ERROR, "out of luck")

    trt = SimpleNamespace(**{**vars(library.trt), "Builder": Builder})
    with pytest.raises(BackendError, match="could not build") as caught:
        build(toy, library=dataclasses.replace(library, trt=trt))
    assert "out of luck" in str(caught.value)
    assert "a warning" not in str(caught.value)
    assert listed(toy.parent) == ["model.onnx"]


@pytest.mark.parametrize("error", [TypeError("factory function returned nullptr"), RuntimeError("no driver")])
def test_the_error_says_why_a_builder_cannot_be_made(build, toy, library, error):
    def make(_):
        raise error

    trt = SimpleNamespace(**{**vars(library.trt), "Builder": make})
    with pytest.raises(BackendError, match="cannot make the builder") as caught:
        build(toy, library=dataclasses.replace(library, trt=trt))
    assert str(error) in str(caught.value)


# --- files that are refused ------------------------------------------------------------------------------------------


def test_files_that_are_not_onnx_are_refused(folder):
    for data, message in ((b"PK\x03\x04", "neither"), (b"ftrt" + bytes(40), "not an ONNX file"), (b"", "empty")):
        (folder / "model").write_bytes(data)
        with pytest.raises(FileFormatError, match=message):
            trt_build.build(folder / "model", folder / "out.plan", library=fake("10.3.0.26"), devices=ORIN)
    with pytest.raises(FileFormatError, match="cannot be read"):
        trt_build.build(folder / "missing.onnx", library=fake("10.3.0.26"), devices=ORIN)
    assert listed(folder) == ["model"]


@pytest.mark.parametrize("path", [".", "", "/"])
def test_a_folder_is_refused_as_a_model(path):
    with pytest.raises(DdpmxError):
        trt_build.build(path, library=fake("1.7.1", "TensorRT-RTX"), devices=NO_GPU)


def test_a_plan_is_refused_as_a_model(build, toy):
    build(toy)
    with pytest.raises(FileFormatError, match="not an ONNX file"):
        build(toy.with_suffix(".plan"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (onnx(metadata={}), "does not say which diffusion model"),
        (onnx(SPEC.replace(prediction="v")), "missing output 'v'"),
        (onnx(SPEC.replace(shape=(3, 8, 16))), "'x' has the shape"),
        (onnx(SPEC.replace(precision="fp16")), "declares fp16, but its weights"),
        (onnx(SPEC.replace(precision="bf16")), "declares bf16, but its weights"),
        (onnx(weights=FLOAT16), "declares fp32, but its weights"),
        (onnx(SPEC.replace(precision="int8")), "declares int8, but its weights"),
    ],
)
def test_files_that_contradict_themselves_are_refused(folder, data, message):
    (folder / "model.onnx").write_bytes(data)
    with pytest.raises(SpecError) as caught:
        trt_build.build(folder / "model.onnx", library=fake("10.13.0.1"), devices=ORIN)
    assert message in str(caught.value)
    assert listed(folder) == ["model.onnx"]


def test_weights_outside_the_folder_are_refused(folder, tmp_path):
    (tmp_path / "secret").write_bytes(bytes(4 * 192 * 20))
    (folder / "model.onnx").write_bytes(onnx(table=external("table", (20, 3, 8, 8), "../secret", 4)))
    with pytest.raises(FileFormatError, match="outside its own folder"):
        trt_build.build(folder / "model.onnx", library=fake("1.7.1", "TensorRT-RTX"), devices=NO_GPU)


def test_a_name_that_the_parser_cannot_take_is_refused(build, toy):
    path = toy.rename(os.fsdecode(os.fsencode(toy.parent) + b"/n\xff.onnx"))
    with pytest.raises(FileFormatError, match="UTF-8"):
        build(path)


def test_a_description_longer_than_a_name_is_refused(build, folder):
    path = folder / "model.onnx"
    path.write_bytes(onnx(SPEC.replace(ddpmx="x" * 3600)))
    with pytest.raises(SpecError, match="a name holds 4095"):
        build(path)
    assert listed(folder) == ["model.onnx"]


# --- what cannot be built here ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"refit": True}, {"strip": True}, {"refit": True, "strip": True}])
def test_refit_and_strip_need_a_gpu(build, toy, options):
    with pytest.raises(BackendError, match="needs a GPU to build") as caught:
        build(toy, **options)
    assert ("stripped" if "strip" in options else "refittable") in str(caught.value)
    assert NO_GPU.trouble in str(caught.value)
    assert listed(toy.parent) == ["model.onnx"]


def test_tensorrt_needs_a_gpu(toy):
    with pytest.raises(BackendError, match="there is none here") as caught:
        trt_build.build(toy, library=fake("10.3.0.26"), devices=NO_GPU)
    for part in ("TensorRT 10.3.0.26", NO_GPU.trouble, "tensorrt-rtx-cu13"):
        assert part in str(caught.value)
    assert listed(toy.parent) == ["model.onnx"]


def test_tensorrt_builds_only_for_the_gpu_of_this_machine(toy):
    with pytest.raises(InputError, match="omit --target"):
        trt_build.build(toy, options=BuildOptions(targets=("8.6",)), library=fake("10.3.0.26"), devices=ORIN)


def possible(library: Library, precision: str = "fp32", devices: Gpus = ORIN, **options) -> None:
    spec = SPEC.replace(precision=precision)
    trt_build._check_possible(library, spec, BuildOptions(**options), devices)


@pytest.mark.parametrize("version", ["10.3.0.26", "10.9.0.34", "10.12.0.36"])
def test_bfloat16_is_refused_before_10_13(version):
    with pytest.raises(BackendError, match="bfloat16") as caught:
        possible(fake(version), "bf16")
    assert f"TensorRT {version}" in str(caught.value)
    assert "--fp16" in str(caught.value)
    possible(fake(version), "fp16")


@pytest.mark.parametrize("version", ["10.13.0.35", "10.16.1.11", "11.4.0.106"])
def test_bfloat16_is_accepted_from_10_13_on(version):
    possible(fake(version), "bf16")


def test_tensorrt_rtx_takes_bfloat16_and_needs_no_gpu():
    possible(fake("1.1.0.3", "TensorRT-RTX"), "bf16", NO_GPU)
    possible(fake("10.3.0.26"), refit=True, strip=True)


@pytest.mark.parametrize("targets", [("8.6",), ("8.9", "7.5")])
def test_e4m3_is_refused_where_no_gpu_computes_in_it(targets):
    with pytest.raises(BackendError, match="does not compute in E4M3") as caught:
        possible(fake("1.7.1.116", "TensorRT-RTX"), "fp8", NO_GPU, targets=targets)
    assert "--int8" in str(caught.value)
    possible(fake("1.7.1.116", "TensorRT-RTX"), "int8", NO_GPU, targets=targets)


def test_e4m3_is_built_for_what_has_it():
    possible(fake("1.7.1.116", "TensorRT-RTX"), "fp8", NO_GPU, targets=("8.9", "12.0"))
    possible(fake("1.7.1.116", "TensorRT-RTX"), "fp8", NO_GPU)  # of no target it says nothing, so it builds
    with pytest.raises(BackendError, match=r"SM 8.7 does not compute in E4M3"):
        possible(fake("10.13.0.35"), "fp8", ORIN)
    possible(fake("10.13.0.35"), "int8", ORIN)


@pytest.mark.parametrize(
    "options",
    [
        *({"batch": batch} for batch in ((1, 2), (0, 1, 2), (4, 2, 8), (1, 2, 1 << 17), (1, 2.0, 3), (True, 2, 3))),
        *({"targets": (target,)} for target in ("sm86", "8", "86", "8.6+", "", "8.66", "8.6\n")),
        *({"workspace": size} for size in (0, -1, 1, 1 << 50)),
        *({"level": level} for level in (-1, 6)),
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(InputError):
        BuildOptions(**options)


def test_a_version_that_is_not_a_number_is_refused(toy):
    with pytest.raises(BackendError, match="reports the version 'unknown'"):
        trt_build.build(toy, library=fake("unknown", "TensorRT-RTX"), devices=NO_GPU)


# --- writing ---------------------------------------------------------------------------------------------------------


def test_outputs_that_cannot_be_written_are_refused(toy):
    def attempt(output: Path) -> str:
        with pytest.raises(OutputError) as caught:
            trt_build.build(toy, output, library=fake("1.7.1", "TensorRT-RTX"), devices=NO_GPU)
        return str(caught.value)

    before = content(toy.parent)
    assert "is a folder" in attempt(toy.parent)
    assert "there is no folder" in attempt(toy.parent / "missing" / "model.plan")
    assert "there is no folder" in attempt(toy / "model.plan")
    assert "it is made from this file" in attempt(toy)
    (toy.parent / "link").symlink_to(toy)
    assert "it is made from this file" in attempt(toy.parent / "link")
    (toy.parent / "link").unlink()
    assert content(toy.parent) == before


@pytest.mark.parametrize(
    ("name", "content"), [("README.md", b"# mine"), ("model.bin", b"\x00" * 99), ("note.plan", b"# mine")]
)
def test_a_file_that_is_not_a_plan_is_not_replaced(toy, name, content):
    (toy.parent / name).write_bytes(content)
    with pytest.raises(OutputError, match=r"refusing to overwrite .*: not a plan"):
        trt_build.build(toy, toy.parent / name, library=fake("1.7.1", "TensorRT-RTX"), devices=NO_GPU)
    assert (toy.parent / name).read_bytes() == content


def test_a_plan_does_not_replace_the_weights_that_it_is_built_from(build, folder):
    path = with_external(folder)
    before = content(folder)
    with pytest.raises(OutputError):
        build(path, folder / "weights.bin")
    assert content(folder) == before


def test_a_sidecar_does_not_replace_the_onnx_file(build, toy):
    source = toy.rename(toy.with_name("model.plan.json"))
    before = content(toy.parent)
    with pytest.raises(OutputError):
        build(source, toy.with_name("model.plan"))
    assert content(toy.parent) == before


def test_an_obstacle_to_the_sidecar_is_found_before_the_build(toy):
    (toy.parent / "model.plan.json").mkdir()
    for output, message in ((None, "is a folder"), (toy.parent / ("x" * 240), "too long")):
        with pytest.raises(OutputError, match=message):
            trt_build.build(toy, output, library=fake("1.7.1", "TensorRT-RTX"), devices=NO_GPU)


@pytest.mark.parametrize("fails", range(3))
def test_a_rebuild_that_fails_leaves_the_plan_that_worked_and_its_sidecar(build, toy, monkeypatch, fails):
    key = build(toy).info.engine.key
    before = content(toy.parent)
    replace, calls = os.replace, []

    def fail(source, target):
        calls.append(target)
        if len(calls) == fails + 1:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    if fails < 2:
        with pytest.raises(OutputError, match="cannot be written"):
            build(toy, tf32=True)
        assert content(toy.parent) == before
    else:  # both are in place, and the sidecar still describes the old plan as well
        assert build(toy, tf32=True).info.engine.key != key
        monkeypatch.setattr(os, "replace", replace)
        build(toy, tf32=True, level=2)
        assert "before" not in (toy.parent / "model.plan.json").read_text(), "the next build removes that"


# --- precision -------------------------------------------------------------------------------------------------------

RTX, TENSORRT = fake("1.7.1.116", "TensorRT-RTX"), fake("10.3.0.26")
MB = 1 << 20


def precision(plan: object, library: Library, weights: int = 64 * MB, element_type: int = FLOAT16, **options) -> str:
    info = GraphInfo({}, {}, {}, 20, (), {element_type: weights})
    name = {FLOAT: "fp32", FLOAT16: "fp16", BFLOAT16: "bf16", INT8: "int8", FLOAT8E4M3FN: "fp8"}[element_type]
    return assert_precision(plan, SPEC.replace(precision=name), info, library, **{"stripped": False} | options)


def rtx_plan(weights: int) -> bytes:
    return b"vtrt" + bytes(84) + b"THGW" + bytes(12) + weights.to_bytes(8, "little") + bytes(400)


@pytest.mark.parametrize("element_type", [INT8, FLOAT8E4M3FN])
def test_8_bit_weights_are_in_the_plan_or_it_is_refused(element_type):
    """The builder widens the time path's halves, which is no fault; 8-bit weights as halves are."""
    name = {INT8: "int8", FLOAT8E4M3FN: "fp8"}[element_type]
    info, spec = GraphInfo({}, {}, {}, 20, (), {element_type: 64 * MB, FLOAT16: 16 * MB}), SPEC.replace(precision=name)
    for stored in (80 * MB, 96 * MB):
        assert name in assert_precision(rtx_plan(stored), spec, info, RTX, stripped=False)
    for stored in (40 * MB, 144 * MB):
        with pytest.raises(BackendError, match="did not keep the precision"):
            assert_precision(rtx_plan(stored), spec, info, RTX, stripped=False)
    assert "a plan of" in assert_precision(np.zeros(100 * MB, np.uint8), spec, info, TENSORRT, stripped=False)
    with pytest.raises(BackendError, match=f"widened the {name} weights"):
        assert_precision(np.zeros(150 * MB, np.uint8), spec, info, TENSORRT, stripped=False)
    few = GraphInfo({}, {}, {}, 20, (), {element_type: MB, FLOAT16: 16 * MB})
    assert "too few 8-bit" in assert_precision(np.zeros(MB, np.uint8), spec, few, TENSORRT, stripped=False)


def test_weights_that_the_graph_rounds_have_8_bits_in_the_plan():
    spec = SPEC.replace(precision="int8")
    info = GraphInfo({}, {}, {}, 20, (), {FLOAT: 66 * MB}, {(FLOAT, INT8): 64 * MB})
    check_weights(Path("model.onnx"), spec, info)
    assert f"{18 * MB} in the graph" in assert_precision(rtx_plan(18 * MB), spec, info, RTX, stripped=False)
    with pytest.raises(BackendError, match="did not keep the precision"):
        assert_precision(rtx_plan(66 * MB), spec, info, RTX, stripped=False)


@pytest.mark.parametrize("element_type", [FLOAT, FLOAT16, BFLOAT16])
def test_weights_of_the_right_size_are_accepted(element_type):
    assert "67108864 bytes" in precision(rtx_plan(64 * MB), RTX, element_type=element_type)
    if element_type != FLOAT:
        assert "a plan of" in precision(np.zeros(66 * MB, np.uint8), TENSORRT, element_type=element_type)


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.3, 2])
def test_weights_of_another_size_are_refused_in_a_tensorrt_rtx_plan(factor):
    with pytest.raises(BackendError, match="did not keep the precision"):
        precision(rtx_plan(int(factor * 64 * MB)), RTX)


@pytest.mark.parametrize("element_type", [FLOAT16, BFLOAT16])
def test_widened_weights_are_refused_in_a_tensorrt_plan(element_type):
    with pytest.raises(BackendError, match="widened"):
        precision(np.zeros(129 * MB, np.uint8), TENSORRT, element_type=element_type)


@pytest.mark.parametrize(
    ("plan", "library", "options"),
    [
        (b"vtrt" + bytes(400), RTX, {}),
        (rtx_plan(0), RTX, {"stripped": True}),
        (np.zeros(4 * MB, np.uint8), TENSORRT, {"weights": 2 * MB}),
        (np.zeros(129 * MB, np.uint8), TENSORRT, {"element_type": FLOAT}),
    ],
)
def test_a_precision_that_cannot_be_verified_is_not_claimed(plan, library, options):
    assert precision(plan, library, **options).startswith("not verified")


def test_a_precision_within_the_slack_is_not_claimed():
    assert precision(rtx_plan(MB >> 4), RTX, weights=MB >> 5).startswith("not verified")


def test_a_plan_that_lost_its_precision_is_not_written(build, toy, library):
    class Builder(library.trt.Builder):
        def build_serialized_network(self, network, config):
            return memoryview(rtx_plan(64 * MB))

    trt = SimpleNamespace(**{**vars(library.trt), "Builder": Builder})
    with pytest.raises(BackendError, match="did not keep the precision"):
        build(toy, library=dataclasses.replace(library, trt=trt))
    assert listed(toy.parent) == ["model.onnx"]
