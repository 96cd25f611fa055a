"""TensorRT plans without a GPU: the names of its bindings that are used, and plans run by a fake TensorRT."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from ddpmx.backends import trt
from ddpmx.backends.base import Buffers, CopyingBackend
from ddpmx.cuda.device_chain import DeviceChain
from ddpmx.cuda.executors import choose_executor
from ddpmx.cuda.kernels import Kernels
from ddpmx.device.discovery import Gpus
from ddpmx.device.driver import Driver
from ddpmx.diffusion.samplers import make_table
from ddpmx.errors import BackendError, FileFormatError, InputError
from ddpmx.formats import plan_file
from ddpmx.sampling import chain
from ddpmx.sampling.pixels import to_nhwc
from ddpmx.trt import build as trt_build
from oracles import tensorrt_bindings
from oracles.cuda_on_host import Toy
from oracles.device_chain import no_driver
from oracles.fake_tensorrt import ADA, FakeTrt
from oracles.plans import RECORD, SPEC, make_plan

CACHE = Path(__file__).parents[3] / ".cache" / "tensorrt-bindings"

# --- names -----------------------------------------------------------------------------------------------------------

PARAMETERS = {
    "Runtime.deserialize_cuda_engine": ("serialized_engine",),
    "ICudaEngine.get_tensor_profile_shape": ("name", "profile_index"),
    "IExecutionContext.set_optimization_profile_async": ("profile_index", "stream_handle"),
    "IExecutionContext.set_input_shape": ("name", "shape"),
    "IExecutionContext.set_tensor_address": ("name", "memory"),
    "IExecutionContext.execute_async_v3": ("stream_handle",),
}


@pytest.mark.parametrize("label", list(tensorrt_bindings.WHEELS))
def test_every_used_name_of_tensorrt_exists(label):
    try:
        found = tensorrt_bindings.describe(label, CACHE)
    except tensorrt_bindings.Unavailable as why:
        pytest.skip(f"not verified here: that TensorRT {label} has the names that ddpmx uses ({why})")
    names = found["names"]
    missing = [
        f"{kind}.{name}" for kind, wanted in trt.USED.items() for name in wanted if name not in names.get(kind, ())
    ]
    assert missing == []
    assert "Runtime.engine_host_code_allowed" in found["writable"]
    for name, wanted in PARAMETERS.items():
        assert wanted in tensorrt_bindings.parameters(found["signatures"][name]), name


def test_every_used_name_of_tensorrt_rtx_exists():
    module = pytest.importorskip("tensorrt_rtx", reason="not verified here: TensorRT-RTX's names (it is not installed)")
    for used in (trt.USED, trt.USED_RTX):
        for kind, wanted in used.items():
            assert [name for name in wanted if not hasattr(getattr(module, kind), name)] == [], kind
    for name in ("cuda_graph_strategy", "dynamic_shapes_kernel_specialization_strategy"):
        assert getattr(module.IRuntimeConfig, name).fset is not None


def test_the_lists_are_what_the_source_uses():
    text = Path(trt.__file__).read_text(encoding="utf-8")
    code = text[text.index("class TrtEngine") :]
    for kind, wanted in (*trt.USED.items(), *trt.USED_RTX.items()):
        for name in wanted:
            assert f".{name}" in code, (kind, name)
    assert set(re.findall(r"\btrt\.([A-Z]\w+)", code)) <= set(trt.USED) | set(trt.USED_RTX)


# --- plans -----------------------------------------------------------------------------------------------------------


def test_a_plan_runs_a_whole_chain(plan, plan_driver):
    module = FakeTrt(plan_driver)
    table = make_table(SPEC.make_schedule(), "eps", "fixed_small", steps=4)
    drawn = np.array([1, 2])
    *_, step = chain.run(Toy(SPEC.shape), table, chain.initial(5, drawn, SPEC.shape), seed=5, images=drawn)
    with trt.TrtEngine(plan, library=module.library(), devices=ADA) as engine:
        assert engine.description == "TensorRT-RTX 1.7.1.116 on NVIDIA RTX 4090, SM 8.9"
        loaded = Kernels(engine.driver)
        with DeviceChain(engine.driver, loaded, SPEC.shape, 2, table) as device_chain:
            at = {"x": device_chain.x, "t": device_chain.t, "out": device_chain.out}
            with engine.network(2, **at, stream=device_chain.stream) as context:
                assert choose_executor(device_chain, context.enqueue).executor == "while"
                got = device_chain.run(seed=5, images=drawn)
    assert got.tobytes() == to_nhwc(step.x0).tobytes()
    config = module.contexts[0].config
    assert config.cuda_graph_strategy == "DISABLED"
    assert config.dynamic_shapes_kernel_specialization_strategy == "EAGER"


def test_a_plan_is_a_backend(plan, plan_driver):
    module = FakeTrt(plan_driver)
    backend = CopyingBackend(trt.TrtEngine(plan, library=module.library(), devices=ADA))
    table = make_table(SPEC.make_schedule(), "eps", "fixed_small", steps=4)
    for batch in (2, 3):
        drawn = np.arange(batch)
        start = chain.initial(5, drawn, SPEC.shape)
        *_, mine = chain.run(backend, table, start, seed=5, images=drawn)
        *_, theirs = chain.run(Toy(SPEC.shape), table, start, seed=5, images=drawn)
        assert mine.x0.tobytes() == theirs.x0.tobytes()
    assert chain.executed_batch(backend, SPEC, 1, 4) == 1
    made = len(module.contexts)
    for _ in range(2):
        backend.bind(Buffers.of(1, SPEC.shape))
    assert len(module.contexts) == made
    with pytest.raises(InputError, match="takes batches of 1…8, not 9"):
        backend.bind(Buffers.of(9, SPEC.shape))
    with pytest.raises(BackendError, match="no buffers are bound"):
        backend.enqueue()
    for _ in range(2):
        backend.close()
    engine = backend.device
    assert (engine._engine, engine._runtime, engine._config) == (None, None, None)


def test_kernels_for_any_shape_are_never_seen(plan, plan_driver):
    """TensorRT-RTX promises those for this batch only from the second run on."""
    module = FakeTrt(plan_driver)
    x, t = np.ones((2, *SPEC.shape), np.float32), np.array([3, 3], np.int32)
    outputs = []
    for module.general_first in (False, True):
        backend = CopyingBackend(trt.TrtEngine(plan, library=module.library(), devices=ADA))
        buffers = Buffers.of(2, SPEC.shape)
        buffers.x[...], buffers.t[...] = x, t
        backend.bind(buffers)
        backend.enqueue()
        outputs.append(buffers.out.copy())
        backend.close()
    np.testing.assert_array_equal(*outputs)


def test_a_backend_that_fails_leaves_nothing(plan, plan_driver):
    module = FakeTrt(plan_driver)
    backend = CopyingBackend(trt.TrtEngine(plan, library=module.library(), devices=ADA))
    backend.bind(Buffers.of(2, SPEC.shape))
    module.refuse = {"execute"}
    with pytest.raises(BackendError, match="refuses to run the network") as caught:
        backend.enqueue()
    assert caught.value.note == "[execute] refused"
    module.refuse = {"shape"}
    module.logger.lines.append((1, "of something else, earlier"))
    with pytest.raises(BackendError, match="does not take x of shape") as caught:
        backend.bind(Buffers.of(3, SPEC.shape))
    assert caught.value.note == "[shape] refused"
    assert "memory" not in plan_driver.alive()
    backend.close()


def test_the_profile_is_chosen_by_the_batch(plan, plan_driver):
    module = FakeTrt(plan_driver, ((1, 8, 16), (1, 1, 1), (32, 32, 64)))
    with trt.TrtEngine(plan, library=module.library(), devices=ADA) as engine:
        assert [engine.check_batch(n) for n in (1, 2, 16, 32, 64)] == [1, 0, 0, 2, 2]
        assert engine.batches == ((1, 16), (1, 1), (32, 64))
        for batch in (17, 65):
            with pytest.raises(InputError, match="takes batches of 1…16, 1…1, 32…64"):
                engine.check_batch(batch)
        with engine.driver.current(), engine.driver.stream() as stream:
            engine.network(1, x=1, t=2, out=3, stream=stream.value).close()
    context = module.contexts[0]
    assert (context.profile, context.shapes) == (1, {"x": (1, *SPEC.shape), "t": (1,)})
    assert context.addresses == {"x": 1, "t": 2, "eps": 3}


@pytest.mark.parametrize("what", ["deserialize", "context", "shape", "address", "infer", "profile"])
def test_a_refusal_of_tensorrt_carries_its_own_message(plan, plan_driver, what):
    module = FakeTrt(plan_driver, ((2, 2, 2), (1, 1, 1)))
    module.refuse = {what}
    with pytest.raises(BackendError) as caught:  # noqa: PT012, SIM117
        with trt.TrtEngine(plan, library=module.library(), devices=ADA) as engine:
            with engine.driver.current(), engine.driver.stream() as stream:
                engine.network(1, x=1, t=2, out=3, stream=stream.value)
    assert caught.value.note == f"[{what}] refused"


def test_another_name_is_refused(plan, plan_driver):
    with pytest.raises(FileFormatError, match="another network name"):
        trt.TrtEngine(plan, library=FakeTrt(plan_driver, name="Unnamed").library(), devices=ADA)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("x", ("INPUT", "HALF", (-1, 3, 8, 8))),
        ("x", ("INPUT", "FLOAT", (-1, 3, 8, 9))),
        ("t", ("INPUT", "INT32", (-1, 1))),
        ("eps", ("INPUT", "FLOAT", (-1, 3, 8, 8))),
        ("more", ("INPUT", "FLOAT", (1,))),
    ],
)
def test_other_inputs_and_outputs_are_refused(plan, plan_driver, name, tensor):
    module = FakeTrt(plan_driver)
    module.tensors |= {name: tensor}
    with pytest.raises(FileFormatError, match="other inputs and outputs") as caught:
        trt.TrtEngine(plan, library=module.library(), devices=ADA)
    assert caught.value.note.startswith(f"{name}: ")
    module.tensors.pop(name)
    if name != "more":
        with pytest.raises(FileFormatError, match="other inputs and outputs"):
            trt.TrtEngine(plan, library=module.library(), devices=ADA)


def test_compiled_kernels_are_cached(plan, plan_driver, tmp_path):
    folder = tmp_path / "cache"
    for loaded in ([], [b"compiled"]):
        module = FakeTrt(plan_driver)
        trt.TrtEngine(plan, library=module.library(), devices=ADA, cache=folder).close()
        assert module.loaded == loaded
    (file,) = folder.iterdir()
    assert file.name == "tensorrt-rtx-1.7.1.116-nvidia-rtx-4090-bbbbbbbbbbbbbbbb.runtime"
    (tmp_path / "file").write_text("")
    with trt.TrtEngine(plan, library=FakeTrt(plan_driver).library(), devices=ADA, cache=tmp_path / "file"):
        pass


def test_a_stripped_plan_is_refused(plan):
    plan.write_bytes(make_plan(record=dataclasses.replace(RECORD, options={**RECORD.options, "strip": True})))
    with pytest.raises(BackendError, match="without weights"):
        trt.TrtEngine(plan, library=FakeTrt(None).library(), devices=ADA)


# --- a real plan -----------------------------------------------------------------------------------------------------


def test_a_real_plan_without_a_gpu(tmp_path, gaussian_onnx):
    """Built by TensorRT-RTX here, then refused: without a GPU, and with a GPU that is only claimed."""
    no_driver()
    pytest.importorskip("tensorrt_rtx", reason="not verified here: a real plan (TensorRT-RTX is not installed)")
    model = Path(shutil.copy(gaussian_onnx, tmp_path / "model.onnx"))
    options = trt_build.BuildOptions(batch=(1, 2, 4))
    built = trt_build.build(model, tmp_path / "model.plan", options, devices=Gpus(trouble="none"))
    with pytest.raises(BackendError, match="runs on an NVIDIA GPU, and there is none here") as caught:
        trt.TrtEngine(tmp_path / "model.plan")
    assert "there is no NVIDIA driver" in str(caught.value)
    with pytest.raises(BackendError, match="there is no NVIDIA driver here"):
        trt.TrtEngine(tmp_path / "model.plan", devices=ADA)
    assert plan_file.read_plan(tmp_path / "model.plan") == built.info


@pytest.mark.slow
def test_a_real_plan_as_far_as_tensorrt_goes_without_a_gpu(tmp_path, gaussian_onnx, fake):
    """The driver is a fake, so TensorRT-RTX itself reports what it lacks."""
    no_driver()
    pytest.importorskip("tensorrt_rtx", reason="not verified here: a real plan (TensorRT-RTX is not installed)")
    model = Path(shutil.copy(gaussian_onnx, tmp_path / "model.onnx"))
    trt_build.build(
        model, tmp_path / "model.plan", trt_build.BuildOptions(batch=(1, 2, 4)), devices=Gpus(trouble="none")
    )
    with Driver(library=fake) as gpu, pytest.raises(BackendError, match="cannot make the engine") as caught:
        trt.TrtEngine(tmp_path / "model.plan", driver=gpu, devices=ADA)
    assert "cuda" in caught.value.note.lower()


def test_a_backend_rebinds_for_another_output(plan, plan_driver):
    """With and without the variance at the same batch size."""
    module = FakeTrt(plan_driver)
    backend = CopyingBackend(trt.TrtEngine(plan, library=module.library(), devices=ADA))
    for var in (False, True, False):
        backend.bind(Buffers.of(2, SPEC.shape, var=var))
        backend.enqueue()
    backend.close()
