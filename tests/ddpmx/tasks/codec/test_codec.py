"""Compressed images, on Gaussian data, where the best ε is known."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from ddpmx import ModelSpec, Pipeline
from ddpmx.errors import Cancelled, FileFormatError, InputError, NumericError
from ddpmx.formats import compressed
from ddpmx.tasks.codec import compress, decompress, residual
from ddpmx.tasks.codec.range_coder import Reader, Writer
from oracles.correlated import Correlated, smooth

SHAPE = (1, 8, 8)
SPEC = ModelSpec(SHAPE, timesteps=400, clip=None, variance="fixed_small", weights="ab" * 32)
MEAN, COVARIANCE = np.linspace(-0.3, 0.3, 64).reshape(SHAPE), smooth(SHAPE)
QUICK = {"book": 11, "steps": 12}


class Elsewhere(Correlated):
    """The network on another machine: its last digits are others."""

    relative = 1e-6

    def enqueue(self):
        super().enqueue()
        out = self.buffers.out
        out *= 1 + self.relative * np.random.default_rng(self.calls).uniform(-1, 1, out.shape).astype(np.float32)


def model(spec=SPEC, kind=Correlated, **more):
    return Pipeline(spec, kind(spec, MEAN, COVARIANCE, **more))


def photos(n, seed=0):
    """uint8 [n, 8, 8, 1], of the model's distribution."""
    values, vectors = np.linalg.eigh(COVARIANCE)
    z = np.random.default_rng(seed).standard_normal((n, 64)) * np.sqrt(np.maximum(values, 0))
    x = MEAN + (z @ vectors.T).reshape(n, *SHAPE)
    return np.clip(127.5 * x + 128, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def rms(a, b):
    return float(np.sqrt(np.square(a.astype(float) - b.astype(float)).mean()))


@pytest.fixture(scope="module")
def done():
    images = photos(6)
    with model() as pipeline:
        return images, compress(pipeline, images, rate=2.5, seed=5, **QUICK)


def test_decoded_is_what_the_coder_says(done):
    images, got = done
    assert got.data[:8] == compressed.MAGIC
    with model() as pipeline:
        back = decompress(pipeline, got.data)
    assert np.array_equal(back.pixels, got.pixels)
    assert back.complete
    assert (back.steps, back.t) == (len(got.sent), got.header.times[0])
    assert rms(images, got.pixels) == pytest.approx(got.sent[-1].rmse, abs=0.3)
    assert back.rmse == pytest.approx(got.sent[-1].rmse, rel=0.25)
    assert rms(images, got.pixels) < 0.35 * rms(images, np.full_like(images, 128))


def test_states_cost_what_the_bound_says(done, figure):
    """The divergences add up to what equation 5 says of them, and the file holds little more."""
    _, got = done
    beyond, chunks = 0.0, 0
    with model() as pipeline:  # that of one set of images is chance, ±4
        for each in (got, *(compress(pipeline, photos(6, seed), rate=2.5, seed=5, **QUICK) for seed in range(1, 5))):
            bound, spent = (sum(getattr(sent, name) for sent in each.sent) for name in ("bits", "spent"))
            assert spent >= bound
            beyond += spent - bound * (1 + 3.4 / QUICK["book"])
            chunks += sum(sent.chunks for sent in each.sent)
    figure("bits of a chunk beyond its divergence, and what its books cost", beyond / chunks, at_most=6)
    spent = sum(sent.spent for sent in got.sent)
    sections = compressed.parse(got.data).sections
    coded = 8 * sum(len(section.data) - compressed.CHECK_BYTES for section in sections)
    assert spent - 16 * len(sections) < coded < 1.01 * spent + 16 * len(sections)


@pytest.mark.parametrize("batch", [1, 4])
def test_the_batch_makes_no_difference(done, batch):
    images, got = done
    with model() as pipeline:
        again = compress(pipeline, images, rate=2.5, seed=5, batch=batch, **QUICK)
        assert again.data == got.data
        assert np.array_equal(decompress(pipeline, got.data, batch=batch).pixels, got.pixels)
    with model(sways="size") as pipeline:  # a network whose output depends on the batch runs at one size
        other = compress(pipeline, images, rate=2.5, seed=5, batch=batch, **QUICK)
        assert np.array_equal(decompress(pipeline, other.data, batch=batch).pixels, other.pixels)


def test_another_machine_decodes_the_same_images(done, figure):
    _, got = done
    with model(kind=Elsewhere) as pipeline:
        back = decompress(pipeline, got.data)
    figure("levels that differ", float((back.pixels != got.pixels).mean()), at_most=1e-3)


def test_large_chunks_are_for_many_images():
    """Chunks that are large cost little beside; few images need small ones, or they would have too few states."""
    plans = []
    for n in (1, 64):
        with model() as pipeline:
            got = compress(pipeline, photos(n), stop=8, book=8, steps=12)
        plans.append(got.header)
    few, many = plans
    assert few.chunk < many.chunk
    assert len(few.times) > 3
    assert many.group > 1


def test_every_beginning_of_a_file_is_an_image(monkeypatch, figure):
    from ddpmx.tasks.codec import encode

    monkeypatch.setattr(encode, "_SECTION_BYTES", 12)
    images, errors, ends = photos(6), [], []
    with model() as pipeline:
        got = compress(pipeline, images, rate=2.5, seed=5, **QUICK)
        file = compressed.parse(got.data)
        assert len(file.sections) > 4
        begin = len(compressed.write_header(got.header))
        for cut in (0, 7, 8, 15, begin - 1):
            with pytest.raises(FileFormatError, match=r"within its header|not compressed"):
                compressed.parse(got.data[:cut])
        for cut in range(begin, len(got.data)):
            beginning = compressed.parse(got.data[:cut])
            assert not beginning.complete
            if beginning.sections and (not ends or ends[-1] != len(beginning.sections)):
                ends.append(len(beginning.sections))
                back = decompress(pipeline, beginning)
                assert not back.complete
                assert back.steps == sum(each.steps for each in beginning.sections)
                sent = got.sent[back.steps - 1]
                assert (back.t, rms(images, back.pixels)) == (sent.t, pytest.approx(sent.rmse, abs=0.3))
                assert back.rmse == pytest.approx(sent.rmse, rel=0.35)
                errors.append(sent.rmse)
                same = decompress(pipeline, got.data, stop=back.t)
                assert np.array_equal(same.x, back.x)
                assert np.array_equal(same.pixels, back.pixels)
    assert ends == list(range(1, len(file.sections)))
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("how", [{"rmse": 12.0}, {"stop": 40}, {}])
def test_what_decides_where_to_stop(how):
    images = photos(4)
    with model() as pipeline:
        got = compress(pipeline, images, **how, **QUICK)
    if "stop" in how:
        assert got.header.times[0] == 40
    elif how:
        assert got.sent[-1].rmse == pytest.approx(12, rel=0.25)
    else:
        assert sum(each.spent for each in got.sent) / images.size == pytest.approx(1, rel=0.4)


def test_lossless(figure):
    images = photos(6)
    images[0] = np.random.default_rng(1).integers(0, 256, images[0].shape)  # nothing that the model expects
    with model() as pipeline:
        got = compress(pipeline, images, lossless=True, **QUICK)
        assert np.array_equal(got.pixels, images)
        back = decompress(pipeline, got.data)
        assert np.array_equal(back.pixels, images)
        assert (back.rmse, back.complete) == (0, True)
        coarse = decompress(pipeline, got.data[: len(got.data) - 20])
        assert not coarse.complete
        assert coarse.rmse > 0
        assert rms(coarse.pixels, images) == pytest.approx(got.sent[-1].rmse, abs=0.3)
    with model(kind=Elsewhere) as pipeline:
        assert np.array_equal(decompress(pipeline, got.data).pixels, images)


@pytest.mark.parametrize("far", [0, 255])
def test_what_is_left_may_be_anything(far):
    levels = np.full((2, 1, 8, 8), far, np.uint8)
    levels[1] = np.random.default_rng(0).integers(0, 256, levels[1].shape)
    estimate = np.full(levels.shape, 1 if far == 0 else -1, np.float32)
    writer = Writer()
    residual.write(writer, levels, estimate)
    assert np.array_equal(residual.read(Reader(writer.finish()), estimate), levels)


def test_lossless_costs_about_the_entropy(figure):
    """Levels of a known Gaussian: what no code can beat, and no two-part one by chance."""
    images = photos(24, seed=3)
    values = np.linalg.eigvalsh(COVARIANCE)
    bits = 0.5 * np.log2(2 * np.pi * np.e * values * 127.5**2)
    least = float(np.maximum(bits, 0).sum()) / 64  # of smooth images most directions are below a level
    with model() as pipeline:
        got = compress(pipeline, images, lossless=True, book=12, steps=24)
    figure("bits/dim by the entropy", got.bits_per_dim / least, at_most=2.2)
    assert got.bits_per_dim > 0.9 * least


def test_another_network_is_noticed(done):
    images, got = done
    with model(SPEC.replace(weights="cd" * 32)) as pipeline, pytest.raises(InputError, match="another model"):
        decompress(pipeline, got.data)
    with (
        model(SPEC.replace(schedule="cosine", schedule_params={})) as pipeline,
        pytest.raises(InputError, match="chain is not"),
    ):
        decompress(pipeline, got.data)

    class Wrong(Elsewhere):
        relative = 3.0

    for relative, noticed in ((0.3, True), (1e-5, False)):  # levels that are off by ten, and hardly any
        Wrong.relative = relative
        with model(kind=Wrong) as pipeline:
            if noticed:
                with pytest.raises(NumericError, match="levels apart"):
                    decompress(pipeline, got.data)
            else:
                decompress(pipeline, got.data)
    Wrong.relative = 3.0
    with model(kind=Wrong) as pipeline, pytest.raises(NumericError, match="does not compute what it did"):
        decompress(pipeline, got.data)

    class Rough(Elsewhere):
        relative = 0.05

    with model() as pipeline:
        exact = compress(pipeline, images, lossless=True, **QUICK)
    with model(kind=Rough) as pipeline, pytest.raises((NumericError, FileFormatError)):
        decompress(pipeline, exact.data)


def test_hashes_are_shown_so_that_they_differ(done):
    _, got = done
    for model_hash, shown in (
        ("cd" * 32, "abababababab…, those of the model here cdcdcdcdcdcd…"),
        ("ab" * 10 + "cd" * 22, "abababababababababababab…, those of the model here ababababababababababcdcd…"),
        ("ab" * 15 + "ac" * 17, "ab" * 16 + "…, those of the model here " + "ab" * 15 + "ac…"),
    ):
        with model(SPEC.replace(weights=model_hash)) as pipeline, pytest.raises(InputError) as caught:
            decompress(pipeline, compressed.parse(got.data, "x.ddpm"))
        assert caught.value.fact == "x.ddpm: compressed by another model"
        assert caught.value.note == f"its weights have the sha256 {shown}"
    with model() as pipeline:  # as others write hashes
        assert np.array_equal(decompress(pipeline, got.data, model=SPEC.weights.upper()).pixels, got.pixels)


def test_another_size_is_not_another_chain(done):
    _, got = done
    file = compressed.parse(got.data)
    other = replace(file, header=replace(file.header, shape=(1, 4, 16)))
    with model() as pipeline, pytest.raises(InputError, match="its images are 4×16×1, not 8×8×1"):
        decompress(pipeline, other)


def test_the_precision_of_the_weights_is_the_same_or_the_file_is_refused(done):
    """fp32 and fp16 files of one model have the same hash, and decode to nearly the same images."""
    _, got = done
    assert (got.header.precision, got.header.arithmetic) == ("fp32", "fp32")
    with (
        model(SPEC.replace(precision="fp16")) as pipeline,
        pytest.raises(InputError, match="compressed by the fp32 file of this model, not by its fp16 file"),
    ):
        decompress(pipeline, got.data)


@pytest.mark.parametrize(("precision", "word"), [("fp16", "half precision"), ("bf16", "bfloat16")])
def test_what_a_plan_has_computed_in_half_is_not_decoded_in_float32(precision, word):
    spec = SPEC.replace(precision=precision)
    with model(spec) as plan, model(spec) as wide:
        wide.arithmetic = "fp32"  # as of an ONNX file
        data = {}
        for pipeline in (plan, wide):
            got = compress(pipeline, photos(1), stop=60, **QUICK)
            assert (got.header.precision, got.header.arithmetic) == (precision, pipeline.arithmetic)
            assert np.array_equal(decompress(pipeline, got.data).pixels, got.pixels)
            data[pipeline] = got.data
        with pytest.raises(InputError, match=f"compressed in {word}, and the model here computes in float32"):
            decompress(wide, data[plan])
        with pytest.raises(InputError, match=f"compressed in float32, and the model here computes in {word}"):
            decompress(plan, data[wide])


def test_other_formats_are_refused(done, tmp_path):
    _, got = done
    file = tmp_path / "x.ddpm"
    for digit, message in ((1, "format 1, and this ddpmx reads format 2"), (3, "format 3, and this ddpmx reads")):
        file.write_bytes(got.data.replace(b"C2\n", b"C%d\n" % digit, 1))
        assert compressed.is_compressed(file)
        with pytest.raises(FileFormatError, match=message) as caught:
            compressed.read_compressed(file)
        assert str(file) in caught.value.fact
    assert compressed.MAGIC == b"DDPMXC2\n"
    for begin in (b"DDPMXC\n\n", b"DDPMXC22", b"DDPMXCx\n", b"DDPMXC"):
        file.write_bytes(begin)
        assert not compressed.is_compressed(file)
    for change, message in (
        ({"precision": "bf16", "arithmetic": "fp16"}, "a file in bf16 that was computed in fp16"),
        ({"arithmetic": "fp16"}, "a file in fp32 that was computed in fp16"),
    ):
        with pytest.raises(FileFormatError) as caught:
            compressed.parse(compressed.write_header(replace(got.header, **change)))
        assert caught.value.note == message


def test_damage_is_noticed(done):
    _, got = done
    rng = np.random.default_rng(0)
    for _ in range(60):
        data = bytearray(got.data)
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        try:
            assert not compressed.parse(bytes(data)).complete  # a length that is larger: cut short
        except FileFormatError:
            continue


def test_models_of_all_kinds():
    """Classes, and x̂_0 of the step before."""
    images = photos(3)
    for change in ({"classes": 4, "null_class": True}, {"self_condition": True}):
        with model(SPEC.replace(**change)) as pipeline:
            labels = [1, 3, 0] if "classes" in change else None
            got = compress(pipeline, images, stop=60, labels=labels, **QUICK)
            assert got.header.labels == (tuple(labels) if labels else ())
            assert np.array_equal(decompress(pipeline, got.data).pixels, got.pixels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": photos(1)[:, :7]}, r"images must be uint8 \[n, 8, 8, 1\]"),
        ({"images": photos(1).astype(float)}, "images must be uint8"),
        ({"rate": 0}, "rate must be a finite number above 0, not 0.0"),
        ({"rmse": math.inf}, "rmse must be a finite number above 0, not inf"),
        ({"rmse": np.float64("nan")}, "rmse must be a finite number above 0, not nan"),
        ({"model": "ab" * 31}, "model must be a sha256 of 64 hexadecimal digits"),
        ({"model": "xy" * 32}, "model must be a sha256 of 64 hexadecimal digits"),
        ({"rate": 1, "stop": 3}, "exclude each other"),
        ({"rate": 1e-6}, "too little for anything"),
        ({"rmse": 1e-3}, "less than the model reaches"),
        ({"stop": 400}, "stop must be from 0 to 399"),
        ({"book": 30}, "book must be from 8 to 22"),
        ({"steps": 0}, "steps must be from 1"),
        ({"seed": -1}, "seed"),
        ({"labels": [1]}, "class"),
    ],
)
def test_refused(change, message):
    arguments = {"images": photos(1), **QUICK, **change}
    with model() as pipeline, pytest.raises(InputError, match=message):
        compress(pipeline, arguments.pop("images"), **arguments)


