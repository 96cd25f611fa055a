"""Descriptions of files: a missing, broken or hostile file is an error of one sentence, never a traceback."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ddpmx.errors import DdpmxError, FileFormatError, SpecError
from ddpmx.formats import envelope, npz
from ddpmx.formats.describe import describe, safetensors_elements
from ddpmx.formats.plan_file import sidecar_path
from oracles import gaussian, protobuf
from oracles.plans import RECORD, SPEC, elf, make_plan

# --- runs ------------------------------------------------------------------------------------------------------------


def safetensors(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


WEIGHTS = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "F32", "shape": [], "data_offsets": [24, 28]},
}


@pytest.fixture
def run(tmp_path) -> Path:
    for step, timesteps in ((9, 10), (100, 20)):  # the newest by number, not by name
        folder = tmp_path / "run" / "checkpoints" / str(step)
        folder.mkdir(parents=True)
        model = {"model": SPEC.replace(timesteps=timesteps).to_json(), "network": {"channels": 16}}
        (folder / "spec.json").write_text(json.dumps(model))
        (folder / "ema.safetensors").write_bytes(safetensors(WEIGHTS, bytes(28)))
    return tmp_path / "run"


def test_a_run_is_described_by_its_newest_checkpoint(run):
    description = describe(run)
    assert (description["kind"], description["checkpoint"], description["note"]) == ("checkpoint", "100", None)
    assert description["spec"] == SPEC.to_json()
    assert description["network"] == {"channels": 16}
    assert description["parameters"] == {"ema.safetensors": 7}
    assert description["bytes"] == (run / "checkpoints" / "100" / "ema.safetensors").stat().st_size
    assert describe(run / "checkpoints" / "9")["spec"]["timesteps"] == 10
    assert json.loads(json.dumps(description)) == description


def test_a_run_says_what_it_was_trained_on_and_how_far(run):
    file = run / "checkpoints" / "100" / "training.json"
    settings = {"train": {"batch": 64}, "loss": 0.03125, "data": {"path": "/photos", "images": 10000, "size": None}}
    file.write_text(json.dumps({"step": 1400, "settings": settings}))
    said = {"step": 1400, "batch": 64, "loss": 0.03125, "data": "/photos", "images": 10000}
    assert describe(run)["training"] == said
    file.write_text(json.dumps({"step": 0, "settings": {"imported": {"from": "diffusers"}}}))
    assert describe(run)["training"] == {"step": 0, "from": "diffusers"}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"step": 1}', '{"step": [], "settings": {"data": 3}}', "[" * 9999])
def test_a_damaged_training_state_is_no_obstacle(run, text):
    """The network runs without it."""
    (run / "checkpoints" / "100" / "training.json").write_text(text)
    assert describe(run)["training"] == {}


def test_a_run_without_a_checkpoint_is_refused(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileFormatError, match="no checkpoint yet"):
        describe(tmp_path)


def test_a_checkpoint_with_a_cut_off_file_is_refused(run):
    file = run / "checkpoints" / "100" / "ema.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(FileFormatError, match=r"ema\.safetensors: not a valid"):
        describe(run)


def test_a_checkpoint_s_link_to_nowhere_is_an_error_of_ours(run):
    (run / "checkpoints" / "100" / "more.safetensors").symlink_to("nowhere")
    with pytest.raises(DdpmxError, match=r"more\.safetensors"):
        describe(run)


def tensor(**changes: object) -> dict[str, object]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 7,
        b"\x00" * 8,
        b"\xff" * 8,
        b"\xff" * 100,
        (1 << 40).to_bytes(8, "little") + b"{}",
        safetensors(b"{"),
        safetensors(b"[" * 100_000),
        safetensors([]),
        safetensors(3),
        safetensors(b'"abc"'),
        safetensors({"a": 3}),
        safetensors({"a": []}),
        safetensors({"a": {}}),
        safetensors(tensor(), bytes(7)),
        safetensors(tensor(), bytes(9)),
        safetensors(tensor(data_offsets=[0]), bytes(8)),
        safetensors(tensor(data_offsets=["0", "8"]), bytes(8)),
        safetensors(tensor(data_offsets=None), bytes(8)),
        safetensors(tensor(shape=None), bytes(8)),
        safetensors(tensor(shape=2), bytes(8)),
        safetensors(tensor(shape=["many"]), bytes(8)),
        safetensors(tensor(shape=[[2]]), bytes(8)),
        safetensors(tensor(shape=[float("nan")]), bytes(8)),
        safetensors(tensor(shape=[float("inf")]), bytes(8)),
        safetensors(tensor(shape=[-2]), bytes(8)),
        safetensors(tensor(data_offsets=[0, float("inf")]), bytes(8)),
    ],
)
def test_broken_safetensors_are_refused(tmp_path, data):
    path = tmp_path / "ema.safetensors"
    path.write_bytes(data)
    with pytest.raises(FileFormatError, match="not a valid safetensors file"):
        safetensors_elements(path)


def test_safetensors_are_counted_whatever_they_claim(tmp_path):
    path = tmp_path / "ema.safetensors"
    path.write_bytes(safetensors(tensor(shape=[10**18] * 50), bytes(8)))
    assert safetensors_elements(path) <= 1 << 62


def test_safetensors_itself_agrees(tmp_path):
    library = pytest.importorskip("safetensors.numpy", reason="not verified here: what safetensors itself writes")
    path = tmp_path / "ema.safetensors"
    library.save_file({"a": np.zeros((3, 4), np.float32), "b": np.zeros(5, np.float16)}, path)
    assert safetensors_elements(path) == 17


# --- ONNX files ------------------------------------------------------------------------------------------------------


def test_an_onnx_file_is_described(gaussian_onnx):
    description = describe(gaussian_onnx)
    assert (description["kind"], description["bytes"], description["note"]) == (
        "onnx",
        gaussian_onnx.stat().st_size,
        None,
    )
    assert description["spec"] == gaussian.SPEC.to_json()
    assert description["inputs"] == {"x": "float32 ['batch', 3, 8, 8]", "t": "int32 ['batch']"}
    assert description["outputs"] == {"eps": "float32 ['batch', 3, 8, 8]"}
    assert description["weights"] == {"float32": 4 * (1000 + 1000 + 192)}
    assert (description["opset"], description["external"]) == (20, [])


def test_weights_beside_an_onnx_file_count(tmp_path):
    graph = protobuf.field(5, protobuf.external_tensor("weights.bin"))
    path = tmp_path / "model.onnx"
    path.write_bytes(protobuf.model({"x": (99, ())}, {}, graph=graph))
    (tmp_path / "weights.bin").write_bytes(bytes(4))
    description = describe(path)
    assert (description["external"], description["bytes"]) == (["weights.bin"], path.stat().st_size + 4)
    assert description["inputs"] == {"x": "type 99 []"}


def test_the_types_of_a_graph_have_their_names(tmp_path):
    onnx = pytest.importorskip("onnx", reason="not verified here: the names of ONNX's types (no onnx)")
    path = tmp_path / "model.onnx"
    path.write_bytes(protobuf.model({f"i{n}": (n, ()) for n in range(1, 24)}, {}))
    shown = [text.removesuffix(" []") for text in describe(path)["inputs"].values()]
    theirs = [onnx.TensorProto.DataType.Name(n).lower() for n in range(1, 24)]
    assert shown == [{"float": "float32", "double": "float64"}.get(name, name) for name in theirs]


def test_a_foreign_onnx_file_is_described_with_what_is_missing(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(protobuf.model({"x": (1, ("N", None, 3))}, {"y": (10, (1,))}))
    description = describe(path)
    assert description["spec"] is None
    assert description["note"].startswith("the file does not say which diffusion model it is")
    assert description["inputs"] == {"x": "float32 ['N', None, 3]"}
    assert description["outputs"] == {"y": "float16 [1]"}


def test_an_onnx_file_with_a_damaged_spec_is_refused(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(protobuf.model({}, {}, metadata={"ddpmx": SPEC.to_text()[:-1]}))
    with pytest.raises(SpecError, match="damaged"):
        describe(path)


# --- plans -----------------------------------------------------------------------------------------------------------


def test_a_plan_is_described(tmp_path):
    path = tmp_path / "model.plan"
    path.write_bytes(make_plan())
    description = describe(path)
    assert (description["kind"], description["flavour"], description["version"]) == (
        "plan",
        "TensorRT-RTX",
        "1.7.1.116",
    )
    assert (description["spec"], description["engine"]) == (SPEC.to_json(), RECORD.to_json())
    assert (description["note"], description["build"]) == (None, None)
    values = {"spec": SPEC.to_json(), "engine": RECORD.to_json(), "bytes": path.stat().st_size}
    sidecar_path(path).write_text(json.dumps(values | {"build": {"layers": 8}}))
    description = describe(path)
    assert description["build"] == {"layers": 8}


def test_a_plan_with_code_for_the_cpu_is_described_and_not_run(tmp_path):
    (tmp_path / "model.plan").write_bytes(make_plan(tail=elf(62)))
    assert describe(tmp_path / "model.plan")["spec"] == SPEC.to_json()


def test_a_plan_without_a_name_is_described_with_what_is_missing(tmp_path):
    (tmp_path / "model.plan").write_bytes(make_plan(name=b"Unnamed Network 0"))
    description = describe(tmp_path / "model.plan")
    assert (description["spec"], description["version"]) == (None, "1.7.1.116")
    assert description["note"].startswith("the plan does not say which diffusion model it is")


def test_a_plan_with_a_damaged_name_or_a_foreign_sidecar_is_refused(tmp_path):
    path = tmp_path / "model.plan"
    path.write_bytes(make_plan().replace(b"timesteps", b"timestep_"))
    with pytest.raises(SpecError, match="damaged"):
        describe(path)
    path.write_bytes(make_plan(record=dataclasses.replace(RECORD, batch=(1, 1, 1))))
    sidecar_path(path).write_text("{}")
    with pytest.raises(SpecError, match="contradicts"):
        describe(path)


# --- envelopes ----------------------------------------------------------------------------------------------------


def test_envelopes_are_found_among_any_bytes():
    first, second = envelope.wrap("a1", {"n": 1}), envelope.wrap("a1", {"n": 2})
    data = b"\0\xffa1 " + first.encode() + b"\xff" + envelope.wrap("b1", {"n": 3}).encode() + second.encode() + b"a1 9"
    found = list(envelope.search("a1", data))
    assert [text for text, _ in found] == [first, second]
    assert [data[end - len(text) : end].decode() for text, end in found] == [first, second]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-1],
        lambda text: text.replace('"n"', '"m"'),
        lambda text: text.replace("a1 ", "a1  "),
        lambda text: text.replace("a1 7 ", "a1 8 "),
        lambda text: text.replace("a1 7 ", "a1 0 "),
        lambda text: text.replace("a1 7 ", "a1 99999 "),
        lambda text: "a1 7 " + f"{int(text[5:13], 16) ^ 1:08x}" + text[13:],
    ],
)
def test_damaged_envelopes_are_skipped(damage):
    whole = envelope.wrap("a1", {"n": 1})
    assert whole.startswith("a1 7 ")
    damaged = damage(whole)
    assert damaged != whole
    assert list(envelope.search("a1", damaged.encode())) == []
    assert [text for text, _ in envelope.search("a1", f"{damaged} {whole}".encode())] == [whole]
    with pytest.raises(SpecError):
        envelope.unwrap("a1", damaged)


def test_envelopes_have_a_longest_length():
    assert envelope.unwrap("a1", envelope.wrap("a1", {"n": "x" * 9991})) == {"n": "x" * 9991}
    with pytest.raises(SpecError, match="the most is 9999"):
        envelope.wrap("a1", {"n": "x" * 9992})


def test_numbers_beyond_double_are_refused():
    for text in ('{"a": 1e999}', "[-1e999]"):
        with pytest.raises(SpecError):
            envelope.parse_json(text)


# --- .npz of unknown origin ------------------------------------------------------------------------------------------


def npy(header: str, data: bytes = b"", version: tuple[int, int] = (1, 0)) -> bytes:
    width = 2 if version == (1, 0) else 4
    return b"\x93NUMPY" + bytes(version) + len(header).to_bytes(width, "little") + header.encode() + data


def dtype(descr: object = "<f4", shape: str = "(2,)", fortran: bool = False) -> str:
    return f"{{'descr': {descr!r}, 'fortran_order': {fortran}, 'shape': {shape}}}\n"


@pytest.fixture
def archive(tmp_path):
    """``archive(a=bytes)`` writes an .npz with these members."""

    def write(compression: int = zipfile.ZIP_STORED, **parts: bytes) -> Path:
        path = tmp_path / "file.npz"
        with zipfile.ZipFile(path, "w", compression) as file:
            for name, data in parts.items():
                file.writestr(f"{name}.npy", data)
        return path

    return write


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_come_back_as_numpy_wrote_them(tmp_path, save):
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(24, dtype=np.int64).reshape(2, 3, 4)),
        "scalar": np.array(7, np.uint8),
        "empty": np.zeros((0, 3), np.float64),
        "flags": np.array([True, False]),
        "big": np.arange(3, dtype=">i4"),
    }
    save(tmp_path / "file.npz", **arrays)
    found = npz.read_npz(tmp_path / "file.npz", max_bytes=1 << 20)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        npy(dtype(), bytes(7)),  # a byte short
        npy(dtype(), bytes(9)),  # one too many
        npy(dtype(shape="(10**12,)")),
        npy(dtype(shape="(1000000000000,)"), bytes(8)),
        npy(dtype(shape="(1048576, 1048576, 1048576, 1048576)"), bytes(8)),
        npy(dtype(shape="(-2,)"), bytes(8)),
        npy(dtype(shape="(-1, -2)"), bytes(8)),
        npy(dtype(shape="(2.0,)"), bytes(8)),
        npy(dtype(shape="2"), bytes(8)),
        npy(dtype("|O"), bytes(16)),
        npy(dtype([("a", "|O")]), bytes(16)),
        npy(dtype([("a", "<f4")]), bytes(8)),
        npy(dtype("<U2"), bytes(16)),
        npy(dtype("|S4"), bytes(8)),
        npy(dtype("|V4"), bytes(8)),
        npy(dtype("<M8[s]"), bytes(16)),
        npy("{}"),
        npy("[" * 5000),
        npy("{" * 100_000, version=(2, 0)),
        npy("__import__('os').system('true')"),
        npy(dtype(), bytes(8))[:40],
    ],
)
def test_arrays_that_do_not_match_their_header_are_refused(archive, data):
    with pytest.raises(FileFormatError, match=r"file\.npz: not a valid \.npz file"):
        npz.read_npz(archive(a=data), max_bytes=1 << 20)


def test_pickles_are_not_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "opened"),)

    np.savez(tmp_path / "file.npz", a=np.array([Bomb()], dtype=object))
    with pytest.raises(FileFormatError):
        npz.read_npz(tmp_path / "file.npz", max_bytes=1 << 20)
    assert not (tmp_path / "opened").exists()


def test_archives_that_unpack_to_too_much_are_refused_unopened(archive, monkeypatch):
    bomb = npy(dtype(shape="(4194304,)"), bytes(1 << 24))
    path = archive(zipfile.ZIP_DEFLATED, a=bomb, b=bomb)
    assert path.stat().st_size < 1 << 17
    monkeypatch.setattr(npz, "_member", lambda *_: pytest.fail("a part was read"))
    with pytest.raises(FileFormatError, match="unpacks to 32 MiB in 2 parts"):
        npz.read_npz(path, max_bytes=(1 << 25) - 1)
    with pytest.raises(FileFormatError, match="in 257 parts"):
        npz.read_npz(archive(**{f"n{i}": b"" for i in range(257)}), max_bytes=1 << 20)


def test_an_archive_that_lies_about_its_size_gives_no_more_than_it_says(archive):
    part = npy(dtype(shape="(4194304,)"), bytes(1 << 24))
    path = archive(zipfile.ZIP_DEFLATED, a=part)
    data, size = path.read_bytes(), len(part).to_bytes(4, "little")
    assert data.count(size) == 2  # before the part, and in the directory
    path.write_bytes(data.replace(size, (100).to_bytes(4, "little")))
    with pytest.raises(FileFormatError):
        npz.read_npz(path, max_bytes=1 << 20)


@pytest.mark.parametrize("data", [b"", b"hello", b"PK\x05\x06", b"\x80\x04K\x01."])
def test_a_file_that_is_not_an_archive_is_refused(tmp_path, data):
    (tmp_path / "file.npz").write_bytes(data)
    for path in (tmp_path / "file.npz", tmp_path / "missing.npz", tmp_path):
        with pytest.raises(FileFormatError):
            npz.read_npz(path, max_bytes=1 << 20)


def test_truncated_archives_are_refused(tmp_path):
    stream = io.BytesIO()
    np.savez_compressed(stream, a=np.arange(200), b=np.eye(9))
    whole = stream.getvalue()
    for length in range(0, len(whole), 11):
        (tmp_path / "file.npz").write_bytes(whole[:length])
        with pytest.raises(FileFormatError):
            npz.read_npz(tmp_path / "file.npz", max_bytes=1 << 20)


def test_changed_archives_never_escape(tmp_path):
    stream = io.BytesIO()
    np.savez_compressed(stream, a=np.arange(200), b=np.eye(9))
    rng = np.random.default_rng(8)
    for _ in range(200):
        data = bytearray(stream.getvalue())
        data[rng.integers(len(data))] = rng.integers(256)
        (tmp_path / "file.npz").write_bytes(data)
        try:
            npz.read_npz(tmp_path / "file.npz", max_bytes=1 << 20)
        except FileFormatError:
            continue


def test_pipes_are_not_waited_for(tmp_path):
    for name in ("a.npz", "ema.safetensors"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(FileFormatError, match="cannot be read"):
        npz.read_npz(tmp_path / "a.npz", max_bytes=1 << 20)
    with pytest.raises(FileFormatError):
        safetensors_elements(tmp_path / "ema.safetensors")
