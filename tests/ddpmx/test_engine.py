"""Engines: what is built, what is refused before or during a build, and what is left behind. Built with TensorRT-RTX,
which needs no GPU for that; of TensorRT itself only what is decided before it is asked.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ddpmx import engine, onnxfile, planfile, tensorrt_library
from ddpmx.device import Device, Gpus
from ddpmx.engine import BuildOptions
from ddpmx.engine_precision import assert_precision
from ddpmx.errors import BackendError, Cancelled, DdpmxError, FileFormatError, InputError, OutputError, SpecError
from ddpmx.onnxfile import BFLOAT16, GraphInfo
from ddpmx.spec import ModelSpec
from ddpmx.tensorrt_library import Library
from ddpmx.wire import fields
from oracles import gaussian, wire
from oracles.wire import FLOAT, FLOAT16, INT32

NO_GPU = Gpus(trouble="there is no NVIDIA driver")
ORIN = Gpus((Device("Orin", "8.7", 8 << 30),), "12.6")
SPEC = ModelSpec((3, 8, 8), timesteps=20, ddpmx="0.1.0")


class Severity(enum.IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


def fake(version: str, flavour: str = "TensorRT") -> Library:
    """A library of which only the name is asked."""
    trt = SimpleNamespace(__version__=version, ILogger=SimpleNamespace(Severity=Severity))
    return Library(trt, flavour, version, SimpleNamespace(lines=[]))


@pytest.fixture(scope="module")
def library() -> Library:
    pytest.importorskip("tensorrt_rtx", reason="not verified here: what TensorRT-RTX builds (it is not installed)")
    return tensorrt_library.load("TensorRT-RTX")


@pytest.fixture
def folder(tmp_path):
    """A folder of its own, so that what is left in it can be listed."""
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


@pytest.fixture
def toy(folder, gaussian_onnx) -> Path:
    return Path(shutil.copy(gaussian_onnx, folder / "model.onnx"))


@pytest.fixture
def build(library):
    """``build(path, output, batch=(1, 2, 4), …)``: fields of the options and arguments of ``build`` alike."""
    names = {field.name for field in dataclasses.fields(BuildOptions)}

    def call(path, output=None, **given):
        options = BuildOptions(**{name: given.pop(name) for name in names & set(given)})
        return engine.build(path, output, options, **{"library": library, "devices": NO_GPU, **given})

    return call


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# --- ONNX files by hand ----------------------------------------------------------------------------------------------


def cast(source: str, target: str, element_type: int) -> bytes:
    to = wire.field(1, "to") + wire.field(3, element_type) + wire.field(20, 2)
    return wire.node("Cast", [source], [target], to)


def external(name: str, dims: tuple[int, ...], location: str, length: int) -> bytes:
    entries = [("location", location), ("offset", "0"), ("length", str(length))]
    data = b"".join(wire.field(13, wire.field(1, key) + wire.field(2, value)) for key, value in entries)
    shape = b"".join(wire.field(1, dim) for dim in dims)
    return shape + wire.field(2, FLOAT) + wire.field(8, name) + data + wire.field(14, 1)


def onnx(
    spec: ModelSpec = SPEC, *, weights=FLOAT, table=None, nodes=None, x=("batch", 3, 8, 8), metadata=None
) -> bytes:
    """eps = x · table[t], computed in the type of the weights."""
    if table is None:
        width = {FLOAT: 4, FLOAT16: 2, BFLOAT16: 2}[weights]
        raw = np.random.default_rng(0).integers(0, 60, spec.timesteps * 192 * width, np.uint8).tobytes()
        table = wire.tensor("table", weights, (spec.timesteps, *spec.shape), raw)
    if nodes is None:
        nodes = [
            wire.node("Gather", ["table", "t"], ["factor"]),
            cast("x", "x16", weights),
            wire.node("Mul", ["x16", "factor"], ["product"]),
            cast("product", "eps", FLOAT),
        ]
    return wire.model(
        {"x": (FLOAT, x), "t": (INT32, ("batch",))},
        {"eps": (FLOAT, ("batch", 3, 8, 8))},
        metadata={"ddpmx": spec.to_text()} if metadata is None else metadata,
        graph=b"".join(wire.field(1, node) for node in nodes) + wire.field(5, table),
    )


def with_external(folder: Path, location: str = "weights.bin", seed: int = 0) -> Path:
    size = SPEC.timesteps * 192
    (folder / location).write_bytes(np.random.default_rng(seed).standard_normal(size, np.float32).tobytes())
    path = folder / "model.onnx"
    path.write_bytes(onnx(table=external("table", (SPEC.timesteps, *SPEC.shape), location, 4 * size)))
    return path


# --- what is built ---------------------------------------------------------------------------------------------------


def test_a_plan_says_what_it_was_built_from_and_how(build, toy, library):
    built = build(toy, batch=(1, 2, 4), level=2)
    assert (built.reused, built.seconds > 0) == (False, True)
    info = planfile.read_plan(toy.with_suffix(".plan"))
    assert info == built.info
    assert info.spec == gaussian.SPEC
    record = info.engine
    assert (record.flavour, record.version) == ("TensorRT-RTX", library.version)
    assert (record.targets, record.batch, record.source) == (("8.0+",), (1, 2, 4), "model.onnx")
    assert record.platform == tensorrt_library.host_platform()
    assert dict(record.options) == {"workspace": None, "level": 2, "tf32": False, "refit": False, "strip": False}
    assert listed(toy.parent) == ["model.onnx", "model.plan", "model.plan.json"]
    assert info.sidecar is not None
    assert info.sidecar["build"]["layers"] > 0
    assert info.sidecar["build"]["precision"] == built.precision


def test_the_plan_holds_its_name_whole(build, toy):
    """TensorRT cuts long names off without a word."""
    build(toy)
    spec, data = gaussian.SPEC.to_text().encode(), toy.with_suffix(".plan").read_bytes()
    assert spec + b" engine1 " in data
    path = toy.with_name("long.onnx")
    path.write_bytes(onnx(SPEC.replace(ddpmx="x" * 3000)))
    assert build(path).info.spec.ddpmx == "x" * 3000


@pytest.mark.parametrize(
    ("shape", "batch"), [((3, 8, 8), (1, 16, 64)), ((3, 256, 256), (1, 16, 21)), ((3, 2048, 2048), (1, 1, 1))]
)
def test_by_default_the_batch_is_open_and_smaller_for_large_images(shape, batch):
    assert engine.default_batch(shape) == batch


def test_by_default_the_plan_lies_beside_its_onnx_file(build, toy, monkeypatch):
    monkeypatch.chdir(toy.parent)
    assert build("model.onnx").info.engine.batch == (1, 16, 64)
    assert listed(toy.parent) == ["model.onnx", "model.plan", "model.plan.json"]


def test_targets_are_recorded(build, toy):
    assert build(toy, targets=("8.6", "12.0")).info.engine.targets == ("8.6", "12.0")


def test_an_unknown_target_is_refused_with_those_that_are_known(build, toy):
    with pytest.raises(InputError, match=r"capability 5\.0") as caught:
        build(toy, targets=("8.6", "5.0"))
    assert "8.9, 12.0" in str(caught.value)
    assert listed(toy.parent) == ["model.onnx"]


def test_weights_in_other_files_are_built_in_also_through_a_link(build, folder, tmp_path):
    path = with_external(folder)
    link = tmp_path / "link.onnx"
    link.symlink_to(path)
    assert build(link).info.engine.key == build(path).info.engine.key
    assert (tmp_path / "link.plan").is_file()


def test_half_precision_is_kept_and_a_plan_that_widened_it_is_refused(build, folder, library):
    """A real plan with 3 MB of halves; the control is a graph that has half of that."""
    spec, path = SPEC.replace(timesteps=8000, precision="fp16"), folder / "model.onnx"
    path.write_bytes(onnx(spec, weights=FLOAT16))
    built = build(path)
    weights = 8000 * 192 * 2
    assert str(weights) in built.precision
    plan = path.with_suffix(".plan").read_bytes()
    narrower = dataclasses.replace(onnxfile.read_onnx(path), weights={FLOAT16: weights // 2})
    with pytest.raises(BackendError, match="did not keep the precision"):
        assert_precision(plan, spec, narrower, library, stripped=False)


def test_a_bfloat16_plan_is_built(build, folder):
    path = folder / "model.onnx"
    path.write_bytes(onnx(SPEC.replace(precision="bf16"), weights=BFLOAT16))
    assert build(path).info.spec.precision == "bf16"


# --- building again --------------------------------------------------------------------------------------------------


def test_a_plan_that_would_come_out_the_same_is_left_alone(build, toy):
    plan = toy.with_suffix(".plan")
    first = build(toy)
    before = plan.stat()
    again = build(toy)
    assert (again.reused, again.seconds, again.info) == (True, 0.0, first.info)
    assert (plan.stat().st_mtime_ns, plan.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    assert build(toy, force=True).reused is False
    assert plan.stat().st_ino != before.st_ino


def test_a_damaged_plan_is_built_again(build, toy):
    build(toy)
    plan = toy.with_suffix(".plan")
    whole = plan.read_bytes()
    plan.write_bytes(whole[:-1])
    assert build(toy).reused is False
    assert len(plan.read_bytes()) == len(whole)
    planfile.sidecar_path(plan).write_text("{}")
    assert build(toy).reused is False
    planfile.sidecar_path(plan).unlink()
    assert build(toy).reused is True


@pytest.mark.parametrize(
    "changes",
    [
        {"batch": (1, 16, 32)},
        {"batch": (2, 16, 64)},
        {"tf32": True},
        {"level": 1},
        {"workspace": 1 << 26},
        {"targets": ("8.6",)},
    ],
)
def test_other_settings_are_another_plan(build, toy, changes):
    key = build(toy).info.engine.key
    changed = build(toy, **changes)
    assert not changed.reused
    assert changed.info.engine.key != key
    assert build(toy, **changes).reused


def test_another_library_or_platform_is_another_plan(build, toy, library, monkeypatch):
    key = build(toy).info.engine.key
    newer = dataclasses.replace(library, version=library.version.rpartition(".")[0] + ".9999")
    assert build(toy, library=newer).info.engine.key != key
    monkeypatch.setattr(engine, "host_platform", lambda: "linux aarch64")
    other = build(toy).info.engine
    assert other.key != key
    assert other.platform == "linux aarch64"


def test_other_bytes_are_another_plan(build, toy):
    key = build(toy).info.engine.key
    data = bytearray(toy.read_bytes())
    data[data.index(np.float32(gaussian.MU.flat[5]).tobytes())] ^= 1  # the lowest bit of one weight
    toy.write_bytes(data)
    built = build(toy)
    assert (built.reused, built.info.engine.key == key) == (False, False)


def test_other_bytes_beside_it_are_another_plan(build, folder):
    path = with_external(folder)
    first = build(path)
    assert build(path).reused
    with_external(folder, seed=1)
    second = build(path)
    assert not second.reused
    assert second.info.engine.onnx != first.info.engine.onnx


def test_the_name_and_the_folder_of_the_source_do_not_matter(build, toy, tmp_path):
    output = tmp_path / "engine.plan"
    build(toy, output)
    (tmp_path / "elsewhere").mkdir()
    renamed = toy.rename(tmp_path / "elsewhere" / "renamed.onnx")
    assert build(renamed, output).reused


# --- progress, and stopping ------------------------------------------------------------------------------------------


def test_progress_is_told_step_by_step(build, toy):
    seen: list[tuple[str, int, int]] = []
    build(toy, progress=lambda *step: seen.append(step))
    assert len(seen) > 10
    assert all(what and 1 <= done <= of for what, done, of in seen)


@pytest.mark.parametrize("after", [0, 1, 20])
def test_a_stopped_build_leaves_what_was_there(build, toy, after):
    build(toy)
    before = content(toy.parent)
    asked = []

    def cancel() -> bool:
        asked.append(1)
        return len(asked) > after

    with pytest.raises(Cancelled):
        build(toy, tf32=True, cancel=cancel)
    assert content(toy.parent) == before
    assert len(asked) == after + 1  # nothing goes on after a stop


@pytest.mark.parametrize("error", [ValueError("progress"), KeyboardInterrupt(), BackendError("progress")])
def test_an_exception_in_a_callback_comes_out_and_nothing_is_written(build, toy, error):
    def callback(*_: object) -> bool:
        raise error

    for name in ("progress", "cancel"):
        with pytest.raises(type(error)) as caught:
            build(toy, **{name: callback})
        assert caught.value is error
        assert listed(toy.parent) == ["model.onnx"]


# --- what TensorRT refuses -------------------------------------------------------------------------------------------


def test_every_operator_that_the_parser_does_not_know_is_named(build, folder, library):
    nodes = [wire.node("Frobnicate", ["x"], ["y"]), wire.node("Defenestrate", ["y"], ["eps"])]
    path = folder / "model.onnx"
    path.write_bytes(onnx(nodes=nodes))
    with pytest.raises(FileFormatError, match="parser refuses this file") as caught:
        build(path)
    for said in (str(library), "Frobnicate", "Defenestrate"):
        assert said in str(caught.value)
    assert listed(folder) == ["model.onnx"]


def test_mixed_types_are_refused_with_their_node(build, folder):
    nodes = [cast("x", "half", FLOAT16), wire.node("Mul", ["x", "half"], ["eps"]) + wire.field(3, "mixed")]
    path = folder / "model.onnx"
    path.write_bytes(onnx(nodes=nodes))
    with pytest.raises(FileFormatError, match="parser refuses") as caught:
        build(path)
    assert "mixed" in str(caught.value)
    assert "Half" in str(caught.value)
    assert listed(folder) == ["model.onnx"]


@pytest.mark.parametrize("x", [("batch", 3, "h", 8), ("batch", None, 8, 8)])
def test_only_the_batch_may_be_open(build, folder, x):
    path = folder / "model.onnx"
    path.write_bytes(onnx(x=x))
    with pytest.raises(FileFormatError, match="reads other inputs and outputs"):
        build(path)
    assert listed(folder) == ["model.onnx"]


def test_a_builder_that_fails_says_why(build, toy, library, monkeypatch):
    """The library's own last words, which it only tells its logger."""

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
def test_a_builder_that_cannot_be_made_says_why(build, toy, library, error):
    def make(_):
        raise error

    trt = SimpleNamespace(**{**vars(library.trt), "Builder": make})
    with pytest.raises(BackendError, match="cannot make the builder") as caught:
        build(toy, library=dataclasses.replace(library, trt=trt))
    assert str(error) in str(caught.value)


