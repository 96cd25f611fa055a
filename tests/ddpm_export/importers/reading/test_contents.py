"""Opening files of unknown origin: nothing in them is run, no declared size is trusted, each fault is one clear error."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import re
import struct
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="not verified here: importers (no torch)")

import torch
from safetensors.torch import save_file

from ddpm_export.importers import diffusers
from ddpm_export.importers.registry import import_checkpoint, open_checkpoint
from ddpm_export.importers.settings import Options, SettingsResolver
from ddpmx.errors import BackendError, DdpmxError, FileFormatError

pytestmark = pytest.mark.torch

WEIGHTS = {"a.weight": torch.arange(1000.0), "b": {"c": torch.ones(3, 4, dtype=torch.float16)}, "step": 7}


class Harmful:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.mark),))


def saved(tmp_path: Path, content: object, *, legacy: bool = False) -> Path:
    path = tmp_path / "model.pt"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def repacked(path: Path, *, compress: bool = False, **changes: bytes) -> Path:
    """The zip written again, with some members (their last name) changed."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(name, changes.get(name.rsplit("/", 1)[1].replace(".", "_"), content))
    return path


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
def test_tensors_are_flat_and_values_beside_them(legacy, tmp_path):
    contents = open_checkpoint(saved(tmp_path, {**WEIGHTS, "list": [torch.zeros(2), 1.5]}, legacy=legacy))
    assert contents.kind == "torch"
    assert set(contents.tensors) == {"a.weight", "b.c", "list.0"}
    assert contents.objects == {"step": 7, "list.1": 1.5}
    assert torch.equal(contents.tensors["a.weight"], torch.arange(1000.0))
    assert set(contents.below("b.")) == {"c"}


def test_safetensors(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "m.safetensors", metadata={"config": '{"x": 1}', "format": "pt"})
    contents = open_checkpoint(tmp_path)  # the only file of a folder
    assert (contents.kind, list(contents.tensors), contents.config) == ("safetensors", ["a"], {"x": 1})


# --- code in files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
def test_nothing_is_run(legacy, tmp_path):
    path = saved(tmp_path, {"a": torch.ones(1), "b": Harmful(tmp_path / "mark")}, legacy=legacy)
    with pytest.raises(FileFormatError, match="more than weights") as caught:
        open_checkpoint(path)
    assert "mkdir" in str(caught.value)
    assert not (tmp_path / "mark").exists()


def test_the_class_that_is_needed_is_named(tmp_path):
    path = saved(tmp_path, {"a": torch.ones(1), "args": argparse.Namespace(lr=1)})
    with pytest.raises(FileFormatError, match=r"argparse\.Namespace"):
        open_checkpoint(path)


def test_a_plain_pickle_is_refused_unopened(tmp_path):
    path = tmp_path / "network-snapshot.pkl"
    path.write_bytes(pickle.dumps({"ema": Harmful(tmp_path / "mark")}))
    with pytest.raises(FileFormatError, match=r"not one that torch\.save wrote") as caught:
        open_checkpoint(path)
    assert "mkdir" in str(caught.value)
    assert not (tmp_path / "mark").exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_is_refused(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "model.pt")
    with pytest.raises(FileFormatError, match="TorchScript"):
        open_checkpoint(tmp_path / "model.pt")


def test_a_torch_whose_weights_only_can_be_bypassed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(BackendError, match=r"2\.5\.1"):
        open_checkpoint(saved(tmp_path, WEIGHTS))


# --- absurd sizes ----------------------------------------------------------------------------------------------------


def test_compressed_members_are_refused_before_they_are_inflated(tmp_path):
    path = repacked(saved(tmp_path, {"a": torch.zeros(10_000_000)}), compress=True)
    assert path.stat().st_size < 100_000
    with pytest.raises(FileFormatError, match="compressed"):
        open_checkpoint(path)


