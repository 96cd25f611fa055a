"""The toy network as a DeviceBackend, on a fake driver."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ddpmx.backends.base import EXECUTORS, NO_CONDITIONING
from ddpmx.device.driver import Driver
from ddpmx.errors import BackendError, InputError
from oracles.cuda_on_host import Toy
from oracles.device_chain import buffers_at


class Sharp(Toy):
    """The toy, with faults of single images.

    Args:
        poisoned_t: the output of every image at that t is not finite.
        sways: the output depends on the "size" of the batch, or on an image's "place" in it.
    """

    def __init__(self, shape, *, poisoned_t=None, sways=None):
        super().__init__(shape)
        self.poisoned_t, self.sways = poisoned_t, sways

    def enqueue(self):
        super().enqueue()
        out, t = self.buffers.out, self.buffers.t
        if self.sways == "size":
            out += np.float32(0.01 * len(out))
        elif self.sways == "place":
            out += np.float32(0.01) * np.arange(len(out), dtype=np.float32)[:, None, None, None]
        if self.poisoned_t is not None:
            out[t == self.poisoned_t, -1, -1, -1] = np.nan


class ToyDevice:
    """Args: the fake library; the model; what makes the network; batches; executors; a stream that it insists on.

    Attributes:
        live: networks that were made and not closed, by batch.
        sizes: the batch of each run.
        stale: the network runs while it is captured, and a graph of it replays nothing.
        most: how many networks there is memory for.
        refuse: the next run is refused.
        hook: called with the number of each run, from 1, before the host puts it into a stream.
    """

    description = "toy device"

    def __init__(
        self,
        cuda,
        spec,
        *,
        make: Callable[[], Toy] | None = None,
        largest: int = 8,
        executors: tuple[str, ...] = EXECUTORS,
        own_stream: bool = False,
    ):
        self.cuda, self.spec, self.executors = cuda, spec, executors
        self.driver = Driver(library=cuda)
        self.make = make or (lambda: Sharp(spec.shape))
        self.batches = ((1, largest),)
        self.live: list[int] = []
        self.most = 1 << 30
        self.sizes: list[int] = []
        self.stale = self.refuse = self.closed = False
        self.hook: Callable[[int], object] | None = None
        self.runs = 0
        self._own, self.stream = None, 0
        if own_stream:
            with self.driver.current():
                self._own = self.driver.stream()
                self.stream = self._own.value

    def check_batch(self, batch):
        if batch > self.batches[0][1]:
            raise InputError("too large")
        return 0

    def network(self, batch, *, x, t, out, var=0, conditioning=NO_CONDITIONING, stream):
        assert not self.stream or stream == self.stream
        self.check_batch(batch)
        if len(self.live) >= self.most:
            raise BackendError("no memory for another network")
        return Network(self, batch, {"x": x, "t": t, "out": out, "var": var}, conditioning)

    def close(self):
        assert not self.live, "closed before its networks"
        if self._own is not None:
            self._own.close()
        self.driver.close()
        self.closed = True


class Network:
    def __init__(self, device, batch, at, conditioning):
        self.device, self.batch, self.toy = device, batch, device.make()
        self.toy.bind(buffers_at(batch, device.spec.shape, at, conditioning, device.spec.conditioning_shapes))
        device.live.append(batch)
        self.open = True

    def enqueue(self, stream):
        assert self.open, "a network that was closed"
        if self.device.hook is not None:
            self.device.runs += 1
            self.device.hook(self.device.runs)
        if self.device.refuse:
            raise BackendError("the toy refuses")

        def run():
            self.device.sizes.append(self.batch)
            assert (self.toy.buffers.t >= 0).all()
            assert (self.toy.buffers.t < self.device.spec.timesteps).all()
            self.toy.enqueue()

        if self.device.stale and self.device.driver.is_capturing(stream):
            run()
        else:
            self.device.cuda.enqueue(stream, run)

    def close(self):
        if self.open:
            self.device.live.remove(self.batch)
        self.open = False
