"""An array by DLPack, as another library would export it."""

from __future__ import annotations

import ctypes

from ddpmx.arrays.dlpack import DLManagedTensor, DLManagedTensorVersioned

FAR = 0x7F00_0000_0000  # reading there would end the process


DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)
FLOAT32 = (2, 32, 1)


class Producer:
    """An array by DLPack, as another library would export it.

    ``deleted`` counts how often its deleter ran; ``requests`` are the arguments of each ``__dlpack__``.
    """

    versioned = True

    def __init__(self, device=(2, 2), *, announced=None, data=FAR, shape=(2, 3), strides=None, dtype=FLOAT32, **more):
        self.announced, self.deleted, self.requests = announced or device, 0, []
        self.managed = managed = (DLManagedTensorVersioned if self.versioned else DLManagedTensor)()
        self.deleter = DELETER(self.delete)
        managed.deleter = ctypes.cast(self.deleter, ctypes.c_void_p)
        if self.versioned:
            managed.major, managed.minor, managed.flags = more.get("major", 1), 9, more.get("flags", 0)
        tensor = managed.dl_tensor
        tensor.data, tensor.byte_offset, tensor.ndim = data, more.get("offset", 0), more.get("ndim", len(shape))
        tensor.device.type, tensor.device.id = device
        tensor.dtype.code, tensor.dtype.bits, tensor.dtype.lanes = dtype
        self.arrays = [(ctypes.c_int64 * len(axes))(*axes) for axes in (shape, strides or ())]
        if not more.get("shapeless"):
            tensor.shape = self.arrays[0]
        if strides is not None:
            tensor.strides = self.arrays[1]

    def delete(self, address):
        assert address == ctypes.addressof(self.managed)
        self.deleted += 1

    def __dlpack_device__(self):
        return self.announced

    def __dlpack__(self, **options):
        self.requests.append(options)
        self.capsule = new_capsule(
            ctypes.addressof(self.managed), b"dltensor_versioned" if self.versioned else b"dltensor", None
        )
        return self.capsule


class Old(Producer):
    """A producer from before DLPack 1.0."""

    versioned = False

    def __dlpack__(self, *, stream=None):
        return super().__dlpack__(**({} if stream is None else {"stream": stream}))


class Wrapped:
    """Something reduced to its DLPack methods."""

    def __init__(self, thing):
        self.__dlpack_device__ = thing.__dlpack_device__
        self.__dlpack__ = thing.__dlpack__
