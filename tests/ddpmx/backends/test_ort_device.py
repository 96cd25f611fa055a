"""ONNX Runtime on a GPU, without one: whole chains through a fake ONNX Runtime on a fake driver, and its real names.

These tests cover control flow: the options passed to ONNX Runtime, when a provider is trusted, refusals, and leaks.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ddpmx.backends import ort_device
from ddpmx.backends.base import Buffers, CopyingBackend
from ddpmx.backends.ort import OrtBackend, open_onnx
from ddpmx.backends.ort_common import NAMES, PROVIDERS
from ddpmx.backends.ort_device import OrtDevice
from ddpmx.cuda.device_chain import DeviceChain
from ddpmx.cuda.executors import choose_executor
from ddpmx.cuda.kernels import Kernels
from ddpmx.device.driver import Driver
from ddpmx.device.versions import version_numbers
from ddpmx.errors import BackendError, Cancelled, InputError
from ddpmx.sampling.pixels import to_nhwc
from ddpmx.sampling.request import Sampling
from ddpmx.serve.batcher import Batcher
from oracles import conditioning, gaussian, protobuf
from oracles.cuda_on_host import Toy
from oracles.device_chain import IMAGES, SHAPE, TABLE, expected, no_driver
from oracles.fake_onnxruntime import CPU, CUDA, OLD_RTX, RTX, TENSORRT, FakeOrt


@pytest.fixture
def fake_ort(fake, monkeypatch):
    """A fake ONNX Runtime, and a fake GPU by default."""
    ort = FakeOrt(fake)
    monkeypatch.setitem(sys.modules, "onnxruntime", ort)
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", ort)
    monkeypatch.setattr(ort_device, "Driver", lambda: Driver(library=fake))
    return ort


@pytest.fixture
def opened(fake_ort):
    """``opened(provider="cuda", …)``: devices that are closed at the end."""
    devices = []

    def make(**options):
        devices.append(OrtDevice("model.onnx", "eps", shape=SHAPE, **options))
        return devices[-1]

    yield make
    for device in devices:
        device.close()


class Chain:
    """A chain on the device's GPU, in its stream, with its network."""

    def __init__(self, device, *, batch=3):
        self.device = device
        self.chain = DeviceChain(
            device.driver,
            Kernels(device.driver),
            SHAPE,
            batch,
            TABLE,
            conditioning_shapes=device.conditioning_shapes,
            stream=device.stream,
        )
        with device.driver.current():
            self.network = device.network(
                batch, **self.chain.at, conditioning=self.chain.conditioning, stream=device.stream
            )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.network.close()
        self.chain.close()


# --- whole chains ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", [*PROVIDERS, CUDA])
def test_a_chain_gives_numpy_s_bits(opened, provider):
    device = opened(provider=provider)
    with Chain(device) as c:
        assert choose_executor(c.chain, c.network.enqueue, among=device.executors).executor == "plain"
        got = c.chain.run(seed=5, images=IMAGES)
        assert got.tobytes() == to_nhwc(expected().x0).tobytes()
    assert device.description == f"onnxruntime 1.31.1, {NAMES.get(provider, provider)}"


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_widened_model_runs_in_place_of_the_file(opened, fake_ort, provider):
    assert opened(provider=provider).description.endswith("ExecutionProvider")
    assert fake_ort.model == "model.onnx"
    device = opened(provider=provider, widened=b"of float32")
    assert fake_ort.model == b"of float32"
    assert device.description.endswith("ExecutionProvider, in float32")


@pytest.mark.parametrize("kind", conditioning.KINDS)
def test_a_chain_passes_the_conditioning_to_its_network(opened, kind):
    spec = gaussian.SPEC.replace(shape=SHAPE, **conditioning.KINDS[kind])
    mine = conditioning.conditioning_of(spec)
    wanted = expected(conditioning_shapes=spec.conditioning_shapes, conditioning=mine)
    with Chain(opened(conditioning_shapes=spec.conditioning_shapes)) as c:
        choose_executor(c.chain, c.network.enqueue, "plain")
        for _ in range(2):
            assert c.chain.run(seed=5, images=IMAGES, conditioning=mine).tobytes() == to_nhwc(wanted.x0).tobytes()


