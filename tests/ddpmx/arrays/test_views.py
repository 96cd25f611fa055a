"""Other libraries' arrays are viewed in place, or refused with a plain error.

There is no GPU here: "device memory" is an address that must not be read.
"""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

from ddpmx.arrays.views import expect, view
from ddpmx.errors import BackendError, InputError
from oracles.dlpack import FAR, Old, Producer, Wrapped

# --- NumPy's arrays --------------------------------------------------------------------------------------------------


def test_a_numpy_array_is_viewed_in_place():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    seen = view(array)
    assert (seen.address, seen.shape, seen.dtype) == (array.ctypes.data, (2, 3), np.float32)
    assert (seen.on_device, seen.ordinal, seen.wait_for) == (False, None, None)
    assert np.shares_memory(seen.numpy(), array)
    with pytest.raises(ValueError, match="read-only"):
        seen.numpy()[0, 0] = 1
    view(array, writable=True).numpy()[1, 2] = 50
    assert array[1, 2] == 50


def test_a_view_and_its_arrays_keep_the_owner_and_nothing_else_does():
    array = np.arange(6.0)
    there = weakref.ref(array)
    seen = view(array)
    del array
    values = seen.numpy()
    seen.close()
    seen.close()
    gc.collect()
    assert there() is not None
    assert values.tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(InputError, match="closed"):
        seen.numpy()
    del values
    gc.collect()
    assert there() is None


READ_ONLY = np.zeros(3)
READ_ONLY.flags.writeable = False
MISALIGNED = np.frombuffer(bytearray(17), np.uint8)[1:].view(np.float32)
NOT_READ = {
    "not C-contiguous": np.zeros((3, 4)).T,
    "C-contiguous": np.zeros(8)[::2],
    "C-contiguous: backwards": np.zeros(8)[::-1],
    "other byte order": np.zeros(3, np.dtype("f4").newbyteorder()),
    "arrays of object": np.zeros(3, object),
    "arrays of void": np.zeros(3, "i4,f4"),
    "arrays of datetime": np.zeros(3, "M8[s]"),
    "masked": np.ma.zeros(3),
    "not aligned": MISALIGNED,
    "list is not an array": [1, 2],
    "NoneType is not an array": None,
    "str is not an array": "x",
}


@pytest.mark.parametrize("why", NOT_READ)
def test_what_cannot_be_read_in_place_is_refused(why):
    with pytest.raises(InputError, match=why.split(":")[0]):
        view(NOT_READ[why])


def test_a_read_only_array_is_viewed_but_not_for_writing():
    assert not view(READ_ONLY).writable
    with pytest.raises(InputError, match="read-only"):
        view(READ_ONLY, writable=True)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1, 4, 1)])
def test_odd_shapes_are_viewed(shape):
    array = np.zeros(shape, np.int16)
    seen = view(array)
    assert seen.shape == seen.numpy().shape == shape
    # strides of axes of length 1 mean nothing
    assert view(np.lib.stride_tricks.as_strided(np.zeros(4), (1, 4), (777 * 8, 8))).shape == (1, 4)


def test_memory_that_belongs_to_the_interface_alone_stays():
    owners = []

    class Fleeting:
        """Like NumPy's scalars."""

        @property
        def __array_interface__(self):
            array = np.full(3, 2.5)
            owners.append(weakref.ref(array))
            return {**array.__array_interface__, "owner": array}

    assert view(np.float32(2.5)).shape == ()
    seen = view(Fleeting())
    gc.collect()
    assert owners[-1]() is not None
    assert seen.numpy().tolist() == [2.5] * 3


# --- the array interfaces --------------------------------------------------------------------------------------------


class Declares:
    """An object with an array interface; keywords replace its entries, and KeyError removes one."""

    def __init__(self, name="__cuda_array_interface__", **entries):
        usual = {"version": 3, "shape": (2, 3), "typestr": "<f4", "data": (FAR, False), "strides": None}
        setattr(self, name, {key: value for key, value in {**usual, **entries}.items() if value is not KeyError})


def test_memory_by_the_cuda_array_interface_is_the_gpus():
    thing = Declares(strides=(12, 4))
    there = weakref.ref(thing)
    seen = view(thing)
    del thing
    assert (seen.address, seen.shape, seen.dtype, seen.on_device) == (FAR, (2, 3), np.float32, True)
    assert seen.ordinal is None, "the interface does not declare it"
    with pytest.raises(InputError, match="GPU's memory"):
        seen.numpy()
    assert there() is not None
    seen.close()
    gc.collect()
    assert there() is None


