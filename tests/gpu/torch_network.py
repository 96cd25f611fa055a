"""Networks of torch's that run in the chain's own stream, where they are captured like TensorRT's kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ddpmx.backends.base import EXECUTORS
from ddpmx.device.driver import Driver
from ddpmx.errors import BackendError, InputError
from ddpmx.formats.spec import ModelSpec

Call = Callable[[Any, Any], Any]
"""The output, of x float32 [B, C, H, W] and t int32 [B]."""


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
    """A network of torch's, a :class:`ddpmx.backends.base.DeviceBackend`. The caller closes the driver.

    Args:
        driver: the GPU.
        torch: the library.
        spec: of a network whose inputs are x and t alone.
        call: the network, on ``device``.
        largest: the largest batch.
        device: where torch computes.
    """

    stream, executors = 0, EXECUTORS

    def __init__(
        self, driver: Driver, torch: Any, spec: ModelSpec, call: Call, *, largest: int = 8, device: str = "cuda"
    ) -> None:
        self.driver, self.torch, self.spec, self.call, self.device = driver, torch, spec, call, device
        self.batches = ((1, largest),)
        self.description = f"torch {torch.__version__}, {spec.precision}"

    def check_batch(self, batch: int) -> int:
        if not 1 <= batch <= self.batches[0][1]:
            raise InputError(f"torch runs batches of 1…{self.batches[0][1]} here, not {batch}")
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
        """The same kernels every time: none is chosen by measuring, and none adds in another order."""
        torch = self._device.torch
        exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        with torch.no_grad(), exact:
            self._out.copy_(self._device.call(self._x, self._t))

    def enqueue(self, stream: int) -> None:
        """Put its kernels into the stream.

        Raises:
            BackendError: torch refuses, as it may where the stream is captured.
        """
        try:
            self._device.put(stream, self.compute)
        except RuntimeError as error:
            note = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            raise BackendError(f"{self._device.description} does not run in this stream", note=note) from error

    def close(self) -> None:
        pass


# --- networks --------------------------------------------------------------------------------------------------------


def small(torch: Any, device: str = "cuda") -> tuple[ModelSpec, Call]:
    """Two convolutions with random weights."""
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(32, 3, 3, padding=1)
    network = torch.nn.Sequential(*layers).to(device).requires_grad_(False)

    def call(x: Any, t: Any) -> Any:
        return x - network(x + torch.sin(0.01 * t.to(torch.float32)).reshape(-1, 1, 1, 1))

    return ModelSpec((3, 16, 16), timesteps=1000, ddpmx="0.1.0"), call


def of_checkpoint(checkpoint: str, precision: str, device: str = "cuda") -> tuple[ModelSpec, Call]:
    """The network of a run or checkpoint, cast as for an export in this precision."""
    from ddpm_export.graph.onnx_export import to_precision
    from ddpm_export.training.checkpoint import load_network

    network, spec = load_network(checkpoint)
    return spec.replace(precision=precision), to_precision(network, precision).to(device)
