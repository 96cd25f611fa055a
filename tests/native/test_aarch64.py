"""libddpmx on aarch64, the processor of a Jetson: cross-compiled, and run in an emulator."""

from __future__ import annotations

import contextlib
import json
import platform
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ddpmx
from ddpmx.backends.base import Buffers
from ddpmx.diffusion.samplers import make_table
from ddpmx.formats import onnx_file, protobuf
from ddpmx.formats.spec import ModelSpec
from ddpmx.parity.check import BOUNDS
from ddpmx.parity.ladder import run_ladder
from ddpmx.parity.reference import Reference
from native.conftest import ROOT, SOURCE, build_native
from oracles import parity
from oracles import protobuf as write_protobuf
from oracles.aarch64 import TOOLS, Unavailable, find_emulator, unpacked_wheels
from oracles.conditioning import conditioning_of, onnx, spec_of

SYSROOT = Path("/usr/aarch64-linux-gnu")
NOT_VERIFIED = "not verified here: libddpmx on aarch64 ({})"
# The quick tests that may depend on the processor (sizes, threads, arithmetic, the sign of char).
OWN_TESTS = ("test_c_api", "test_c_header", "test_tables")

pytestmark = [
    pytest.mark.long,  # the cross-compiler and the emulator take a minute
    pytest.mark.skipif(
        platform.machine() != "x86_64",
        reason=NOT_VERIFIED.format(f"by an emulator: this is {platform.machine()}, and the other tests ran on it"),
    ),
]


@pytest.fixture(scope="module")
def emulator() -> list[str]:
    """The command that runs a program of aarch64."""
    try:
        return [find_emulator(), "-L", str(SYSROOT)]
    except Unavailable as why:
        pytest.skip(NOT_VERIFIED.format(why))


@pytest.fixture(scope="module")
def aarch64_build(emulator) -> Path:
    if shutil.which("aarch64-linux-gnu-g++") is None:
        pytest.skip(NOT_VERIFIED.format("no aarch64-linux-gnu-g++; .ci/native-tools installs it"))
    toolchain = SOURCE / "cmake" / "aarch64-linux-gnu.cmake"
    return build_native(
        ROOT / "build" / "native-aarch64",
        f"-DCMAKE_TOOLCHAIN_FILE={toolchain}",
        "-DCMAKE_UNITY_BUILD=ON",
        targets=("run_model", "fake_onnxruntime", *OWN_TESTS),
    )


@pytest.fixture(scope="module")
def aarch64_ort(emulator) -> Path:
    """ONNX Runtime for aarch64, of the same version as this Python's."""
    onnxruntime = pytest.importorskip("onnxruntime", reason=NOT_VERIFIED.format("no ONNX Runtime"))
    version = onnxruntime.__version__
    try:
        folder = unpacked_wheels(
            TOOLS / f"onnxruntime-{version}-aarch64",
            f"onnxruntime=={version}",
            wanted=lambda name: Path(name).name.startswith("libonnxruntime.so."),
        )
    except Unavailable as why:
        pytest.skip(NOT_VERIFIED.format(why))
    (library,) = folder.rglob("libonnxruntime.so.*")
    return library