@pytest.mark.parametrize(
    ("entries", "stream", "wait_for"),
    [
        ({}, 0, None),
        ({"stream": None}, 0, None),
        ({"stream": 1}, 0, 1),
        ({"stream": 0x5570}, 0, 0x5570),
        ({"stream": 0x5570}, 0x5570, None),
        ({"version": 2}, 0, 1),
    ],
)
def test_the_producers_stream_is_to_be_waited_for(entries, stream, wait_for):
    assert view(Declares(**entries), stream=stream).wait_for == wait_for


MALFORMED = [
    {"shape": (-1, 3)},
    {"shape": [2, 3]},
    {"shape": (2, 2.5)},
    {"shape": (1,) * 33},
    {"shape": (1 << 62, 1 << 62)},
    {"shape": (1 << 61,)},
    {"shape": (1 << 70,)},
    {"shape": KeyError},
    {"data": (0, False)},
    {"data": (-8, False)},
    {"data": ((1 << 64) - 4, False)},
    {"data": FAR},
    {"data": None},
    {"data": KeyError},
    {"strides": (12,)},
    {"strides": 4},
    {"typestr": 4},
]


@pytest.mark.parametrize("name", ["__cuda_array_interface__", "__array_interface__"])
@pytest.mark.parametrize("entries", MALFORMED, ids=" ".join)
def test_a_malformed_interface_is_refused(name, entries):
    with pytest.raises(InputError, match="describes its memory incorrectly"):
        view(Declares(name, **entries))


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ({"typestr": "<f3"}, "'<f3'"),
        ({"typestr": "<V2"}, "'<V2'"),
        ({"typestr": "3f4"}, "'3f4'"),
        ({"typestr": ""}, "''"),
        ({"typestr": "|O8"}, "O8"),
        ({"typestr": ">f4"}, "byte order"),
        ({"strides": (4, 8)}, "not C-contiguous"),
        ({"strides": (12, "4")}, "not C-contiguous"),
        ({"data": (FAR + 2, False)}, "not aligned"),
        ({"mask": Declares()}, "masked"),
        ({"version": 1}, "version 1"),
        ({"version": 4}, "version 4"),
        ({"stream": 0}, "describes its memory incorrectly"),
        ({"stream": "1"}, "describes its memory incorrectly"),
    ],
    ids=lambda case: (
        " ".join(case) if isinstance(case, dict) else case
    ),  # no addresses: they differ from process to process
)
def test_an_unusable_cuda_interface_is_refused_with_the_reason(entries, why):
    with pytest.raises(InputError, match=why.replace("<", r"\<")):
        view(Declares(**entries))


def test_a_read_only_interface_is_not_written_to():
    assert view(Declares(data=(FAR, True))).address == FAR
    with pytest.raises(InputError, match="read-only"):
        view(Declares(data=(FAR, True)), writable=True)


def test_memory_by_the_array_interface_is_the_hosts():
    array = np.arange(6, dtype="<f4")
    seen = view(Declares("__array_interface__", data=(array.ctypes.data, False)))
    assert not seen.on_device
    assert np.shares_memory(seen.numpy(), array)


class Raises:
    def __init__(self, error):
        self.error = error

    @property
    def __cuda_array_interface__(self):
        raise self.error


class UnspeakableError(Exception):
    def __str__(self):
        raise RuntimeError("no")


@pytest.mark.parametrize("error", [RuntimeError("use tensor.detach()"), UnspeakableError(), RecursionError("deep")])
def test_whatever_a_producer_raises_is_carried_over(error):
    with pytest.raises(InputError, match="cannot use the memory of this") as caught:
        view(Raises(error))
    assert type(error).__name__ in caught.value.note
    assert "detach" in caught.value.note or "detach" not in str(error.args)


# --- expected arrays -------------------------------------------------------------------------------------------------


def test_another_shape_or_type_than_expected_is_refused():
    seen = view(np.zeros((4, 1, 8, 8), np.float32))
    assert expect(seen, (None, 1, 8, 8), np.float32, "x") is seen
    for shape, dtype in [((4, 3, 8, 8), "f4"), ((4, 1, 8), "f4"), ((4, 1, 8, 8), "f8"), ((), "f4")]:
        with pytest.raises(InputError, match="x must be float") as caught:
            expect(seen, shape, dtype, "x")
        assert "float32 [4, 1, 8, 8]" in caught.value.note


