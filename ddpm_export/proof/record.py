"""The record of PyTorch's outputs, against which every file of the model is checked."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ddpm_export.networks.torch_backend import TorchBackend
from ddpmx.backends.base import Buffers
from ddpmx.diffusion.grids import timestep_grid
from ddpmx.diffusion.samplers import x0_coefficients
from ddpmx.errors import InputError
from ddpmx.formats.spec import ModelSpec
from ddpmx.parity.evaluator import Evaluator
from ddpmx.parity.ladder import SILENT
from ddpmx.parity.propagation import DRIFT
from ddpmx.parity.reference import (
    GUIDANCE,
    QUANTILES,
    Reference,
    chain_table,
    diffusion_noise,
    elements,
    recorded_steps,
)
from ddpmx.sampling import chain
from ddpmx.sampling.chain import Float32
from ddpmx.sampling.conditioning import example
from ddpmx.sampling.guidance import GuidedBackend, guided
from ddpmx.sampling.pixels import from_uint8, to_uint8

TIMESTEPS = 32


def short_chain(shape: tuple[int, int, int]) -> int:
    """Steps of a chain that runs in reasonable time on a CPU: 50, and 20 for images of more than 128×128 in colour."""
    return 50 if int(np.prod(shape)) <= 3 << 14 else 20


def record(
    network: nn.Module,
    spec: ModelSpec,
    *,
    data: NDArray[np.uint8] | None = None,
    steps: int | None = None,
    seed: int = 0,
    magnitude: Callable[[Float32, NDArray[np.int32], Float32], float] | None = None,
    ignores_time: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Reference:
    """Record the outputs that a file of the network should have, in float32, TF32 off.

    Args:
        network: x float32 [B, C, H, W], t int [B] → [B, C, H, W], in eval mode, float32; see :class:`TorchBackend`.
        spec: of the network. Its precision is ignored.
        data: uint8 [N, H, W, C], real images; by default the ends of the network's own chain. A network with classes
            gets other classes for every t, spread over all that it has, whatever the images show.
        steps: length of the recorded chain, at most T; None for all T.
        seed: of all noise.
        magnitude: (x_t, t, output) → the RMS of the largest term that the output is a sum of, in the output's unit; for a
            network that converts its output from another range of images.
        ignores_time: whether the network ignores t, by its exporter's word.
        progress: called with (network calls done, network calls in all).

    Raises:
        InputError: the images have another shape, or the network's output is nearly zero (it was never trained).
        NumericError: its outputs are not finite.
    """
    spec = spec.replace(precision="fp32")
    steps = spec.timesteps if steps is None else min(steps, spec.timesteps)
    t = timestep_grid(spec.timesteps, min(TIMESTEPS, spec.timesteps)).astype(np.int32)
    size = int(np.prod(spec.shape))
    learns = spec.learns_variance  # the second output takes as much space again
    images_per_t, chains = int(np.clip((1 << 15) // size, 1, 1 if learns else 2)), int(np.clip((1 << 18) // size, 1, 4))
    total, done = 2 * steps + len(t) + len(recorded_steps(steps, spec.shape)), 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    with exact_float32():
        backend = TorchBackend(network)
        evaluate = Evaluator(backend, spec, images_per_t, None, total)
        table = chain_table(spec, steps)
        at = recorded_steps(steps, spec.shape)
        state = np.empty((len(at), *spec.shape), np.float32)
        indices = np.arange(chains)
        x_start = chain.initial(seed, indices, spec.shape)
        sample, before = x_start, np.zeros(spec.shape, np.float32)
        state_x0 = np.empty((len(at), *spec.shape), np.uint8)
        chain_conditioning = example(spec, indices, seed=seed)
        if spec.classes is not None:
            # reversed, so that the first image, whose states are recorded, is not of class 0; guided to classes alone
            chain_conditioning["y"] = spread(spec.classes, chains)[::-1].copy()
        guidance = GUIDANCE if spec.null_class else 1.0
        how = guided(spec, guidance)
        run = chain.run(
            backend if how is None else GuidedBackend(backend, spec, how),
            table,
            x_start,
            seed=seed,
            images=indices,
            clip=spec.clip,
            conditioning_shapes=spec.conditioning_shapes,
            conditioning=chain_conditioning,
        )
        for number, step in enumerate(run):
            if number in at:
                state[np.searchsorted(at, number)] = step.x[0]
                state_x0[np.searchsorted(at, number)] = to_uint8(before)
            sample, before = step.x0, step.x0[0].copy()
            tick()
        final = to_uint8(sample)
        ends = sample
        x0 = final[:images_per_t] if data is None else _chosen(data, spec, images_per_t)
        clean, schedule = from_uint8(x0), spec.make_schedule()
        kept = elements(spec.shape)
        unit, state_unit = (None if magnitude is None else np.empty(n, np.float32) for n in (len(t), len(at)))
        out, losses = np.empty((len(t), len(x0), len(kept)), np.float32), []
        var = np.empty_like(out) if learns else None
        y = None if spec.classes is None else spread(spec.label_count, len(t) * len(x0)).reshape(len(t), len(x0))
        conditioning = example(spec, np.arange(len(x0)), seed=seed)
        if spec.self_condition:
            conditioning["x0_prev"] = np.zeros_like(clean)
        for i, ti in enumerate(t):
            z = diffusion_noise(clean, int(ti), seed)
            signal, noise = (np.float32(np.sqrt(v[ti])) for v in (schedule.alpha_bar, schedule.one_minus_alpha_bar))
            x_t = signal * clean + noise * z
            if y is not None:
                conditioning["y"] = y[i]
            output, variance = evaluate(x_t, np.full(len(x0), ti, np.int32), conditioning)
            if unit is not None and magnitude is not None:
                unit[i] = magnitude(x_t, np.full(len(x0), ti, np.int32), output)
            if var is not None and variance is not None:
                var[i] = variance.reshape(len(x0), -1)[:, kept]
            if spec.prediction == "mu":  # nearly all of μ is in x_t: what the network knows shows in ε alone
                p, q = (column[ti] for column in x0_coefficients(schedule, "mu"))
                target, found = z, (x_t - signal * (p * x_t + q * output)) / noise
            else:
                target, found = {"eps": z, "x0": clean, "v": signal * z - noise * clean}[spec.prediction], output
            losses.append(float(np.mean(np.square(target - found)) / max(float(np.var(target)), 1e-6)))
            out[i] = output.reshape(len(x0), -1)[:, kept]
            tick()
        states_out = np.empty((len(at), len(kept)), np.float32)
        states_var = np.empty_like(states_out) if learns else None
        conditioning = {name: array[:1] for name, array in chain_conditioning.items()}
        for i, number in enumerate(at):
            if spec.self_condition:
                conditioning["x0_prev"] = from_uint8(state_x0[i : i + 1])
            ti = np.array([table.timesteps[number]], np.int32)
            output, variance = evaluate(state[i : i + 1], ti, conditioning, batch=1)
            if state_unit is not None and magnitude is not None:
                state_unit[i] = magnitude(state[i : i + 1], ti, output)
            states_out[i] = output.reshape(-1)[kept]
            if states_var is not None and variance is not None:
                states_var[i] = variance.reshape(-1)[kept]
            tick()
    reference = Reference(
        spec=spec,
        made_with=backend.description,
        seed=seed,
        real=data is not None,
        loss=float(np.median(losses)),
        t=t,
        x0=np.ascontiguousarray(x0),
        out=out,
        steps=steps,
        at=at,
        state=state,
        state_out=states_out,
        final=np.ascontiguousarray(final),
        y=y,
        final_y=chain_conditioning.get("y"),
        var=var,
        state_var=states_var,
        state_x0=state_x0 if spec.self_condition else None,
        unit=unit,
        state_unit=state_unit,
        ignores_time=ignores_time,
        guidance=guidance,
    )
    if reference.scale < SILENT:
        raise InputError(
            "the network's output is nearly zero, so a file cannot be checked against it",
            note=f"RMS of its output: {reference.scale:.1g}; its last layer is as it was initialised",
            hint="train it first",
        )
    if reference.trained:
        with exact_float32():
            reference = dataclasses.replace(reference, drift=_drift(backend, reference, ends[:1], tick))
    else:
        for _ in range(steps):
            tick()
    return reference


def _drift(backend: TorchBackend, reference: Reference, end: Float32, tick: Callable[[], None]) -> Float32:
    """How far the chain's first image moves, in levels, if every output has an error of a known size.

    Float32 [64], quantiles over the pixels that are not saturated; see :func:`ddpmx.parity.propagation.pixels_bound`.
    ``end`` is x̂_0 at the end of the undisturbed chain, float32 [1, C, H, W].
    """
    spec, first = reference.spec, np.arange(1)
    sample = end
    for step in chain.run(
        reference.guided(_Disturbed(backend, DRIFT * reference.scale)),
        reference.table(),
        chain.initial(reference.seed, first, spec.shape),
        seed=reference.seed,
        images=first,
        clip=spec.clip,
        conditioning_shapes=spec.conditioning_shapes,
        conditioning={name: array[:1] for name, array in reference.chain_conditioning().items()},
    ):
        sample = step.x0
        tick()
    theirs, mine = np.clip(end, -1, 1), np.clip(sample, -1, 1)
    counted = (np.abs(theirs) < 1) | (mine != theirs)
    moved = 127.5 * np.abs(mine - theirs)[counted]
    places = (np.arange(QUANTILES) + 0.5) / QUANTILES
    return np.quantile(moved if moved.size else np.zeros(1), places).astype(np.float32)


class _Disturbed:
    """A network with an error N(0, size²) in each number of its outputs, half of its variance the same in every call."""

    description = "disturbed"

    def __init__(self, inner: TorchBackend, size: float) -> None:
        self._inner, self._size = inner, size
        self._random = np.random.default_rng(0)
        self._fixed: list[NDArray[np.float64]] = []

    def bind(self, buffers: Buffers) -> None:
        """Read inputs from, and write outputs to, these buffers."""
        self._outputs = list(buffers.outputs().values())
        self._fixed = [self._random.standard_normal(out.shape) for out in self._outputs]
        self._inner.bind(buffers)

    def enqueue(self) -> None:
        """Run the network once."""
        self._inner.enqueue()
        for out, fixed in zip(self._outputs, self._fixed, strict=True):
            out += (self._size * (fixed + self._random.standard_normal(out.shape)) / np.sqrt(2)).astype(np.float32)

    def close(self) -> None:
        """Do nothing: the network is another's."""