class Program:
    """run_model, on this processor or on the emulated one."""

    def __init__(self, process: subprocess.Popen[str], errors: Any) -> None:
        self._process, self._errors = process, errors
        self.backend = self._read_line().split(maxsplit=1)[1]

    def _read_line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            raise AssertionError(f"run_model ended with {code}: {self._errors.read()[-2000:]}")
        return line.strip()

    def __call__(self, **words: Any) -> float:
        """Run a request; the seconds that it took."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(" ".join(f"{name}={value}" for name, value in words.items()) + "\n")
            self._process.stdin.flush()
        return float(self._read_line())


@contextlib.contextmanager
def program(command: list[Any], model: Path, ort: Path, spec: ModelSpec | None = None) -> Iterator[Program]:
    words = [
        *command,
        model,
        f"ort={ort}",
        "threads=1",
        *([] if spec is None else [f"spec={json.dumps(spec.to_json())}"]),
    ]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        late = threading.Timer(240, process.kill)
        late.start()
        try:
            yield Program(process, errors)
            process.communicate()
            assert process.returncode == 0
        finally:
            late.cancel()
            process.kill()


# --- the library's own tests -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OWN_TESTS)
def test_the_tests_of_the_project(name, emulator, aarch64_build):
    done = subprocess.run([*emulator, aarch64_build / "tests" / name], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"


def test_what_is_built_is_for_aarch64(aarch64_build):
    head = (aarch64_build / "libddpmx.so").read_bytes()[:20]
    assert head[:4] == b"\x7fELF"
    assert int.from_bytes(head[18:20], "little") == 183  # EM_AARCH64


# --- everything but the network: every bit is the same ---------------------------------------------------------------

PLAIN: list[dict[str, Any]] = [
    {"n": 5, "seed": 5, "steps": 25},
    {"n": 2, "seed": 2**64 - 1, "first": 2**32 - 5},
    {"n": 3, "steps": 30, "sampler": "ddim"},
    {"n": 3, "steps": 9, "sampler": "unipc", "spacing": "logsnr"},
    {"n": 3, "steps": 30, "sampler": "ddim", "eta": 0.7, "spacing": "trailing"},
    {"n": 4, "steps": 20, "spacing": "quad", "variance": "fixed_small", "batch": 3},
]
BETAS = np.linspace(1e-3, 0.3, 20) ** 1.5
MODELS: dict[str, tuple[ModelSpec, list[dict[str, Any]]]] = {
    "plain": (spec_of("classes", (3, 8, 8), classes=None, timesteps=1000), PLAIN),
    "conditioned": (spec_of("all", clip=None, schedule="cosine", prediction="v"), [{"n": 4, "seed": 9, "batch": 3}]),
    "x0": (
        spec_of("itself", (1, 5, 7), prediction="x0", schedule="sigmoid_alpha_bar", clip=0.5),
        [{"n": 3}, {"n": 3, "sampler": "ddim", "eta": 1.0, "steps": 9}],
    ),
    "learned variance": (
        spec_of("classes", variance="learned_range", classes=None),
        [{"n": 5, "batch": 2}, {"n": 5, "variance": "fixed_small"}, {"n": 5, "sampler": "ddim", "steps": 7}],
    ),
    "betas": (spec_of("classes", schedule="betas", betas=BETAS, classes=None), [{"n": 3, "seed": 1}]),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_bit_is_the_same(name, emulator, aarch64_build, native_build, tmp_path):
    """Noise, tables, the update and the images, around a network that is a formula in C++."""
    spec, requests = MODELS[name]
    model = tmp_path / "model.onnx"
    model.write_bytes(onnx(spec, metadata=onnx_file.metadata(spec)))
    found: dict[str, list[bytes]] = {}
    for where, prefix, build in (("x86_64", [], native_build), ("aarch64", emulator, aarch64_build)):
        fake = build / "tests" / "libfake_onnxruntime.so"
        with program([*prefix, build / "tests" / "run_model"], model, fake) as run:
            for number, request in enumerate(requests):
                conditioning = conditioning_of(spec, request["n"])
                words: dict[str, Any] = {}
                if "y" in conditioning:
                    words["labels"] = ",".join(map(str, conditioning["y"]))
                if "cond" in conditioning:
                    words["cond"] = tmp_path / "cond"
                    conditioning["cond"].tofile(words["cond"])
                files = {kind: tmp_path / f"{where}-{number}-{kind}" for kind in ("images", "samples", "seen")}
                run(**request, **words, **files)
                found.setdefault(where, []).extend(path.read_bytes() for path in files.values())
    assert found["aarch64"] == found["x86_64"]
    assert len(found["x86_64"]) == 3 * len(requests)
    assert all(len(set(part)) > 20 for part in found["x86_64"])


# --- with ONNX Runtime's own code for aarch64: the ladder ------------------------------------------------------------


def undescribed(path: Path, to: Path) -> Path:
    """The file without its metadata, so that it can be opened with another spec."""
    metadata_props = 14
    parts = [part for part in protobuf.fields(memoryview(path.read_bytes())) if part[0] != metadata_props]
    to.write_bytes(b"".join(write_protobuf.field(n, v if isinstance(v, int) else bytes(v)) for n, v in parts))
    return to


class Emulated:
    """The network as libddpmx runs it on aarch64: ε follows from the x̂0 of a chain's first step, x̂0 = p·x + q·ε.

    The spec has no clip. Dividing by q costs up to 6e-6 of ε at t = 0, where q = −0.01, and nothing at large t.
    """

    def __init__(self, run: Program, spec: ModelSpec, folder: Path) -> None:
        self.run, self.folder, self.calls = run, folder, 0
        self.description = f"{run.backend}, aarch64"
        self._table = make_table(spec.make_schedule(), spec.prediction, spec.variance).rows[::-1].astype(np.float32)

    def bind(self, buffers: Buffers) -> None:
        self._buffers = buffers

    def enqueue(self) -> None:
        x, out = self._buffers.x, self._buffers.out
        for t in np.unique(self._buffers.t):
            rows = self._buffers.t == t
            x[rows].tofile(self.folder / "x")
            n = int(rows.sum())
            self.run(n=n, batch=n, start=t, x=self.folder / "x", seen=self.folder / "seen", stop=1)
            self.calls += 1
            seen = np.fromfile(self.folder / "seen", np.float32, offset=4).reshape(2, n, *x.shape[1:])
            assert np.array_equal(seen[0], x[rows])
            p, q = self._table[t, :2].astype(np.float64)
            out[rows] = (seen[1] - p * seen[0]) / q

    def close(self) -> None:
        pass


def check_ladder(model: Path, reference: Reference, emulated: list[Any], ort: Path, folder: Path, figure: Any) -> None:
    bare, spec = undescribed(model, folder / "bare.onnx"), ddpmx.load(model, threads=1).spec
    unclipped = spec.replace(clip=None)
    with program(emulated, bare, ort, unclipped) as run:
        backend = Emulated(run, unclipped, folder)
        result = run_ladder(backend, spec, reference, batch=8)
        assert re.search(r"onnxruntime \d", backend.description)
        assert backend.calls > 50
    for check in result.checks:
        if reference.drift is None and check.name.startswith("light judge"):
            continue  # a closed form has no chain whose drift was measured
        assert check.skipped is None, str(check)
        limit = {"at_least": check.bound} if check.at_least else {"at_most": check.bound}
        figure(f"aarch64, {model.name}: {check.name}", check.value, **limit)


def check_chain(model: Path, emulated: list[Any], ort: Path, folder: Path, figure: Any, **request: Any) -> None:
    """The library's own chain against Python's, on this processor."""
    n = request["n"]
    with ddpmx.load(model, threads=1) as pipeline, program(emulated, model, ort) as run:
        bounds, name = BOUNDS[pipeline.spec.precision], f"aarch64, {model.name}"
        images = pipeline.generate(**request)
        seconds = run(**request, images=folder / "images")
        whole = list(pipeline.stream(n, seed=1))  # all T steps: for these the bound is
        step = []
        for before, after in [whole[at : at + 2] for at in (0, len(whole) // 2, len(whole) - 2)]:
            before.x.tofile(folder / "x")
            run(n=n, seed=1, start=before.t, x=folder / "x", stop=2, seen=folder / "seen")
            seen = np.fromfile(folder / "seen", np.uint8).reshape(2, -1)[1, 4:].view(np.float32)
            step.append(rms(seen.reshape(2, *after.x.shape)[0] - after.x))
    apart = np.abs(np.fromfile(folder / "images", np.uint8).reshape(images.shape) - images.astype(np.int16))
    # as tight as a step of the paper's chain, where |A·q| is at most 0.02
    figure(f"{name}: one step of the library's own chain, RMS", max(step), at_most=0.02 * bounds.eps)
    steps = request.get("steps", len(whole))
    chain = f"the library's own chain of {steps} steps"
    figure(f"{name}: {chain}, pixels within one level", float(np.mean(apart <= 1)), at_least=bounds.pixels)
    figure(
        f"{name}: {chain}, PSNR in dB", psnr(apart), at_least=20 * np.log10(255)
    )  # what one level everywhere would be
    figure(f"{name}: emulated, milliseconds per step and image", 1e3 * seconds / steps / n, at_most=5e3)


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def psnr(apart: np.ndarray) -> float:
    mse = float(np.mean(np.square(apart, dtype=np.float64)))
    return float("inf") if mse == 0 else 10 * np.log10(255**2 / mse)


@pytest.fixture(scope="module")
def emulated(emulator, aarch64_build) -> list[Any]:
    return [*emulator, aarch64_build / "tests" / "run_model"]


def test_the_ladder_of_a_closed_form(emulated, aarch64_ort, gaussian_onnx, tmp_path, figure):
    check_ladder(gaussian_onnx, parity.make_reference(), emulated, aarch64_ort, tmp_path, figure)


def test_the_chain_of_a_closed_form(emulated, aarch64_ort, gaussian_onnx, tmp_path, figure):
    check_chain(gaussian_onnx, emulated, aarch64_ort, tmp_path, figure, n=4, seed=5)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Path, Reference]:
    """A trained network, and the record of PyTorch's outputs."""
    pytest.importorskip("torch", reason=NOT_VERIFIED.format("a trained network: no torch"))
    from ddpm_export.graph.onnx_export import export_network
    from ddpm_export.proof.record import record
    from oracles.tiny import train

    folder = tmp_path_factory.mktemp("tiny")
    module, spec = train(folder)
    export_network(module, spec, folder / "tiny.onnx")
    return folder / "tiny.onnx", record(module, spec, steps=20)


@pytest.mark.long
@pytest.mark.torch
def test_the_ladder_of_a_trained_network(emulated, aarch64_ort, tiny, tmp_path, figure):
    check_ladder(*tiny, emulated, aarch64_ort, tmp_path, figure)


@pytest.mark.torch
def test_the_chain_of_a_trained_network(emulated, aarch64_ort, tiny, tmp_path, figure):
    check_chain(tiny[0], emulated, aarch64_ort, tmp_path, figure, n=4, seed=5, steps=25)