# --- what is refused before ------------------------------------------------------------------------------------------


def test_files_that_are_no_onnx_are_refused(folder):
    for data, says in ((b"PK\x03\x04", "neither"), (b"ftrt" + bytes(40), "not an ONNX file"), (b"", "empty")):
        (folder / "model").write_bytes(data)
        with pytest.raises(FileFormatError, match=says):
            engine.build(folder / "model", folder / "out.plan", library=fake("10.3.0.26"), devices=ORIN)
    with pytest.raises(FileFormatError, match="cannot be read"):
        engine.build(folder / "missing.onnx", library=fake("10.3.0.26"), devices=ORIN)
    assert listed(folder) == ["model"]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (onnx(metadata={}), "does not say which diffusion model"),
        (onnx(SPEC.replace(prediction="v")), "no 'v'"),
        (onnx(SPEC.replace(shape=(3, 8, 16))), "'x' has the shape"),
        (onnx(SPEC.replace(precision="fp16")), "says fp16, and its weights"),
        (onnx(SPEC.replace(precision="bf16")), "says bf16, and its weights"),
        (onnx(weights=FLOAT16), "says fp32, and its weights"),
    ],
)
def test_files_that_contradict_themselves_are_refused(folder, data, says):
    (folder / "model.onnx").write_bytes(data)
    with pytest.raises(SpecError) as caught:
        engine.build(folder / "model.onnx", library=fake("10.13.0.1"), devices=ORIN)
    assert says in str(caught.value)
    assert listed(folder) == ["model.onnx"]


