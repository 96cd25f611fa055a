"""Our arrays reach NumPy and PyTorch without a copy, and their memory is freed once, when its last user releases it.

There is no GPU here: "device memory" is the host's. Not verified here: that consumers on CUDA accept them.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from ddpmx.arrays import dlpack
from ddpmx.arrays.device_array import DeviceArray
from ddpmx.arrays.dlpack import DLDataType, DLDevice, DLManagedTensor, DLManagedTensorVersioned, DLTensor
from ddpmx.arrays.views import view
from ddpmx.device.driver import Driver
from ddpmx.errors import BackendError, InputError
from oracles.dlpack import Wrapped
from oracles.fake_cuda import FakeCuda

NUMPY = tuple(map(int, np.__version__.split(".")[:2]))


# --- the layout of dlpack.h ------------------------------------------------------------------------------------------

LAYOUT = {
    DLDevice: "type 0, id 4, sizeof 8",
    DLDataType: "code 0, bits 1, lanes 2, sizeof 4",
    DLTensor: "data 0, device 8, ndim 16, dtype 20, shape 24, strides 32, byte_offset 40, sizeof 48",
    DLManagedTensor: "dl_tensor 0, manager_ctx 48, deleter 56, sizeof 64",
    DLManagedTensorVersioned: "major 0, minor 4, manager_ctx 8, deleter 16, flags 24, dl_tensor 32, sizeof 80",
}
C_NAMES = {"type": "device_type", "id": "device_id", "major": "version.major", "minor": "version.minor"}
PUBLISHED = """
#include <stdint.h>
#include <stddef.h>
typedef struct { uint32_t major, minor; } DLPackVersion;
typedef enum { kDLCPU = 1 } DLDeviceType;
typedef struct { DLDeviceType device_type; int32_t device_id; } DLDevice;
typedef struct { uint8_t code; uint8_t bits; uint16_t lanes; } DLDataType;
typedef struct { void* data; DLDevice device; int32_t ndim; DLDataType dtype; int64_t* shape; int64_t* strides;
                 uint64_t byte_offset; } DLTensor;
typedef struct DLManagedTensor { DLTensor dl_tensor; void* manager_ctx; void (*deleter)(struct DLManagedTensor*);
} DLManagedTensor;
typedef struct DLManagedTensorVersioned { DLPackVersion version; void* manager_ctx;
    void (*deleter)(struct DLManagedTensorVersioned*); uint64_t flags; DLTensor dl_tensor; } DLManagedTensorVersioned;
"""


def offsets(kind):
    at = {name: getattr(kind, name).offset for name, *_ in kind._fields_}
    return {**at, "sizeof": ctypes.sizeof(kind)}


@pytest.mark.parametrize("kind", LAYOUT)
def test_structs_have_the_layout_that_dlpack_1_publishes(kind):
    assert ", ".join(f"{name} {at}" for name, at in offsets(kind).items()) == LAYOUT[kind]


@pytest.mark.parametrize("header", ["published", pytest.param("torch", marks=pytest.mark.torch)])
def test_a_c_compiler_gives_the_structs_the_same_layout(tmp_path, header):
    gcc = shutil.which("gcc") or shutil.which("cc")
    if gcc is None:
        pytest.skip("not verified here: that C lays the structs out the same (no C compiler)")
    if header == "torch":
        spec = importlib.util.find_spec("torch")
        path = Path(spec.origin).parent / "include/ATen/dlpack.h" if spec and spec.origin else None
        if path is None or not path.exists():
            pytest.skip("not verified here: that PyTorch's dlpack.h has the same structs (it is not here)")
        text = f'#include "{path}"\n'
    else:
        text = PUBLISHED
    lines, expected = [], []
    for kind in LAYOUT:
        for name, at in offsets(kind).items():
            what = f"offsetof({kind.__name__}, {C_NAMES.get(name, name)})"
            lines.append(f"sizeof({kind.__name__})" if name == "sizeof" else what)
            expected.append(at)
    source = tmp_path / "layout.c"
    prints = "".join(f'printf("%zu\\n", (size_t){line});' for line in lines)
    source.write_text(f"{text}#include <stdio.h>\nint main(void) {{ {prints} return 0; }}\n")
    subprocess.run([gcc, "-o", tmp_path / "layout", source], check=True)
    printed = subprocess.run([tmp_path / "layout"], check=True, capture_output=True, text=True).stdout
    assert list(map(int, printed.split())) == expected


# --- our arrays ------------------------------------------------------------------------------------------------------


class OnHost(DeviceArray):
    """A DeviceArray in memory that NumPy and PyTorch can read."""

    _device_type = dlpack.CPU


@pytest.fixture
def gpu():
    """A driver whose device memory is the host's."""
    library = FakeCuda(kernels=None)
    with Driver(library=library) as driver:
        yield driver
        gc.collect()
        assert library.alive() == {}, "memory was leaked"
    assert library.faults == []
    assert library.retained == 0


