"""The network alone, at states and timesteps of the caller's: its outputs, x̂_0 and ε, without a chain around them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ddpmx.backends.base import Backend, Buffers
from ddpmx.diffusion.samplers import x0_coefficients
from ddpmx.diffusion.schedule import Schedule
from ddpmx.errors import InputError, NumericError
from ddpmx.formats.spec import ModelSpec
from ddpmx.sampling.guidance import Guidance

Float32 = NDArray[np.float32]


class Outputs(NamedTuple):
    """A network's outputs.

    Attributes:
        out: float32 [n, C, H, W], the first output.
        var: float32 [n, C, H, W], the second output, or None if the network has none.
    """

    out: Float32
    var: Float32 | None


class Evaluation(NamedTuple):
    """What a network says of states x_t, float32 [n, C, H, W] each.

    Attributes:
        x0: x̂_0, the estimate of the images, clipped as in the model's chain: with the bits that a chain has there.
        eps: ε, the noise in x_t, by the output as it is, without the clip. Of a network that predicts ε, the output.
        out: the output: ε, x_0, v or μ, see :attr:`ModelSpec.prediction`; guided, where guidance is.
        var: the second output of a network that learns its variance, or None.
    """

    x0: Float32
    eps: Float32
    out: Float32
    var: Float32 | None


@dataclass(frozen=True)
class Call:
    """A batch for the network.

    Attributes:
        x: float32 [n, C, H, W], x_t.
        t: int32 [n], 0…T−1.
        images: int64 [n], the index of each image.
        batch: the batch size at which the network is to run if neighbours make a difference; n or more.
        conditioning: of each image: ``y`` int32 [n], ``cond`` float32 [n, K, H, W], and ``x0_prev`` float32
            [n, C, H, W], which is 0 where it is missing.
        guidance: w of classifier-free guidance, or None.
    """

    x: Float32
    t: NDArray[np.int32]
    images: NDArray[np.int64]
    batch: int
    conditioning: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    guidance: Guidance | None = None

    def rows(self, part: slice) -> Call:
        """The same for some of the images."""
        conditioning = {name: array[part] for name, array in self.conditioning.items()}
        return Call(self.x[part], self.t[part], self.images[part], self.batch, conditioning, self.guidance)


def run(backend: Backend, spec: ModelSpec, call: Call, rows: slice | NDArray[np.int64], executed: int) -> Outputs:
    """Run the network once.

    Args:
        backend: the network.
        spec: the model.
        call: the batch.
        rows: the row of each image among those that the network runs.
        executed: how many those are. What no image is in repeats the last one.

    Raises:
        NumericError: an output is not finite.
        BackendError: the network could not be run.
    """
    buffers = Buffers.of(executed, spec.shape, var=spec.learns_variance, conditioning_shapes=spec.conditioning_shapes)
    inputs = {"x": call.x, "t": call.t, **call.conditioning}
    for name, array in buffers.inputs().items():
        if name in inputs:
            array[...] = inputs[name][-1:]
            array[rows] = inputs[name]
    backend.bind(buffers)
    backend.enqueue()
    outputs = Outputs(buffers.out[rows], None if buffers.var is None else buffers.var[rows])
    for output in outputs:
        if output is not None and not np.isfinite(output).all():
            bad = np.argmin(np.isfinite(output).reshape(len(output), -1).all(axis=1))
            raise NumericError(
                f"the network's output at t = {call.t[bad]} is not finite",
                note=f"image {call.images[bad]}; {backend.description}",
                hint="if the file is fp16, try fp32: an activation may exceed 65504",
            )
    return outputs


def evaluated(spec: ModelSpec, schedule: Schedule, x: Float32, t: NDArray[np.int32], outputs: Outputs) -> Evaluation:
    """x̂_0 and ε of the outputs at x_t.

    Args:
        spec: the model.
        schedule: its schedule.
        x: float32 [n, C, H, W], x_t.
        t: int32 [n].
        outputs: the network's.
    """
    p, q = (column[t][:, None, None, None] for column in x0_coefficients(schedule, spec.prediction))
    out = outputs.out
    limit = np.float32(np.inf if spec.clip is None else spec.clip)
    with np.errstate(over="ignore", invalid="ignore"):
        x0 = np.clip(x * p.astype(np.float32) + out * q.astype(np.float32), -limit, limit)  # chain.update's operations
        if spec.prediction == "eps":
            return Evaluation(x0, out, out, outputs.var)
        signal, noise = (
            np.sqrt(values[t])[:, None, None, None] for values in (schedule.alpha_bar, schedule.one_minus_alpha_bar)
        )
        eps = (x - signal * (p * x + q * out)) / noise
    return Evaluation(x0, eps.astype(np.float32), out, outputs.var)


def timesteps(t: Any, n: int, T: int) -> NDArray[np.int32]:
    """One timestep for all images, or one for each, as int32 [n].

    Raises:
        InputError: other numbers than 0…T−1, or another number of them.
    """
    array = np.asarray(t)
    if array.dtype.kind not in "iu" or array.shape not in ((), (n,)):
        raise InputError(
            f"t must be one timestep, or {n} of them",
            note=f"it is {array.dtype} {[*array.shape]}",
            hint="whole numbers",
        )
    wrong = array[(array < 0) | (array >= T)]
    if wrong.size:
        raise InputError(f"t must be from 0 to {T - 1}, not {wrong.flat[0]}", note=f"the model has T = {T}")
    return np.broadcast_to(array, n).astype(np.int32)