def test_weights_outside_the_folder_are_refused(folder, tmp_path):
    (tmp_path / "secret").write_bytes(bytes(4 * 192 * 20))
    (folder / "model.onnx").write_bytes(onnx(table=external("table", (20, 3, 8, 8), "../secret", 4)))
    with pytest.raises(FileFormatError, match="outside its own folder"):
        engine.build(folder / "model.onnx", library=fake("1.7.1", "TensorRT-RTX"), devices=NO_GPU)


def test_outputs_that_cannot_be_are_refused(toy):
    def attempt(output: Path) -> str:
        with pytest.raises(OutputError) as caught:
            engine.build(toy, output, library=fake("1.7.1", "TensorRT-RTX"), devices=NO_GPU)
        return str(caught.value)

    before = content(toy.parent)
    assert "a folder stands there" in attempt(toy.parent)
    assert "there is no folder" in attempt(toy.parent / "missing" / "model.plan")
    assert "there is no folder" in attempt(toy / "model.plan")
    assert "would replace what the plan is built from" in attempt(toy)
    (toy.parent / "link").symlink_to(toy)
    assert "would replace what the plan is built from" in attempt(toy.parent / "link")
    (toy.parent / "link").unlink()
    assert content(toy.parent) == before


@pytest.mark.parametrize(("name", "content"), [("README.md", b"# mine"), ("model.bin", b"\x00" * 99)])
def test_a_file_that_is_no_plan_is_not_replaced(toy, name, content):
    (toy.parent / name).write_bytes(content)
    with pytest.raises(OutputError, match="no such thing"):
        engine.build(toy, toy.parent / name, library=fake("1.7.1", "TensorRT-RTX"), devices=NO_GPU)
    assert (toy.parent / name).read_bytes() == content


