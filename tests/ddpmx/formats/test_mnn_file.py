"""The description of an .mnn file: what is written is read, and what was damaged is refused before MNN sees it."""

from __future__ import annotations

import dataclasses
import hashlib
import struct

import numpy as np
import pytest

from ddpmx.errors import DdpmxError, FileFormatError, SpecError
from ddpmx.formats import mnn_file as files
from ddpmx.formats.describe import describe
from ddpmx.formats.mnn_file import MnnRecord, describe_network, has_network, is_mnn, read_mnn
from ddpmx.formats.model_file import identify
from ddpmx.formats.spec import ModelSpec
from oracles.mnn import RECORD, mnn_file, network

SPEC = ModelSpec((1, 8, 8), timesteps=20)
FREE = ModelSpec((1, 8, 8), timesteps=30, schedule="betas", betas=np.linspace(1e-4, 0.3, 30))


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "model.mnn"
    file.write_bytes(mnn_file())
    return file


@pytest.mark.parametrize("spec", [SPEC, FREE, SPEC.replace(precision="fp16", classes=10)], ids=["eps", "betas", "fp16"])
@pytest.mark.parametrize("name", ["m.onnx", "mo.onnx", "mod.onnx", "mode.onnx"])  # four lengths: each needs other zeros
def test_what_is_written_is_read(path, spec, name):
    record = dataclasses.replace(RECORD, source=name)
    path.write_bytes(mnn_file(spec, record))
    info = read_mnn(path)
    assert info.spec == spec
    assert info.size == path.stat().st_size
    assert dataclasses.replace(info.record, network=RECORD.network) == record
    if spec.betas is not None:
        assert np.array_equal(info.spec.betas, spec.betas)
    assert identify(path) == "mnn"


def test_googles_flatbuffers_read_the_same_text(path):
    flatbuffers = pytest.importorskip("flatbuffers", reason="not verified here: an .mnn by flatbuffers (not installed)")
    from flatbuffers import encode, number_types
    from flatbuffers.table import Table

    path.write_bytes(mnn_file(FREE))
    data = path.read_bytes()
    root = Table(data, encode.Get(number_types.UOffsetTFlags.packer_type, data, 0))
    text = root.String(root.Pos + root.Offset(4)).decode()  # the first field of a table
    assert flatbuffers.__name__ == "flatbuffers"
    assert text.startswith(FREE.to_text() + " mnn1 ")
    assert text.count("betas1 ") == 1


def test_the_hash_is_that_of_everything_before_the_description(path):
    data = path.read_bytes()
    at = data.rindex(b"ddpmx1 ") - 4
    assert read_mnn(path).record.network == hashlib.sha256(data[:at]).hexdigest()
    assert data[:at].startswith(network()[:16]), "but for the place of the text the network is as it was"
    assert len(data[:at]) - len(network()) < 4


def test_a_changed_bit_is_noticed_wherever_it_is(path):
    good = path.read_bytes()
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 1 << at % 8
        path.write_bytes(bad)
        with pytest.raises(DdpmxError):
            read_mnn(path)


def test_every_other_length_is_noticed(path):
    good = path.read_bytes()
    for data in [*(good[:end] for end in range(len(good))), good + b"\0", good + b"\0" * 4, good + good]:
        path.write_bytes(data)
        with pytest.raises(DdpmxError):
            read_mnn(path)


def test_showing_a_file_reads_its_description_alone(path):
    bad = bytearray(path.read_bytes())
    bad[60] ^= 1
    path.write_bytes(bad)
    assert read_mnn(path, brief=True).spec == SPEC
    assert describe(path)["record"]["part"] == 4
    with pytest.raises(FileFormatError, match="the network in this file is damaged"):
        read_mnn(path)


def test_a_file_of_mnns_own_converter_says_nothing(path):
    path.write_bytes(network())
    with pytest.raises(SpecError, match="does not say which diffusion model it is") as caught:
        read_mnn(path)
    assert caught.value.hint == "ddpmx build model.onnx --for mnn"
    assert describe(path)["spec"] is None
    assert "does not say" in describe(path)["note"]
    assert identify(path) == "mnn"


def test_a_file_is_known_by_its_description_whatever_its_name(path, tmp_path):
    other = path.rename(tmp_path / "weights.bin")
    assert is_mnn(other)
    other.write_bytes(network())
    assert not is_mnn(other)
    assert has_network(other)
    other.write_bytes(b"\x08\x07 not a FlatBuffer")
    assert not has_network(other)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        struct.pack("<I", 0),
        struct.pack("<I", 0xFFFFFFFF) + bytes(40),
        struct.pack("<Ii", 4, -(1 << 31)) + bytes(40),
        struct.pack("<I3H", 4, 0, 0, 0) + bytes(40),
        network()[:16] + struct.pack("<I", 0xFFFFFFF0) + network()[20:],
        network()[:20] + struct.pack("<I", 0xFFFFFFFF) + network()[24:],
    ],
    ids=[
        "empty",
        "one byte",
        "no root",
        "root far away",
        "vtable far away",
        "no field",
        "text far away",
        "endless text",
    ],
)
def test_what_is_no_flatbuffer_is_refused(path, data):
    path.write_bytes(data)
    with pytest.raises(FileFormatError, match="not a valid MNN model"):
        read_mnn(path)


@pytest.mark.parametrize(
    "change",
    [
        {"version": "new"},
        {"onnx": "1"},
        {"source": "../x"},
        {"network": None},
        {"part": 0},
        {"part": 65},
        {"part": True},
        {"other": 1},
        {"part": "4"},
        {"memory": "none"},
    ],
)
def test_a_damaged_record_is_refused(change):
    with pytest.raises(SpecError, match="the record of this MNN file is damaged"):
        MnnRecord.from_json(RECORD.to_json() | change)


def test_a_file_without_room_for_a_description_is_not_written():
    with pytest.raises(SpecError, match="without a place"):
        describe_network(struct.pack("<I3H", 12, 4, 4, 0) + bytes(40), SPEC, RECORD)


def test_the_hint_makes_the_file_again(path):
    record = dataclasses.replace(RECORD, source="a model.onnx")
    assert files.rebuild_command(path, record) == f"ddpmx build 'a model.onnx' --for mnn --part 4 -o {path}"
    low = dataclasses.replace(record, memory="low")
    assert files.rebuild_command(path, low) == f"ddpmx build 'a model.onnx' --for mnn --part 4 --low-memory -o {path}"