def filled(driver, kind, values):
    with driver.current():
        memory = driver.allocate(values.nbytes, "an array")
    ctypes.memmove(memory.value, values.ctypes.data, values.nbytes)
    return kind(memory, values.shape, values.dtype, driver)


VALUES = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


@pytest.mark.parametrize("consumer", ["numpy", pytest.param("torch", marks=pytest.mark.torch)])
@pytest.mark.parametrize("dtype", [np.float32, np.uint8, np.bool_, np.float16])
def test_consumers_see_the_same_memory_and_it_is_freed_once_after_the_last(gpu, consumer, dtype):
    library = pytest.importorskip(consumer, reason=f"not verified here: {consumer} as a consumer (not installed)")
    values = (VALUES % 7).astype(dtype)
    array = filled(gpu, OnHost, values)
    address = array.address
    first, second = library.from_dlpack(array), library.from_dlpack(array)
    assert (first.data_ptr() if consumer == "torch" else first.ctypes.data) == address
    array.close()
    del array
    del first
    gc.collect()
    assert np.array_equal(np.asarray(second), values)
    assert gpu._library.alive() == {"memory": 1}
    del second
    gc.collect()
    assert gpu._library.count("cuMemFree_v2") == 1


@pytest.mark.parametrize("options", [{}, {"max_version": (1, 0)}, {"max_version": (0, 8)}, {"stream": 1}], ids=str)
def test_a_capsule_names_the_device_and_frees_the_array_if_nobody_consumes_it(gpu, options):
    gpu.ordinal = 3
    array = filled(gpu, DeviceArray, VALUES)
    capsule = array.__dlpack__(**options)
    managed, used = dlpack.open_capsule(capsule)
    tensor = managed.dl_tensor
    versioned = options.get("max_version", (0, 0)) >= (1, 0) and NUMPY >= (2, 1)
    assert used == (b"used_dltensor_versioned" if versioned else b"used_dltensor")
    assert (tensor.device.type, tensor.device.id, tensor.data) == (2, 3, array.address)
    assert array.__dlpack_device__() == (2, 3)
    array.close()
    gc.collect()
    assert gpu._library.alive() == {"memory": 1}
    del capsule
    assert gpu._library.alive() == {}


class Last:
    """Hands out the last reference, so that dropping the capsule frees the memory."""

    def __init__(self, array):
        self.array = array

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()

    def __dlpack__(self, **options):
        capsule = self.array.__dlpack__(**options)
        self.array.close()
        return capsule


def test_a_consumer_that_refuses_keeps_its_own_error_and_no_memory(gpu):
    array = filled(gpu, DeviceArray, VALUES)
    options = {"device": None} if NUMPY >= (2, 1) else {}
    with pytest.raises((RuntimeError, BufferError), match="device"):  # no SystemError
        np.from_dlpack(Last(array), **options)
    array.close()
    assert gpu._library.alive() == {}


