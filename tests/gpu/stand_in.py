"""A stand-in network for GPUs without TensorRT: ε = s_t·x, and v = s_t·x as well.

It is one hand-written kernel. The factors s_t are in device memory, so a captured step can be made to output NaN at any t,
and healed, without another capture. Its twin in NumPy has the same bits, since it computes nothing but one product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpmx.backends.base import EXECUTORS, Buffers
from ddpmx.device.driver import Driver
from ddpmx.diffusion.samplers import Table, make_table
from ddpmx.errors import InputError
from ddpmx.formats.spec import ModelSpec
from ddpmx.sampling import chain
from ddpmx.sampling.pixels import to_nhwc

SPEC = ModelSpec((3, 5, 7), timesteps=1000, ddpmx="0.1.0")
"""Odd sizes: 105 numbers, not a multiple of four."""

STEPS, SEED = 12, 5

PTX = b"""
.version 6.3
.target sm_75
.address_size 64

.visible .entry scale(
	.param .u64 scale_param_0,
	.param .u64 scale_param_1,
	.param .u64 scale_param_2,
	.param .u64 scale_param_3,
	.param .u64 scale_param_4,
	.param .u64 scale_param_5
)
{
	.reg .pred %p<2>;
	.reg .f32 %f<4>;
	.reg .b32 %r<9>;
	.reg .b64 %rd<16>;
	ld.param.u64 %rd1, [scale_param_0];
	ld.param.u64 %rd2, [scale_param_1];
	ld.param.u64 %rd3, [scale_param_2];
	ld.param.u64 %rd4, [scale_param_3];
	ld.param.u64 %rd5, [scale_param_4];
	ld.param.u64 %rd6, [scale_param_5];
	mov.u32 %r1, %ctaid.x;
	mov.u32 %r2, %ntid.x;
	mov.u32 %r3, %tid.x;
	mul.lo.s32 %r4, %r1, %r2;
	add.s32 %r5, %r4, %r3;
	cvt.u32.u64 %r6, %rd6;
	setp.ge.u32 %p1, %r5, %r6;
	@%p1 bra $END;
	cvt.u32.u64 %r7, %rd5;
	div.u32 %r7, %r5, %r7;
	mul.wide.u32 %rd7, %r7, 4;
	add.s64 %rd8, %rd2, %rd7;
	ld.global.u32 %r8, [%rd8];
	mul.wide.u32 %rd9, %r8, 4;
	add.s64 %rd10, %rd3, %rd9;
	ld.global.f32 %f1, [%rd10];
	mul.wide.u32 %rd11, %r5, 4;
	add.s64 %rd12, %rd1, %rd11;
	ld.global.f32 %f2, [%rd12];
	mul.rn.f32 %f3, %f2, %f1;
	add.s64 %rd13, %rd4, %rd11;
	st.global.f32 [%rd13], %f3;
$END:
	ret;
}
\0"""
"""scale(x, t, factors, out, numbers of an image, numbers in all): out[i] = x[i] · factors[t[image of i]]."""


def factors(spec: ModelSpec) -> NDArray[np.float32]:
    """The factors of a perfect network for images ~ N(0, I): E[ε | x_t] = √(1 − ᾱ_t)·x_t."""
    return np.sqrt(spec.make_schedule().one_minus_alpha_bar).astype(np.float32)


def scaled(x: NDArray[np.float32], t: NDArray[np.int32], by: NDArray[np.float32]) -> NDArray[np.float32]:
    """The kernel in NumPy."""
    return x * by[t].reshape(-1, *(1,) * (x.ndim - 1))


class Twin:
    """The network in NumPy, a :class:`ddpmx.backends.base.Backend`."""

    description = "the stand-in, in NumPy"

    def __init__(self, spec: ModelSpec) -> None:
        self._factors = factors(spec)

    def bind(self, buffers: Buffers) -> None:
        self._buffers = buffers

    def enqueue(self) -> None:
        for output in (self._buffers.out, self._buffers.var):
            if output is not None:
                output[...] = scaled(self._buffers.x, self._buffers.t, self._factors)

    def close(self) -> None:
        pass


class StandIn:
    """The network on the GPU, a :class:`ddpmx.backends.base.DeviceBackend`. The caller closes the driver.

    Args:
        driver: the GPU.
        spec: the model.
        largest: the largest batch.
    """

    stream, executors = 0, EXECUTORS
    description = "the stand-in"

    def __init__(self, driver: Driver, spec: ModelSpec = SPEC, largest: int = 8) -> None:
        self.driver, self.spec, self.batches = driver, spec, ((1, largest),)
        with driver.current():
            self._module = driver.module(PTX, "the stand-in")
            self.kernel = driver.function(self._module, "scale")
            self._memory = driver.allocate(4 * spec.timesteps, "its factors")
        self.factors = self._memory.value
        self.heal()

    def heal(self) -> None:
        """Output the right values at every t again."""
        self._write(factors(self.spec))

    def poison(self, t: int, value: float) -> None:
        """Output ``value``·x at one t: NaN, or an infinity."""
        poisoned = factors(self.spec)
        poisoned[t] = value
        self._write(poisoned)

    def _write(self, values: NDArray[np.float32]) -> None:
        with self.driver.current(), self.driver.stream() as stream:
            self.driver.copy_in(self.factors, values, stream.value)
            self.driver.wait_for_stream(stream.value)

    def check_batch(self, batch: int) -> int:
        if not 1 <= batch <= self.batches[0][1]:
            raise InputError(f"the stand-in takes batches of 1…{self.batches[0][1]}, not {batch}")
        return 0

    def network(
        self, batch: int, *, x: int, t: int, out: int, var: int = 0, conditioning: object = (), stream: int
    ) -> Network:
        self.check_batch(batch)
        return Network(self, batch, x, t, [address for address in (out, var) if address])

    def close(self) -> None:
        self._memory.close()
        self._module.close()


class Network:
    """The network for one batch in device memory."""

    def __init__(self, device: StandIn, batch: int, x: int, t: int, outputs: Sequence[int]) -> None:
        self._device, self._x, self._t, self._outputs = device, x, t, outputs
        self._image = math.prod(device.spec.shape)
        self._count = batch * self._image

    def enqueue(self, stream: int) -> None:
        device = self._device
        for output in self._outputs:
            arguments = (self._x, self._t, device.factors, output, self._image, self._count)
            device.driver.launch(device.kernel, -(-self._count // 128), 128, stream, arguments, "the stand-in")

    def close(self) -> None:
        pass


class Copying:
    """ε = x, by a copy within the GPU's memory: the smallest network, without a kernel. See :class:`StandIn`."""

    stream, executors = 0, EXECUTORS
    description = "a copy"

    def __init__(self, driver: Driver, spec: ModelSpec = SPEC) -> None:
        self.driver, self.spec, self.batches = driver, spec, ((1, 8),)

    def check_batch(self, batch: int) -> int:
        return 0

    def network(
        self, batch: int, *, x: int, t: int, out: int, var: int = 0, conditioning: object = (), stream: int
    ) -> CopyingNetwork:
        return CopyingNetwork(self.driver, x, out, 4 * batch * math.prod(self.spec.shape))

    def close(self) -> None:
        pass


