"""Images as the states of a chain: the coder.

Algorithm 3 of Ho et al. (2020). Both sides begin with draws that they have in common and walk down the same chain: at each
of its states the network says p(x_s | x_t), the coder knows q(x_s | x_t, x_0) as well, and sends a sample of q under p
(:mod:`ddpmx.tasks.codec.channel`). Whoever has the states down to some t shows x̂_0, so a file's beginning is an image too.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ddpmx.arrays.protocols import Labels
from ddpmx.diffusion import noise
from ddpmx.diffusion.noise import Purpose, check_seed
from ddpmx.errors import Cancelled, InputError, NumericError
from ddpmx.formats import compressed
from ddpmx.formats.compressed import RESIDUAL, STEPS, Header, Section
from ddpmx.pipeline import Pipeline
from ddpmx.sampling.conditioning import class_labels
from ddpmx.sampling.pixels import from_uint8, to_nhwc
from ddpmx.tasks.codec import channel, draws, residual
from ddpmx.tasks.codec.plan import (
    DEFAULT_BOOK,
    DEFAULT_STEPS,
    Forecast,
    fitting_book,
    make_plan,
    stop_for_rate,
    stop_for_rmse,
)
from ddpmx.tasks.codec.range_coder import Writer
from ddpmx.tasks.codec.same_model import check_model, check_of, weights_of
from ddpmx.tasks.codec.walk import Chunks, Network, Walk

Float32 = NDArray[np.float32]
UInt8 = NDArray[np.uint8]

DEFAULT_RATE = 1.0

_SECTION_BYTES = 400
"""Less is not worth a section of its own."""
_MEASURED_IMAGES = 32
"""On which the model is tried."""
_DIFFUSE = 1 << 23
"""The draw of the purpose by which they are diffused."""


@dataclass(frozen=True)
class Sent:
    """What one state cost, over all images.

    Attributes:
        t: its timestep.
        bits: the divergence of q and p, bits.
        spent: bits for it in the file.
        chunks: how many pieces it was cut into.
        rmse: of x̂_0 from it, in levels; NaN until it is known.
    """

    t: int
    bits: float
    spent: float
    chunks: int
    rmse: float


@dataclass(frozen=True, eq=False)
class Compressed:
    """Compressed images.

    Attributes:
        data: the file.
        pixels: uint8 [n, H, W, C], what it decodes to here.
        sent: the states, in the order in which they are in the file.
        header: of the file.
        residual: bits of what follows the states in a lossless file, or 0.
    """

    data: bytes = field(repr=False)
    pixels: UInt8 = field(repr=False)
    sent: tuple[Sent, ...]
    header: Header
    residual: int = 0

    @property
    def bits_per_dim(self) -> float:
        """Of the file, everything included."""
        return 8 * len(self.data) / self.pixels.size


def compress(
    pipeline: Pipeline,
    images: UInt8,
    *,
    rate: float | None = None,
    rmse: float | None = None,
    stop: int | None = None,
    lossless: bool = False,
    labels: Labels | None = None,
    seed: int = 0,
    steps: int = DEFAULT_STEPS,
    book: int = DEFAULT_BOOK,
    model: str | None = None,
    batch: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    cancel: Callable[[], bool] | None = None,
) -> Compressed:
    """Compress images by a model.

    At most one of ``rate``, ``rmse`` and ``stop``; by default a rate of :data:`DEFAULT_RATE`, and of a lossless file what
    is expected to make it smallest. The file is the same for any ``batch``.

    A model in half precision is computed in float32, on every machine: see :meth:`ddpmx.Pipeline.in_float32`.

    Args:
        pipeline: the model; one that takes no condition image.
        images: uint8 [n, H, W, C], of the model's size.
        rate: bits per dimension that the states may need, about.
        rmse: √ of the mean square error that is aimed at, in levels 0…255.
        stop: the timestep of the last state, 0…T−1.
        lossless: send what is left of the images too.
        labels: the class of each image, or one for all, for a model with classes.
        seed: of the draws that coder and decoder share, 0…2⁶⁴−1.
        steps: about how many states are sent; of a small number a few more. More cost fewer bits, and the decoder a network
            call each.
        book: how far the coder searches: 2^book draws and more, 8…22. More cost fewer bits, and time.
        model: the sha256 by which a decoder knows the model, 64 digits; by default what the model says of its weights.
        batch: images in the network at once.
        progress: called repeatedly with (work done, work in all).
        cancel: called repeatedly; True stops the work.

    Raises:
        InputError: images that do not fit the model, or a number out of its range.
        Cancelled: ``cancel`` returned True.
        NumericError: the network's output was not finite.
        FileFormatError: the model cannot be computed in float32.
        BackendError: the network could not be run.
    """
    spec = pipeline.spec
    c, height, width = spec.shape
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (height, width, c) or not len(images):
        raise InputError(
            f"images must be uint8 [n, {height}, {width}, {c}], n at least 1",
            note=f"they are {images.dtype} {[*images.shape]}",
            hint="a model compresses images of its own size",
        )
    n, numbers = len(images), c * height * width
    check_model(pipeline)
    if n * numbers > compressed.MAX_NUMBERS:
        raise InputError(f"{n} images are too many for one file", hint="several files")
    _check_numbers(rate, rmse, stop, steps, book, spec.timesteps)
    seed = check_seed(seed)
    batch = pipeline.check_request(n, seed=seed, batch=batch, labels=labels)
    classes = _classes(pipeline, n, labels)
    book = fitting_book(book, numbers)
    x0 = np.ascontiguousarray(from_uint8(images).transpose(0, 3, 1, 2))
    with pipeline.in_float32() as wide:
        run = Network(wide, classes, batch, cancel)
        errors, residuals = _measure(run, x0, images, seed, lossless=lossless)
        forecast = Forecast(run.schedule, numbers, errors)
        if stop is None:
            if rate is None and rmse is None and lossless:
                stop = _cheapest(forecast, residuals, n, book, steps)
            elif rmse is not None:
                stop = stop_for_rmse(forecast, rmse)
            else:
                stop = stop_for_rate(forecast, DEFAULT_RATE if rate is None else rate, n, book=book, steps=steps)
        plan = make_plan(forecast, stop, n, book=book, steps=steps)
        header = Header(
            weights_of(pipeline, model),
            spec.to_json()["coefficients"],
            spec.precision,
            wide.arithmetic,
            spec.shape,
            spec.timesteps,
            n,
            plan.group,
            seed,
            plan.book,
            plan.chunk,
            plan.times,
            errors,
            lossless,
            tuple(classes or ()),
        )
        walk, coder = Walk(header, pipeline), _Coder(header, x0, forecast)
        sections, pending, sent = [compressed.write_header(header)], 0, []
        count = len(plan.times)
        for i in range(count - 1, -1, -1):
            divergence, spent, chunks = coder.step(walk, i, cancel)
            pending += 1
            estimate = run(walk.x, plan.times[i], walk.previous)
            apart = 127.5 * math.sqrt(float(np.square(estimate.astype(np.float64) - x0).mean()))
            sent.append(Sent(plan.times[i], divergence, spent, chunks, apart))
            walk.estimated(estimate)
            if i == 0 or len(coder.writer) >= _SECTION_BYTES:
                check = check_of(header, to_nhwc(estimate))
                sections.append(compressed.write_section(Section(STEPS, pending, check + coder.writer.finish())))
                coder.writer, pending = Writer(), 0
            if progress is not None:
                progress(count - i, count)
        assert walk.previous is not None
        pixels, left = to_nhwc(walk.previous), 0
        if lossless:
            writer = Writer()
            residual.write(writer, np.ascontiguousarray(images.transpose(0, 3, 1, 2)), walk.previous)
            body = zlib.crc32(images.tobytes()).to_bytes(4, "little") + writer.finish()
            sections.append(compressed.write_section(Section(RESIDUAL, 0, body)))
            pixels, left = images.copy(), 8 * len(body)
        data = b"".join(sections)
        if images.size > compressed.NUMBERS_BY_BYTE * len(data):
            raise InputError("rate is too little for so many images", hint="more bits per dimension, or several files")
        return Compressed(data, pixels, tuple(sent), header, left)


class _Coder:
    """The coder's side of a step."""

    def __init__(self, header: Header, x0: Float32, forecast: Forecast) -> None:
        self._header, self._x0, self._chunks = header, x0, Chunks(header, forecast)
        self.writer = Writer()

    def step(self, walk: Walk, i: int, cancel: Callable[[], bool] | None) -> tuple[float, float, int]:
        """Send state i: the divergence and the bits for it, and how many chunks it was."""
        header, book = self._header, self._header.book
        apart = self._x0.astype(np.float64) - (0.0 if walk.previous is None else walk.previous)
        delta = (walk.signal(i) * apart).reshape(header.n, -1)
        y = np.empty(delta.shape, np.float32)
        spent, count = 0.0, 0
        for unit, group, numbers, place, expected in self._chunks.of(i):
            if cancel is not None and cancel():
                raise Cancelled("cancelled before the last state")
            if expected < 0:
                number, index = 0, 0
            else:
                number, index = channel.choose(place, book, delta[group].ravel()[numbers])
                odds = self._chunks.odds(expected)
                self.writer.put(number, odds)
                self.writer.put_bits(index, number)
                self._chunks.learn(unit, expected, number)
                spent += odds.bits(number) + number
                count += 1
            y[group].reshape(-1)[numbers] = draws.draw(place, book, number, index, len(numbers))
        walk.move(i, y.reshape(walk.x.shape))
        return 0.5 * float(np.square(delta).sum()) / math.log(2), spent, count


