"""Opening other people's files: nothing in them is run, nothing they claim is believed, each fault is one clear error."""

from __future__ import annotations

import argparse
import os
import pickle
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="not verified here: importers (no torch)")

import torch
from safetensors.torch import save_file

from ddpm_export.importers import import_checkpoint, open_found
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
    found = open_found(saved(tmp_path, {**WEIGHTS, "list": [torch.zeros(2), 1.5]}, legacy=legacy))
    assert found.kind == "torch"
    assert set(found.tensors) == {"a.weight", "b.c", "list.0"}
    assert found.objects == {"step": 7, "list.1": 1.5}
    assert torch.equal(found.tensors["a.weight"], torch.arange(1000.0))
    assert set(found.below("b.")) == {"c"}


def test_safetensors(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "m.safetensors", metadata={"config": '{"x": 1}', "format": "pt"})
    found = open_found(tmp_path)  # the only file of a folder
    assert (found.kind, list(found.tensors), found.config) == ("safetensors", ["a"], {"x": 1})


# --- what would run --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
def test_nothing_is_run(legacy, tmp_path):
    path = saved(tmp_path, {"a": torch.ones(1), "b": Harmful(tmp_path / "mark")}, legacy=legacy)
    with pytest.raises(FileFormatError, match="more than weights") as caught:
        open_found(path)
    assert "mkdir" in str(caught.value)
    assert not (tmp_path / "mark").exists()


def test_the_class_that_is_needed_is_named(tmp_path):
    path = saved(tmp_path, {"a": torch.ones(1), "args": argparse.Namespace(lr=1)})
    with pytest.raises(FileFormatError, match=r"argparse\.Namespace"):
        open_found(path)


def test_a_plain_pickle_is_refused_unopened(tmp_path):
    path = tmp_path / "network-snapshot.pkl"
    path.write_bytes(pickle.dumps({"ema": Harmful(tmp_path / "mark")}))
    with pytest.raises(FileFormatError, match=r"not one that torch\.save wrote") as caught:
        open_found(path)
    assert "mkdir" in str(caught.value)
    assert not (tmp_path / "mark").exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_is_refused(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "model.pt")
    with pytest.raises(FileFormatError, match="TorchScript"):
        open_found(tmp_path / "model.pt")


def test_a_torch_that_can_be_got_around_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(BackendError, match=r"2\.5\.1"):
        open_found(saved(tmp_path, WEIGHTS))


# --- what claims to be large -----------------------------------------------------------------------------------------


def test_compressed_members_are_refused_before_they_are_inflated(tmp_path):
    path = repacked(saved(tmp_path, {"a": torch.zeros(10_000_000)}), compress=True)
    assert path.stat().st_size < 100_000
    with pytest.raises(FileFormatError, match="compressed"):
        open_found(path)


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
        open_found(path)


def test_storages_that_claim_more_than_there_is_are_refused(tmp_path):
    path = saved(tmp_path, {"a": torch.arange(1000.0)})
    with pytest.raises(FileFormatError, match="claims 4,000 bytes, and the file holds 8"):
        open_found(repacked(path, **{"0": b"12345678"}))


def test_an_old_file_that_claims_a_terabyte_is_refused(tmp_path):
    path = saved(tmp_path, {"a": torch.arange(1000.0)}, legacy=True)
    content = path.read_bytes()
    count = b"M\xe8\x03"  # BININT2 1000: how many numbers the storage has
    assert content.count(count) >= 1
    path.write_bytes(content.replace(count, b"\x8a\x05\x00\x00\x00\x00\x40", 1))  # LONG1 2^38
    with pytest.raises(FileFormatError, match="claim 1,099,511,627,776 bytes"):
        open_found(path)


def test_a_view_of_absurd_shape_is_refused(tmp_path):
    with pytest.raises(FileFormatError, match="absurd shape"):
        open_found(saved(tmp_path, {"a": torch.zeros(1).expand(1 << 40)}))


