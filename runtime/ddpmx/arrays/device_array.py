"""Arrays that stay on the GPU, for PyTorch, CuPy and everybody else who speaks DLPack or the CUDA array interface."""

from __future__ import annotations

import math
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ddpmx.arrays.dlpack import CPU, CUDA, ArrayInterface, Owner, open_capsule
from ddpmx.errors import BackendError, InputError

if TYPE_CHECKING:
    from ddpmx.device.driver import Driver, Handle


class DeviceArray:
    """An array in a GPU's memory, complete when it is handed out. NumPy's order (C-contiguous).

    ``torch.from_dlpack(array)``, ``cupy.from_dlpack(array)`` and their like take it as it lies there; ``numpy()`` copies
    it to the host. The memory is freed when nobody needs it any more: neither this array, which may be closed,
    nor those who took it by DLPack. A context manager.

    Args:
        memory: at least as many bytes; the array's from now on.
        shape: of the array.
        dtype: of its elements.
        driver: with which the memory was allocated. If that is closed, the memory goes with it: see :meth:`allocate`.
        owned: the driver is the array's alone, and closed in the memory's stead.

    Attributes:
        shape, dtype, driver: as given.
    """

    _device_type = CUDA

    def __init__(
        self, memory: Handle, shape: tuple[int, ...], dtype: DTypeLike, driver: Driver, *, owned: bool = False
    ) -> None:
        self.shape, self.dtype, self.driver = shape, np.dtype(dtype), driver
        self._memory = memory
        self._hold: Owner | None = Owner(driver.close if owned else memory.close)
        self._shown: Owner | None = None

    @classmethod
    def allocate(cls, driver: Driver, shape: tuple[int, ...], dtype: DTypeLike, what: str) -> DeviceArray:
        """A new array of any content, which outlives ``driver``: it has a hold on the GPU of its own.

        Args:
            driver: the GPU.
            shape: of the array.
            dtype: of its elements.
            what: it is, for error messages.

        Raises:
            BackendError: the memory does not suffice.
        """
        own = type(driver)(driver.ordinal, library=driver._library)
        try:
            with own.current():
                memory = own.allocate(max(1, math.prod(shape) * np.dtype(dtype).itemsize), what)
        except BaseException:
            own.close()
            raise
        return cls(memory, shape, dtype, own, owned=True)

    @property
    def address(self) -> int:
        """Of the first element, on the GPU.

        Raises:
            InputError: it was closed.
            BackendError: its driver was.
        """
        return self._held()[0]

    def _held(self) -> tuple[int, Owner]:
        hold = self._hold
        if hold is None:
            raise InputError("the array was closed")
        return self._memory.value, hold

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """CUDA Array Interface 3. No stream: nothing is to be waited for."""
        address, hold = self._held()
        self._shown = hold  # those who read this keep the array itself, and never say when they are done
        data, dtype = (address if self.nbytes else 0, False), self.dtype.str
        return {"shape": self.shape, "typestr": dtype, "data": data, "strides": None, "version": 3, "stream": None}

    def __dlpack_device__(self) -> tuple[int, int]:
        """Kind of device, and which of them."""
        return self._device_type, self.driver.ordinal if self._device_type == CUDA else 0

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """A capsule of DLPack's with this memory; with ``dl_device=(1, 0)``, the host, with a copy.

        NumPy makes the capsule, of an array that pretends to lie on the host, and the device is put right in it. So what
        deletes it is NumPy's C: a callback in Python could not run while an exception is on its way, which is how a
        consumer that refuses drops a capsule, nor after Python's end.

        Args:
            stream: the consumer's. Nothing has to be waited for in it.
            max_version: the newest DLPack that the consumer reads. NumPy before 2.1 gives the one of before 1.0.
            dl_device: where it is wanted.
            copy: whether it is to be a copy.

        Raises:
            BufferError: it is wanted on another GPU, or as a copy on this one.
            InputError: it was closed.
        """
        options = {"max_version": tuple(max_version)} if max_version is not None else {}
        address, hold = self._held()
        here = self.__dlpack_device__()
        wanted = here if dl_device is None else (int(dl_device[0]), int(dl_device[1]))
        if wanted == here and not copy:
            return self._placed(
                _capsule(np.asarray(ArrayInterface(address, self.shape, self.dtype, hold, True)), options)
            )
        if wanted == (CPU, 0) and copy is not False:
            return _capsule(self.numpy(), options)
        raise BufferError(f"an array on DLPack's device {here} is not given {'as a copy ' if copy else ''}on {wanted}")

    def _placed(self, capsule: object) -> object:
        held = open_capsule(capsule)
        if held is None:
            raise BackendError("NumPy gives no capsule of DLPack's", note=f"NumPy {np.__version__}")
        device = held[0].dl_tensor.device
        device.type, device.id = self.__dlpack_device__()
        return capsule

    def numpy(self) -> NDArray[Any]:
        """A copy on the host. Who has written to the array since has to have waited for that.

        Raises:
            InputError: it was closed.
            BackendError: the driver refuses.
        """
        address, _hold = self._held()  # the hold: another thread may close the array meanwhile
        host = np.empty(self.shape, self.dtype)
        if host.nbytes:
            with self.driver.current(), self.driver.stream() as stream:
                self.driver.copy_out(host, address, stream.value)
                self.driver.wait_for_stream(stream.value, "copying an array to the host")
        return host

    def __array__(self, *arguments: object, **options: object) -> NDArray[Any]:
        """Refused: nothing crosses the bus unasked.

        Raises:
            InputError: always.
        """
        raise InputError("the array is in a GPU's memory", hint="array.numpy() copies it to the host")

    def abandon(self) -> None:
        """Leave the memory to the end of the process, since freeing it would wait for a device that does not answer."""
        if self._hold is not None:
            self._hold.abandon()
            self._memory.abandon()

    def close(self) -> None:
        """Done with it here; who took it by DLPack or the array interface still has it. Again is harmless."""
        self._hold = None

    def __enter__(self) -> DeviceArray:
        """The array itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        """Close it."""
        self.close()

    def __len__(self) -> int:
        """Of the first axis."""
        if not self.shape:
            raise TypeError("an array without axes has no length")
        return self.shape[0]

    def __repr__(self) -> str:
        """Type, shape and place."""
        where = "closed" if self._hold is None else f"GPU {self.driver.ordinal}"
        return f"DeviceArray({self.dtype.name} {list(self.shape)}, {where})"


def _capsule(array: NDArray[Any], options: dict[str, Any]) -> Any:
    try:
        return array.__dlpack__(**options)
    except TypeError:  # NumPy before 2.1 knows no versions, and gives what everybody reads
        return array.__dlpack__()
