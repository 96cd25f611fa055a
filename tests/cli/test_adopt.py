"""`ddpmx adopt`, on toy models: what it writes, and what it leaves alone."""

from __future__ import annotations

import dataclasses

import pytest
from PIL import Image

from conftest import GAUSSIAN_ONNX
from ddpmx.formats import onnx_file
from ddpmx.parity.reference import Reference
from oracles import conditioning, parity
from oracles.plans import make_plan

pytest.importorskip("onnxruntime", reason="not verified here: files changed by other tools (no ONNX Runtime)")


@pytest.fixture
def original(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(GAUSSIAN_ONNX.read_bytes())
    return path


@pytest.fixture
def changed(tmp_path):
    path = tmp_path / "slim.onnx"
    path.write_bytes(GAUSSIAN_ONNX.read_bytes().replace(b"\x05ddpmx\x12", b"\x05other\x12"))
    return path


def described(path):
    return onnx_file.METADATA_KEY in onnx_file.read_onnx(path).metadata


def test_nothing_of_another_kind_is_overwritten(ddpmx, refused, original, changed, tmp_path):
    another = conditioning.spec_of("classes")
    there = {
        "model.plan": make_plan(),
        "note.onnx": b"hello",
        "foreign.onnx": changed.read_bytes(),
        "another.onnx": conditioning.onnx(another, metadata=onnx_file.metadata(another)),
    }
    for name, content in there.items():
        (tmp_path / name).write_bytes(content)
    Image.new("L", (4, 4)).save(tmp_path / "1.png")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for name in (*there, "1.png"):
        refused("adopt", changed, "--like", original, "-o", tmp_path / name)
    assert "-o " + str(tmp_path / "model.onnx") in refused("adopt", changed, "--like", original, "-o", tmp_path)
    assert "there is no folder" in refused("adopt", changed, "--like", original, "-o", tmp_path / "no" / "x.onnx")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert ddpmx("adopt", changed, "--like", original, "-o", tmp_path / "another.onnx", "--overwrite").code == 0
    assert (tmp_path / "another.onnx").read_bytes().startswith(changed.read_bytes())


def test_the_file_itself_and_its_own_copy_are_replaced_without_a_flag(ddpmx, original, changed, tmp_path):
    for _ in range(2):
        assert ddpmx("adopt", changed, "--like", original, "-o", tmp_path / "copy.onnx").code == 0
    assert not described(changed)
    assert ddpmx("adopt", changed, "--like", original).code == 0
    assert described(changed)


@pytest.mark.parametrize("own", [True, False])
def test_a_record_is_handed_over_only_if_it_is_the_original_s(ddpmx, original, changed, own):
    spec = onnx_file.onnx_spec(original, onnx_file.read_onnx(original))
    reference = dataclasses.replace(parity.make_reference(), spec=spec if own else spec.replace(variance="fixed_small"))
    reference.save(original.with_suffix(".parity.npz"))
    done = ddpmx("adopt", changed, "--like", original)
    assert done.code == 0, done
    assert described(changed)
    assert changed.with_suffix(".parity.npz").exists() == own
    if own:
        assert Reference.load(changed.with_suffix(".parity.npz")).spec == spec
    else:
        assert "was left out: the record is another model's" in done.out


def test_a_record_of_somebody_else_is_not_overwritten(refused, original, changed, tmp_path):
    spec = onnx_file.onnx_spec(original, onnx_file.read_onnx(original))
    dataclasses.replace(parity.make_reference(), spec=spec).save(original.with_suffix(".parity.npz"))
    (tmp_path / "slim.parity.npz").write_bytes(b"hello")
    assert "not a parity record" in refused("adopt", changed, "--like", original)
    assert (tmp_path / "slim.parity.npz").read_bytes() == b"hello"
    assert not described(changed)


def test_what_is_no_original_is_named(refused, original, changed, tmp_path):
    (tmp_path / "model.plan").write_bytes(make_plan())
    assert "a TensorRT plan" in refused("adopt", tmp_path / "model.plan", "--like", original, "-o", tmp_path / "x.onnx")
    assert "a TensorRT plan" in refused("adopt", changed, "--like", tmp_path / "model.plan")
    err = refused("adopt", original, "--like", changed, "-o", tmp_path / "x.onnx")
    assert "has no description to give" in err
    assert "--spec" not in err
    assert "--threads must be" in refused("adopt", changed, "--like", original, "--threads", -1)
    assert "does not match the spec" in refused("adopt", changed, "--like", "garments"), "the model that comes along"