class CopyingNetwork:
    """The copy for one batch."""

    def __init__(self, driver: Driver, x: int, out: int, size: int) -> None:
        self._driver, self._x, self._out, self._size = driver, x, out, size

    def enqueue(self, stream: int) -> None:
        self._driver.copy(self._out, self._x, self._size, stream)

    def close(self) -> None:
        pass


class CopyingTwin:
    """The copy in NumPy."""

    description = "a copy, in NumPy"

    def bind(self, buffers: Buffers) -> None:
        self._buffers = buffers

    def enqueue(self) -> None:
        self._buffers.out[...] = self._buffers.x

    def close(self) -> None:
        pass


# --- expected results ------------------------------------------------------------------------------------------------


def table_of(spec: ModelSpec = SPEC, steps: int = STEPS, **more: Any) -> Table:
    return make_table(spec.make_schedule(), spec.prediction, spec.variance, steps=steps, **more)


def walk(
    indices: Sequence[int], *, spec: ModelSpec = SPEC, table: Table | None = None, seed: int = SEED, x: Any = None
) -> list[chain.Step]:
    """NumPy's chain of the stand-in, step by step, as copies."""
    drawn = np.array(indices, np.int64)
    start = chain.initial(seed, drawn, spec.shape) if x is None else x
    steps = chain.run(Twin(spec), table or table_of(spec), start, seed=seed, images=drawn, clip=spec.clip)
    return [chain.Step(step.t, step.x.copy(), step.x0.copy(), step.x_next.copy()) for step in steps]


def drawn(indices: Sequence[int], **more: Any) -> NDArray[np.uint8]:
    """NumPy's images of the stand-in, uint8 [n, H, W, C]."""
    return to_nhwc(walk(indices, **more)[-1].x0)
