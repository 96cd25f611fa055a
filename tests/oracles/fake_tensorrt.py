"""A TensorRT whose engines are the toy network, for control flow."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from ddpmx.device.discovery import Device, Gpus
from ddpmx.trt import library as trt_library
from oracles.cuda_on_host import Toy
from oracles.device_chain import buffers_at
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

    def __init__(self, cuda, profiles=((1, 4, 8),), *, name=None, tensors=None, spec=SPEC):
        self.cuda, self.profiles, self.spec = cuda, profiles, spec
        self.name = name_of(spec).decode() if name is None else name
        self.tensors = tensors or {
            **{n: ("INPUT", "INT32" if n in ("t", "y") else "FLOAT", (-1, *d)) for n, d in spec.inputs.items()},
            "eps": ("OUTPUT", "FLOAT", (-1, *spec.shape)),
        }
        self.refuse: set[str] = set()
        self.general_first = False  # a context's first run has kernels for any shape, with other bits
        self.contexts, self.loaded = [], []
        self.make = lambda: Toy(SPEC.shape)
        self.logger = SimpleNamespace(lines=[])

    def library(self):
        return trt_library.Library(self, "TensorRT-RTX", "1.7.1.116", self.logger)

    def accepts(self, name):
        if name in self.refuse:
            self.logger.lines.append((1, f"[{name}] refused"))
        return name not in self.refuse

    def Runtime(self, logger):
        return SimpleNamespace(
            deserialize_cuda_engine=lambda data: self.engine() if self.accepts("deserialize") else None
        )

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
                (n, *self.tensors[name][2][1:]) for n in self.profiles[index]
            ],
            create_runtime_config=lambda: FakeConfig(self),
            create_execution_context=lambda config: FakeContext(self, config) if self.accepts("context") else None,
        )


class FakeConfig:
    def __init__(self, fake):
        self.fake = fake

    def create_runtime_cache(self):
        return SimpleNamespace(deserialize=self.fake.loaded.append, serialize=lambda: b"compiled")

    def set_runtime_cache(self, cache):
        return self.fake.accepts("cache")


class FakeContext:
    def __init__(self, fake, config):
        self.fake, self.config, self.profile = fake, config, 0
        self.shapes, self.addresses, self.ran = {}, {}, False
        fake.contexts.append(self)

    def set_optimization_profile_async(self, index, stream):
        self.profile = index
        return self.fake.accepts("profile")

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        return self.fake.accepts("shape")

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return self.fake.accepts("address")

    def infer_shapes(self):
        return [] if self.fake.accepts("infer") else ["eps"]

    def execute_async_v3(self, stream):
        if not self.fake.accepts("execute"):
            return False
        batch, *shape = self.shapes["x"]
        assert self.shapes == {name: (batch, *dims) for name, dims in self.fake.spec.inputs.items()}
        toy, at = self.fake.make(), {"out": self.addresses["eps"], **self.addresses}
        conditioning = {name: self.addresses[name] for name in self.fake.spec.conditioning_shapes}
        buffers = buffers_at(batch, shape, at, conditioning, self.fake.spec.conditioning_shapes)
        toy.bind(buffers)
        general, self.ran = self.fake.general_first and not self.ran, True

        def run():
            toy.enqueue()
            if general:
                np.multiply(buffers.out, 1.25, out=buffers.out)

        self.fake.cuda.enqueue(stream, run)
        return True
