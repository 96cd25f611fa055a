"""Arrays that stay on the GPU, for PyTorch, CuPy and every library with DLPack or the CUDA array interface."""

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
    """An array in a GPU's memory, C-contiguous, whose content is complete when it is returned.

    ``torch.from_dlpack(array)``, ``cupy.from_dlpack(array)`` and the like use it in place; ``numpy()`` copies it to the
    host. The memory is freed when nobody uses it any more: neither this array, which may be closed, nor the consumers that
    took it by DLPack. A context manager.

    Args:
        memory: at least as many bytes as the array needs; owned by the array from now on.
        shape: of the array.
        dtype: of its elements.
        driver: that allocated the memory. Closing it frees the memory as well: see :meth:`allocate`.
        owned: whether the driver belongs to the array alone, and is closed instead of the memory.

    Attributes:
        shape, dtype, driver: as passed.
    """

    _device_type = CUDA

    def __init__(
        self, memory: Handle, shape: tuple[int, ...], dtype: DTypeLike, driver: Driver, *, owned: bool = False
    ) -> None:
        self.shape, self.dtype, self.driver = shape, np.dtype(dtype), driver
        self._memory = memory
        self._owner: Owner | None = Owner(driver.close if owned else memory.close)
        self._shown: Owner | None = None

    @classmethod
    def allocate(cls, driver: Driver, shape: tuple[int, ...], dtype: DTypeLike, what: str) -> DeviceArray:
        """A new array with undefined content, which outlives ``driver``: it opens the GPU for itself.

        Args:
            driver: the GPU.
            shape: of the array.
            dtype: of its elements.
            what: what it holds, for error messages.

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
        """The first element's address on the GPU.

        Raises:
            InputError: the array was closed.
            BackendError: its driver was closed.
        """
        return self._held()[0]

    def _held(self) -> tuple[int, Owner]:
        owner = self._owner
        if owner is None:
            raise InputError("the array was closed")
        return self._memory.value, owner

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """CUDA Array Interface 3. No stream: there is nothing to wait for."""
        address, owner = self._held()
        self._shown = owner  # a consumer keeps the array itself alive, and never reports when it is done
        data, dtype = (address if self.nbytes else 0, False), self.dtype.str
        return {"shape": self.shape, "typestr": dtype, "data": data, "strides": None, "version": 3, "stream": None}

    def __dlpack_device__(self) -> tuple[int, int]:
        """(kind of device, its index)."""
        return self._device_type, self.driver.ordinal if self._device_type == CUDA else 0

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """A DLPack capsule with this memory; with ``dl_device=(1, 0)``, the host, with a copy.

        NumPy makes the capsule, from an array that pretends to lie on the host, and the device is corrected in it. So its
        deleter is NumPy's C code: a callback in Python could not run while an exception propagates, which is how a
        consumer that refuses drops a capsule, nor after Python has ended.

        Args:
            stream: the consumer's. There is nothing to wait for in it.
            max_version: the newest DLPack that the consumer reads. NumPy before 2.1 makes capsules of before 1.0.
            dl_device: the device where the consumer needs it.
            copy: whether it has to be a copy.

        Raises:
            BufferError: it is needed on another GPU, or as a copy on this one.
            InputError: the array was closed.
        """
        options = {"max_version": tuple(max_version)} if max_version is not None else {}
        address, owner = self._held()
        here = self.__dlpack_device__()
        wanted = here if dl_device is None else (int(dl_device[0]), int(dl_device[1]))
        if wanted == here and not copy:
            return self._placed(
                _capsule(np.asarray(ArrayInterface(address, self.shape, self.dtype, owner, True)), options)
            )
        if wanted == (CPU, 0) and copy is not False:
            return _capsule(self.numpy(), options)
        raise BufferError(
            f"an array on DLPack's device {here} cannot be exported {'as a copy ' if copy else ''}on {wanted}"
        )

    def _placed(self, capsule: object) -> object:
        opened = open_capsule(capsule)
        if opened is None:
            raise BackendError("NumPy did not make a DLPack capsule", note=f"NumPy {np.__version__}")
        device = opened[0].dl_tensor.device
        device.type, device.id = self.__dlpack_device__()
        return capsule

    def numpy(self) -> NDArray[Any]:
        """A copy on the host. Writes to the array have to be finished before.

        Raises:
            InputError: the array was closed.
            BackendError: the driver refuses.
        """
        address, _owner = self._held()  # kept, since another thread may close the array meanwhile
        host = np.empty(self.shape, self.dtype)
        if host.nbytes:
            with self.driver.current(), self.driver.stream() as stream:
                self.driver.copy_out(host, address, stream.value)
                self.driver.wait_for_stream(stream.value, "copying an array to the host")
        return host

    def __array__(self, *arguments: object, **options: object) -> NDArray[Any]:
        """Refused: copies to the host are always explicit.

        Raises:
            InputError: always.
        """
        raise InputError("the array is in a GPU's memory", hint="array.numpy() copies it to the host")

    def abandon(self) -> None:
        """Never free the memory before the process ends, since freeing would wait for a device that does not respond."""
        if self._owner is not None:
            self._owner.abandon()
            self._memory.abandon()

    def close(self) -> None:
        """Release it here; consumers by DLPack or the array interface keep it. Safe to call again."""
        self._owner = None

    def __enter__(self) -> DeviceArray:
        """The array itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        """Close it."""
        self.close()

    def __len__(self) -> int:
        """The length of the first axis."""
        if not self.shape:
            raise TypeError("an array without axes has no length")
        return self.shape[0]

    def __repr__(self) -> str:
        """Type, shape and place."""
        where = "closed" if self._owner is None else f"GPU {self.driver.ordinal}"
        return f"DeviceArray({self.dtype.name} {list(self.shape)}, {where})"


def _capsule(array: NDArray[Any], options: dict[str, Any]) -> Any:
    try:
        return array.__dlpack__(**options)
    except TypeError:  # NumPy before 2.1 has no versions, and makes what every consumer reads
        return array.__dlpack__()