@pytest.mark.parametrize("executor", ["graph", "while"])
def test_a_capture_is_refused_and_plain_runs_after_it(opened, fake_ort, executor):
    """Captured, ONNX Runtime's own work would be repeated: it frees host buffers in the stream."""
    device = opened()
    with Chain(device) as c:
        runs = fake_ort.runs
        with pytest.raises(BackendError, match="cannot be captured") as caught:
            choose_executor(c.chain, c.network.enqueue, executor)
        assert "--executor plain" in caught.value.hint
        assert fake_ort.runs == runs + 1, "it ran while the stream was captured"
        assert choose_executor(c.chain, c.network.enqueue, among=(executor, "plain")).executor == "plain"
        assert c.chain.run(seed=5, images=IMAGES).tobytes() == to_nhwc(expected().x0).tobytes()


def test_a_run_waits_for_nothing(opened, fake, fake_ort):
    device = opened()
    with Chain(device) as c, device.driver.current():
        c.chain.prepare(c.network.enqueue, "plain")
        waits = fake.count("cuStreamSynchronize", "cuEventSynchronize")
        launched = fake.launches.count("engine")
        for _ in range(3):
            c.network.enqueue(device.stream)
        assert fake.count("cuStreamSynchronize", "cuEventSynchronize") == waits
        assert fake.launches.count("engine") == launched
        device.driver.wait_for_stream(device.stream)
        assert fake.launches.count("engine") == launched + 3


@pytest.mark.parametrize("at", [1, 2, 7])
def test_a_run_that_is_refused_ends_the_chain_and_leaves_the_device_usable(opened, fake_ort, at):
    device = opened()
    with Chain(device) as c:
        c.chain.prepare(c.network.enqueue, "plain")
        fake_ort.refuse_at = fake_ort.runs + at
        with pytest.raises(BackendError, match="failed to run the network") as caught:
            c.chain.run(seed=5, images=IMAGES)
        assert "Failed to allocate memory" in caught.value.note
        assert "smaller batch" in caught.value.hint
        got = c.chain.run(seed=5, images=IMAGES)
        assert got.tobytes() == to_nhwc(expected().x0).tobytes()


def test_a_chain_can_be_cancelled(opened):
    with Chain(opened()) as c:
        c.chain.prepare(c.network.enqueue, "plain")
        with pytest.raises(Cancelled):
            c.chain.run(seed=5, images=IMAGES, cancel=lambda: True)


def test_images_at_different_steps_are_served_in_its_stream(opened, fake):
    spec, asked = gaussian.SPEC.replace(shape=SHAPE), [(2, "ancestral", 6), (3, "unipc", 9), (4, "ddim", 4)]
    with Batcher(spec, CopyingBackend(opened()), batch=4) as batcher:
        assert batcher.description.endswith("executor plain")
        tickets = [batcher.submit(n, seed=5, sampling=Sampling(name, steps=steps)) for n, name, steps in asked]
        drawn = [ticket.result(60) for ticket in tickets]
    for (n, name, steps), images in zip(asked, drawn, strict=True):
        table = Sampling(name, steps=steps).table(spec)
        assert images.tobytes() == to_nhwc(expected(range(n), seed=5, table=table).x0).tobytes()
    assert "ddpmx_step_each" in fake.launches


def test_on_host_arrays_it_gives_the_network_s_output_at_every_batch_size(opened):
    device = opened(variance=True)
    backend, toy = CopyingBackend(device), Toy(SHAPE)
    for batch in (1, 3, 2):
        got, want = (Buffers.of(batch, SHAPE, var=True) for _ in range(2))
        got.x[...] = want.x[...] = np.random.default_rng(batch).standard_normal(got.x.shape)
        got.t[...] = want.t[...] = np.arange(batch) * 100
        backend.bind(got)
        backend.enqueue()
        toy.bind(want)
        toy.enqueue()
        assert got.out.tobytes() == want.out.tobytes()
        assert (got.var == 0.25).all()
    backend.release()


# --- ONNX Runtime's options ------------------------------------------------------------------------------------------


def test_cuda_runs_in_our_stream_in_full_float32_and_the_same_way_tomorrow(opened, fake_ort, capsys):
    device = opened(provider="cuda")
    stream = {"device_id": "0", "user_compute_stream": str(device.stream)}
    own = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
    assert fake_ort.requested == [(CUDA, {**stream, **own})]
    assert fake_ort.preloaded == 1
    assert capsys.readouterr().out == "", "what preload_dlls prints must not mix with our output"


