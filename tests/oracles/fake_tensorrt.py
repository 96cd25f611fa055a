"""A TensorRT whose engines are the toy network, for control flow."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

from ddpmx import tensorrt_library
from ddpmx.backends import Buffers
from ddpmx.device import Device, Gpus
from oracles.cuda_on_host import Toy
from oracles.device_chain import array_at
from oracles.plans import SPEC, name_of

ADA = Gpus((Device("NVIDIA RTX 4090", "8.9", 24 << 30),), "13.0")


class FakeTrt:
    """A TensorRT whose engines are the toy network, for control flow."""

    class DataType:
        FLOAT, INT32, HALF = "FLOAT", "INT32", "HALF"

    class TensorIOMode:
        INPUT, OUTPUT = "INPUT", "OUTPUT"

    class TensorLocation:
        DEVICE, HOST = "DEVICE", "HOST"

    class CudaGraphStrategy:
        DISABLED = "DISABLED"

    class DynamicShapesKernelSpecializationStrategy:
        EAGER = "EAGER"

    class ILogger:
        class Severity:
            ERROR = 1

    def __init__(self, cuda, profiles=((1, 4, 8),), *, name=None, tensors=None):
        self.cuda, self.profiles = cuda, profiles
        self.name = name_of().decode() if name is None else name
        self.tensors = tensors or {
            "x": ("INPUT", "FLOAT", (-1, *SPEC.shape)),
            "t": ("INPUT", "INT32", (-1,)),
            "eps": ("OUTPUT", "FLOAT", (-1, *SPEC.shape)),
        }
        self.refuse: set[str] = set()
        self.contexts, self.loaded = [], []
        self.make = lambda: Toy(SPEC.shape)
        self.logger = SimpleNamespace(lines=[])

    def library(self):
        return tensorrt_library.Library(self, "TensorRT-RTX", "1.7.1.116", self.logger)

    def says(self, name):
        if name in self.refuse:
            self.logger.lines.append((1, f"[{name}] refused"))
        return name not in self.refuse

    def Runtime(self, logger):
        return SimpleNamespace(deserialize_cuda_engine=lambda data: self.engine() if self.says("deserialize") else None)

    def engine(self):
        names = list(self.tensors)
        return SimpleNamespace(
            name=self.name,
            num_io_tensors=len(names),
            num_optimization_profiles=len(self.profiles),
            get_tensor_name=names.__getitem__,
            get_tensor_mode=lambda name: self.tensors[name][0],
            get_tensor_dtype=lambda name: self.tensors[name][1],
            get_tensor_shape=lambda name: self.tensors[name][2],
            get_tensor_location=lambda name: "DEVICE",
            get_tensor_profile_shape=lambda name, index: [
                (n, *SPEC.shape)[: 4 if name == "x" else 1] for n in self.profiles[index]
            ],
            create_runtime_config=lambda: FakeConfig(self),
            create_execution_context=lambda config: FakeContext(self, config) if self.says("context") else None,
        )


class FakeConfig:
    def __init__(self, fake):
        self.fake = fake

    def create_runtime_cache(self):
        return SimpleNamespace(deserialize=self.fake.loaded.append, serialize=lambda: b"compiled")

    def set_runtime_cache(self, cache):
        return self.fake.says("cache")


class FakeContext:
    def __init__(self, fake, config):
        self.fake, self.config, self.profile = fake, config, 0
        self.shapes, self.addresses = {}, {}
        fake.contexts.append(self)

    def set_optimization_profile_async(self, index, stream):
        self.profile = index
        return self.fake.says("profile")

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        return self.fake.says("shape")

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return self.fake.says("address")

    def infer_shapes(self):
        return [] if self.fake.says("infer") else ["eps"]

    def execute_async_v3(self, stream):
        if not self.fake.says("execute"):
            return False
        shape = self.shapes["x"]
        toy = self.fake.make()
        toy.bind(
            Buffers(
                array_at(self.addresses["x"], shape, ctypes.c_float),
                array_at(self.addresses["t"], self.shapes["t"], ctypes.c_int32),
                array_at(self.addresses["eps"], shape, ctypes.c_float),
            )
        )
        self.fake.cuda.enqueue(stream, toy.enqueue)
        return True