def test_overlapping_members_are_refused(tmp_path):
    path = saved(tmp_path, {"a": torch.zeros(10_000), "b": torch.ones(10_000)})
    content = bytearray(path.read_bytes())
    ends = [i for i in range(len(content)) if content[i : i + 4] == b"PK\x01\x02"]
    with zipfile.ZipFile(path) as archive:
        offsets = {info.filename.rsplit("/", 1)[1]: info.header_offset for info in archive.infolist()}
    for end in ends:  # the central directory: every large member lies where the first one does
        for name in ("1",):
            if content[end + 42 : end + 46] == offsets[name].to_bytes(4, "little"):
                content[end + 42 : end + 46] = offsets["0"].to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(FileFormatError):
        open_checkpoint(path)


def test_storages_that_claim_more_than_there_is_are_refused(tmp_path):
    path = saved(tmp_path, {"a": torch.arange(1000.0)})
    with pytest.raises(FileFormatError, match="claims 4,000 bytes, and the file holds 8"):
        open_checkpoint(repacked(path, **{"0": b"12345678"}))


def test_an_old_file_that_claims_a_terabyte_is_refused(tmp_path):
    path = saved(tmp_path, {"a": torch.arange(1000.0)}, legacy=True)
    content = path.read_bytes()
    count = b"M\xe8\x03"  # BININT2 1000: how many numbers the storage has
    assert content.count(count) >= 1
    path.write_bytes(content.replace(count, b"\x8a\x05\x00\x00\x00\x00\x40", 1))  # LONG1 2^38
    with pytest.raises(FileFormatError, match="claim 1,099,511,627,776 bytes"):
        open_checkpoint(path)


def test_a_view_of_absurd_shape_is_refused(tmp_path):
    with pytest.raises(FileFormatError, match="absurd shape"):
        open_checkpoint(saved(tmp_path, {"a": torch.zeros(1).expand(1 << 40)}))


def test_a_million_views_of_one_storage_are_refused(tmp_path):
    one = torch.zeros(1 << 18)
    with pytest.raises(FileFormatError, match="many times the file's size"):
        open_checkpoint(saved(tmp_path, [one.view(1 << 18) for _ in range(200)]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["itself", "doubling"])
def test_containers_without_end_are_refused(kind, tmp_path):
    content: list[object] = [torch.ones(1)]
    if kind == "itself":
        content.append(content)
    else:
        for _ in range(28):
            content = [content, content]
    with pytest.raises(FileFormatError, match="nested"):
        open_checkpoint(saved(tmp_path, content))


LEGACY = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
NESTED = b"K\x01K\x01\x86q\x00" + b"".join(b"h%ch%c\x86q%c" % (i - 1, i - 1, i) for i in range(1, 60))
"""A tuple of twice a tuple of twice a tuple …: 60 levels, which hash() walks 2^60 times."""


def crafted(tmp_path: Path, content: bytes, *, legacy: bool = False) -> Path:
    """A file whose content is the pickle with these operations."""
    path = tmp_path / "model.pt"
    if legacy:
        path.write_bytes(LEGACY + content + pickle.dumps([], 2))
        return path
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
    return path


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"\x80\x02}" + NESTED + b"K\x01s.", id="a key"),
        pytest.param(b"\x80\x02}(" + NESTED + b"K\x01u.", id="keys"),
        pytest.param(b"\x80\x02ccollections\nOrderedDict\n]]" + NESTED + b"aK\x01aa\x85R.", id="reduce"),
        pytest.param(b"\x80\x02(" + NESTED + b"Q.", id="a storage"),
        pytest.param(b"\x80\x04(" + NESTED + b"\x91.", id="a frozen set"),
    ],
)
def test_tuples_that_hash_cannot_walk_are_refused(content, legacy, tmp_path):
    with pytest.raises(FileFormatError):
        open_checkpoint(crafted(tmp_path, content, legacy=legacy))


def test_the_storages_keys_of_an_old_file_are_looked_at(tmp_path):
    path = crafted(tmp_path, pickle.dumps({}, 2), legacy=True)
    assert not open_checkpoint(path).tensors
    path.write_bytes(LEGACY + pickle.dumps({}, 2) + b"\x80\x02}" + NESTED + b"K\x01s.")
    with pytest.raises(FileFormatError, match="tuples of tuples"):
        open_checkpoint(path)


