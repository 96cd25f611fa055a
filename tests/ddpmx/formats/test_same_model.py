"""A model file is overwritten by the same model, and by no other."""

from __future__ import annotations

import pytest

from ddpmx.errors import OutputError
from ddpmx.formats import onnx_file
from ddpmx.formats.same_model import check_same_model
from oracles import conditioning

SPEC = conditioning.spec_of("itself", weights="a" * 64)


@pytest.fixture
def path(tmp_path):
    (tmp_path / "model.onnx").write_bytes(conditioning.onnx(SPEC, metadata=onnx_file.metadata(SPEC)))
    return tmp_path / "model.onnx"


@pytest.mark.parametrize(("changes", "other_weights"), [
    ({}, None),
    ({"precision": "fp16", "ddpmx": "9.9"}, None),
    ({"weights": "b" * 64}, "a" * 64),
])  # fmt: skip
def test_another_export_of_the_model_may_replace_it(path, changes, other_weights):
    assert check_same_model(path, SPEC.replace(**changes)) == other_weights


OTHERS = [
    {"shape": (3, 8, 16)},
    {"timesteps": 21},
    {"schedule": "cosine", "schedule_params": {}},
    {"prediction": "v"},
    {"classes": 5},
    {"clip": None},
]


@pytest.mark.parametrize("changes", OTHERS, ids=str)
def test_another_model_is_refused_and_the_difference_named(path, changes):
    with pytest.raises(OutputError, match="it is another model") as caught:
        check_same_model(path, SPEC.replace(**changes))
    assert next(iter(changes)) in str(caught.value.note)


def test_files_of_others_are_refused_and_damaged_ones_are_not(path, tmp_path):
    assert check_same_model(tmp_path / "new.onnx", SPEC) is None
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert check_same_model(path, SPEC) is None
    path.write_bytes(b"")
    assert check_same_model(path, SPEC) is None
    path.write_bytes(b"hello")
    with pytest.raises(OutputError, match="not an ONNX file"):
        check_same_model(path, SPEC)
    path.write_bytes(conditioning.onnx(SPEC, metadata={}))
    with pytest.raises(OutputError, match="ddpmx has not written it"):
        check_same_model(path, SPEC)
    path.write_bytes(whole.replace(b'"timesteps":20', b'"timesteps":21'))
    with pytest.raises(OutputError, match="is not known"):
        check_same_model(path, SPEC)
