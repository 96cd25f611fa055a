"""The arrays and streams of other libraries, as types: what has to be there, whoever made it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, Union

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Sequence


class SupportsDLPack(Protocol):
    """An array that speaks DLPack: NumPy's, PyTorch's, CuPy's, JAX's."""

    def __dlpack__(self) -> object:
        """A capsule with the array's memory."""

    def __dlpack_device__(self) -> tuple[int, int]:
        """(kind of device, which of them)."""


class SupportsCudaArray(Protocol):
    """An array in a GPU's memory that has the CUDA array interface, version 2 or 3: Numba's, CuPy's."""

    @property
    def __cuda_array_interface__(self) -> Mapping[str, Any]:
        """Address, shape, type and stream."""


class SupportsArrayInterface(Protocol):
    """An array on the host that has NumPy's array interface."""

    @property
    def __array_interface__(self) -> Mapping[str, Any]:
        """Address, shape and type."""


class SupportsCudaStream(Protocol):
    """A CUDA stream of CUDA's own Python packages."""

    def __cuda_stream__(self) -> tuple[int, int]:
        """(version of the protocol, handle)."""


class HasCudaStream(Protocol):
    """A CUDA stream of PyTorch's."""

    @property
    def cuda_stream(self) -> int:
        """The handle."""


AnyArray = SupportsDLPack | SupportsCudaArray | SupportsArrayInterface
"""An array that is read, or written, where it lies. See :func:`ddpmx.arrays.views.view`."""

CudaStream = int | SupportsCudaStream | HasCudaStream
"""A CUDA stream: its handle, or an object that has one."""

Labels = Union[int, str, "Sequence[int]", "Sequence[str]", "NDArray[np.integer[Any]]", AnyArray]
"""Classes: one for all images, or one for each: whole numbers, in a list or in an array on the host, or their names."""

Target = TypeVar("Target", bound=AnyArray)
"""The array that the caller gives for the images, and gets back."""