def _measure(
    run: Network, x0: Float32, images: UInt8, seed: int, *, lossless: bool
) -> tuple[tuple[int, ...], dict[int, float]]:
    """The error of x̂_0 by t on some of the images, as codes; with ``lossless`` also bits of the residual of an image."""
    schedule = run.schedule
    times = compressed.knots(len(schedule))
    some = np.arange(min(len(x0), _MEASURED_IMAGES))  # their labels are the first ones too
    mse, residuals = np.empty(len(times)), {}
    for k, t in enumerate(times):
        z = noise.normal(seed, some, t, Purpose.CODEC, x0[0].size, repeat=_DIFFUSE).reshape(x0[some].shape)
        signal, rest = math.sqrt(schedule.alpha_bar[t]), math.sqrt(schedule.one_minus_alpha_bar[t])
        found = run((signal * x0[some] + rest * z).astype(np.float32), t)
        mse[k] = np.square(found.astype(np.float64) - x0[some]).mean()
        if lossless:
            few = some[:8]
            writer = Writer()
            residual.write(writer, np.ascontiguousarray(images[few].transpose(0, 3, 1, 2)), found[few])
            residuals[t] = 8 * len(writer) / len(few)
    if not np.isfinite(mse).all():
        raise NumericError("the error of x̂_0 is not finite", note="the images, or the network's output, are not")
    return tuple(compressed.error_code(127.5 * math.sqrt(value)) for value in mse), residuals