def test_a_plan_of_any_name_is_replaced(build, toy):
    build(toy, toy.parent / "engine.bin")
    assert not build(toy, toy.parent / "engine.bin", tf32=True).reused


def test_what_has_more_to_say_than_a_name_holds_is_refused(build, folder):
    path = folder / "model.onnx"
    path.write_bytes(onnx(SPEC.replace(ddpmx="x" * 3600)))
    with pytest.raises(SpecError, match="a name holds 4095"):
        build(path)
    assert listed(folder) == ["model.onnx"]


@pytest.mark.parametrize("options", [{"refit": True}, {"strip": True}, {"refit": True, "strip": True}])
def test_refit_and_strip_need_a_gpu(build, toy, options):
    with pytest.raises(BackendError, match="only where there is a GPU") as caught:
        build(toy, **options)
    assert ("stripped" if "strip" in options else "refittable") in str(caught.value)
    assert NO_GPU.trouble in str(caught.value)
    assert listed(toy.parent) == ["model.onnx"]


def test_tensorrt_itself_needs_a_gpu(toy):
    with pytest.raises(BackendError, match="there is none here") as caught:
        engine.build(toy, library=fake("10.3.0.26"), devices=NO_GPU)
    for said in ("TensorRT 10.3.0.26", NO_GPU.trouble, "tensorrt-rtx-cu13"):
        assert said in str(caught.value)
    assert listed(toy.parent) == ["model.onnx"]


