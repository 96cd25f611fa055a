"""libddpmx against Python's runtime: the same file, seed and request, and every byte of the images is the same."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path

import numpy as np
import pytest

import ddpmx
from ddpmx.errors import InputError
from ddpmx.formats import onnx_file
from ddpmx.sampling.pixels import to_nhwc
from native import binding
from native.binding import Native, NativeError
from oracles import conditioning
from oracles.conditioning import KINDS, as_arguments, conditioning_of, spec_of
from oracles.mnn import mnn_file

pytest.importorskip("onnxruntime", reason="not verified here: that libddpmx gives Python's images (no ONNX Runtime)")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def native(native_build) -> Native:
    return Native(native_build / "libddpmx.so")


@pytest.fixture
def both(native, ort_library):
    """``both(path)``: Python's pipeline and libddpmx's."""
    opened = []

    def open_both(path: Path):
        pair = (
            ddpmx.load(path, threads=1),
            native.open(path, threads=1, ort_library=ort_library),
        )
        opened.extend(pair)
        return pair

    yield open_both
    for pipeline in opened:
        pipeline.close()


REQUESTS = {
    "usual": {},
    "seed": {"seed": 2**64 - 1},
    "part": {"first": 2**32 - 5},
    "one at a time": {"batch": 1},
    "in twos": {"batch": 2},
    "ddim": {"sampler": "ddim"},
    "ddim with noise": {"sampler": "ddim", "eta": 0.7},
    "leading": {"spacing": "leading"},
    "trailing": {"spacing": "trailing", "sampler": "ddim"},
    "quad": {"spacing": "quad"},
    "fixed small": {"variance": "fixed_small"},
    "one x0 remembered": {"sampler": "dpmpp_2m"},
    "two remembered": {"sampler": "unipc", "spacing": "logsnr"},
    "two remembered, in twos": {"sampler": "unipc", "spacing": "karras", "batch": 2},
}


@pytest.mark.parametrize("name", REQUESTS)
def test_images_are_pythons(both, gaussian_onnx, name):
    python, native = both(gaussian_onnx)
    request = {"seed": 5, "steps": 25, **REQUESTS[name]}
    wanted = python.generate(5, **request)
    got, samples = native.generate(5, **request, samples=True)
    assert got.tobytes() == wanted.tobytes()
    assert to_nhwc(samples).tobytes() == wanted.tobytes()
    assert len(np.unique(wanted)) > 20


def test_a_whole_chain_is_pythons(both, gaussian_onnx):
    python, native = both(gaussian_onnx)
    assert native.generate(2, seed=3).tobytes() == python.generate(2, seed=3).tobytes()


def test_every_split_gives_the_same_images(both, gaussian_onnx):
    python, native = both(gaussian_onnx)
    wanted = python.generate(7, seed=1, steps=9)
    for batch in (1, 2, 3, 7, 16):
        assert native.generate(7, seed=1, steps=9, batch=batch).tobytes() == wanted.tobytes()
    parts = [native.generate(n, seed=1, steps=9, first=first) for first, n in ((0, 2), (2, 4), (6, 1))]
    assert np.concatenate(parts).tobytes() == wanted.tobytes()


def test_previews_are_pythons(both, gaussian_onnx):
    python, native = both(gaussian_onnx)
    wanted = list(python.stream(3, seed=2, steps=8))
    seen = []
    native.generate(3, seed=2, steps=8, previews=True, callback=lambda p, x, x0: seen.append((p.t, x, x0)) or 0)
    assert [t for t, _, _ in seen] == [step.t for step in wanted]
    for (_, x, x0), step in zip(seen, wanted, strict=True):
        assert (x.tobytes(), x0.tobytes()) == (step.x.tobytes(), step.x0.tobytes())


def test_a_state_in_the_middle_leads_to_the_same_images(both, gaussian_onnx):
    python, native = both(gaussian_onnx)
    steps = list(python.stream(3, seed=2, steps=20))
    t, x = steps[7].t, steps[7].x
    wanted = python.generate(3, seed=2, steps=20)
    assert native.generate(3, seed=2, steps=20, x=x, start=t).tobytes() == wanted.tobytes()
    assert python.generate(3, seed=2, steps=20, x=x, start=t).tobytes() == wanted.tobytes()
    assert native.generate(3, seed=2, steps=20, x=x, start=t + 1).tobytes() == wanted.tobytes(), "the nearest"
    with pytest.raises(NativeError, match=r"(?s)INPUT: .*from 0 to 999, not 1000"):
        native.generate(3, seed=2, steps=20, x=x, start=1000)


def test_a_chain_that_starts_in_the_middle_remembers_nothing(both, gaussian_onnx):
    python, native = both(gaussian_onnx)
    how = {"steps": 9, "sampler": "unipc", "spacing": "logsnr"}
    step = list(python.stream(3, seed=2, **how))[3]
    wanted = python.generate(3, seed=2, x=step.x, start=step.t, **how)
    assert native.generate(3, seed=2, x=step.x, start=step.t, **how).tobytes() == wanted.tobytes()
    assert wanted.tobytes() != python.generate(3, seed=2, **how).tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_conditioning(kind, both, tmp_path):
    spec = spec_of(kind)
    path = tmp_path / "model.onnx"
    path.write_bytes(conditioning.onnx(spec, metadata={"ddpmx": spec.to_text()}))
    python, native = both(path)
    arrays = as_arguments(conditioning_of(spec, 4))
    assert (
        native.generate(4, seed=9, batch=3, **arrays).tobytes()
        == python.generate(4, seed=9, batch=3, **arrays).tobytes()
    )
    remembering = {"sampler": "unipc", "steps": 6, **arrays}
    assert native.generate(4, seed=9, **remembering).tobytes() == python.generate(4, seed=9, **remembering).tobytes()
    assert (native.model.classes, native.model.condition) == (spec.classes or 0, spec.condition or 0)
    if "labels" in arrays:
        one = {**arrays, "labels": [3]}
        same = python.generate(4, seed=9, **{**arrays, "labels": 3})
        assert native.generate(4, seed=9, **one).tobytes() == same.tobytes()
        with pytest.raises(NativeError, match=f"INPUT: there is no class {spec.classes}"):
            native.generate(4, **{**arrays, "labels": [0, 1, 2, spec.classes]})
    for name in arrays:
        with pytest.raises(NativeError, match=f"INPUT: missing {name}: "):
            native.generate(4, **{other: array for other, array in arrays.items() if other != name})


def test_classes_have_names(both, tmp_path):
    names = ("cats", "Möwen", "x", "y z", "v")
    path = tmp_path / "model.onnx"
    for spec, wanted in ((spec_of("classes", class_names=names), names), (spec_of("classes"), (None,) * 5)):
        path.write_bytes(conditioning.onnx(spec, metadata={"ddpmx": spec.to_text()}))
        python, native = both(path)
        assert python.spec.class_names == spec.class_names
        assert tuple(map(native.class_name, range(5))) == wanted
        assert [native.class_name(label) for label in (-1, 5, -(2**31), 2**31 - 1)] == [None] * 4


@pytest.mark.parametrize("change", [{}, {"variance": "learned_range"}, {"self_condition": True, "condition": 2}])
def test_guidance(change, both, tmp_path):
    spec = spec_of("classes", null_class=True, **change)
    path = tmp_path / "model.onnx"
    path.write_bytes(conditioning.onnx(spec, metadata={"ddpmx": spec.to_text()}))
    python, native = both(path)
    arrays = as_arguments(conditioning_of(spec, 5))
    assert native.model.null_class == 1
    seen = set()
    for w in (2.0, 1.3, -0.5, 0, 1):
        wanted = python.generate(5, seed=9, batch=3, guidance=w, **arrays)
        assert native.generate(5, seed=9, batch=3, guidance=w, **arrays).tobytes() == wanted.tobytes()
        seen.add(wanted.tobytes())
    assert len(seen) == 5
    labels = arrays.pop("labels")
    nobody = python.generate(5, seed=9, **arrays)
    assert native.generate(5, seed=9, **arrays).tobytes() == nobody.tobytes()
    assert python.generate(5, seed=9, labels=labels, guidance=0, **arrays).tobytes() == nobody.tobytes()
    for bad in ({"guidance": 2.0}, {"guidance": np.inf, "labels": labels}):
        with pytest.raises(InputError) as ours:
            python.generate(5, **arrays, **bad)
        with pytest.raises(NativeError) as theirs:
            native.generate(5, **arrays, **bad)
        assert theirs.value.text == str(ours.value)


def test_guidance_of_a_model_that_cannot_be_guided(both, gaussian_onnx):
    python, native = both(gaussian_onnx)
    with pytest.raises(InputError) as ours:
        python.generate(1, steps=2, guidance=2)
    with pytest.raises(NativeError) as theirs:
        native.generate(1, steps=2, guidance=2)
    assert theirs.value.text == str(ours.value)
    assert native.generate(1, steps=2, guidance=1).tobytes() == python.generate(1, steps=2).tobytes()


@pytest.mark.parametrize(
    ("prediction", "schedule", "clip"),
    [("x0", "cosine", 1.0), ("v", "cosine", None), ("v", "sigmoid_alpha_bar", 0.5), ("eps", "quad", 2.5)],
)
def test_predictions_schedules_and_clips(prediction, schedule, clip, both, tmp_path):
    spec = spec_of("condition", prediction=prediction, schedule=schedule, clip=clip)
    path = tmp_path / "model.onnx"
    path.write_bytes(conditioning.onnx(spec, metadata={"ddpmx": spec.to_text()}))
    python, native = both(path)
    cond = conditioning_of(spec, 3)["cond"]
    assert native.generate(3, seed=1, cond=cond).tobytes() == python.generate(3, seed=1, cond=cond).tobytes()


def test_a_learned_variance(both, tmp_path):
    spec = spec_of("classes", variance="learned_range", classes=None)
    path = tmp_path / "model.onnx"
    path.write_bytes(conditioning.onnx(spec, metadata={"ddpmx": spec.to_text()}))
    python, native = both(path)
    for request in (
        *({}, {"variance": "fixed_small"}, {"sampler": "ddim", "eta": 1.0, "steps": 7}),
        {"sampler": "unipc", "steps": 7},
    ):
        wanted = python.generate(5, seed=4, batch=2, **request)
        assert native.generate(5, seed=4, batch=2, **request).tobytes() == wanted.tobytes()


def test_free_betas(both, tmp_path):
    betas = np.linspace(1e-3, 0.3, 20) ** 1.5
    spec = spec_of("classes", schedule="betas", betas=betas, classes=None)
    path = tmp_path / "model.onnx"
    path.write_bytes(conditioning.onnx(spec, metadata=onnx_file.metadata(spec)))
    python, native = both(path)
    assert native.generate(3, seed=1).tobytes() == python.generate(3, seed=1).tobytes()


def test_an_mnn_model_is_refused_by_its_kind(native, tmp_path):
    (tmp_path / "m.mnn").write_bytes(mnn_file())
    with pytest.raises(NativeError, match=r"FILE_FORMAT: .*an MNN model, which libddpmx does not run"):
        native.open(tmp_path / "m.mnn")


def test_a_spec_beside_the_file(native, ort_library, tmp_path):
    spec = spec_of("classes", classes=None)
    path = tmp_path / "model.onnx"
    path.write_bytes(conditioning.onnx(spec, metadata={}))
    with pytest.raises(NativeError, match=r"SPEC: .*does not say which diffusion model it is"):
        native.open(path, ort_library=ort_library)
    text = json.dumps(spec.to_json())
    with (
        native.open(path, ort_library=ort_library, spec=text, threads=1) as ours,
        ddpmx.load(path, spec=spec, threads=1) as python,
    ):
        assert ours.generate(2, seed=1).tobytes() == python.generate(2, seed=1).tobytes()


def test_a_file_is_onnx_whatever_its_name(both, gaussian_onnx, tmp_path):
    """By its name ONNX Runtime would take it for a format of its own, which has not been checked."""
    path = tmp_path / "model.ort"
    path.write_bytes(gaussian_onnx.read_bytes())
    python, native = both(path)
    assert native.generate(2, steps=5).tobytes() == python.generate(2, steps=5).tobytes()


def test_a_large_condition_counts(both, tmp_path):
    """If the condition is larger than the image, its size limits the batch."""
    spec = spec_of("classes", (1, 64, 64), classes=None, condition=4096)
    path = tmp_path / "model.onnx"
    path.write_bytes(conditioning.onnx(spec, metadata={"ddpmx": spec.to_text()}))
    python, native = both(path)
    assert native.model.default_batch == python.default_batch == 1
    with pytest.raises(InputError, match="3 images of 64×64 at once do not fit"):
        python.check_request(3, batch=3)
    with pytest.raises(NativeError, match="INPUT: 3 images of 64×64 at once do not fit"):
        native.generate(3, batch=3, cond=np.zeros((3, 4096, 64, 64), np.float32))


def test_threads_of_a_real_onnxruntime(native, ort_library, gaussian_onnx):
    with native.open(gaussian_onnx, ort_library=ort_library, threads=1) as pipeline:
        wanted = [pipeline.generate(3, seed=seed, steps=20).tobytes() for seed in range(4)]
        got: dict[int, bytes] = {}

        def draw(seed: int) -> None:
            got[seed] = pipeline.generate(3, seed=seed, steps=20).tobytes()

        threads = [threading.Thread(target=draw, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [got[seed] for seed in range(4)] == wanted


@pytest.mark.torch
def test_a_trained_network_is_pythons(both, trained):
    """Convolutions, norms and attention, in fp32 and fp16, with ONNX Runtime's own choice of threads."""
    for path in (trained.fp32, trained.fp16):
        python, native = both(path)
        request = {"seed": 6, "steps": 12, "batch": 3}
        assert native.generate(4, **request).tobytes() == python.generate(4, **request).tobytes()


def test_the_binding_is_the_header(native_build):
    """The offsets of ctypes against those of the C compiler in test_c_header.c."""
    header = (Path(__file__).parents[2] / "runtime" / "native" / "tests" / "test_c_header.c").read_text()
    for name, structure in (
        ("ddpmx_open_options", binding.OpenOptions),
        ("ddpmx_model", binding.Model),
        ("ddpmx_progress", binding.Progress),
        ("ddpmx_request", binding.Request),
    ):
        pinned = {field: int(at) for field, at in re.findall(rf"AT\({name}, (\w+), (\d+)\)", header)}
        pinned["sizeof"] = int(re.findall(rf"sizeof\({name}\) == (\d+)", header)[0])
        mine = binding.fields(structure)
        assert pinned == {field: mine[field] for field in pinned}
        assert len(pinned) >= len(mine) - 3