def _cheapest(forecast: Forecast, residuals: dict[int, float], n: int, book: int, steps: int) -> int:
    """Where a lossless file is expected to be smallest."""
    costs = {t: make_plan(forecast, t, n, book=book, steps=steps).cost + rest for t, rest in residuals.items()}
    return min(costs, key=lambda t: costs[t])


def _classes(pipeline: Pipeline, n: int, labels: Labels | None) -> list[int] | None:
    if pipeline.spec.classes is None and labels is None:
        return None
    return [int(label) for label in class_labels(pipeline.spec, n, labels)]


def _check_numbers(rate: float | None, rmse: float | None, stop: int | None, steps: int, book: int, T: int) -> None:
    if sum(value is not None for value in (rate, rmse, stop)) > 1:
        raise InputError("rate, rmse and stop exclude each other")
    for name, value in (("rate", rate), ("rmse", rmse)):
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"{name} must be a finite number above 0, not {float(value)!r}")
    for name, whole, least, most in (
        ("stop", stop, 0, T - 1),
        ("steps", steps, 1, compressed.MAX_STEPS // 2),
        ("book", book, draws.SMALLEST_BOOK, draws.LARGEST_BOOK),
    ):
        if whole is not None and (isinstance(whole, bool) or not isinstance(whole, (int, np.integer))):
            raise InputError(f"{name} must be a whole number, not {whole!r}")
        if whole is not None and not least <= whole <= most:
            raise InputError(f"{name} must be from {least} to {most}, not {whole!r}")
