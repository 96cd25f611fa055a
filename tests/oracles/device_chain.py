"""A toy network on a fake driver, complete: driver, kernels, chain and engine, and the same chain in NumPy."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from ddpmx.backends.base import NO_CONDITIONING, Buffers
from ddpmx.cuda.device_chain import DeviceChain
from ddpmx.cuda.kernels import Kernels
from ddpmx.device.discovery import DRIVER
from ddpmx.device.driver import Driver
from ddpmx.diffusion.samplers import make_table
from ddpmx.errors import BackendError
from ddpmx.sampling import chain
from oracles import gaussian
from oracles.cuda_on_host import Toy

SHAPE = (3, 5, 7)
STEPS = 12
TABLE = make_table(gaussian.SPEC.make_schedule(), "eps", "fixed_small", steps=STEPS)
IMAGES = [7, 0, 2]


class Engine:
    """The toy network in device memory: what TensorRT's execution context is for a DeviceChain.

    Args:
        refuse_at: which enqueue, from 1, is refused.
    """

    def __init__(self, cuda, device_chain, batch, shape=SHAPE, *, poison=None, refuse_at=0):
        self.cuda, self.refuse_at, self.enqueued = cuda, refuse_at, 0
        self.toy = Toy(shape, poison=poison)
        self.toy.bind(
            buffers_at(batch, shape, device_chain.at, device_chain.conditioning, device_chain._conditioning_shapes)
        )

    def __call__(self, stream):
        self.enqueued += 1
        if self.enqueued == self.refuse_at:
            raise BackendError("TensorRT refuses to run the network", note="its last words")
        self.cuda.enqueue(stream, self.toy.enqueue)


def buffers_at(batch, shape, at, conditioning=None, dims=None):
    """A network's arrays at these addresses. ``dims``: the shape of each conditioning input, for one image."""
    x, out, var = (array_at(at[n], (batch, *shape), ctypes.c_float) if at.get(n) else None for n in ("x", "out", "var"))
    arrays = {
        name: array_at(address, (batch, *dims[name]), ctypes.c_int32 if name == "y" else ctypes.c_float)
        for name, address in (conditioning or {}).items()
    }
    return Buffers(x, array_at(at["t"], (batch,), ctypes.c_int32), out, var, **arrays)


def array_at(address, shape, kind):
    return np.ctypeslib.as_array((kind * int(np.prod(shape))).from_address(address)).reshape(shape)


class Setup:
    """Driver, kernels, chain and engine; close them all with ``with``."""

    def __init__(
        self, cuda, *, batch=3, table=TABLE, clip=1.0, with_x0=False, conditioning_shapes=NO_CONDITIONING, **faults
    ):
        self.driver = Driver(library=cuda)
        try:
            self.chain = DeviceChain(
                self.driver,
                Kernels(self.driver),
                SHAPE,
                batch,
                table,
                clip=clip,
                conditioning_shapes=conditioning_shapes,
                with_x0=with_x0,
                description="toy",
            )
            self.engine = Engine(cuda, self.chain, batch, **faults)
        except BaseException:
            self.driver.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.chain.close()
        self.driver.close()


def expected(
    indices=IMAGES,
    *,
    seed=5,
    clip=1.0,
    table=TABLE,
    x=None,
    conditioning_shapes=NO_CONDITIONING,
    conditioning=NO_CONDITIONING,
):
    drawn = np.array(indices, np.int64)
    start = chain.initial(seed, drawn, SHAPE) if x is None else x
    *_, step = chain.run(
        Toy(SHAPE),
        table,
        start,
        seed=seed,
        images=drawn,
        clip=clip,
        conditioning_shapes=conditioning_shapes,
        conditioning=conditioning,
    )
    return step


def no_driver():
    try:
        ctypes.CDLL(DRIVER)
    except OSError:
        return
    pytest.skip("not verified here: the errors where there is no NVIDIA driver (there is one)")