def test_tensorrt_itself_builds_for_the_gpu_that_is_here_only(toy):
    with pytest.raises(InputError, match="leave --target away"):
        engine.build(toy, options=BuildOptions(targets=("8.6",)), library=fake("10.3.0.26"), devices=ORIN)


def possible(library: Library, precision: str = "fp32", devices: Gpus = ORIN, **options) -> None:
    spec = SPEC.replace(precision=precision)
    engine._check_possible(library, spec, BuildOptions(**options), devices)


@pytest.mark.parametrize("version", ["10.3.0.26", "10.9.0.34", "10.12.0.36"])
def test_bfloat16_is_refused_where_its_normalization_lacks_it(version):
    with pytest.raises(BackendError, match="bfloat16") as caught:
        possible(fake(version), "bf16")
    assert f"TensorRT {version}" in str(caught.value)
    assert "--fp16" in str(caught.value)
    possible(fake(version), "fp16")


@pytest.mark.parametrize("version", ["10.13.0.35", "10.16.1.11", "11.4.0.106"])
def test_bfloat16_is_taken_where_it_is_known(version):
    possible(fake(version), "bf16")


def test_tensorrt_rtx_knows_bfloat16_and_needs_no_gpu():
    possible(fake("1.1.0.3", "TensorRT-RTX"), "bf16", NO_GPU)
    possible(fake("10.3.0.26"), refit=True, strip=True)


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