@pytest.mark.parametrize("key", [(1, 2), 1.5, None], ids=str)
def test_keys_are_names_or_numbers(key, tmp_path):
    with pytest.raises(FileFormatError, match="neither a name nor a number"):
        open_checkpoint(saved(tmp_path, {"a": torch.ones(1), "b": {key: 1}}))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize(
    "put", [b"r" + struct.pack("<I", 0x7FFFFFFF), b"q\xff", b"p99999\n"], ids=["long", "one", "text"]
)
def test_an_object_s_number_allocates_nothing(put, legacy, tmp_path):
    with pytest.raises(FileFormatError, match="memo index"):
        open_checkpoint(crafted(tmp_path, b"\x80\x02N" + put + b".", legacy=legacy))


def test_a_bare_pickle_with_an_absurd_number_is_refused(tmp_path):
    (tmp_path / "m.pkl").write_bytes(b"\x80\x02Nr" + struct.pack("<I", 0x7FFFFFFF) + b".")
    with pytest.raises(FileFormatError, match="memo index"):
        open_checkpoint(tmp_path / "m.pkl")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
def test_a_pickle_beyond_the_bound_is_refused(legacy, tmp_path, monkeypatch):
    path = saved(tmp_path, {"a": "x" * 5000}, legacy=legacy)
    assert open_checkpoint(path).objects["a"] == "x" * 5000
    monkeypatch.setattr("ddpm_export.importers.reading.torch_file.MAX_PICKLE", 4096)
    with pytest.raises(FileFormatError, match="its pickle alone"):
        open_checkpoint(path)


def test_a_bytearray_of_any_length_is_refused(tmp_path):
    with pytest.raises(FileFormatError, match="a bytearray made from a length"):
        open_checkpoint(crafted(tmp_path, b"\x80\x02c__builtin__\nbytearray\nJ\x00\x00\x00\x70\x85R."))


def test_two_members_that_torch_takes_for_one_are_refused(tmp_path):
    path = saved(tmp_path, WEIGHTS)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("model/DATA.PKL", b"\x80\x02}.")
    with pytest.raises(FileFormatError, match="one name"):
        open_checkpoint(path)


# --- plain objects with attributes that hide their methods ------------------------------------------------------------


def test_a_dict_whose_items_are_hidden_is_read_as_a_dict(tmp_path):
    state = b"}X\x05\x00\x00\x00itemsX\x01\x00\x00\x00xsb"
    path = crafted(tmp_path, b"\x80\x02ccollections\nOrderedDict\n)RX\x01\x00\x00\x00nK\x07s" + state + b".")
    assert open_checkpoint(path).objects == {"n": 7}


def test_a_tensor_whose_methods_are_hidden_is_read_as_a_tensor(tmp_path):
    tensor, parameter = torch.ones(2), torch.nn.Parameter(torch.zeros(3))
    tensor.detach = tensor.numel = parameter.detach = parameter.numel = "x"
    contents = open_checkpoint(saved(tmp_path, {"t": tensor, "p": parameter}))
    assert {type(one) for one in contents.tensors.values()} == {torch.Tensor}
    assert contents.tensors["t"].numel() == 2
    assert not contents.tensors["p"].requires_grad


