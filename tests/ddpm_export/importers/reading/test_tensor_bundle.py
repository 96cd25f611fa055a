"""TensorFlow's checkpoints, read without TensorFlow: against files that TensorFlow wrote, and against hostile ones."""

from __future__ import annotations

import json
import os
import random
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="not verified here: TensorFlow's checkpoints (no torch)")
pytest.importorskip("safetensors", reason="not verified here: TensorFlow's checkpoints (no safetensors)")

from ddpm_export.importers.reading import tensor_bundle
from ddpm_export.importers.reading.crc32c import crc32c, mask, unmask
from ddpm_export.importers.reading.tensor_bundle import TensorBundle, find_bundle, is_bundle
from ddpmx.errors import FileFormatError
from mutations.mutants import INTEGERS, noise
from oracles import tf_bundle
from oracles.protobuf import field, varint
from oracles.tf_bundle import FIXTURES, block, entry, header, table

pytestmark = pytest.mark.torch

TYPES = json.loads((FIXTURES / "types.json").read_text())
ONE = np.arange(6, dtype="<f4")
BEGIN = (b"", header())


def types(folder: Path) -> Path:
    """A copy of the fixture, to be damaged."""
    for file in FIXTURES.glob("types.ckpt-12.*"):
        shutil.copy(file, folder / file.name)
    return folder / "types.ckpt-12"


def good(**changes: object) -> tuple[bytes, bytes]:
    return b"w", entry(ONE.tobytes(), (2, 3), **changes)  # type: ignore[arg-type]


# --- what TensorFlow wrote -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TYPES)
def test_tensors_have_the_values_that_tensorflow_gave_them(name):
    expected = TYPES[name]
    read = TensorBundle(FIXTURES / "types.ckpt-12").read(name)
    assert read.dtype == np.dtype("f4" if expected["dtype"] == "bfloat16" else expected["dtype"])
    assert list(read.shape) == expected["shape"]
    wide = np.int64 if read.dtype.kind in "iub" else np.float64
    np.testing.assert_array_equal(read.astype(wide).reshape(-1), np.array(expected["values"], wide), strict=True)


def test_every_element_type_and_data_file_of_the_fixture_is_used():
    bundle = TensorBundle(FIXTURES / "types.ckpt-12")
    assert {entry.shard for entry in bundle.entries.values()} == {0, 1, 2}
    assert {expected["dtype"] for expected in TYPES.values()} == {
        *("float16", "bfloat16", "float32", "float64", "bool"),
        *("int8", "int16", "int32", "int64", "uint8", "uint16"),
    }
    assert set(bundle.entries) - set(TYPES) == {"beta2_power", "parts", "text"}
    assert list(bundle.entries) == sorted(bundle.entries)
    assert bundle.step == 12


def test_a_variable_in_parts_is_refused_by_name():
    with pytest.raises(FileFormatError, match="'parts' was saved in parts"):
        TensorBundle(FIXTURES / "types.ckpt-12").read("parts")


def test_text_is_no_tensor_of_numbers():
    with pytest.raises(FileFormatError, match="'text' is text"):
        TensorBundle(FIXTURES / "types.ckpt-12").read("text")


def test_an_unknown_name_is_refused():
    with pytest.raises(FileFormatError, match="no tensor 'x'"):
        TensorBundle(FIXTURES / "types.ckpt-12").read("x")


def test_only_the_data_files_that_are_needed_are_opened(tmp_path):
    prefix = types(tmp_path)
    (tmp_path / "types.ckpt-12.data-00001-of-00003").unlink()
    bundle = TensorBundle(prefix)
    assert bundle.read("shapes/scalar") == 7.5
    with pytest.raises(FileFormatError, match=r"data-00001-of-00003: cannot be read.*(\n.*)*3 data files"):
        bundle.read("floats/half")