def test_an_array_on_another_gpu_is_refused():
    def unknown(address):
        raise BackendError("CUDA_ERROR_INVALID_VALUE")

    silent, first = view(Declares()), SimpleNamespace(ordinal=0, ordinal_of=lambda address: 0)
    assert expect(silent, (2, 3), "f4", "x", driver=first) is silent
    for ordinal_of, why in [
        (lambda address: 1, "x is on GPU 1, but the model is on GPU 0"),
        (unknown, "not in a GPU's memory"),
    ]:
        with pytest.raises(InputError, match=why):
            expect(silent, (2, 3), "f4", "x", driver=SimpleNamespace(ordinal=0, ordinal_of=ordinal_of))
    thing = Declares(version=3)
    thing.__class__ = type("Placed", (Declares,), {"__dlpack_device__": lambda self: (2, 1)})
    assert view(thing).ordinal == 1
    with pytest.raises(InputError, match="GPU 1"):
        expect(view(thing), (2, 3), "f4", "x", driver=first)


# --- DLPack ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Producer, Old])
@pytest.mark.parametrize("strides", [None, (3, 1)])
def test_dlpack_on_a_gpu_is_viewed_and_freed_once(kind, strides):
    producer = kind(strides=strides, offset=64)
    seen = view(producer)
    assert (seen.address, seen.shape, seen.dtype) == (FAR + 64, (2, 3), np.float32)
    assert (seen.on_device, seen.ordinal, seen.wait_for) == (True, 2, 1)
    assert f"used_dltensor{'_versioned' * producer.versioned}" in repr(producer.capsule)
    assert producer.deleted == 0
    seen.close()
    seen.close()
    del seen
    gc.collect()
    assert producer.deleted == 1


@pytest.mark.parametrize(
    ("device", "stream", "options", "on_device", "wait_for"),
    [
        ((2, 0), 0, {"stream": 1}, True, 1),
        ((13, 0), -1, {"stream": -1}, True, None),
        ((2, 1), 0x5570, {"stream": 0x5570}, True, None),
        ((1, 0), 0x5570, {}, False, None),
        ((3, 0), 0x5570, {}, False, None),
    ],
)
def test_streams_are_passed_for_gpus_only_and_never_as_0(device, stream, options, on_device, wait_for):
    for kind, more in [(Producer, {"max_version": (1, 0)}), (Old, {})]:
        producer = kind(device)
        seen = view(producer, stream=stream)
        assert producer.requests == [{**options, **more}]
        assert (seen.on_device, seen.wait_for) == (on_device, wait_for)
        assert seen.ordinal == (device[1] if on_device else None)


def test_version_2_of_the_array_interface_yields_to_dlpack():
    producer = Producer()
    producer.__cuda_array_interface__ = Declares(version=2).__cuda_array_interface__
    assert view(producer, stream=7).wait_for is None
    assert producer.requests[0]["stream"] == 7
    producer.__cuda_array_interface__ = Declares(version=3, stream=9).__cuda_array_interface__
    seen = view(producer, stream=7)
    assert (seen.wait_for, seen.ordinal, len(producer.requests)) == (9, 2, 1)


UNREADABLE = {
    "not C-contiguous": {"strides": (1, 2)},
    "C-contiguous: rows apart": {"strides": (4, 1)},
    "bfloat16": {"dtype": (4, 16, 1)},
    "float8_e4m3fn": {"dtype": (10, 8, 1)},
    "4 × f32": {"dtype": (2, 32, 4)},
    "i4 ": {"dtype": (0, 4, 1)},
    "type 99": {"dtype": (99, 8, 1)},
    "not aligned": {"offset": 2},
    "DLPack 2.9": {"major": 2},
    "incorrectly": {"shape": (-2, 3)},
    "incorrectly: empty": {"data": None},
    "incorrectly: beyond": {"offset": (1 << 64) - 8},
    "incorrectly: huge": {"shape": (1 << 40, 1 << 40)},
    "incorrectly: ndim": {"ndim": 1 << 30},
    "incorrectly: negative": {"ndim": -1},
    "incorrectly: no shape": {"shapeless": True},
    "incorrectly: device": {"announced": (1, 0)},
    "incorrectly: index": {"device": (2, -1), "announced": (2, 0)},
}


@pytest.mark.parametrize("why", UNREADABLE)
def test_an_unusable_dlpack_array_is_refused_and_freed_once(why):
    producer = Producer(**UNREADABLE[why])
    with pytest.raises(InputError, match=why.split(":")[0].strip()) as caught:
        view(producer)
    assert producer.deleted == 1, "at once, although the error is still alive"
    del caught
    gc.collect()
    assert producer.deleted == 1


