"""Arrays on the GPU from three sources: each can make one, read one, and adopt one of ddpmx's without a copy."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ddpmx.device.driver import Driver, Handle


class Maker(Protocol):
    """A library with arrays on the GPU."""

    def make(self, values: NDArray[Any]) -> Any:
        """A new array with these values."""

    def read(self, array: Any) -> NDArray[Any]:
        """Its values."""

    def adopt(self, array: Any) -> Any:
        """An array of ddpmx's as one of this library, on the same memory."""


class Ours:
    """The plain ``__cuda_array_interface__``, with memory from the driver."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    def make(self, values: NDArray[Any]) -> Any:
        with self._driver.current(), self._driver.stream() as stream:
            made = OnDevice(self._driver.allocate(values.nbytes, "another library's array"), values.shape, values.dtype)
            self._driver.copy_in(made.handle.value, values, stream.value)
            self._driver.wait_for_stream(stream.value)
        return made

    def read(self, array: Any) -> NDArray[Any]:
        interface = array.__cuda_array_interface__
        values = np.empty(interface["shape"], interface["typestr"])
        with self._driver.current(), self._driver.stream() as stream:
            self._driver.copy_out(values, interface["data"][0], stream.value)
            self._driver.wait_for_stream(stream.value)
        return values

    def adopt(self, array: Any) -> Any:
        return array


class OnDevice:
    """An array with ``__cuda_array_interface__`` and nothing else."""

    def __init__(self, handle: Handle, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.handle = handle
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": dtype.str,
            "data": (handle.value, False),
            "version": 3,
            "strides": None,
            "stream": None,
        }


class Torch:
    """torch's tensors."""

    def __init__(self, torch: Any, device: str) -> None:
        self._torch, self._device = torch, device

    def make(self, values: NDArray[Any]) -> Any:
        return self._torch.from_numpy(values.copy()).to(self._device)

    def read(self, array: Any) -> NDArray[Any]:
        values: NDArray[Any] = array.cpu().numpy()
        return values

    def adopt(self, array: Any) -> Any:
        return self._torch.from_dlpack(array)


class Cupy:
    """cupy's arrays."""

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy

    def make(self, values: NDArray[Any]) -> Any:
        return self._cupy.asarray(values)

    def read(self, array: Any) -> NDArray[Any]:
        values: NDArray[Any] = self._cupy.asnumpy(array)
        return values

    def adopt(self, array: Any) -> Any:
        return self._cupy.from_dlpack(array)
