"""Builds: what is built, when it is built again, and how a build runs. They use TensorRT-RTX, which needs no GPU."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from ddpmx.device.discovery import Device, Gpus
from ddpmx.errors import BackendError, Cancelled, InputError
from ddpmx.formats import onnx_file, plan_file
from ddpmx.formats.onnx_file import BFLOAT16
from ddpmx.trt import build as trt_build
from ddpmx.trt import builder
from ddpmx.trt import library as trt_library
from ddpmx.trt.precision import assert_precision
from ddpmx.trt.timing_cache import TimingCache, timing_cache_name
from oracles import gaussian, protobuf
from oracles.engines import SPEC, content, fake, listed, onnx, with_external
from oracles.protobuf import FLOAT, FLOAT16

# --- what is built ---------------------------------------------------------------------------------------------------


def test_a_plan_records_its_source_and_its_options(build, toy, library):
    built = build(toy, batch=(1, 2, 4), level=2)
    assert (built.reused, built.seconds > 0) == (False, True)
    info = plan_file.read_plan(toy.with_suffix(".plan"))
    assert info == built.info
    assert info.spec == gaussian.SPEC
    record = info.engine
    assert (record.flavour, record.version) == ("TensorRT-RTX", library.version)
    assert (record.targets, record.batch, record.source) == (("8.0+",), (1, 2, 4), "model.onnx")
    assert record.platform == trt_library.host_platform()
    assert dict(record.options) == {"workspace": None, "level": 2, "tf32": False, "refit": False, "strip": False}
    assert listed(toy.parent) == ["model.onnx", "model.plan", "model.plan.json"]
    assert info.sidecar is not None
    assert info.sidecar["build"]["layers"] > 0
    assert info.sidecar["build"]["precision"] == built.precision


def test_the_plan_holds_its_name_whole(build, toy):
    """TensorRT silently truncates long names."""
    build(toy)
    spec, data = gaussian.SPEC.to_text().encode(), toy.with_suffix(".plan").read_bytes()
    assert spec + b" engine1 " in data
    path = toy.with_name("long.onnx")
    path.write_bytes(onnx(SPEC.replace(ddpmx="x" * 3000)))
    assert build(path).info.spec.ddpmx == "x" * 3000


@pytest.mark.parametrize(
    ("shape", "batch"), [((3, 8, 8), (1, 16, 64)), ((3, 256, 256), (1, 16, 21)), ((3, 2048, 2048), (1, 1, 1))]
)
def test_the_default_batch_is_smaller_for_large_images(shape, batch):
    assert trt_build.default_batch(shape) == batch


def test_by_default_the_plan_lies_beside_its_onnx_file(build, toy, monkeypatch):
    monkeypatch.chdir(toy.parent)
    assert build("model.onnx").info.engine.batch == (1, 16, 64)
    assert listed(toy.parent) == ["model.onnx", "model.plan", "model.plan.json"]


def test_a_plan_of_tensorrt_rtx_allocates_nothing_when_it_runs(build, toy, library, monkeypatch):
    """Its documentation requires that of engines whose streams are captured."""
    configurations = []
    set_targets = builder._set_targets
    monkeypatch.setattr(builder, "_set_targets", lambda c, *rest: configurations.append(c) or set_targets(c, *rest))
    build(toy, level=0)
    (configuration,) = configurations
    assert configuration.get_flag(library.trt.BuilderFlag.REQUIRE_USER_ALLOCATION)


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
    """A real plan with 3 MB of float16; the control is a graph with half of that."""
    spec, path = SPEC.replace(timesteps=8000, precision="fp16"), folder / "model.onnx"
    path.write_bytes(onnx(spec, weights=FLOAT16))
    built = build(path)
    weights = 8000 * 192 * 2
    assert str(weights) in built.precision
    plan = path.with_suffix(".plan").read_bytes()
    narrower = dataclasses.replace(onnx_file.read_onnx(path), weights={FLOAT16: weights // 2})
    with pytest.raises(BackendError, match="did not keep the precision"):
        assert_precision(plan, spec, narrower, library, stripped=False)


def test_a_bfloat16_plan_is_built(build, folder):
    path = folder / "model.onnx"
    path.write_bytes(onnx(SPEC.replace(precision="bf16"), weights=BFLOAT16))
    assert build(path).info.spec.precision == "bf16"


def test_weights_in_constant_nodes_count(build, folder):
    table = protobuf.tensor("", FLOAT, (4096, 3, 8, 8), bytes(4096 * 192 * 4))
    value = protobuf.field(1, "value") + protobuf.field(5, table) + protobuf.field(20, 4)
    nodes = [
        protobuf.node("Constant", [], ["table"], value),
        protobuf.node("Gather", ["table", "t"], ["factor"]),
        protobuf.node("Mul", ["x", "factor"], ["eps"]),
    ]
    path = folder / "model.onnx"
    path.write_bytes(
        onnx(SPEC.replace(timesteps=4096), nodes=nodes, table=protobuf.tensor("one", FLOAT, (1,), bytes(4)))
    )
    assert build(path)


def test_a_name_that_is_not_printable_is_not_recorded(build, toy):
    assert build(toy.rename(toy.with_name("a\x1bb.onnx"))).info.engine.source == "model.onnx"


# --- building again --------------------------------------------------------------------------------------------------


def test_a_plan_that_would_be_the_same_is_not_built_again(build, toy):
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
    plan_file.sidecar_path(plan).write_text("{}")
    assert build(toy).reused is False
    plan_file.sidecar_path(plan).unlink()
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
    monkeypatch.setattr(trt_build, "host_platform", lambda: "linux aarch64")
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


def test_a_plan_of_any_name_is_replaced(build, toy):
    build(toy, toy.parent / "engine.bin")
    assert not build(toy, toy.parent / "engine.bin", tf32=True).reused


def test_the_sidecar_is_replaced_with_its_plan(build, toy):
    build(toy)
    built = build(toy, tf32=True)
    sidecar = json.loads(plan_file.sidecar_path(toy.with_suffix(".plan")).read_text())
    assert sidecar["engine"] == built.info.engine.to_json()
    assert sidecar["engine"]["options"]["tf32"] is True


def test_a_plan_that_is_replaced_through_a_link_can_be_read_by_both_names(build, toy, tmp_path):
    plan, link = toy.with_suffix(".plan"), tmp_path / "link.plan"
    build(toy)
    link.symlink_to(plan)
    build(toy, link, tf32=True)
    assert plan_file.read_plan(plan).engine == plan_file.read_plan(link).engine


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
        TimingCache(tmp_path, fake("10.3.0"), gpu, config).save(config)
        assert config.taken == taken
        assert file.read_bytes() == b"measured"
    assert listed(tmp_path) == [file.name]
    assert timing_cache_name(fake("10.16.1"), gpu) != file.name


# --- progress, and stopping ------------------------------------------------------------------------------------------


def test_progress_is_reported_step_by_step(build, toy):
    seen: list[tuple[str, int, int]] = []
    build(toy, progress=lambda *step: seen.append(step))
    assert len(seen) > 10
    assert all(what and 1 <= done <= of for what, done, of in seen)


@pytest.mark.parametrize("after", [0, 1, 20])
def test_a_stopped_build_leaves_the_old_plan(build, toy, after):
    build(toy)
    before = content(toy.parent)
    calls = []

    def cancel() -> bool:
        calls.append(1)
        return len(calls) > after

    with pytest.raises(Cancelled):
        build(toy, tf32=True, cancel=cancel)
    assert content(toy.parent) == before
    assert len(calls) == after + 1  # nothing goes on after a stop


@pytest.mark.parametrize("error", [ValueError("progress"), KeyboardInterrupt(), BackendError("progress")])
def test_an_exception_in_a_callback_is_raised_and_nothing_is_written(build, toy, error):
    def callback(*_: object) -> bool:
        raise error

    for name in ("progress", "cancel"):
        with pytest.raises(type(error)) as caught:
            build(toy, **{name: callback})
        assert caught.value is error
        assert listed(toy.parent) == ["model.onnx"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_a_build_stops_it_and_reaches_its_handler(build, toy, number):
    """TensorRT would print the exception of a handler that runs in its callbacks, and continue."""

    class Handled(BaseException):
        pass

    def handler(*_):
        raise Handled

    before = signal.signal(number, handler)
    try:
        with pytest.raises(Handled):
            build(toy, progress=lambda *_: os.kill(os.getpid(), number))
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)
    assert listed(toy.parent) == ["model.onnx"]


# --- without everything else -----------------------------------------------------------------------------------------


def python(code: str, *args: object) -> str:
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_it_imports_no_library():
    heavy = ["torch", "onnx", "onnxruntime", "polygraphy", "tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"]
    assert python(f"import ddpmx.trt.build, sys; print([name for name in {heavy} if name in sys.modules])") == "[]"


def test_engines_are_built_without_torch_and_onnx(library, toy):
    code = """
import sys
for name in ("torch", "onnx", "onnxruntime", "polygraphy", "cuda", "ddpm_export", "ddpmx_cli"):
    sys.modules[name] = None  # importing it raises ImportError
from ddpmx.device import discovery
from ddpmx.trt import build as trt_build, library as trt_library
built = trt_build.build(sys.argv[1], library=trt_library.load("TensorRT-RTX"), devices=discovery.Gpus(trouble="none"))
print(built.info.engine.source, built.info.size > 1000)
"""
    assert python(code, toy) == "model.onnx True"