@pytest.mark.parametrize(("flags", "why"), [(1, "read-only"), (2, "copy only")])
def test_dlpacks_flags_are_respected(flags, why):
    assert view(Producer(flags=flags)).address == FAR
    with pytest.raises(InputError, match=why):
        view(Producer(flags=flags), writable=True)


@pytest.mark.parametrize(("kind", "name"), [(10, "ROCm"), (8, "Metal"), (14, "oneAPI"), (77, "kind 77")])
def test_other_devices_are_named(kind, name):
    producer = Producer((kind, 0))
    with pytest.raises(InputError, match=name):
        view(producer)
    assert producer.requests == []


@pytest.mark.parametrize("device", [(2, -1), (2,), (2.0, 0), ("cuda", 0), None, (True, 0)])
def test_a_malformed_device_is_refused(device):
    with pytest.raises(InputError, match="incorrectly") as caught:
        view(SimpleNamespace(__dlpack_device__=lambda: device, __dlpack__=dict))
    assert "__dlpack_device__ gives" in caught.value.note


def test_a_capsule_without_deleter_or_consumed_before_does_no_harm():
    producer = Producer()
    producer.managed.deleter = None
    view(producer).close()
    producer.__class__ = type("Again", (Producer,), {"__dlpack__": lambda self, **options: self.capsule})
    with pytest.raises(InputError, match="consumed before"):
        view(producer)


def test_numpys_own_capsules_are_viewed():
    array = np.arange(6, dtype=np.int16)
    there = weakref.ref(array)
    seen = view(Wrapped(array), writable=True)
    values = seen.numpy()
    values[2] = 9
    assert array[2] == 9
    del array, seen
    gc.collect()
    assert there() is not None
    del values
    gc.collect()
    assert there() is None
    with pytest.raises(InputError, match=r"cannot use the memory|read-only"):
        view(Wrapped(READ_ONLY), writable=True)


@pytest.mark.torch
def test_pytorchs_tensors_are_viewed_or_refused_with_the_reason():
    torch = pytest.importorskip("torch", reason="not verified here: PyTorch's tensors (no torch)")
    tensor = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    seen = view(tensor, writable=True)
    assert (seen.address, seen.shape, seen.dtype) == (tensor.data_ptr(), (2, 3), np.float32)
    values = seen.numpy()
    values[1, 1] = 70
    assert tensor[1, 1] == 70
    del tensor, seen
    gc.collect()
    assert values.tolist() == [[0, 1, 2], [3, 70, 5]]
    assert view(torch.zeros(3, dtype=torch.bool)).dtype == bool
    for refused, why in [
        (torch.zeros(3, dtype=torch.bfloat16), "bfloat16"),
        (torch.zeros(3, 2).T, "not C-contiguous"),
        (torch.zeros(3, requires_grad=True), "(?s)cannot use the memory.*grad"),
        (torch.zeros(3, device="meta"), "cannot use the memory"),
        (torch.zeros(3).to_sparse(), "cannot use the memory"),
    ]:
        with pytest.raises(InputError, match=why):
            view(refused)


def test_garbage_is_refused_and_does_nothing_else():
    hypothesis = pytest.importorskip("hypothesis", reason="not verified here: random garbage (no hypothesis)")
    st = hypothesis.strategies
    number = st.integers() | st.integers(-3, 40) | st.none() | st.booleans() | st.floats() | st.text(max_size=3)
    thing = number | st.tuples(number, number) | st.lists(number).map(tuple) | st.dictionaries(st.text(), number)
    keys = st.sampled_from(["version", "shape", "typestr", "data", "strides", "mask", "stream"])
    entries = st.dictionaries(keys, thing)
    axis = st.integers(-2, 5) | st.integers(-(1 << 63), (1 << 63) - 1)

    def tried(thing):
        try:
            return view(thing, writable=True)
        except InputError:
            return None

    @hypothesis.settings(max_examples=300, deadline=None, database=None)
    @hypothesis.given(entries, thing, thing, st.lists(axis, max_size=40), st.tuples(*[st.integers(0, 255)] * 3))
    def check(entries, device, capsule, axes, dtype):
        tried(Declares(**entries))
        tried(Declares("__array_interface__", **entries))
        tried(SimpleNamespace(__cuda_array_interface__=device))
        tried(SimpleNamespace(__dlpack_device__=lambda: device, __dlpack__=lambda **options: capsule))
        tried(SimpleNamespace(__dlpack_device__=lambda: (1, 0), __dlpack__=lambda **options: capsule))
        for how in ({"dtype": dtype}, {"strides": axes[::-1]}, {}):
            producer = Producer(shape=axes, **how)
            tried(producer)
            assert producer.deleted == 1

    check()