def test_a_version_that_is_none_is_refused(toy):
    with pytest.raises(BackendError, match="says that its version is 'unknown'"):
        engine.build(toy, library=fake("unknown", "TensorRT-RTX"), devices=NO_GPU)


# --- precision -------------------------------------------------------------------------------------------------------

RTX, TENSORRT = fake("1.7.1.116", "TensorRT-RTX"), fake("10.3.0.26")
MB = 1 << 20


def precision(plan: object, library: Library, weights: int = 64 * MB, element_type: int = FLOAT16, **options) -> str:
    info = GraphInfo({}, {}, {}, 20, (), {element_type: weights})
    name = {FLOAT: "fp32", FLOAT16: "fp16", BFLOAT16: "bf16"}[element_type]
    return assert_precision(plan, SPEC.replace(precision=name), info, library, **{"stripped": False} | options)


def rtx_plan(weights: int) -> bytes:
    return b"vtrt" + bytes(84) + b"THGW" + bytes(12) + weights.to_bytes(8, "little") + bytes(400)


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
def test_what_cannot_be_ascertained_is_not_claimed(plan, library, options):
    assert precision(plan, library, **options).startswith("not ascertained")


def test_a_plan_that_lost_its_precision_is_not_written(build, toy, library):
    class Builder(library.trt.Builder):
        def build_serialized_network(self, network, config):
            return memoryview(rtx_plan(64 * MB))

    trt = SimpleNamespace(**{**vars(library.trt), "Builder": Builder})
    with pytest.raises(BackendError, match="did not keep the precision"):
        build(toy, library=dataclasses.replace(library, trt=trt))
    assert listed(toy.parent) == ["model.onnx"]


# --- writing ---------------------------------------------------------------------------------------------------------


def test_the_sidecar_is_replaced_with_its_plan(build, toy):
    build(toy)
    built = build(toy, tf32=True)
    told = json.loads(planfile.sidecar_path(toy.with_suffix(".plan")).read_text())
    assert told["engine"] == built.info.engine.to_json()
    assert told["engine"]["options"]["tf32"] is True


