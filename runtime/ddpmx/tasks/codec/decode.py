"""Images from the states of a chain, Algorithm 4 of Ho et al. (2020): the decoder."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ddpmx.errors import Cancelled, FileFormatError, InputError
from ddpmx.formats import compressed
from ddpmx.formats.compressed import RESIDUAL, CompressedFile, Header
from ddpmx.pipeline import Pipeline
from ddpmx.sampling.pixels import to_nhwc
from ddpmx.tasks.codec import draws, residual
from ddpmx.tasks.codec.plan import Forecast
from ddpmx.tasks.codec.range_coder import Reader
from ddpmx.tasks.codec.same_model import check_arithmetic, check_fits, check_of, compare, other_network
from ddpmx.tasks.codec.walk import Chunks, Network, Walk

Float32 = NDArray[np.float32]
UInt8 = NDArray[np.uint8]

_COPY = "copy it again from where it came"


@dataclass(frozen=True, eq=False)
class Decompressed:
    """What a file, or the beginning of one, decodes to.

    Attributes:
        pixels: uint8 [n, H, W, C].
        t: the timestep of the last state, from which x̂_0 is shown.
        steps: states that were decoded.
        rmse: the error that is expected of them, in levels 0…255; 0 of a lossless file.
        complete: whether it is all that was compressed.
        x: float32 [n, C, H, W], the last state.
    """

    pixels: UInt8
    t: int
    steps: int
    rmse: float
    complete: bool
    x: Float32 = field(repr=False)


def decompress(
    pipeline: Pipeline,
    data: bytes | CompressedFile,
    *,
    stop: int | None = None,
    model: str | None = None,
    batch: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    cancel: Callable[[], bool] | None = None,
) -> Decompressed:
    """Decode compressed images, or the beginning of their file: of a file that was cut short, the sections that are whole.

    Args:
        pipeline: the model that they were compressed by.
        data: the file, or what :func:`ddpmx.formats.compressed.parse` made of it.
        stop: decode no further than to this t: a coarser image, sooner.
        model: as for :func:`compress`.
        batch: images in the network at once.
        progress: called repeatedly with (states done, states in all).
        cancel: called repeatedly; True stops the work.

    Raises:
        FileFormatError: no such file, damaged, or without a whole section.
        InputError: another model, one that computes in another precision, or a number out of its range.
        NumericError: the network here computes something else than that of the coder: the images would not be those.
        Cancelled: ``cancel`` returned True.
        BackendError: the network could not be run.
    """
    file = data if isinstance(data, CompressedFile) else compressed.parse(data)
    header = file.header
    check_fits(pipeline, file, model)
    if not file.steps:
        raise FileFormatError(f"{file.name}: ends before its first section does", hint=_COPY)
    if stop is not None and (isinstance(stop, bool) or not header.times[-1] >= stop >= 0):
        raise InputError(f"stop must be from 0 to {header.times[-1]}, not {stop!r}")
    batch = pipeline.check_request(header.n, seed=header.seed, batch=batch)
    with pipeline.in_float32() as wide:
        check_arithmetic(wide, file)
        return _decoded(wide, file, stop, batch, progress, cancel)


def _decoded(
    pipeline: Pipeline,
    file: CompressedFile,
    stop: int | None,
    batch: int,
    progress: Callable[[int, int], None] | None,
    cancel: Callable[[], bool] | None,
) -> Decompressed:
    header = file.header
    run = Network(pipeline, [*header.labels] or None, batch, cancel)
    walk, i, total = Walk(header, pipeline), len(header.times), file.steps
    forecast = Forecast(run.schedule, header.numbers, header.errors)
    decoder = _Decoder(header, forecast)
    for section in file.sections:
        if section.kind == RESIDUAL:
            break
        decoder.reader = Reader(section.data[compressed.CHECK_BYTES :])
        for _ in range(section.steps):
            i -= 1
            try:
                decoder.step(walk, i, cancel)
            except FileFormatError as error:
                raise FileFormatError(f"{file.name}: {error.fact}", hint=_COPY) from error
            walk.estimated(run(walk.x, header.times[i], walk.previous))
            if progress is not None:
                progress(len(header.times) - i, total)
            if stop is not None and i and header.times[i - 1] < stop:
                break
        else:
            assert walk.previous is not None
            compare(section.data[: compressed.CHECK_BYTES], check_of(header, to_nhwc(walk.previous)), header.times[i])
            continue
        break
    assert walk.previous is not None
    pixels, rmse, complete = to_nhwc(walk.previous), forecast.rmse(header.times[i]), i == 0 and file.complete
    if i == 0 and file.sections[-1].kind == RESIDUAL:
        body = file.sections[-1].data
        try:
            levels = residual.read(Reader(body[4:]), walk.previous)
        except FileFormatError as error:  # the section has its CRC, so these are no numbers for this x̂_0
            raise other_network(header.times[0], "what is left of the images does not fit them") from error
        pixels, rmse = np.ascontiguousarray(levels.transpose(0, 2, 3, 1)), 0.0
        if zlib.crc32(pixels.tobytes()) != int.from_bytes(body[:4], "little"):
            raise other_network(header.times[0], "the checksum of the pixels is another one")
    return Decompressed(pixels, header.times[i], len(header.times) - i, rmse, complete, walk.x)


class _Decoder:
    """The decoder's side of a step."""

    def __init__(self, header: Header, forecast: Forecast) -> None:
        self._header, self._chunks = header, Chunks(header, forecast)
        self.reader = Reader(b"")

    def step(self, walk: Walk, i: int, cancel: Callable[[], bool] | None) -> None:
        """Receive state i."""
        header, book = self._header, self._header.book
        y = np.empty((header.n, header.numbers), np.float32)
        for unit, group, numbers, place, expected in self._chunks.of(i):
            if cancel is not None and cancel():
                raise Cancelled("cancelled before the last state")
            number, index = 0, 0
            if expected >= 0:
                odds = self._chunks.odds(expected)
                number = self.reader.get(odds)
                index = self.reader.get_bits(number)
                self._chunks.learn(unit, expected, number)
            y[group].reshape(-1)[numbers] = draws.draw(place, book, number, index, len(numbers))
        walk.move(i, y.reshape(walk.x.shape))