@pytest.mark.parametrize("error", [TypeError, AttributeError, RuntimeError, ValueError, RecursionError])
def test_contents_that_cannot_be_flattened_are_no_traceback(error, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise error("not callable")

    path = saved(tmp_path, WEIGHTS)
    monkeypatch.setattr("ddpm_export.importers.reading.contents._plain_tensor", fail)
    with pytest.raises(FileFormatError, match="not plain weights"):
        open_checkpoint(path)


def test_an_empty_table_of_time_embeddings_is_refused(tmp_path):
    with pytest.raises(FileFormatError, match="time embeddings"):
        import_checkpoint(saved(tmp_path, {"time_embedding.timembedding.0.weight": torch.zeros(0, 8)}))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantized_tensors_are_refused(tmp_path):
    with pytest.raises(FileFormatError, match=r"quantized tensors \(QInt8\)"):
        open_checkpoint(saved(tmp_path, {"a": torch.quantize_per_tensor(torch.zeros(2, 2), 0.1, 0, torch.qint8)}))


def test_sparse_tensors_are_refused(tmp_path):
    with pytest.raises(FileFormatError, match="sparse"):
        open_checkpoint(saved(tmp_path, {"a": torch.eye(3).to_sparse()}))


# --- damaged files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("part", [0.0, 0.001, 0.3, 0.7, 0.99])
def test_a_file_that_was_cut_off_is_refused(kind, part, tmp_path):
    path = tmp_path / "model.safetensors"
    if kind == "safetensors":
        save_file({"a": torch.arange(1000.0)}, path)
    else:
        path = saved(tmp_path, WEIGHTS, legacy=kind == "legacy")
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(FileFormatError) as caught:
        open_checkpoint(path)
    assert path.name in str(caught.value)


def test_a_flipped_bit_is_found_by_the_checksum(tmp_path):
    path = saved(tmp_path, {"a": torch.arange(1000.0)})
    content = bytearray(path.read_bytes())
    content[content.index(torch.arange(1000.0).numpy().tobytes()) + 500] ^= 1
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match="checksum"):
        open_checkpoint(path)


def test_every_damaged_byte_is_an_error_or_harmless(tmp_path):
    """Anything may happen to a file but a crash, a traceback, or a wrong tensor."""
    path = saved(tmp_path, {"a": torch.arange(4.0)})
    content = path.read_bytes()
    for i in range(0, len(content), 7):
        path.write_bytes(content[:i] + bytes([content[i] ^ 0x55]) + content[i + 1 :])
        try:
            contents = open_checkpoint(path)
        except DdpmxError:
            continue
        assert all(torch.equal(tensor, torch.arange(4.0)) for tensor in contents.tensors.values())