def spread(classes: int, n: int) -> NDArray[np.int32]:
    """``n`` labels, evenly spread over all that the network takes, int32 [n]."""
    return np.linspace(0, classes - 1, n).round().astype(np.int32)


def check_images(data: NDArray[np.uint8], spec: ModelSpec) -> None:
    """Check that images are uint8 and have the model's size.

    Raises:
        InputError: they do not.
    """
    channels, height, width = spec.shape
    if data.dtype != np.uint8:
        raise InputError(f"the images are {data.dtype}, not uint8", hint="0…255, whatever the model's own range is")
    if data.ndim != 4 or data.shape[1:] != (height, width, channels) or not len(data):
        raise InputError(
            f"the images are {list(data.shape[1:])} (height, width, channels), and the model's {[height, width, channels]}",
            hint="images of a folder are cropped and resized to the model's size; those of an .npz are not",
        )


def _chosen(data: NDArray[np.uint8], spec: ModelSpec, n: int) -> NDArray[np.uint8]:
    """``n`` images spread over the data, as [n, C, H, W]."""
    check_images(data, spec)
    picked = data[np.linspace(0, len(data) - 1, n).round().astype(int)]
    return np.ascontiguousarray(picked.transpose(0, 3, 1, 2))


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Turn TF32 off while the reference is recorded: in cuDNN it is on by default."""
    backends: Any = torch.backends
    matmul, cudnn = backends.cuda.matmul, backends.cudnn
    flags: list[tuple[Any, str, Any]] = [(cudnn, "allow_tf32", False), (matmul, "allow_tf32", False)]
    try:
        before = [getattr(owner, name) for owner, name, _ in flags]
    except RuntimeError:  # somebody has set torch's newer flags, beside which it does not tell of these
        flags = [(owner, "fp32_precision", "ieee") for owner in (matmul, cudnn.conv, cudnn.rnn)]
        before = [getattr(owner, name) for owner, name, _ in flags]
    for owner, name, exact in flags:
        setattr(owner, name, exact)
    try:
        yield
    finally:
        for (owner, name, _), value in zip(flags, before, strict=True):
            setattr(owner, name, value)
