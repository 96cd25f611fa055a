"""MNN's backend: ONNX Runtime's images within its precision, the same bits however a batch is cut, and free threads."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import ddpmx
from ddpmx.backends import mnn
from ddpmx.backends.base import Buffers
from ddpmx.backends.mnn import MnnBackend
from ddpmx.errors import BackendError, Cancelled, FileFormatError, InputError
from ddpmx.formats import mnn_file
from ddpmx.formats.mnn_file import describe_network, read_mnn
from ddpmx.formats.spec import ModelSpec
from ddpmx.models import shipped
from ddpmx.pipeline import Pipeline
from oracles import conditioning
from oracles.mnn import mnn_file as handmade

pytest.importorskip("onnxruntime", reason="not verified here: MNN against ONNX Runtime (no onnxruntime)")
try:
    from ddpmx.mnn import library

    library.load()
except BackendError as why:
    pytest.skip(f"not verified here: MNN's backend ({why.fact})", allow_module_level=True)

from ddpmx.mnn.build import build

DDIM = {"sampler": "ddim", "steps": 6}


@pytest.fixture(scope="module")
def garments(tmp_path_factory) -> Path:
    """The model that comes along, trained, in half, in parts of eight."""
    path = tmp_path_factory.mktemp("mnn") / "garments.mnn"
    build(shipped.find("garments"), path)
    return path


@pytest.fixture(scope="module")
def whole(garments):
    with ddpmx.load(garments) as pipeline:
        return pipeline.generate(32, seed=5, **DDIM)


# --- the same network ------------------------------------------------------------------------------------------------


def test_images_are_those_of_onnx_runtime(garments, whole):
    with ddpmx.load("garments") as pipeline:
        expected = pipeline.generate(32, seed=5, **DDIM)
    difference = np.abs(whole.astype(int) - expected)
    assert whole.std() > 50, "images, not a flat grey"
    assert (difference > 1).mean() < 0.001
    assert difference.max() < 8


@pytest.mark.parametrize("batch", [1, 3, 8, 11])
def test_outputs_are_those_of_onnx_runtime(garments, batch, figure):
    outputs = []
    for file in (garments, "garments"):
        spec, backend = ddpmx.backends.open.open_model(file, threads=2)
        buffers = Buffers.of(batch, spec.shape)
        buffers.x[...] = np.random.default_rng(batch).standard_normal(buffers.x.shape)
        buffers.t[...] = np.linspace(0, spec.timesteps - 1, batch)
        backend.bind(buffers)
        backend.enqueue()
        backend.close()
        outputs.append(buffers.out.copy())
    error = np.sqrt(np.mean((outputs[0] - outputs[1]) ** 2) / np.mean(outputs[1] ** 2))
    figure(f"MNN against ONNX Runtime, fp16, batch {batch}: relative error of ε", float(error), at_most=5e-4)


def test_in_float32_it_is_the_widened_network(garments, monkeypatch, figure):
    """Two libraries and two files: the rounding of the weights is the same, and nothing else is rounded to half."""
    monkeypatch.setattr(mnn, "_in_half", lambda spec: spec.precision == "fp16")  # as on an ARM CPU
    x, out = np.random.default_rng(0).standard_normal((2, 1, 16, 16)).astype(np.float32), []
    for path in ("garments", garments):
        with ddpmx.load(path, threads=1) as pipeline:
            assert ("in half" in pipeline.backend) == (path == garments)
            with pipeline.in_float32() as wide, wide.share() as shared:
                assert "in half" not in wide.backend
                assert (wide.backend, wide.arithmetic) == (shared.backend, "fp32")
                out.append(shared.evaluate(x, [5, 800]).eps)
    apart = float(np.sqrt(np.mean((out[0] - out[1]) ** 2) / np.mean(out[0] ** 2)))
    figure("MNN against ONNX Runtime, fp16 in float32: relative error of ε", apart, at_most=1e-5)


@pytest.mark.parametrize("kind", conditioning.KINDS)
def test_conditioning_reaches_the_network(tmp_path, kind):
    """The chain written out in float64, for networks that take a class, x̂_0 and a condition."""
    spec = conditioning.spec_of(kind)
    (tmp_path / "m.onnx").write_bytes(conditioning.onnx(spec, metadata={"ddpmx": spec.to_text()}))
    build(tmp_path / "m.onnx", part=2)
    inputs = conditioning.conditioning_of(spec, 5)
    expected = conditioning.chain_by_hand(spec, inputs, seed=3, n=5)[-1]
    with ddpmx.load(tmp_path / "m.mnn") as pipeline:
        images = pipeline.generate(5, seed=3, **conditioning.as_arguments(inputs))
    assert np.abs(images.transpose(0, 3, 1, 2) - (expected * 127.5 + 127.5)).max() < 0.6


def test_a_learned_variance_is_read(tmp_path):
    spec = conditioning.spec_of("classes", variance="learned_range")
    (tmp_path / "m.onnx").write_bytes(conditioning.onnx(spec, metadata={"ddpmx": spec.to_text()}))
    build(tmp_path / "m.onnx")
    found, backend = ddpmx.backends.open.open_model(tmp_path / "m.mnn")
    buffers = Buffers.of(3, spec.shape, var=True, conditioning_shapes=found.conditioning_shapes)
    buffers.x[...] = np.random.default_rng(0).standard_normal(buffers.x.shape)
    backend.bind(buffers)
    backend.enqueue()
    backend.close()
    np.testing.assert_allclose(buffers.var, buffers.x / 2, rtol=1e-6)  # as the file computes it


def test_a_chain_that_reads_no_variance_runs_before_and_after_one_that_does(tmp_path):
    spec = conditioning.spec_of("classes", variance="learned_range")
    (tmp_path / "m.onnx").write_bytes(conditioning.onnx(spec, metadata={"ddpmx": spec.to_text()}))
    build(tmp_path / "m.onnx")
    chains = ({"sampler": "ddim", "steps": 5}, {"sampler": "ancestral"}, {"sampler": "ddim", "steps": 5})
    with ddpmx.load(tmp_path / "m.mnn") as pipeline, ddpmx.load(tmp_path / "m.onnx") as expected:
        for chain in chains:
            images = (each.generate(3, seed=1, labels=[0, 1, 2], **chain).astype(int) for each in (pipeline, expected))
            assert np.abs(next(images) - next(images)).max() <= 1


def test_guided_images_depend_on_nothing_else(tmp_path):
    """Both rows of an image are cut into the same parts, and lie at its place in them."""
    spec = conditioning.spec_of("classes", null_class=True)
    (tmp_path / "m.onnx").write_bytes(conditioning.onnx(spec, metadata={"ddpmx": spec.to_text()}))
    build(tmp_path / "m.onnx", part=2)
    labels = [i % 5 for i in range(7)]
    options = {"seed": 3, "guidance": 2.5, "steps": 8}
    with ddpmx.load(tmp_path / "m.mnn") as pipeline, ddpmx.load(tmp_path / "m.onnx") as expected:
        whole = pipeline.generate(7, labels=labels, batch=4, **options)
        for first, n in ((0, 3), (3, 4), (5, 1)):
            part = pipeline.generate(n, labels=labels[first : first + n], first=first, batch=4, **options)
            assert np.array_equal(part, whole[first : first + n]), (first, n)
        theirs = expected.generate(7, labels=labels, **options)
        assert np.abs(whole.astype(int) - theirs).max() <= 1
        assert np.abs(whole.astype(int) - expected.generate(7, labels=labels, seed=3, steps=8)).max() > 1  # the control


# --- the same bits ---------------------------------------------------------------------------------------------------


def test_parts_make_the_whole(garments, whole):
    with ddpmx.load(garments) as pipeline:
        for first, n in ((0, 1), (0, 8), (3, 1), (5, 7), (7, 2), (16, 16), (9, 20), (31, 1)):
            part = pipeline.generate(n, seed=5, first=first, **DDIM)
            assert np.array_equal(part, whole[first : first + n]), (first, n)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_the_number_of_threads_makes_no_difference(garments, whole, threads):
    with ddpmx.load(garments, threads=threads) as pipeline:
        assert np.array_equal(pipeline.generate(32, seed=5, batch=16, **DDIM), whole)
        used = min(threads, 2)  # parts in a batch of 16
        assert pipeline.backend == f"MNN {library.load().version()}, CPU, {used} thread{'s' if used > 1 else ''}"


@pytest.mark.parametrize("batch", [1, 3, 6, 16, 20])
def test_with_any_batch_an_image_depends_on_nothing_else(garments, batch):
    with ddpmx.load(garments) as pipeline:
        images = pipeline.generate(21, seed=5, batch=batch, **DDIM)
        assert np.array_equal(pipeline.generate(8, seed=5, first=13, batch=batch, **DDIM), images[13:])
        assert np.array_equal(pipeline.generate(1, seed=5, first=20, batch=batch, **DDIM), images[20:])


def test_pipelines_in_threads_give_the_same(garments, whole):
    with ddpmx.load(garments, threads=2) as pipeline, pipeline.share() as other, ThreadPoolExecutor(2) as pool:
        both = [pool.submit(each.generate, 32, seed=5, **DDIM) for each in (pipeline, other)]
        assert all(np.array_equal(each.result(), whole) for each in both)


class Placed:
    """A toy whose ε depends on the place in the part, and with ``leak`` on the neighbours."""

    largest_part = 4
    description = "placed"

    def __init__(self, leak: float = 0) -> None:
        self.part, self.leak, self.bound = 4, leak, []

    def use_part(self, part: int) -> None:
        self.part = part

    def bind(self, buffers: Buffers) -> None:
        self.buffers = buffers
        self.bound.append(len(buffers.x))

    def enqueue(self) -> None:
        for at in range(0, len(self.buffers.x), self.part):
            x, out = (array[at : at + self.part] for array in (self.buffers.x, self.buffers.out))
            out[...] = x * (0.5 + 0.1 * np.arange(len(x))[:, None, None, None]) + self.leak * x.mean()

    def close(self) -> None:
        pass


def test_an_image_has_its_place_by_its_index():
    backend = Placed()
    pipeline = Pipeline(ModelSpec((1, 4, 4), timesteps=10), backend)
    images = pipeline.generate(16, seed=1)
    assert len(np.unique(images.reshape(16, -1), axis=0)) == 16
    backend.bound.clear()
    assert np.array_equal(pipeline.generate(3, seed=1, first=6), images[6:9])
    assert backend.bound == [8], "6 and 7 at the end of their part, 8 at the beginning of the next one"
    x = np.random.default_rng(0).standard_normal((3, 1, 4, 4)).astype(np.float32)
    assert np.array_equal(
        pipeline.generate(3, seed=1, first=6, x=x)[1:], pipeline.generate(2, seed=1, first=7, x=x[1:])
    )


def test_where_neighbours_matter_each_image_runs_alone():
    backend = Placed(leak=1e-3)
    pipeline = Pipeline(ModelSpec((1, 4, 4), timesteps=10), backend)
    images = pipeline.generate(8, seed=1)
    assert backend.part == 1
    assert np.array_equal(pipeline.generate(3, seed=1, first=5), images[5:])


# --- beside other work -----------------------------------------------------------------------------------------------


def test_other_threads_run_meanwhile(garments):
    """MNN's newer interface holds Python's lock while it computes, and the older one, which is used here, does not."""
    spec, backend = ddpmx.backends.open.open_model(garments, threads=1)
    buffers = Buffers.of(64, spec.shape)
    backend.bind(buffers)
    backend.enqueue()
    ticks, stop = 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not stop.is_set():
            ticks += 1

    other = threading.Thread(target=tick)
    other.start()
    backend.enqueue()  # eight parts
    stop.set()
    other.join()
    backend.close()
    assert ticks > 1000


def test_progress_and_cancel(garments):
    seen = []
    with ddpmx.load(garments) as pipeline:
        with pytest.raises(Cancelled):
            pipeline.generate(
                16, steps=10, progress=lambda done, total: seen.append((done, total)), cancel=lambda: len(seen) >= 3
            )
        assert seen == [(1, 10), (2, 10), (3, 10)]
        assert len(pipeline.generate(2, **DDIM)) == 2


def test_standard_output_stays_clean(garments):
    """MNN's C++ prints a line when it is imported."""
    code = f"import ddpmx; print(ddpmx.load({str(garments)!r}).generate(1, steps=2).shape)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "(1, 16, 16, 1)\n"


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_damaged_file_never_reaches_mnn(garments, tmp_path, monkeypatch):
    data = bytearray(garments.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "bad.mnn").write_bytes(data)
    monkeypatch.setattr("ddpmx.backends.mnn.MnnBackend", None)
    with pytest.raises(FileFormatError, match="the network in this file is damaged"):
        ddpmx.load(tmp_path / "bad.mnn")