def test_what_tensorrt_leaves_stays_on_the_gpu_in_the_same_stream(opened, fake_ort):
    device = opened(provider="tensorrt")
    assert [name for name, _ in fake_ort.requested] == [TENSORRT, CUDA]
    assert {options["user_compute_stream"] for _, options in fake_ort.requested} == {str(device.stream)}


def test_the_plugin_is_registered_once(opened, fake_ort):
    for _ in range(2):
        device = opened(provider="rtx")
        options = {"has_user_compute_stream": "1", "user_compute_stream": str(device.stream)}
        assert fake_ort.requested == [(RTX, options)]
    assert fake_ort.registered == 1


def test_a_plugin_without_a_gpu_says_so_each_time(opened, fake_ort):
    fake_ort.devices = 0
    for _ in range(2):
        with pytest.raises(BackendError) as caught:
            opened(provider="rtx")
        assert "finds no GPU that it supports" in str(caught.value)
    assert fake_ort.registered == 1


def test_a_plugin_may_have_another_name_than_onnxruntime_s(opened, fake_ort):
    fake_ort.plugin = OLD_RTX
    device = opened(provider="rtx")
    assert [name for name, _ in fake_ort.requested] == [OLD_RTX]
    assert RTX in device.description
    device.close()
    fake_ort.instead = [RTX]  # control: a provider of that name that is not the plugin
    with pytest.raises(BackendError) as caught:
        opened(provider="rtx")
    assert caught.value.note == f"it uses {RTX}, {CPU} instead"


def test_tensorrt_s_libraries_are_loaded_from_its_wheel(opened, fake_ort, monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "tensorrt_libs", raising=False)
    (tmp_path / "tensorrt_libs.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    opened(provider="cuda")
    assert "tensorrt_libs" not in sys.modules
    opened(provider="tensorrt")
    assert sys.modules.pop("tensorrt_libs").__file__ == str(tmp_path / "tensorrt_libs.py")


def test_another_stream_is_refused(opened):
    device = opened()
    with Chain(device) as c, device.driver.current():
        other = device.driver.stream()
        for use in (
            lambda: c.network.enqueue(other.value),
            lambda: device.network(3, x=1, t=1, out=1, stream=other.value),
        ):
            with pytest.raises(BackendError, match="its own stream"):
                use()
        other.close()


# --- trusted after one run -------------------------------------------------------------------------------------------


def test_it_has_run_once_and_waited_before_it_is_trusted(opened, fake, fake_ort):
    opened(variance=True)
    assert (fake_ort.runs, fake.launches) == (1, ["engine"])
    assert fake.count("cuStreamSynchronize") >= 1


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("what", ["session", "bind", "run"])
def test_a_provider_that_is_listed_and_does_not_run_is_an_error(fake, fake_ort, provider, what):
    fake_ort.refuse = {what}
    with pytest.raises(BackendError, match="does not run this file by") as caught:
        OrtDevice("model.onnx", "eps", shape=SHAPE, provider=provider)
    assert f"model.onnx: ONNX Runtime 1.31.1 does not run this file by {NAMES[provider]} here" in str(caught.value)
    assert caught.value.note.endswith(f"{what} refused")
    assert len(caught.value.note) <= 300
    assert caught.value.hint
    assert fake_ort.events == ([] if what == "session" else ["session"]), "the error keeps the session"
    assert (fake.alive(), fake.retained) == ({}, 0)


@pytest.mark.parametrize(("provider", "instead"), [("cuda", []), ("tensorrt", [CUDA]), ("rtx", [])])
def test_a_provider_that_is_silently_replaced_is_an_error(fake_ort, monkeypatch, provider, instead):
    """ONNX Runtime reports no error for a library that does not load: it opens a session on the CPU."""
    fake_ort.instead = instead or [CPU]
    with pytest.raises(BackendError, match=NAMES[provider]) as caught:
        OrtDevice("model.onnx", "eps", shape=SHAPE, provider=provider)
    assert re.search(f"it uses .*{CPU} instead", caught.value.note)
    assert fake_ort.runs == 0


def test_the_error_names_why_a_provider_s_library_does_not_load(fake_ort, tmp_path):
    """ONNX Runtime writes the reason to stderr alone, so the library is loaded once more."""
    name = "onnxruntime_providers_cuda.dll" if sys.platform == "win32" else "libonnxruntime_providers_cuda.so"
    (tmp_path / "capi").mkdir()
    (tmp_path / "capi" / name).write_bytes(b"no library")
    (tmp_path / "__init__.py").touch()
    fake_ort.__file__, fake_ort.instead = str(tmp_path / "__init__.py"), [CPU]
    with pytest.raises(BackendError, match="does not run this file") as caught:
        OrtDevice("model.onnx", "eps", shape=SHAPE, provider="cuda")
    assert caught.value.note.startswith(name)
    assert "instead" not in caught.value.note


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_hint_suits_the_machine(fake_ort, monkeypatch, machine):
    monkeypatch.setattr(ort_device.platform, "machine", lambda: machine)
    fake_ort.refuse = {"run"}
    with pytest.raises(BackendError) as caught:
        OrtDevice("my model.onnx", "eps", shape=SHAPE)
    jetson = "on a Jetson, TensorRT runs this file: ddpmx build 'my model.onnx'"
    assert (caught.value.hint == jetson) == (machine == "aarch64")


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("cuInit", 0),
        ("cuStreamCreate", 0),
        ("cuStreamIsCapturing", 0),
        ("cuMemAlloc_v2", 1),
        ("cuMemAlloc_v2", 3),
        ("cuMemcpyHtoDAsync_v2", 1),
        ("cuMemcpyHtoDAsync_v2", 2),
        ("cuMemcpyDtoHAsync_v2", 1),
        ("cuStreamSynchronize", 0),
    ],
)
def test_a_driver_that_fails_leaves_nothing(fake, fake_ort, name, at):
    fake.fail[name] = (at, 700)
    with pytest.raises(BackendError) as caught:
        OrtDevice("model.onnx", "eps", shape=SHAPE)
    assert "CUDA_ERROR_ILLEGAL_ADDRESS" in f"{caught.value.fact} {caught.value.note}"
    if name == "cuStreamSynchronize":
        fake.faults.clear()  # memory is freed without a wait, since no wait succeeds
    assert (fake.alive(), fake.retained) == ({}, 0)