def test_a_million_views_of_one_storage_are_refused(tmp_path):
    one = torch.zeros(1 << 18)
    with pytest.raises(FileFormatError, match="many times the file's size"):
        open_found(saved(tmp_path, [one.view(1 << 18) for _ in range(200)]))


@pytest.mark.parametrize("kind", ["itself", "doubling"])
def test_containers_without_end_are_refused(kind, tmp_path):
    content: list[object] = [torch.ones(1)]
    if kind == "itself":
        content.append(content)
    else:
        for _ in range(28):
            content = [content, content]
    with pytest.raises(FileFormatError, match="nested"):
        open_found(saved(tmp_path, content))


def test_sparse_tensors_are_refused(tmp_path):
    with pytest.raises(FileFormatError):
        open_found(saved(tmp_path, {"a": torch.eye(3).to_sparse()}))


# --- what is damaged -------------------------------------------------------------------------------------------------


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
        open_found(path)
    assert path.name in str(caught.value)


def test_a_flipped_bit_is_found_by_the_checksum(tmp_path):
    path = saved(tmp_path, {"a": torch.arange(1000.0)})
    content = bytearray(path.read_bytes())
    content[content.index(torch.arange(1000.0).numpy().tobytes()) + 500] ^= 1
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match="checksum"):
        open_found(path)


def test_every_damaged_byte_is_an_error_or_harmless(tmp_path):
    """Anything may happen to a file but a crash, a traceback, or a wrong tensor."""
    path = saved(tmp_path, {"a": torch.arange(4.0)})
    content = path.read_bytes()
    for i in range(0, len(content), 7):
        path.write_bytes(content[:i] + bytes([content[i] ^ 0x55]) + content[i + 1 :])
        try:
            found = open_found(path)
        except DdpmxError:
            continue
        assert all(torch.equal(tensor, torch.arange(4.0)) for tensor in found.tensors.values())


def test_two_tensors_of_one_name_are_refused(tmp_path):
    with pytest.raises(FileFormatError, match=r"a\.b"):
        open_found(saved(tmp_path, {"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}}))


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"version https://git-lfs.github.com/spec/v1\n"])
def test_what_is_no_checkpoint_is_refused(content, tmp_path):
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(FileFormatError, match="neither a torch file"):
        open_found(tmp_path / "model.pt")


def test_nothing_there(tmp_path):
    with pytest.raises(FileFormatError, match="nothing there"):
        open_found(tmp_path / "missing.pt")
    with pytest.raises(FileFormatError, match="no checkpoint in this folder"):
        open_found(tmp_path)


def test_a_folder_of_several_files_is_not_guessed_at(tmp_path):
    for name in ("ema.pt", "raw.pt"):
        torch.save(WEIGHTS, tmp_path / name)
    with pytest.raises(FileFormatError, match="several checkpoints") as caught:
        open_found(tmp_path)
    assert "ema.pt, raw.pt" in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="not verified here: a pipe (no named pipes)")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.pt")
    with pytest.raises(FileFormatError, match="neither a file nor a folder"):
        open_found(tmp_path / "model.pt")


def test_nobody_s_checkpoint_is_said_so(tmp_path):
    with pytest.raises(FileFormatError, match="nobody's checkpoint") as caught:
        import_checkpoint(saved(tmp_path, WEIGHTS))
    assert "a.weight" in str(caught.value)


def test_score_sde_is_refused_with_the_reason(tmp_path):
    weights = {"model": {"module.all_modules.0.weight": torch.ones(1)}, "ema": {"shadow_params": [torch.ones(1)]}}
    with pytest.raises(FileFormatError, match="continuous t"):
        import_checkpoint(saved(tmp_path, weights))


# --- the hub ---------------------------------------------------------------------------------------------------------


def test_without_huggingface_hub_an_id_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(BackendError, match="not installed"):
        open_found("hf:google/ddpm-cifar10-32")