def test_another_network_than_described_is_refused(garments, tmp_path):
    info = read_mnn(garments)
    data = garments.read_bytes()
    network = data[: data.rindex(b"ddpmx1 ") - 4]
    for change, words in (
        ({"shape": (1, 28, 28)}, r"float32 \[batch, 1, 16, 16\], not float32 \[batch, 1, 28, 28\]"),
        ({"prediction": "v"}, r"eps: float32 .*, not nothing; v: nothing, not"),
        ({"classes": 10}, r"y: nothing, not int32 \[batch\]"),
        ({"variance": "learned_range"}, "var: nothing, not float32"),
    ):
        (tmp_path / "x.mnn").write_bytes(describe_network(network, info.spec.replace(**change), info.record))
        with pytest.raises(FileFormatError, match="not the one that its description says") as caught:
            ddpmx.load(tmp_path / "x.mnn")
        assert re.search(words, caught.value.note or ""), caught.value.note


def test_what_mnn_refuses_is_an_error(tmp_path):
    (tmp_path / "x.mnn").write_bytes(handmade())
    with pytest.raises(FileFormatError, match="refuses this file"):
        ddpmx.load(tmp_path / "x.mnn")


def test_a_file_that_changed_while_open_gives_no_more_copies(garments, tmp_path):
    path, new = tmp_path / "x.mnn", tmp_path / "new.mnn"
    path.write_bytes(garments.read_bytes())
    with ddpmx.load(path, threads=3) as pipeline:
        images = pipeline.generate(2, seed=5, **DDIM)
        new.write_bytes(garments.read_bytes())
        new.replace(path)
        with pipeline.share() as other:  # another file of the same content
            assert np.array_equal(other.generate(2, seed=5, **DDIM), images)
        info = read_mnn(path)
        network = path.read_bytes()[: path.read_bytes().rindex(b"ddpmx1 ") - 4]
        new.write_bytes(describe_network(network + bytes(4), info.spec, info.record))
        new.replace(path)
        assert np.array_equal(pipeline.generate(2, seed=5, **DDIM), images)
        for more in (pipeline.share, lambda: pipeline.generate(24, seed=5, batch=24, **DDIM)):
            with pytest.raises(FileFormatError, match="has changed since it was opened"):
                more()


def test_options_of_other_files_are_refused(garments):
    with pytest.raises(InputError, match="carries its own spec"):
        ddpmx.load(garments, spec=ModelSpec((1, 16, 16)))
    with pytest.raises(InputError, match="by MNN alone"):
        ddpmx.load(garments, providers=["cuda"])
    with pytest.raises(InputError, match="threads must be from 0"):
        ddpmx.load(garments, threads=-1)


def test_without_mnn_the_error_says_what_to_install(garments, monkeypatch):
    monkeypatch.setitem(sys.modules, "MNN", None)
    with pytest.raises(BackendError, match="MNN is not installed") as caught:
        ddpmx.load(garments)
    assert caught.value.hint == "pip install 'ddpmx[mnn]'"


def test_a_closed_backend_is_not_used(garments):
    backend = MnnBackend(garments, mnn_file.read_mnn(garments))
    backend.close()
    backend.close()
    with pytest.raises(BackendError, match="closed"):
        backend.bind(Buffers.of(1, (1, 16, 16)))
