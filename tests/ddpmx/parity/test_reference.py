"""The record of PyTorch's outputs: it loads as it was saved, and nothing else is accepted as one."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddpmx.diffusion.noise import Purpose, normal
from ddpmx.errors import DdpmxError, FileFormatError, OutputError, SpecError
from ddpmx.formats.spec import ModelSpec
from ddpmx.parity.ladder import run_ladder
from ddpmx.parity.reference import Reference, diffuse, diffusion_noise, elements, recorded_steps
from oracles.parity import ALPHA_BAR, FORCED, PIXEL, SEED, SHAPE, SIZE, SPEC, STEPS, T, failed, make_reference
from oracles.toy_backend import ToyBackend


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.fixture(scope="module")
def reference() -> Reference:
    return make_reference()


# --- the record as a file --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(reference, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("record") / "model.parity.npz"
    reference.save(path)
    return path


def test_a_record_comes_back_as_it_was(reference, saved):
    again = Reference.load(saved)
    for field in dataclasses.fields(Reference):
        before, after = getattr(reference, field.name), getattr(again, field.name)
        if isinstance(before, np.ndarray):
            assert before.dtype == after.dtype
            assert np.array_equal(before, after), field.name
        else:
            assert before == after
            assert type(before) is type(after)
    assert again.scale == reference.scale
    # as text: some values are NaN, and Python 3.13's data classes are unequal then
    assert repr(run_ladder(ToyBackend(), SPEC, again).checks) == repr(run_ladder(ToyBackend(), SPEC, reference).checks)


def test_saving_is_all_or_nothing(reference, tmp_path, monkeypatch):
    path = tmp_path / "model.parity.npz"
    path.write_text("yesterday")
    monkeypatch.setattr(os, "fsync", raising(OSError(28, "No space left on device")))
    with pytest.raises(OutputError):
        reference.save(path)
    assert path.read_text() == "yesterday"
    assert [p.name for p in tmp_path.iterdir()] == ["model.parity.npz"]


Parts = tuple[dict[str, np.ndarray], dict[str, Any]]


def tampered(saved: Path, path: Path, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> Path:
    """A record whose arrays and whose JSON ``change`` has edited."""
    with np.load(saved) as archive:
        arrays = {name: archive[name].copy() for name in archive.files}
    about = json.loads(arrays.pop("about").tobytes())
    change(arrays, about)
    np.savez(path, about=np.frombuffer(json.dumps(about).encode(), np.uint8), **arrays)
    return path


def refused(path: Path) -> DdpmxError:
    with pytest.raises((FileFormatError, SpecError)) as caught:
        Reference.load(path)
    assert str(path) in caught.value.fact
    return caught.value


def test_an_unchanged_record_is_accepted(saved, tmp_path):
    """The control: the refusals below are due to the change."""
    Reference.load(tampered(saved, tmp_path / "same.npz", lambda arrays, about: None))


ARRAYS = ["t", "x0", "out", "at", "state", "state_out", "final"]
JSON_FIELDS = ["format", "spec", "made_with", "seed", "real", "loss", "steps"]


@pytest.mark.parametrize("name", ARRAYS)
def test_a_missing_array_is_refused(saved, tmp_path, name):
    refused(tampered(saved, tmp_path / "x.npz", lambda arrays, about: arrays.pop(name)))


@pytest.mark.parametrize("name", JSON_FIELDS)
def test_a_missing_json_field_is_refused(saved, tmp_path, name):
    refused(tampered(saved, tmp_path / "x.npz", lambda arrays, about: about.pop(name)))


def set_to(**values: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    """Changes JSON fields."""
    return lambda arrays, about: about.update(values)


def array(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def apply(arrays, about):
        arrays[name] = change(arrays[name])

    return apply


def with_value(value: float, index: tuple[int, ...] | int = 0) -> Callable[[np.ndarray], np.ndarray]:
    def change(values):
        values[index] = value
        return values

    return change


TAMPERINGS: dict[str, Callable[[dict[str, Any], dict[str, Any]], Any]] = {
    "an array too many": lambda arrays, about: arrays.update(more=np.zeros(3)),
    "a JSON field too many": set_to(more=1),
    "another format": set_to(format="ddpmx-parity2"),
    "a format that is a number": set_to(format=1),
    "no spec": set_to(spec=None),
    "a spec without a shape": set_to(spec={}),
    "a damaged spec": lambda arrays, about: about["spec"].update(coefficients="00000000"),
    "a spec of another shape": lambda arrays, about: about["spec"].update(shape=[3, 8, 4]),
    "float64 outputs": array("out", lambda a: a.astype(np.float64)),
    "half outputs": array("state_out", lambda a: a.astype(np.float16)),
    "outputs of the other byte order": array("out", lambda a: a.astype(">f4")),
    "int64 t": array("t", lambda a: a.astype(np.int64)),
    "float t": array("t", lambda a: a.astype(np.float32)),
    "int32 at": array("at", lambda a: a.astype(np.int32)),
    "float images": array("x0", lambda a: a.astype(np.float32)),
    "signed images": array("final", lambda a: a.astype(np.int8)),
    "an output too short": array("out", lambda a: a[:, :, :-1]),
    "an image too few": array("x0", lambda a: a[:1]),
    "a t too many": array("t", lambda a: np.append(a, a[-1:])),
    "a state too few": array("state", lambda a: a[:-1]),
    "transposed states": array("state", lambda a: a.transpose(0, 2, 3, 1)),
    "no final image": array("final", lambda a: a[:0]),
    "final images of another size": array("final", lambda a: a[:, :, :4]),
    "no timesteps": lambda arrays, about: arrays.update(t=arrays["t"][:0], out=arrays["out"][:0]),
    "NaN in the outputs": array("out", with_value(np.nan, (3, 1, 100))),
    "an infinity in a state": array("state", with_value(np.inf, (3, 1, 2, 2))),
    "NaN in a state's output": array("state_out", with_value(-np.nan, (3, 1))),
    "t below 0": array("t", with_value(-1)),
    "t = T": array("t", with_value(T, -1)),
    "at below 0": array("at", with_value(-1)),
    "at beyond the chain": array("at", with_value(STEPS, -1)),
    "at twice the same": array("at", with_value(0, 1)),
    "at falling": array("at", lambda a: a[::-1]),
    "no step": set_to(steps=0),
    "more steps than T": set_to(steps=T + 1),
    "fewer steps than recorded": set_to(steps=STEPS - 1),
    "steps that are no whole number": set_to(steps=50.0),
    "steps that are a yes": set_to(steps=True),
    "steps in words": set_to(steps="50"),
    "a negative seed": set_to(seed=-1),
    "a seed of 65 bits": set_to(seed=2**64),
    "a fractional seed": set_to(seed=1.5),
    "a loss that is no number": set_to(loss=math.nan),
    "an infinite loss": set_to(loss=math.inf),
    "no loss": set_to(loss=None),
    "real as a number": set_to(real=1),
    "made with a number": set_to(made_with=5),
    "no JSON field at all": lambda arrays, about: about.clear(),
    "no images at all, as numbers": array("x0", lambda a: a[0, 0, 0, 0:1]),
}
CRASHES: dict[str, Callable[[dict[str, Any], dict[str, Any]], Any]] = {
    "t without a dimension": array("t", lambda a: a[0]),
    "at without a dimension": array("at", lambda a: a[0]),
    "x0 without a dimension": array("x0", lambda a: a[0, 0, 0, 0]),
    "final without a dimension": array("final", lambda a: a[0, 0, 0, 0]),
    "an array as a JSON field": lambda arrays, about: about.update(t=arrays.pop("t").tolist()),
    "a JSON field as an array": lambda arrays, about: arrays.update(spec=np.zeros(SHAPE)),
}


@pytest.mark.parametrize("what", TAMPERINGS)
def test_a_record_that_was_tampered_with_is_refused(saved, tmp_path, what):
    refused(tampered(saved, tmp_path / "x.npz", TAMPERINGS[what]))


@pytest.mark.parametrize("what", CRASHES)
def test_a_record_with_parts_of_another_kind_is_refused(saved, tmp_path, what):
    refused(tampered(saved, tmp_path / "x.npz", CRASHES[what]))


def test_foreign_archives_are_refused_by_their_content(tmp_path):
    path = tmp_path / "images.npz"
    np.savez(path, images=np.zeros((2, 8, 8, 3), np.uint8))
    assert "images" in refused(path).note
    np.savez(path)
    refused(path)
    np.savez(path, about=np.zeros(3))
    refused(path)
    for text in (b"[]", b"null", b"{", b"\xff\xfe", b"[" * 100_000, b"{}"):
        np.savez(path, about=np.frombuffer(text, np.uint8))
        refused(path)


def test_objects_are_not_unpickled(saved, tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "trodden",)

    path = tmp_path / "x.npz"
    with np.load(saved) as archive:
        arrays = {name: archive[name] for name in archive.files}
    np.savez(path, **{**arrays, "t": np.array([Trap()], dtype=object)})
    refused(path)
    assert not (tmp_path / "trodden").exists()


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.6, 0.9, 0.99, 0.9999])
def test_a_truncated_record_is_refused(saved, tmp_path, share):
    data = saved.read_bytes()
    path = tmp_path / "x.npz"
    path.write_bytes(data[: int(len(data) * share)])
    refused(path)


def test_a_changed_byte_is_noticed_or_changes_nothing(reference, saved, tmp_path):
    data, path = saved.read_bytes(), tmp_path / "x.npz"
    noticed = 0
    for at in np.random.default_rng(0).integers(0, len(data), 100).tolist():
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        try:
            again = Reference.load(path)
        except (FileFormatError, SpecError):
            noticed += 1
        else:
            assert np.array_equal(again.out, reference.out)
            assert np.array_equal(again.state, reference.state)
    assert noticed > 90


def test_a_file_that_is_no_archive_is_refused(tmp_path):
    refused(tmp_path / "missing.npz")
    refused(tmp_path)
    (tmp_path / "text.npz").write_text("<html>")
    refused(tmp_path / "text.npz")


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path):
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        stream = io.BytesIO()
        np.save(stream, np.zeros(70 << 20, np.uint8))
        archive.writestr("about.npy", stream.getvalue())
    assert "MiB" in refused(path).fact


@pytest.mark.parametrize(
    ("shape", "images", "chains", "steps"),
    [((3, 32, 32), 2, 4, 50), ((3, 256, 256), 1, 1, 20), ((3, 32, 32), 2, 4, 1000), ((3, 256, 256), 1, 1, 1000)],
)
def test_a_record_takes_at_most_4_mb(tmp_path, figure, shape, images, chains, steps):
    """Of random numbers, which do not compress."""
    random, kept, at = np.random.default_rng(0), len(elements(shape)), recorded_steps(steps, shape)
    record = Reference(
        spec=ModelSpec(shape),
        made_with="torch",
        seed=0,
        real=False,
        loss=0.1,
        t=np.round(np.linspace(0, 999, 32)).astype(np.int32),
        x0=random.integers(0, 256, (images, *shape), np.uint8),
        out=random.standard_normal((32, images, kept), np.float32),
        steps=steps,
        at=at,
        state=random.standard_normal((len(at), *shape), np.float32),
        state_out=random.standard_normal((len(at), kept), np.float32),
        final=random.integers(0, 256, (chains, *shape), np.uint8),
    )
    record.save(tmp_path / "x.npz")
    size = (tmp_path / "x.npz").stat().st_size
    figure(f"MB of a record of {shape}, a chain of {steps} steps", size / 1e6, at_most=4)
    Reference.load(tmp_path / "x.npz")


# --- which elements, and from which inputs ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1, 1), SHAPE, (1, 16, 16), (3, 32, 32), (1, 64, 64)])
def test_of_small_images_all_elements_are_stored(shape):
    assert np.array_equal(elements(shape), np.arange(math.prod(shape)))


@pytest.mark.parametrize(
    "shape", [(3, 64, 64), (3, 256, 256), (1, 512, 512), (4, 33, 47), (3, 128, 96), (1, 65, 65), (3, 1024, 1024)]
)
def test_of_large_images_4096_elements_from_everywhere_are_stored(shape):
    kept = elements(shape)
    assert len(kept) == len(set(kept.tolist())) == 4096
    assert kept.min() >= 0
    assert kept.max() < math.prod(shape)
    assert np.all(np.diff(kept) > 0)
    c, y, x = np.unravel_index(kept, shape)
    rows, columns = np.array_split(np.arange(shape[1]), 2), np.array_split(np.arange(shape[2]), 2)
    for channel in range(shape[0]):
        assert np.mean(c == channel) == pytest.approx(1 / shape[0], rel=0.1)
        for part_y in rows:
            for part_x in columns:
                share = np.mean((c == channel) & np.isin(y, part_y) & np.isin(x, part_x))
                wanted = len(part_y) * len(part_x) / math.prod(shape)
                assert share == pytest.approx(wanted, rel=0.25)
    for phase in range(2):
        assert np.mean(x % 2 == phase) == pytest.approx(0.5, abs=0.1), "even and odd columns alike"
        assert np.mean(y % 2 == phase) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("steps", [1, 2, 3, 20, 32, 50, 1000])
@pytest.mark.parametrize("shape", [SHAPE, (3, 32, 32), (3, 256, 256)])
def test_states_are_recorded_from_the_first_step_to_the_last(steps, shape):
    at = recorded_steps(steps, shape)
    assert at.dtype == np.int64
    assert np.all(np.diff(at) > 0)
    assert at[-1] == steps - 1
    assert steps == 1 or at[0] == 0
    assert len(at) <= min(steps, 32)
    assert len(at) == min(steps, 2 if shape == (3, 256, 256) else 32)


@pytest.mark.parametrize("t", [0, 1, 17, 500, 998, 999])
def test_diffused_images_are_those_of_equation_4(t):
    x0 = np.random.default_rng(2).uniform(-1, 1, (3, *SHAPE)).astype(np.float32)
    z = normal(SEED, range(3), t, Purpose.DIFFUSE, SIZE).reshape(x0.shape)
    assert np.array_equal(diffusion_noise(x0, t, SEED), z)
    wanted = np.sqrt(ALPHA_BAR[t]) * x0.astype(np.float64) + np.sqrt(1 - ALPHA_BAR[t]) * z.astype(np.float64)
    found = diffuse(SPEC.make_schedule(), x0, t, SEED)
    assert found.dtype == np.float32
    assert np.abs(found - wanted).max() < 1e-6


@pytest.mark.parametrize("t", [0, 300, 999])
def test_diffused_images_have_the_mean_and_the_variance_of_q(t):
    x0 = np.full((1, 3, 128, 128), 0.5, np.float32)
    x = diffuse(SPEC.make_schedule(), x0, t, 3).astype(np.float64)
    variance, n = 1 - ALPHA_BAR[t], x.size
    assert abs(x.mean() - 0.5 * np.sqrt(ALPHA_BAR[t])) < 4 * np.sqrt(variance / n)
    assert abs(x.var() / variance - 1) < 4 * np.sqrt(2 / n)


def test_the_inputs_differ_from_image_to_image_and_from_t_to_t(reference):
    noises = [diffusion_noise(np.zeros((2, *SHAPE), np.float32), t, SEED) for t in (0, 1)]
    flat = np.concatenate([noise.reshape(2, -1) for noise in noises])
    assert np.abs(np.corrcoef(flat) - np.eye(4)).max() < 0.3
    again = dataclasses.replace(reference, seed=8)
    assert not np.allclose(again.inputs(10), reference.inputs(10))


def test_another_process_makes_the_same_inputs(reference, saved):
    program = (
        "import hashlib, sys; from ddpmx.parity.reference import Reference; r = Reference.load(sys.argv[1]);"
        "print(hashlib.sha256(b''.join(r.inputs(k).tobytes() for k in range(len(r.t)))).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", program, str(saved)], capture_output=True, text=True, check=True)
    mine = hashlib.sha256(b"".join(reference.inputs(k).tobytes() for k in range(len(reference.t)))).hexdigest()
    assert done.stdout.strip() == mine


def test_of_a_large_image_the_stored_elements_are_compared(reference):
    """3×40×40 is more than 4096: the 4096 stored elements are compared in order."""
    shape = (3, 40, 40)
    spec, kept = ModelSpec(shape), elements(shape)
    assert len(kept) == 4096 < math.prod(shape)

    class Linear:
        description = "x times its place"
        weights = np.linspace(0.5, 1.5, math.prod(shape), dtype=np.float32).reshape(shape)

        def bind(self, buffers):
            self.buffers = buffers

        def enqueue(self):
            self.buffers.out[...] = self.buffers.x * self.weights

    t = np.array([0, 500, 999], np.int32)
    x0 = np.random.default_rng(0).integers(0, 256, (2, *shape), np.uint8)
    states = np.random.default_rng(1).standard_normal((2, *shape), np.float32)
    inputs = np.stack([diffuse(spec.make_schedule(), x0 / np.float32(127.5) - 1, int(i), 0) for i in t])
    record = Reference(
        spec=spec, made_with="by hand", seed=0, real=True, loss=0.9, t=t, x0=x0,
        out=(inputs * Linear.weights).reshape(3, 2, -1)[:, :, kept], steps=5, at=np.array([0, 4]), state=states,
        state_out=(states * Linear.weights).reshape(2, -1)[:, kept], final=x0[:1],
    )  # fmt: skip
    assert run_ladder(Linear(), spec, record).passed
    wrong = Linear()
    wrong.weights = Linear.weights.copy()
    wrong.weights.reshape(-1)[kept[2000]] += 0.5
    assert {PIXEL, FORCED} <= set(failed(run_ladder(wrong, spec, record)))


@pytest.mark.parametrize(
    "changes",
    [
        {"final": np.zeros((17, *SHAPE), np.uint8)},
        {"x0": np.zeros((17, *SHAPE), np.uint8), "out": np.zeros((32, 17, SIZE), np.float32)},
        {"made_with": "torch\n# PASSED"},
        {"made_with": "\x1b[2J"},
        {"made_with": "x" * 201},
    ],
)
def test_a_record_with_too_many_images_or_a_forged_line_is_refused(changes):
    """200,000 black images take 170 KB in an archive, but would exhaust the memory in a network."""
    with pytest.raises(FileFormatError):
        make_reference(**changes)