# --- what is missing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", ["cuda", TENSORRT])
def test_a_build_without_the_provider_is_reported_before_the_missing_driver(fake, fake_ort, provider):
    fake_ort.listed = ["AzureExecutionProvider", CPU]
    fake.fail["cuInit"] = (0, 100)
    with pytest.raises(BackendError, match="ONNX Runtime has no") as caught:
        OrtDevice("model.onnx", "eps", shape=SHAPE, provider=provider)
    assert caught.value.note == f"version 1.31.1 has {CPU}"
    assert "pip install 'onnxruntime-gpu[cuda,cudnn]'" in caught.value.hint
    assert fake.calls == []


def test_the_error_for_a_missing_plugin_names_what_to_install(fake_ort, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", None)
    with pytest.raises(BackendError, match="TensorRT-RTX is not installed") as caught:
        OrtDevice("model.onnx", "eps", shape=SHAPE, provider="rtx")
    assert "onnxruntime-ep-nv-tensorrt-rtx" in caught.value.hint


def test_an_onnxruntime_that_binds_no_memory_of_a_plugin_s_is_refused(fake_ort, monkeypatch):
    monkeypatch.setattr(FakeOrt, "__version__", "1.24.4")
    with pytest.raises(BackendError, match=r"1\.24\.4 cannot give a GPU's memory to a plugin") as caught:
        OrtDevice("model.onnx", "eps", shape=SHAPE, provider="rtx")
    assert caught.value.hint == "pip install 'onnxruntime>=1.25'"
    assert not fake_ort.registered


@pytest.mark.parametrize(("refuse", "devices", "why"), [({"register"}, 1, "register refused"), ((), 0, "no GPU")])
def test_the_error_names_why_a_plugin_does_not_start(fake_ort, refuse, devices, why):
    fake_ort.refuse, fake_ort.devices = set(refuse), devices
    with pytest.raises(BackendError, match=RTX) as caught:
        OrtDevice("model.onnx", "eps", shape=SHAPE, provider="rtx")
    assert why in caught.value.note


def test_without_a_driver_the_error_names_it(fake_ort, monkeypatch):
    no_driver()
    monkeypatch.setattr(ort_device, "Driver", Driver)
    with pytest.raises(BackendError, match="there is no NVIDIA driver here"):
        OrtDevice("model.onnx", "eps", shape=SHAPE)


def test_an_error_without_a_message_is_named_by_its_type(fake_ort, monkeypatch):
    monkeypatch.setattr(fake_ort, "InferenceSession", lambda *_, **__: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(BackendError, match="does not run this file") as caught:
        OrtDevice("model.onnx", "eps", shape=SHAPE)
    assert caught.value.note == "MemoryError"


def test_providers_for_other_devices_are_refused(fake_ort):
    with pytest.raises(InputError, match="not a provider for NVIDIA GPUs"):
        OrtDevice("model.onnx", "eps", shape=SHAPE, provider="cpu")


def test_a_failed_preload_is_left_to_the_session(opened, fake_ort):
    fake_ort.refuse = {"preload"}
    opened()
    assert fake_ort.runs == 1


# --- closing ---------------------------------------------------------------------------------------------------------


def test_closing_ends_the_session_before_the_stream_and_twice_is_harmless(fake, fake_ort):
    device = OrtDevice("model.onnx", "eps", shape=SHAPE)
    with device.driver.current():
        memory = [device.driver.allocate(4 * 3 * 5 * 7, "x") for _ in range(3)]
        x, t, out = (m.value for m in memory)
        network = device.network(1, x=x, t=t, out=out, stream=device.stream)
        stream = device.stream
    device.close()  # with a network that was forgotten
    assert fake_ort.events == ["session"]
    assert (fake.alive(), fake.retained) == ({}, 0)
    device.close()
    network.close()
    network.close()
    with pytest.raises(BackendError, match="is closed"):
        network.enqueue(stream)
    with pytest.raises(BackendError, match="is closed"):
        device.network(1, x=x, t=t, out=out, stream=stream)


def test_a_driver_that_was_passed_stays_open(fake, fake_ort):
    with Driver(library=fake) as driver:
        OrtDevice("model.onnx", "eps", shape=SHAPE, driver=driver).close()
        assert (fake.alive(), fake.retained) == ({}, 1)
        with driver.current():
            driver.stream().close()


# --- which backend a file gets ---------------------------------------------------------------------------------------

SPEC = gaussian.SPEC.replace(shape=SHAPE)


@pytest.mark.parametrize("providers", ["cuda", ("cuda",), ("rtx", "cpu"), (TENSORRT,)])
def test_a_file_runs_on_the_requested_gpu_provider(fake_ort, providers):
    backend = open_onnx(Path("model.onnx"), SPEC, providers=providers)
    assert isinstance(backend, CopyingBackend)
    backend.close()


def test_without_fallback_a_provider_that_fails_is_an_error(fake_ort):
    fake_ort.refuse = {"run"}
    with pytest.raises(BackendError, match=CUDA):
        open_onnx(Path("model.onnx"), SPEC, providers=("cuda", "cpu"))


def test_with_fallback_the_next_provider_runs_the_file(fake_ort, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", None)
    backend = open_onnx(Path("model.onnx"), SPEC, providers=("rtx", "cuda"), fallback=True)
    assert CUDA in backend.description
    backend.close()


def test_with_fallback_the_cpu_comes_last(gaussian_onnx):
    pytest.importorskip("onnxruntime", reason="not verified here: ONNX Runtime on the CPU (it is not installed)")
    no_driver()
    for providers in (("cuda",), ("rtx", "tensorrt", "cuda")):
        backend = open_onnx(gaussian_onnx, gaussian.SPEC, providers=providers, fallback=True)
        assert CPU in backend.description
        backend.close()


# --- the real ONNX Runtime -------------------------------------------------------------------------------------------


@pytest.fixture
def real():
    return pytest.importorskip("onnxruntime", reason="not verified here: ONNX Runtime's names (it is not installed)")


@pytest.fixture
def with_plugins(real):
    if not hasattr(real, "register_execution_provider_library"):
        pytest.skip(f"not verified here: ONNX Runtime's plugins ({real.__version__} has none)")
    return real


def test_every_used_name_of_onnxruntime_exists(with_plugins):
    real = with_plugins
    for kind, names in ort_device.USED.items():
        owner = getattr(real, kind) if kind else real
        assert [name for name in names if not hasattr(owner, name)] == [], kind
    taken = inspect.signature(real.IOBinding.bind_input).parameters
    assert [*taken][1:] == ["name", "device_type", "device_id", "element_type", "shape", "buffer_ptr"]
    assert [*inspect.signature(real.IOBinding.bind_output).parameters] == [*taken]
    assert [*inspect.signature(real.InferenceSession.run_with_iobinding).parameters] == [
        "self",
        "iobinding",
        "run_options",
    ]
    assert {"sess_options", "providers", "kwargs"} <= set(inspect.signature(real.InferenceSession).parameters)
    assert all(p.default is not p.empty for p in inspect.signature(real.preload_dlls).parameters.values())
    # the argument types of pybind's functions are in their docstrings alone
    assert "arg0: str, arg1: str" in real.register_execution_provider_library.__doc__
    assert re.search(
        r"arg0: \S*(Sequence|list)\[\S*OrtEpDevice\], arg1: \S*(Mapping|dict)\[str, str\]",
        real.SessionOptions.add_provider_for_devices.__doc__,
    )
    assert all(isinstance(device.ep_name, str) for device in real.get_ep_devices())


def test_what_is_bound_as_cuda_is_nvidia_s_to_a_plugin_as_well(with_plugins):
    if version_numbers(with_plugins.__version__) < ort_device.PLUGIN_RELEASE:
        pytest.skip(f"not verified here: memory bound for a plugin ({with_plugins.__version__} is refused)")
    assert with_plugins.OrtDevice.make("cuda", 0)._get_c_device().vendor_id() == 0x10DE  # NVIDIA's PCI vendor ID


def test_the_list_of_names_is_what_the_source_uses():
    code = Path(ort_device.__file__).read_text(encoding="utf-8")
    code = code[code.index("class OrtDevice") :]
    shared = inspect.getsource(ort_device.session_options) + inspect.getsource(ort_device.available_providers)
    for names in ort_device.USED.values():
        assert [name for name in names if f".{name}" not in code + shared] == []
    assert set(re.findall(r"\bort\.([a-zA-Z]\w+)", code + shared)) <= set(ort_device.USED[""])


def test_run_options_are_stored(real):
    options = real.RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"


def test_without_fallback_a_session_raises_instead_of_printing(with_plugins, tmp_path, capsys):
    with pytest.raises(ValueError, match="providers"):
        with_plugins.InferenceSession(str(tmp_path / "none.onnx"), providers=[("nonsense", 1)], enable_fallback=0)
    assert capsys.readouterr().out == ""


def learned_variance(path):
    """eps = 2·x and var = −x, of the contract's form."""
    picture = (protobuf.FLOAT, ("batch", *SHAPE))
    nodes = [protobuf.node("Add", ["x", "x"], ["eps"]), protobuf.node("Neg", ["x"], ["var"])]
    graph = b"".join(protobuf.field(1, node) for node in nodes)
    outputs = {"eps": picture, "var": picture}
    path.write_bytes(protobuf.model({"x": picture, "t": (protobuf.INT32, ("batch",))}, outputs, graph=graph))
    return path


def test_the_host_s_backend_gives_both_outputs(real, tmp_path):
    backend = OrtBackend(learned_variance(tmp_path / "model.onnx"), "eps")
    rng = np.random.default_rng(0)
    for batch, var in ((1, True), (3, True), (2, False)):
        buffers = Buffers.of(batch, SHAPE, var=var)
        buffers.x[...] = rng.standard_normal(buffers.x.shape)
        backend.bind(buffers)
        backend.enqueue()
        np.testing.assert_array_equal(buffers.out, 2 * buffers.x)
        if buffers.var is not None:
            np.testing.assert_array_equal(buffers.var, -buffers.x)
    backend.close()
    backend.close()
    with pytest.raises(BackendError, match="is closed"):
        backend.bind(buffers)


def test_a_variance_that_the_graph_does_not_have_is_an_error(real, gaussian_onnx):
    backend = OrtBackend(gaussian_onnx, "eps")
    with pytest.raises(BackendError, match="NodeArg with name: var"):
        backend.bind(Buffers.of(1, gaussian.SHAPE, var=True))
    backend.close()


def test_backends_that_share_a_session_keep_their_buffers_apart(real, tmp_path):
    one = OrtBackend(learned_variance(tmp_path / "model.onnx"), "eps")
    first, second = (Buffers.of(2, SHAPE) for _ in range(2))
    first.x[...], second.x[...] = 1, 5
    one.bind(first)
    two = one.share()
    two.bind(second)
    one.enqueue()
    assert (first.out == 2).all()
    assert (second.out == 0).all()
    one.close()
    two.enqueue()
    assert (second.out == 10).all()
    two.close()


def test_importing_it_loads_nothing_heavy():
    heavy = ["onnxruntime", "onnx", "torch", "onnxruntime_ep_nv_tensorrt_rtx"]
    code = f"import sys, ddpmx.backends.ort_device as _; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