def test_any_changed_bit_of_the_data_is_noticed(tmp_path):
    prefix = types(tmp_path)
    file = tmp_path / "types.ckpt-12.data-00001-of-00003"
    data = file.read_bytes()
    place = TensorBundle(prefix).entries["model/conv_in/W"]
    for bit in random.Random(0).sample(range(8 * place.size), 40):
        changed = bytearray(data)
        changed[place.offset + bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        with pytest.raises(FileFormatError, match="'model/conv_in/W' were changed"):
            TensorBundle(prefix).read("model/conv_in/W")
        TensorBundle(prefix).read("floats/double")


def test_any_changed_byte_of_the_index_is_noticed(tmp_path):
    prefix = types(tmp_path)
    file = tmp_path / "types.ckpt-12.index"
    data = file.read_bytes()
    entries = TensorBundle(prefix).entries
    accepted = []
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 0x55
        file.write_bytes(changed)
        try:
            assert TensorBundle(prefix).entries == entries
            accepted.append(at)
        except FileFormatError:
            pass
    # the footer's padding, and the block of statistics that nobody reads, mean nothing
    assert len(accepted) < 60
    assert min(accepted) > len(data) - 110


def test_a_data_file_that_is_cut_off_is_refused(tmp_path):
    prefix = types(tmp_path)
    file = tmp_path / "types.ckpt-12.data-00001-of-00003"
    os.truncate(file, 100)
    with pytest.raises(FileFormatError, match="data-00001-of-00003: cut off"):
        TensorBundle(prefix).read("model/conv_in/W")


# --- where it is -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".index", ".meta", ".data-00000-of-00003"])
def test_the_prefix_and_each_of_its_files_name_a_checkpoint(tmp_path, suffix):
    prefix = types(tmp_path)
    assert find_bundle(f"{prefix}{suffix}") == prefix
    assert is_bundle(f"{prefix}{suffix}")


def test_a_folder_means_the_one_that_its_state_names_or_the_last(tmp_path):
    for step in (9, 10, 100):
        tf_bundle.write(tmp_path, [BEGIN, good()], ONE.tobytes(), name=f"model.ckpt-{step}")
    assert find_bundle(tmp_path).name == "model.ckpt-100"
    state = tmp_path / "checkpoint"
    state.write_text('model_checkpoint_path: "/elsewhere/model.ckpt-9"\nall_model_checkpoint_paths: "model.ckpt-10"\n')
    assert find_bundle(tmp_path).name == "model.ckpt-9"
    state.write_text('model_checkpoint_path: "gs://bucket/model.ckpt-11"\n')
    assert find_bundle(tmp_path).name == "model.ckpt-100"


def test_where_there_is_none_the_error_says_what_to_look_for(tmp_path):
    (tmp_path / "weights.npz").write_bytes(b"PK")
    for path in (tmp_path, tmp_path / "weights.npz", tmp_path / "model.ckpt-3"):
        assert not is_bundle(path)
        with pytest.raises(FileFormatError, match=r"no TensorFlow checkpoint there(.*\n)*.*\.index"):
            find_bundle(path)


def test_version_1_is_recognised_and_refused(tmp_path):
    saved = field(1, field(1, field(1, b"model/a/W")))
    data = table([block([(b"", saved), (b"\0model/a/W\0", b"\0")])])
    old = tmp_path / "model.ckpt-7"
    old.write_bytes(data)
    assert is_bundle(old)
    for path in (old, tmp_path / "model.ckpt-7.meta"):
        with pytest.raises(FileFormatError, match=r"model.ckpt-7: a TensorFlow checkpoint of version 1"):
            TensorBundle(path)
    (tmp_path / "x.index").write_bytes(data)
    with pytest.raises(FileFormatError, match=r"x.index: a TensorFlow checkpoint of version 1"):
        TensorBundle(tmp_path / "x")


# --- what TensorFlow could have written ------------------------------------------------------------------------------


def test_many_blocks_are_one_table(tmp_path):
    arrays = {f"scope/variable_{i:04d}/W": np.full(i % 5 + 1, i, "<f4") for i in range(300)}
    items, data = [BEGIN], b""
    for name, array in sorted(arrays.items()):
        items.append((name.encode(), entry(array.tobytes(), array.shape, offset=len(data))))
        data += array.tobytes() + bytes(3)  # as with data_alignment
    bundle = TensorBundle(tf_bundle.write(tmp_path, items, data, per_block=7))
    assert list(bundle.entries) == sorted(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(bundle.read(name), array, strict=True)


@pytest.mark.parametrize(("code", "dtype"), [(1, ">f4"), (2, ">f8"), (9, ">i8"), (19, ">f2"), (10, "?"), (14, ">f4")])
def test_a_big_endian_machine_wrote_the_same_numbers(tmp_path, code, dtype):
    array = np.array([1.0, -2.0, 0.0], dtype)
    raw = array.tobytes() if code != 14 else b"".join(array[i : i + 1].tobytes()[:2] for i in range(3))
    items = [(b"", header(big_endian=True)), (b"w", entry(raw, (3,), dtype=code))]
    read = TensorBundle(tf_bundle.write(tmp_path, items, raw)).read("w")
    np.testing.assert_array_equal(read, array.astype(np.dtype(dtype).newbyteorder("=")), strict=True)


# --- hostile ---------------------------------------------------------------------------------------------------------

HUGE = 1 << 61
GOOD = block([BEGIN, good()])
EMPTY = block([])
HOSTILE = {
    "compressed": (table([GOOD], kind=1), "compressed"),
    "no header": (table([block([good()])]), "no header"),
    "nothing": (table([]), "no header"),
    "a newer version": (table([block([(b"", header(min_consumer=2)), good()])]), "of a version"),
    "no data files": (table([block([(b"", header(0)), good()])]), "0 data files"),
    "a million data files": (table([block([(b"", header(10**6)), good()])]), "1000000 data files"),
    "a data file too many": (table([block([BEGIN, good(shard=1)])]), "data file 1 of 1"),
    "an offset behind the file": (table([block([BEGIN, good(offset=HUGE)])]), "cut off"),
    "a negative offset": (table([block([BEGIN, good(offset=2**64 - 8)])]), "negative"),
    "a size that is not the shape's": (table([block([BEGIN, good(size=20)])]), "contradicts itself"),
    "an absurd shape": (table([block([BEGIN, (b"w", entry(b"", (2**39, 2**39), size=2**30))])]), "contradicts"),
    "an absurd shape of that size": (table([block([BEGIN, (b"w", entry(b"", (2**28, 4), size=2**32))])]), "cut off"),
    "a tensor of a terabyte": (table([block([BEGIN, (b"w", entry(b"", (2**39, 4), size=2**41))])]), "too large"),
    "a negative side": (table([block([BEGIN, (b"w", entry(b"", (2**64 - 1,), size=4))])]), "shape"),
    "a hundred sides": (table([block([BEGIN, (b"w", entry(b"1234", (1,) * 100))])]), "shape"),
    "a million sides": (table([block([BEGIN, (b"w", field(2, field(2, b"") * 10**6))])]), "to describe one tensor"),
    "an unknown type": (table([block([BEGIN, good(dtype=99)])]), "type 99"),
    "complex numbers": (table([block([BEGIN, good(dtype=8)])]), "complex64"),
    "one place twice": (table([block([BEGIN, (b"v", good()[1]), good()])]), "same place"),
    "one name twice": (table([block([BEGIN, good(), good()])]), "not in order"),
    "names out of order": (table([block([BEGIN, good(), (b"v", good(offset=24)[1])])]), "not in order"),
    "one block twice": (table([GOOD], handles=[(0, len(GOOD))] * 2), "its blocks are not in order"),
    "an empty block again and again": (table([EMPTY, GOOD], handles=[(0, 8)] * 900), "its blocks are not in order"),
    "a block of itself": (table([GOOD], handles=[(0, 2**63)]), "beyond its end"),
    "an endless name": (table([block([BEGIN, (b"w" * 5000, good()[1])])]), "does not fit"),
    "a share of nothing": (table([varint(9) + b"\1\0w" + bytes(4) + b"\1\0\0\0"]), "does not fit"),
    "a value beyond its block": (table([b"\0\0" + varint(2**40) + bytes(4) + b"\1\0\0\0"]), "does not fit"),
    "restarts beyond their block": (table([bytes(8) + b"\xff\xff\xff\xff"]), "without an end"),
    "a block of nothing": (table([b""]), "without an end"),
    "an entry that is no message": (table([block([BEGIN, (b"w", b"\xff\xff")])]), "inside a number"),
    "a header that is no message": (table([block([(b"", b"\x0f")])]), "not a whole index"),
    "a number for a shape": (table([block([BEGIN, (b"w", field(2, 5))])]), "a number in place of a message"),
    "empty": (b"", "empty"),
    "something else": (b"PK" + bytes(100), "does not end with the magic number"),
    "the footer alone": (table([])[-48:], "beyond its end"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_indexes_are_refused(tmp_path, case):
    index, text = HOSTILE[case]
    (tmp_path / "m.index").write_bytes(index)
    (tmp_path / "m.data-00000-of-00001").write_bytes(ONE.tobytes())
    with pytest.raises(FileFormatError, match=text):
        TensorBundle(tmp_path / "m").read("w")


@pytest.mark.parametrize(("limit", "value"), [("MAX_NAMES", 100_000), ("MAX_TENSORS", 900)])
def test_names_that_grow_by_a_byte_each_are_stopped(tmp_path, monkeypatch, limit, value):
    items = [BEGIN, *((b"w" * n, entry(b"", (0,))) for n in range(1, 1000))]
    prefix = tf_bundle.write(tmp_path, items, b"")
    assert len(TensorBundle(prefix).entries) == 999
    monkeypatch.setattr(tensor_bundle, limit, value)
    with pytest.raises(FileFormatError, match=r"more than \d+ tensors, or \d+ bytes of names"):
        TensorBundle(prefix)


def test_an_index_larger_than_any_is_not_read(tmp_path):
    with (tmp_path / "m.index").open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(FileFormatError, match="too large"):
        TensorBundle(tmp_path / "m")


def test_a_pipe_is_not_waited_for(tmp_path):
    prefix = types(tmp_path)
    for name in ("types.ckpt-12.data-00001-of-00003", "types.ckpt-12.index"):
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
    with pytest.raises(FileFormatError):
        TensorBundle(prefix)
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    prefix = types(tmp_path)
    (tmp_path / "types.ckpt-12.data-00001-of-00003").unlink()
    os.mkfifo(tmp_path / "types.ckpt-12.data-00001-of-00003")
    with pytest.raises(FileFormatError, match="not a file"):
        TensorBundle(prefix).read("floats/half")


def structured(rng: random.Random) -> tuple[bytes, bytes]:
    """A checkpoint of three tensors with one or two numbers that nobody expects, and every CRC right."""
    arrays = [np.arange(4, dtype="<f4"), np.arange(3, dtype="<i8"), np.arange(8, dtype="<f2")]
    data = b"".join(array.tobytes() for array in arrays)
    changed = rng.sample(range(16), rng.choice((1, 1, 2)))

    def number(place: int, usual: int) -> int:
        return rng.choice((*INTEGERS, usual + 1, max(usual - 1, 0))) if place in changed else usual

    items, at = [(b"", header(number(0, 1), big_endian=1 in changed, min_consumer=number(2, 0)))], 0
    for i, (array, dtype) in enumerate(zip(arrays, (1, 9, 19), strict=True)):
        declared = {
            "dtype": number(3 + 4 * i, dtype),
            "offset": number(4 + 4 * i, at),
            "size": number(5 + 4 * i, array.nbytes),
        }
        items.append((b"w%d" % i, entry(array.tobytes(), (number(6 + 4 * i, array.size),), **declared)))
        at += array.nbytes
    handles = None
    if 15 in changed:
        handles = [(rng.choice(INTEGERS), rng.choice(INTEGERS)) for _ in range(rng.choice((1, 2, 900)))]
    return table([block(items[:2]), block(items[2:])], handles=handles), data


@pytest.mark.slow
def test_six_hundred_mutants_are_read_or_refused_in_little_memory(tmp_path):
    rng = random.Random(5)
    fixture = {file.name.replace("types.ckpt-12", "m"): file.read_bytes() for file in FIXTURES.glob("types.ckpt-12.*")}
    read, refused = 0, set()
    tracemalloc.start()
    for number in range(600):
        folder = tmp_path / str(number)
        folder.mkdir()
        if number % 2:
            index, data = structured(rng)
            files = {"m.index": index, "m.data-00000-of-00001": data}
        else:
            chosen = rng.choice(("m.index", "m.index", *sorted(fixture)))
            files = fixture | {chosen: noise(rng, fixture[chosen])}
        for name, content in files.items():
            (folder / name).write_bytes(content)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        whole = True
        try:
            bundle = TensorBundle(folder / "m")
        except FileFormatError as error:
            refused.add(error.note)
            continue
        for name in bundle.entries:
            try:
                bundle.read(name)
            except FileFormatError as error:
                whole = whole and name in ("parts", "text")
                refused.add(error.fact.split(": ", 1)[-1])
        read += whole
        assert tracemalloc.get_traced_memory()[1] - before < 8 << 20, f"mutant {number} takes much memory"
        shutil.rmtree(folder)
    tracemalloc.stop()
    assert read > 20
    assert len(refused) > 25, refused


# --- CRC-32C ---------------------------------------------------------------------------------------------------------


def test_crc32c_of_rfc_3720():
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    assert crc32c(b"") == 0


@pytest.mark.parametrize("seed", range(4))
def test_crc32c_equals_the_plain_loop_at_every_length(seed):
    rng = random.Random(seed)
    for length in (*range(seed, 280, 4), *(rng.randrange(70_000) for _ in range(3)), 2**15 + 3 * seed):
        message = rng.randbytes(length)
        assert crc32c(message) == tf_bundle.crc32c(message), length


def test_masking_is_undone():
    for crc in (0, 1, 0xFFFFFFFF, 0x80000000, 0xE3069283):
        assert unmask(mask(crc)) == crc
        assert mask(crc) != crc