def test_a_model_without_a_hash(done):
    images, got = done
    with model(SPEC.replace(weights=None)) as pipeline:
        with pytest.raises(InputError, match="does not state the hash"):
            compress(pipeline, images, **QUICK)
        assert np.array_equal(decompress(pipeline, got.data, model=SPEC.weights).pixels, got.pixels)


def test_progress_and_cancel(done):
    images, _ = done
    seen = []
    with model() as pipeline:
        got = compress(pipeline, images, stop=100, progress=lambda *counts: seen.append(counts), **QUICK)
        assert seen == [(i + 1, len(got.sent)) for i in range(len(got.sent))]
        for work in (
            lambda c: compress(pipeline, images, cancel=c, **QUICK),
            lambda c: decompress(pipeline, got.data, cancel=c),
        ):
            calls = iter([False] * 3 + [True] * 99)
            with pytest.raises(Cancelled):
                work(lambda calls=calls: next(calls))


def test_bits_of_a_state_by_the_formula(done):
    """½·(SNR_s − SNR_t)·|x_0 − x̂_0|²: the divergence as it was coded, from the error that the coder states."""
    images, got = done
    schedule = SPEC.make_schedule()
    for before, after in itertools.pairwise(got.sent):
        error = (before.rmse / 127.5) ** 2 * images.size
        bits = 0.5 * (schedule.snr[after.t] - schedule.snr[before.t]) * error / math.log(2)
        assert after.bits == pytest.approx(bits, rel=1e-4)