def test_memory_is_freed_from_whichever_thread_releases_it_last(gpu):
    array = filled(gpu, OnHost, VALUES)
    threads = [threading.Thread(target=lambda: [np.from_dlpack(array).sum() for _ in range(100)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert gpu._library.count("cuMemFree_v2") == 0
    last = [np.from_dlpack(array)]
    array.close()
    thread = threading.Thread(target=last.clear)
    thread.start()
    thread.join()
    assert gpu._library.alive() == {}


def test_an_array_is_freed_with_its_last_reference_or_by_close(gpu):
    for end in (lambda array: None, DeviceArray.close, lambda array: array.__exit__(None, None, None)):
        array = filled(gpu, DeviceArray, VALUES)
        end(array)
        del array
        assert gpu._library.alive() == {}


def test_a_closed_array_refuses(gpu):
    array = filled(gpu, DeviceArray, VALUES)
    assert repr(array) == "DeviceArray(float32 [2, 3, 4], GPU 0)"
    assert len(array) == 2
    array.close()
    array.close()
    assert "closed" in repr(array)
    uses = (array.numpy, array.__dlpack__, lambda: array.address, lambda: array.__cuda_array_interface__)
    for use in uses:
        with pytest.raises(InputError, match="closed"):
            use()
    with pytest.raises(InputError, match="closed"):
        view(array)


def test_the_array_interface_keeps_the_memory_as_long_as_the_array_lives(gpu):
    array = filled(gpu, DeviceArray, VALUES)
    interface = array.__cuda_array_interface__
    assert interface == {
        "version": 3,
        "shape": (2, 3, 4),
        "typestr": "<f4",
        "data": (array.address, False),
        "strides": None,
        "stream": None,
    }
    array.close()
    assert gpu._library.alive() == {"memory": 1}, "CuPy keeps the array and reads on"
    del array
    assert gpu._library.alive() == {}


@pytest.mark.parametrize("only", [lambda array: array, Wrapped])
def test_our_own_arrays_can_be_viewed(gpu, only):
    array = filled(gpu, DeviceArray, VALUES)
    seen = view(only(array), stream=5, writable=True)
    assert (seen.address, seen.shape, seen.dtype) == (array.address, VALUES.shape, VALUES.dtype)
    assert (seen.on_device, seen.ordinal, seen.wait_for) == (True, 0, None)
    del array, only
    gc.collect()
    assert gpu._library.alive() == {"memory": 1}
    seen.close()


def test_a_copy_on_the_host_is_made_on_request_only(gpu):
    array = filled(gpu, DeviceArray, VALUES)
    assert np.array_equal(array.numpy(), VALUES)
    managed, _ = dlpack.open_capsule(array.__dlpack__(dl_device=(1, 0)))
    assert managed.dl_tensor.device.type == 1
    assert managed.dl_tensor.data != array.address
    if NUMPY >= (2, 1):
        assert np.array_equal(np.from_dlpack(array, device="cpu"), VALUES)
    with pytest.raises(InputError, match="GPU's memory"):
        np.asarray(array)
    for wanted in ({"copy": True}, {"dl_device": (2, 1)}, {"dl_device": (1, 0), "copy": False}):
        with pytest.raises(BufferError):
            array.__dlpack__(**wanted)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_odd_shapes_are_exported(gpu, shape):
    array = OnHost.allocate(gpu, shape, np.int32, "an array")
    assert np.from_dlpack(array).shape == array.numpy().shape == view(array).shape == shape
    assert (array.__cuda_array_interface__["data"][0] == 0) == (0 in shape)
    if not shape:
        with pytest.raises(TypeError, match="no length"):
            len(array)


def test_an_allocated_array_outlives_the_driver_and_another_does_not():
    library = FakeCuda(kernels=None)
    driver = Driver(library=library)
    array, other = DeviceArray.allocate(driver, (2, 3), "f4", "x"), filled(driver, DeviceArray, VALUES)
    driver.close()
    assert array.numpy().shape == (2, 3)
    with pytest.raises(BackendError, match="freed"):
        other.numpy()
    other.close()
    assert (library.alive(), library.retained) == ({"memory": 1}, 1)
    array.close()
    assert (library.alive(), library.retained, library.faults) == ({}, 0, [])
    library.fail["cuMemAlloc_v2"] = (0, 2)
    with pytest.raises(BackendError, match="OUT_OF_MEMORY"), Driver(library=library) as driver:
        DeviceArray.allocate(driver, (2, 3), "f4", "x")
    assert library.retained == 0


def test_an_abandoned_array_is_never_freed():
    library = FakeCuda(kernels=None)
    with Driver(library=library) as driver:
        filled(driver, DeviceArray, VALUES).abandon()
        DeviceArray.allocate(driver, (2, 3), "f4", "x").abandon()
    gc.collect()
    assert library.alive() == {"memory": 2}
    assert library.retained == 1, "releasing the GPU may wait for it as well"


def ended_well(code, *arguments):
    """The output of a program in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-X", "dev", "-W", "ignore", "-c", code, *arguments]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout


AT_EXIT = """
import atexit
atexit.register(lambda: print("freed", library.count("cuMemFree_v2")))  # after what is registered later
import builtins, ctypes, sys, threading
import numpy as np
from ddpmx.arrays import device_array as arrays, dlpack
from ddpmx.arrays.views import view
from ddpmx.arrays.device_array import DeviceArray
from ddpmx.device.driver import Driver
from oracles.fake_cuda import FakeCuda

class OnHost(DeviceArray):
    _device_type = dlpack.CPU

library = FakeCuda(kernels=None)
driver = Driver(library=library)
x = OnHost.allocate(driver, (4, 4), "f4", "x")
capsule, versioned = x.__dlpack__(), x.__dlpack__(max_version=(1, 0))
builtins.kept = [np.from_dlpack(x), x.__dlpack__(), view(x)]
sys.modules["kept"] = np.from_dlpack(x)
cycle = [np.from_dlpack(x), view(np.zeros(3)), x]
cycle.append(cycle)
leaked = np.from_dlpack(x)
ctypes.pythonapi.Py_IncRef(ctypes.py_object(leaked))
if "torch" in sys.argv:
    import torch
    builtins.tensors = [torch.from_dlpack(x), view(torch.zeros(3)), view(torch.zeros(3)).numpy()]
def hold(array, gone=threading.Event()):
    gone.wait()
threading.Thread(target=hold, args=(np.from_dlpack(x),), daemon=True).start()
print("done")
"""


@pytest.mark.parametrize("who", ["numpy", pytest.param("torch", marks=pytest.mark.torch)])
def test_arrays_alive_at_exit_do_no_harm(who):
    pytest.importorskip(who, reason=f"not verified here: {who}'s arrays at exit (not installed)")
    assert ended_well(AT_EXIT, who) == "done\nfreed 0\n"


LATE = """
#include <stdlib.h>
static void *managed;
static void (*deleter)(void *);
static void late(void) { deleter(managed); }
void take(void *it, void (*its_deleter)(void *)) { managed = it; deleter = its_deleter; atexit(late); }
"""
CONSUMED_LATE = """
import ctypes, sys
from ddpmx.arrays import device_array as arrays, dlpack
from ddpmx.device.driver import Driver
from oracles.fake_cuda import FakeCuda
x = arrays.DeviceArray.allocate(Driver(library=FakeCuda(kernels=None)), (4, 4), "f4", "x")
capsule = x.__dlpack__(max_version=eval(sys.argv[2]))
managed, used = dlpack.open_capsule(capsule)
dlpack.rename(capsule, used)
ctypes.CDLL(sys.argv[1]).take(ctypes.c_void_p(ctypes.addressof(managed)), ctypes.c_void_p(managed.deleter))
"""


@pytest.mark.parametrize("version", [None, (1, 0)])
def test_a_consumer_in_c_may_free_an_array_after_pythons_end(tmp_path, version):
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or sys.platform == "win32":
        pytest.skip("not verified here: that memory may be freed after Python's end (no C compiler)")
    (tmp_path / "late.c").write_text(LATE)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", tmp_path / "late.so", tmp_path / "late.c"], check=True)
    assert ended_well(CONSUMED_LATE, tmp_path / "late.so", str(version)) == ""