def test_two_tensors_of_one_name_are_refused(tmp_path):
    with pytest.raises(FileFormatError, match=r"a\.b"):
        open_checkpoint(saved(tmp_path, {"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}}))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 142941696\n"


def tarred(name: str, mode: str) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:
        archive.addfile(tarfile.TarInfo(name))
    return stream.getvalue()


def zipped(*names: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, "x" * 1000)
    return stream.getvalue()


FOREIGN = {
    "nothing": (b"", "it is empty"),
    "unknown": (b"not weights", "neither a torch file"),
    "a page": (b"\n<!DOCTYPE html><html><head><title>Sign in</title>", "HTML page, .* title is 'Sign in'"),
    "an error page": (b"<html>not found</html>", "HTML page"),
    "S3's error": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "XML page, .*AccessDenied"),
    "a server's answer": (b'{"error": "Repository not found"}', "JSON text, .*not found"),
    "an LFS pointer": (POINTER, "pointer of Git LFS, .*142,941,696 bytes.*git lfs pull"),
    "a tar archive": (tarred("run/model.pt", "w"), "a tar archive.*run/model.pt"),
    "a tar.gz": (tarred("run/model.pt", "w:gz"), "compressed by gzip"),
    "a zip of weights": (zipped("readme.txt", "run/model.pt"), "a zip archive, .*name run/model.pt"),
    "a zip of images": (zipped("a.png", "b.png"), "a zip archive, .*a.png, b.png"),
    "an npz": (zipped("images.npy"), "arrays of NumPy"),
    "Keras weights": (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
    "a plan": (b"ftrt" + bytes(100), "TensorRT plan"),
}


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("what", FOREIGN)
def test_what_is_no_checkpoint_is_named(what, suffix, tmp_path):
    content, said = FOREIGN[what]
    (tmp_path / f"model.{suffix}").write_bytes(content)
    if (what, suffix) == ("unknown", "safetensors"):
        said = "not a safetensors file"
    with pytest.raises(FileFormatError) as caught:
        open_checkpoint(tmp_path / f"model.{suffix}")
    assert re.search(said, str(caught.value), re.DOTALL)


def test_the_pointer_of_a_folder_s_weights_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(POINTER)
    with pytest.raises(FileFormatError, match="pointer of Git LFS"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.ckpt-7.index").write_bytes(POINTER)
    with pytest.raises(FileFormatError, match="pointer of Git LFS"):
        open_checkpoint(tmp_path / "model.ckpt-7")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_numbers_of_numpy_beside_the_weights_are_left_out(legacy, tmp_path):
    beside = {"loss": np.float64(0.02), "step": np.int64(7), "losses": np.arange(5.0), "best": [np.float32(1)]}
    before = torch.serialization.get_safe_globals()
    contents = open_checkpoint(saved(tmp_path, {"a": torch.ones(2), **beside}, legacy=legacy))
    assert list(contents.tensors) == ["a"]
    assert "loss" not in contents.objects
    assert set(torch.serialization.get_safe_globals()) == set(before), "nothing more is allowed afterwards"


def test_weights_are_known_by_their_content_not_by_their_name(tmp_path):
    save_file({"a": torch.arange(4.0)}, tmp_path / "weights.ckpt")
    torch.save({"a": torch.arange(4.0)}, tmp_path / "weights.safetensors")
    for name in ("weights.ckpt", "weights.safetensors"):
        assert open_checkpoint(tmp_path / name).tensors["a"].tolist() == [0, 1, 2, 3]


def test_nothing_there(tmp_path):
    with pytest.raises(FileFormatError, match="nothing there"):
        open_checkpoint(tmp_path / "missing.pt")
    with pytest.raises(FileFormatError, match="no checkpoint in this folder"):
        open_checkpoint(tmp_path)


def test_a_run_needs_no_import(tmp_path):
    saved = tmp_path / "run" / "checkpoints" / "00000002"
    saved.mkdir(parents=True)
    save_file({"a": torch.zeros(1)}, saved / "ema.safetensors")
    (saved / "spec.json").write_text("{}")
    for path, folder, what in (
        (tmp_path / "run", tmp_path / "run", "a run"),
        (saved, saved, "a checkpoint"),
        (saved / "ema.safetensors", saved, "a checkpoint"),
    ):
        with pytest.raises(FileFormatError, match=f"{what} of ddpmx, which needs no import") as caught:
            open_checkpoint(path)
        assert f"ddpmx export {folder} -o" in str(caught.value)


def test_a_folder_of_several_files_is_not_guessed_at(tmp_path):
    for name in ("ema.pt", "raw.pt"):
        torch.save(WEIGHTS, tmp_path / name)
    with pytest.raises(FileFormatError, match="several checkpoints") as caught:
        open_checkpoint(tmp_path)
    assert "ema.pt, raw.pt" in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="not verified here: a pipe (no named pipes)")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.pt")
    with pytest.raises(FileFormatError, match="neither a file nor a folder"):
        open_checkpoint(tmp_path / "model.pt")


def test_a_checkpoint_of_an_unknown_project_is_refused(tmp_path):
    with pytest.raises(FileFormatError, match="a checkpoint of no project that ddpmx knows") as caught:
        import_checkpoint(saved(tmp_path, WEIGHTS))
    assert "a.weight" in str(caught.value)


def test_score_sde_is_refused_with_the_reason(tmp_path):
    weights = {"model": {"module.all_modules.0.weight": torch.ones(1)}, "ema": {"shadow_params": [torch.ones(1)]}}
    with pytest.raises(FileFormatError, match="continuous t"):
        import_checkpoint(saved(tmp_path, weights))


# --- several files of one network ------------------------------------------------------------------------------------


def folder_of(folder: Path, *names: str) -> Path:
    """diffusers' layout, in which each file holds its own name's length."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    for name in names:
        weights = {"a": torch.tensor([float(len(name))]), **{mark: torch.ones(1) for mark in diffusers.MARKS}}
        save = save_file if name.endswith("safetensors") else torch.save
        save(weights, folder / f"diffusion_pytorch_model.{name}")
    return folder


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (("bin", "fp16.safetensors", "non_ema.safetensors"), "bin"),
        (("bin", "fp16.bin", "safetensors"), "safetensors"),
        (("fp16.bin", "fp16.safetensors"), "fp16.safetensors"),
    ],
)
def test_plain_weights_come_before_their_variants(names, taken, tmp_path):
    contents = open_checkpoint(folder_of(tmp_path, *names))
    assert contents.file.name == f"diffusion_pytorch_model.{taken}"
    assert contents.tensors["a"].item() == len(taken)


@pytest.mark.parametrize("names", [("non_ema.safetensors",), ("fp16.bin", "ema.safetensors")], ids=len)
def test_variants_alone_are_not_guessed_at(names, tmp_path):
    with pytest.raises(FileFormatError, match="only variants") as caught:
        open_checkpoint(folder_of(tmp_path, *names))
    assert "name one of them" in str(caught.value)
    for name in names:
        contents = open_checkpoint(tmp_path / f"diffusion_pytorch_model.{name}")
        assert (contents.kind, contents.path) == ("folder", tmp_path)
        assert (contents.tensors["a"].item(), contents.config["_class_name"]) == (len(name), "UNet2DModel")


@pytest.mark.parametrize(
    ("inside", "name", "kind", "source"),
    [
        (".", "bin", "as stored", "diffusion_pytorch_model.bin"),
        ("unet", "safetensors", "as stored", "unet/diffusion_pytorch_model.safetensors"),
        ("unet_ema", "safetensors", "ema", "unet_ema/diffusion_pytorch_model.safetensors"),
        ("unet", "fp16.safetensors", "as stored", "unet/diffusion_pytorch_model.fp16.safetensors"),
    ],
)
def test_the_facts_say_which_weights_are_taken(inside, name, kind, source, tmp_path, monkeypatch):
    facts: list[tuple[str, object, str]] = []
    monkeypatch.setattr(SettingsResolver, "add_fact", lambda _, *fact: facts.append(fact))
    for part in ("read_network", "read_chain", "rows", "unet_shapes", "to_ours"):
        monkeypatch.setattr(diffusers, part, lambda *_, **__: None)
    monkeypatch.setattr(SettingsResolver, "finish", lambda *_, **__: None)
    folder_of(tmp_path / inside, name)
    diffusers.read(open_checkpoint(tmp_path), Options())
    assert facts == [("weights", kind, f"3 tensors of {source}")]


def test_weights_in_parts_are_refused(tmp_path):
    folder = folder_of(tmp_path)
    part = folder / "diffusion_pytorch_model-00001-of-00002.safetensors"
    save_file({"a": torch.ones(1)}, part)
    for path in (folder, part):
        with pytest.raises(FileFormatError, match="split over several files"):
            open_checkpoint(path)


# --- the hub ---------------------------------------------------------------------------------------------------------


def test_without_huggingface_hub_an_id_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(BackendError, match="not installed"):
        open_checkpoint("hf:google/ddpm-cifar10-32")


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (("bin", "fp16.safetensors"), "bin"),
        (("bin", "safetensors"), "safetensors"),
        (("bin",), "bin"),
        (("fp16.safetensors",), "fp16.safetensors"),
    ],
)
def test_the_hub_s_plain_weights_are_downloaded(names, taken, tmp_path, monkeypatch):
    def snapshot_download(_: str, *, allow_patterns: list[str]) -> str:
        folder_of(tmp_path, *(name for name in names if f"*.{name.rsplit('.')[-1]}" in allow_patterns))
        return str(tmp_path)

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert open_checkpoint("hf:somebody/something").file.name == f"diffusion_pytorch_model.{taken}"


def test_what_accelerate_saves_beside_the_weights_is_no_second_checkpoint(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    for name in ("optimizer.bin", "scheduler.bin", "scaler.pt", "optimizer_1.bin"):
        torch.save({"state": {}}, tmp_path / name)
    assert open_checkpoint(tmp_path).file.name == "model.safetensors"