@pytest.mark.parametrize("which", ["the plan", "the sidecar"])
def test_a_write_that_fails_leaves_a_plan_that_can_be_read(build, toy, monkeypatch, which):
    plan = toy.with_suffix(".plan")
    key = build(toy).info.engine.key
    replace = os.replace

    def fail(source, target):
        if Path(target).suffix == (".plan" if which == "the plan" else ".json"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr("ddpmx.files.os.replace", fail)
    with pytest.raises(OutputError, match="cannot be written"):
        build(toy, tf32=True)
    assert (planfile.read_plan(plan).engine.key == key) == (which == "the plan")
    assert not [name for name in listed(toy.parent) if name.endswith(".part")]


def test_a_plan_that_is_replaced_through_a_link_can_be_read_by_both_names(build, toy, tmp_path):
    plan, link = toy.with_suffix(".plan"), tmp_path / "link.plan"
    build(toy)
    link.symlink_to(plan)
    build(toy, link, tf32=True)
    assert planfile.read_plan(plan).engine == planfile.read_plan(link).engine


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


def test_a_name_that_the_parser_cannot_take_is_refused(build, toy):
    path = toy.rename(os.fsdecode(os.fsencode(toy.parent) + b"/n\xff.onnx"))
    with pytest.raises(FileFormatError, match="UTF-8"):
        build(path)


def test_a_name_that_cannot_be_shown_is_not_recorded(build, toy):
    assert build(toy.rename(toy.with_name("a\x1bb.onnx"))).info.engine.source == "model.onnx"


def test_an_input_without_a_shape_is_refused(build, folder):
    path, whole = folder / "model.onnx", onnx()
    known = wire.field(11, wire.value_info("x", FLOAT, ("batch", 3, 8, 8)))
    unknown = wire.field(11, wire.field(1, "x") + wire.field(2, wire.field(1, wire.field(1, FLOAT))))
    parts = [
        wire.field(number, value if isinstance(value, int) else bytes(value).replace(known, unknown))
        for number, value in fields(memoryview(whole))
    ]
    assert b"".join(parts) != whole
    path.write_bytes(b"".join(parts))
    with pytest.raises(DdpmxError):
        build(path)


def test_what_fits_into_the_slack_is_not_claimed():
    assert precision(rtx_plan(MB >> 4), RTX, weights=MB >> 5).startswith("not ascertained")


def test_weights_in_constant_nodes_count(build, folder):
    table = wire.tensor("", FLOAT, (4096, 3, 8, 8), bytes(4096 * 192 * 4))
    value = wire.field(1, "value") + wire.field(5, table) + wire.field(20, 4)
    nodes = [
        wire.node("Constant", [], ["table"], value),
        wire.node("Gather", ["table", "t"], ["factor"]),
        wire.node("Mul", ["x", "factor"], ["eps"]),
    ]
    path = folder / "model.onnx"
    path.write_bytes(onnx(SPEC.replace(timesteps=4096), nodes=nodes, table=wire.tensor("one", FLOAT, (1,), bytes(4))))
    assert build(path)


@pytest.mark.parametrize("path", [".", "", "/"])
def test_a_folder_is_refused_as_a_model(path):
    with pytest.raises(DdpmxError):
        engine.build(path, library=fake("1.7.1", "TensorRT-RTX"), devices=NO_GPU)


def test_a_plan_is_refused_as_a_model(build, toy):
    build(toy)
    with pytest.raises(FileFormatError, match="not an ONNX file"):
        build(toy.with_suffix(".plan"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_a_build_ends_it_and_is_heard(build, toy, number):
    """TensorRT would print the exception of a handler that runs in its callbacks, and go on."""

    class Heard(BaseException):
        pass

    def handler(*_):
        raise Heard

    before = signal.signal(number, handler)
    try:
        with pytest.raises(Heard):
            build(toy, progress=lambda *_: os.kill(os.getpid(), number))
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)
    assert listed(toy.parent) == ["model.onnx"]


def test_the_timing_cache_is_kept_per_version_and_sm_and_a_refused_one_is_forgotten(tmp_path):
    gpu = Gpus((Device("Orin", "8.7", 1 << 33),), "12.6")

    class Config:
        def create_timing_cache(self, content):
            return content

        def set_timing_cache(self, cache, ignore_mismatch):
            self.taken = cache
            return not ignore_mismatch and cache in (b"", b"good")

        def get_timing_cache(self):
            return SimpleNamespace(serialize=lambda: b"measured")

    file = tmp_path / "tensorrt-10.3.0-sm8.7.timing"
    for before, taken in ((None, b""), (b"good", b"good"), (b"of another build", b"")):
        if before is not None:
            file.write_bytes(before)
        config = Config()
        engine._TimingCache(tmp_path, fake("10.3.0"), gpu, config).save(config)
        assert config.taken == taken
        assert file.read_bytes() == b"measured"
    assert listed(tmp_path) == [file.name]
    assert engine.timing_cache_name(fake("10.16.1"), gpu) != file.name


def test_what_stands_in_the_sidecar_s_way_is_found_before_the_build(toy):
    (toy.parent / "model.plan.json").mkdir()
    for output, says in ((None, "no file"), (toy.parent / ("x" * 240), "too long")):
        with pytest.raises(OutputError, match=says):
            engine.build(toy, output, library=fake("1.7.1", "TensorRT-RTX"), devices=NO_GPU)


# --- without everything else -----------------------------------------------------------------------------------------


def python(code: str, *args: object) -> str:
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_it_imports_no_library():
    heavy = ["torch", "onnx", "onnxruntime", "polygraphy", "tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"]
    assert python(f"import ddpmx.engine, sys; print([name for name in {heavy} if name in sys.modules])") == "[]"


def test_engines_are_built_without_torch_and_onnx(library, toy):
    code = """
import sys
for name in ("torch", "onnx", "onnxruntime", "polygraphy", "cuda", "ddpm_export", "ddpmx_cli"):
    sys.modules[name] = None  # importing it raises ImportError
from ddpmx import device, engine, tensorrt_library
built = engine.build(sys.argv[1], library=tensorrt_library.load("TensorRT-RTX"), devices=device.Gpus(trouble="none"))
print(built.info.engine.source, built.info.size > 1000)
"""
    assert python(code, toy) == "model.onnx True"
