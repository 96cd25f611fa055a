"""A checkpoint as a file with 8-bit convolutions: calibrated, corrected, what is sensitive left in half precision."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from ddpm_export.graph import onnx_export
from ddpm_export.quantize import calibrate
from ddpm_export.quantize.convolutions import convolutions, first_and_last
from ddpm_export.quantize.graph import insert, store_in_half
from ddpm_export.quantize.run import RunnerBackend
from ddpm_export.quantize.states import States, calibration_states
from ddpm_export.training import checkpoint as checkpoints
from ddpm_export.training.checkpoint import Weights
from ddpmx.errors import InputError
from ddpmx.formats.describe import training_summary
from ddpmx.formats.same_model import check_output
from ddpmx.formats.spec import ModelSpec, Precision

SHARE = 0.9
"""Of the multiplications that are to be in 8 bits, at least, as far as convolutions make so many."""

SECONDS = 120.0
"""For the pass over single layers, and again for the chains by which the scales are chosen."""

ROOMS = (1.1, 1.0, 1.15, 1.05, 1.2)
"""By how much the scales may be wider than the largest values of the calibration, the likeliest first. Each is another draw
of all roundings, and how far a chain drifts is a matter of chance by a factor of two: it is run, and the best is taken."""


@dataclass(frozen=True)
class Quantised:
    """What became of a network.

    Attributes:
        spec: of the file.
        layers: convolutions in 8 bits, and all.
        share: of the multiplications that are in 8 bits.
        kept: convolutions in half precision though they are neither first nor last, by the error that they alone make.
        looked_at: how many convolutions were tried alone, and how many there are to try.
        states: that it was calibrated on; and how many of those are of real images.
        drifts: how far the calibration's chain ends from float32's in levels, RMS, by the room of the scales.
        error: of the output by t, see :func:`ddpm_export.quantize.calibrate.correlation`.
    """

    spec: ModelSpec
    layers: tuple[int, int]
    share: float
    kept: tuple[str, ...]
    looked_at: tuple[int, int]
    states: tuple[int, int]
    drifts: dict[float, float]
    error: dict[str, list[float]]

    @property
    def lines(self) -> list[str]:
        """For people."""
        done, of = self.layers
        kept = ", ".join(name.removesuffix("/Conv") for name in self.kept) or "none"
        tried, to_try = self.looked_at
        images = f", {self.states[1]} of them of real images" if self.states[1] else ""
        t, rms = self.error["t"], self.error["rms"]
        share, sigma = max(self.error["share"]), max(self.error["sigma"])
        return [
            f"8 bits: {done} of {of} convolutions, {self.share:.1%} of the multiplications; calibrated on "
            f"{self.states[0]} states{images}",
            f"in half precision beside the first and the last: {kept}"
            + (f" ({tried} of {to_try} were tried in the time)" if tried < to_try else ""),
            f"scales: {min(self.drifts, key=lambda room: self.drifts[room]):g} times the largest value, the best of "
            f"{len(self.drifts)}; the calibration's chain then ends {min(self.drifts.values()):.2f} levels from float32's, "
            f"RMS, and {max(self.drifts.values()):.2f} with the worst",
            f"error of the output: {rms[-1]:.2%} at t = {t[-1]:.0f}, {rms[0]:.2%} at t = {t[0]:.0f}; at most {share:.1%} "
            f"of its square is a multiple of the output, and the rest is at most {sigma:.2g} of σ in x_{{t−1}}",
        ]


def export(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    precision: Precision = "int8",
    weights: Weights = "ema",
    time_table: bool = False,
    data: NDArray[np.uint8] | None = None,
    seconds: float = SECONDS,
    progress: Callable[[str, int, int], None] | None = None,
) -> Quantised:
    """Export a checkpoint, or the newest one of a run, with 8-bit convolutions.

    Args:
        path: the checkpoint's or the run's folder.
        output: the file to write. It appears only when it is whole.
        precision: ``int8`` or ``fp8``.
        weights: ``ema`` (averaged) or ``raw``.
        time_table: as for :func:`ddpm_export.graph.onnx_export.export`.
        data: uint8 [N, H, W, C], real images to calibrate on, beside the network's own chain.
        seconds: for the pass over single layers.
        progress: called with (what is done, its steps done, its steps in all).

    Raises:
        InputError: the images do not fit or are too few, or the network was never trained.
        DdpmxError: the checkpoint cannot be read, or the file cannot be written.
    """
    output = Path(output)
    check_output(output)
    path = checkpoints.resolve(path)
    network, spec = checkpoints.load_network(path, weights)
    if weights == "raw":
        spec = spec.replace(weights=checkpoints.weights_hash(network.state_dict()))
    states = calibration_states(network, spec, data=data, progress=_part(progress, "running the chain"))
    base, spec = onnx_export.make_graph(network, spec, precision=precision, time_table=time_table)
    model, about = quantise(base, spec, states, seconds=seconds, progress=progress)
    onnx_export.write_graph(model, spec, output, training_summary(path))
    return about


def quantise(
    base: onnx.ModelProto,
    spec: ModelSpec,
    states: States,
    *,
    seconds: float = SECONDS,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[onnx.ModelProto, Quantised]:
    """A graph in half precision as one with 8-bit convolutions.

    Args:
        base: from :func:`ddpm_export.graph.onnx_export.make_graph`.
        spec: of the result; its precision is ``int8`` or ``fp8``.
        states: to calibrate on.
        seconds, progress: as for :func:`export`.

    Raises:
        InputError: the network has no convolution that could be in 8 bits.
        BackendError: ONNX Runtime is missing, or fails.
    """
    layers = convolutions(base)
    ends = first_and_last(base)
    usable = {name: one for name, one in layers.items() if name not in ends}
    if not usable:
        raise InputError(
            "this network has no convolution for 8 bits", note="the first and the last stay as they are", hint="--fp16"
        )
    largest, sizes = calibrate.largest_values(base, layers, states)
    costs = calibrate.multiplications(base, layers, sizes)
    all_of_them = sum(costs.values()) + calibrate.other_multiplications(base, states)
    in_usable = sum(costs[name] for name in usable)
    errors = calibrate.errors_by_layer(
        base,
        usable,
        largest,
        states,
        spec,
        seconds=seconds,
        progress=_part(progress, "trying single layers"),
    )
    kept = calibrate.left_in_half(errors, costs, in_usable - int(np.ceil(SHARE * all_of_them)))
    chosen = {name: one for name, one in usable.items() if name not in kept}
    best, model = np.inf, base
    drifts: dict[float, float] = {}
    begun = time.monotonic()
    for room in ROOMS:
        if drifts and time.monotonic() - begun > seconds:
            break
        wider = {name: room * value for name, value in largest.items()}
        tried = insert(base, chosen, wider, spec.precision)
        calibrate.correct_biases(base, tried, chosen, states, spec)
        drifts[room] = states.drift(RunnerBackend(tried), spec)
        if drifts[room] < best:
            best, model = drifts[room], tried
        if progress is not None:
            progress("trying scales on the chain", len(drifts), len(ROOMS))
    store_in_half(model)
    error = calibrate.correlation(base, model, states, spec, spec.outputs)
    about = Quantised(
        spec=spec,
        layers=(len(chosen), len(layers)),
        share=sum(costs[name] for name in chosen) / all_of_them,
        kept=tuple(name for name in layers if name in kept),
        looked_at=(len(errors), len(usable)),
        states=(states.rows, sum(len(batch["t"]) for batch in states.batches[len(states.own) :])),
        drifts=drifts,
        error=error,
    )
    return model, about


def _part(progress: Callable[[str, int, int], None] | None, what: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(what, done, total)
