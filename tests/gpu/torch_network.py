"""A small network in torch that runs in the chain's own stream, where it is captured like TensorRT's kernels."""

from __future__ import annotations

import math
from typing import Any

from ddpmx.backends.base import EXECUTORS
from ddpmx.device.driver import Driver
from ddpmx.formats.spec import ModelSpec


class Seen:
    """Device memory of another owner, for torch to view."""

    def __init__(self, address: int, shape: tuple[int, ...], typestr: str) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": typestr,
            "data": (address, False),
            "version": 3,
            "strides": None,
        }


class TorchDevice:
    """Two convolutions with random weights, a :class:`ddpmx.backends.base.DeviceBackend`. The caller closes the driver."""

    stream, executors, batches = 0, EXECUTORS, ((1, 8),)
    description = "torch"

    def __init__(self, driver: Driver, torch: Any, device: str = "cuda") -> None:
        self.driver, self.torch, self.device = driver, torch, device
        self.spec = ModelSpec((3, 16, 16), timesteps=1000, ddpmx="0.1.0")
        torch.manual_seed(0)
        layers = torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(32, 3, 3, padding=1)
        self.layers = torch.nn.Sequential(*layers).to(device).requires_grad_(False)

    def check_batch(self, batch: int) -> int:
        return 0

    def network(
        self, batch: int, *, x: int, t: int, out: int, var: int = 0, conditioning: object = (), stream: int
    ) -> TorchNetwork:
        return TorchNetwork(self, batch, x, t, out)

    def see(self, address: int, shape: tuple[int, ...], typestr: str) -> Any:
        """Device memory as a tensor."""
        assert math.prod(shape) > 0
        return self.torch.as_tensor(Seen(address, shape, typestr), device=self.device)

    def put(self, stream: int, work: Any) -> None:
        """Run torch's work in this stream."""
        with self.torch.cuda.stream(self.torch.cuda.ExternalStream(stream)):
            work()

    def close(self) -> None:
        pass


class TorchNetwork:
    """The network for one batch. Once it has run in a stream, torch's cache holds all memory that it needs there."""

    def __init__(self, device: TorchDevice, batch: int, x: int, t: int, out: int) -> None:
        self._device = device
        image = (batch, *device.spec.shape)
        self._x, self._out = (device.see(address, image, "<f4") for address in (x, out))
        self._t = device.see(t, (batch,), "<i4")

    def compute(self) -> None:
        torch = self._device.torch
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            time = torch.sin(0.01 * self._t.to(torch.float32)).reshape(-1, 1, 1, 1)
            self._out.copy_(self._x - self._device.layers(self._x + time))

    def enqueue(self, stream: int) -> None:
        self._device.put(stream, self.compute)

    def close(self) -> None:
        pass
