"""A repository for Triton: its files, by Triton's own schema where that is installed, and the chain on a stand-in for its
Python backend. A real server's answers: tests/benchmarks/scale.py --triton.
"""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from ddpmx import Sampling, load
from ddpmx.errors import FileFormatError, InputError, OutputError, SpecError
from ddpmx.formats import onnx_file
from ddpmx.formats.plan_file import read_plan
from ddpmx.formats.sidecar import sidecar_json
from ddpmx.scale import triton_model
from ddpmx.scale.triton import pbtxt, write_repository
from oracles import conditioning, fake_triton
from oracles.fake_triton import Server, parse
from oracles.plans import TENSORRT, make_plan


@pytest.fixture(autouse=True)
def _utils(monkeypatch):
    fake_triton.install(monkeypatch)


@pytest.fixture
def guided_onnx(tmp_path):
    spec = conditioning.spec_of("classes", null_class=True, class_names=("a", "b", "c", "d", "e"))
    path = tmp_path / "guided.onnx"
    path.write_bytes(conditioning.onnx(spec, metadata=onnx_file.metadata(spec)))
    return path


@pytest.fixture
def repository(tmp_path):
    def make(path, **options):
        write_repository(path, tmp_path / "repository", name="m", batch=8, **options)
        return tmp_path / "repository"

    return make


def config(folder):
    return parse((folder / "config.pbtxt").read_text())


def message(code):
    return getattr(fake_triton.TritonError, code)


# --- the chain --------------------------------------------------------------------------------------------------------


def test_images_are_those_of_generate(repository, gaussian_onnx):
    with load(gaussian_onnx) as pipeline, Server(repository(gaussian_onnx) / "m") as server:
        (plain,) = server(server.request(seed=(1 << 64) - 1, n=3, steps=4))
        few = Sampling.chosen(1000, steps=4)
        np.testing.assert_array_equal(plain[0], pipeline.generate(3, seed=(1 << 64) - 1, batch=8, sampling=few))
        rows, other = server(
            server.request(seed=[1, 2], first=[0, 5], n=2, steps=3, sampler="ddim"), server.request(seed=9, steps=5)
        )
        for row, (seed, first) in enumerate([(1, 0), (2, 5)]):
            wanted = pipeline.generate(2, seed=seed, first=first, batch=8, steps=3, sampler="ddim")
            np.testing.assert_array_equal(rows[row], wanted)
        assert other.shape == (1, 1, 8, 8, 3)
        (whole,) = server(server.request(seed=0))
        np.testing.assert_array_equal(whole[0], pipeline.generate(1, batch=8), "all steps by default")


def test_labels_and_guidance(repository, guided_onnx):
    with load(guided_onnx) as pipeline, Server(repository(guided_onnx) / "m") as server:
        how = {"steps": 5, "sampler": "ancestral"}
        one, turns, none = server(
            server.request(seed=1, n=2, labels=(3,), guidance=1.7, **how),
            server.request(seed=2, n=3, first=4, labels=(4, 0), **how),
            server.request(seed=3, n=2, **how),
        )
        np.testing.assert_array_equal(one[0], pipeline.generate(2, seed=1, batch=4, labels=3, guidance=1.7, **how))
        wanted = pipeline.generate(3, seed=2, first=4, batch=8, labels=[4, 0, 4], **how)
        np.testing.assert_array_equal(turns[0], wanted)
        np.testing.assert_array_equal(none[0], pipeline.generate(2, seed=3, batch=8, **how))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"seed": 1, "n": 0}, "n must be a whole number"),
        ({"seed": 1, "n": -3}, "n must be a whole number"),
        ({"seed": 1, "n": 65}, "65 images in a request"),
        ({"seed": [1] * 8, "n": 9}, "72 images in a request"),
        ({"seed": [1, 2], "n": [1, 2]}, "n differs between the rows"),
        ({"seed": 1, "first": -1}, "first must be a whole number"),
        ({"seed": 1, "steps": 0}, "steps must be"),
        ({"seed": 1, "steps": 21}, "steps must be"),
        ({"seed": 1, "sampler": "magic"}, "there is no sampler 'magic'"),
        ({"seed": 1, "labels": (6,)}, "there is no class 6"),
        ({"seed": 1, "labels": ()}, "labels are empty"),
        ({"seed": 1, "labels": (1,), "guidance": float("nan")}, "guidance"),
    ],
    ids=str,
)
def test_bad_requests_are_refused_and_others_are_answered(repository, guided_onnx, values, words):
    with Server(repository(guided_onnx) / "m") as server:
        good = server.request(seed=5, n=2, steps=2)
        error, images = server(server.request(**values), good)
        assert words in error.message()
        assert error.code() == message("INVALID_ARG")
        np.testing.assert_array_equal(images, server(good)[0])


def test_a_model_that_needs_labels_says_so(repository, tmp_path):
    spec = conditioning.spec_of("classes")
    (tmp_path / "classes.onnx").write_bytes(conditioning.onnx(spec, metadata=onnx_file.metadata(spec)))
    folder = repository(tmp_path / "classes.onnx") / "m"
    with pytest.raises(AssertionError, match="labels"), Server(folder) as server:
        server.request(seed=1)  # Triton refuses it, since the input is not optional
    assert (folder / "labels.txt").read_text().split() == ["0", "1", "2", "3", "4"]
    assert "guidance" not in Server(folder).inputs


def test_a_client_that_has_gone_cancels_its_images(repository, gaussian_onnx, monkeypatch):
    monkeypatch.setattr(triton_model, "LOOK_SECONDS", 0.001)
    with Server(repository(gaussian_onnx) / "m") as server:
        gone, images = server(server.request(seed=1, n=60, cancelled=True), server.request(seed=2, steps=2))
        assert gone.code() == message("CANCELLED")
        assert images.shape == (1, 1, 8, 8, 3)


def test_an_older_server_knows_no_codes(repository, gaussian_onnx, monkeypatch):
    monkeypatch.delattr(fake_triton.TritonError, "INVALID_ARG")
    with Server(repository(gaussian_onnx) / "m") as server:
        (error,) = server(server.request(seed=1, n=0))
        assert "n must be" in error.message()


def test_each_instance_on_a_gpu_sees_one(repository, gaussian_onnx, monkeypatch):
    folder = repository(gaussian_onnx) / "m"
    for seen, device, wanted in (("", "1", "1"), ("4,7", "1", "7"), ("GPU-ab", "0", "GPU-ab")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
        with Server(folder, kind="GPU", device=device):
            assert os.environ["CUDA_VISIBLE_DEVICES"] == wanted


# --- the files --------------------------------------------------------------------------------------------------------


def test_the_files_of_a_repository(repository, guided_onnx):
    folder = repository(guided_onnx, instances=3, threads=2, most_images=5)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    chain = {"m/config.pbtxt", "m/labels.txt", "m/1/model.py", "m/1/model.onnx"}
    assert files == chain | {"m_eps/config.pbtxt", "m_eps/1/model.onnx"}
    assert (folder / "m" / "labels.txt").read_text() == "a\nb\nc\nd\ne\n"
    assert (folder / "m_eps" / "1" / "model.onnx").read_bytes() == guided_onnx.read_bytes()
    found = config(folder / "m")
    assert found["instance_group"] == [{"count": [3], "kind": ["KIND_CPU"]}]
    assert (found["backend"], found["max_batch_size"]) == (["python"], [8])
    parameters = {each["key"][0]: each["value"][0]["string_value"][0] for each in found["parameters"]}
    assert parameters == {
        **{"file": "model.onnx", "provider": "cpu", "batch": "8", "threads": "2"},
        **{"most_images": "5", "labels_file": "labels.txt"},
    }


def test_the_network_s_inputs_and_outputs_are_those_of_its_file(repository, guided_onnx):
    found = config(repository(guided_onnx) / "m_eps")
    info = onnx_file.read_onnx(guided_onnx)
    inputs = {each["name"][0]: (each["data_type"][0], each["dims"], "reshape" in each) for each in found["input"]}
    assert inputs == {
        "x": ("TYPE_FP32", [3, 8, 8], False),
        "t": ("TYPE_INT32", [1], True),
        "y": ("TYPE_INT32", [1], True),
    }
    assert set(inputs) == set(info.inputs)
    assert [(each["name"], each["dims"]) for each in found["output"]] == [(["eps"], [3, 8, 8])]
    assert found["backend"] == ["onnxruntime"]
    assert found["input"][1]["reshape"] == [{"shape": []}]


def test_a_plan_of_tensorrt(repository, tmp_path):
    (tmp_path / "model.plan").write_bytes(make_plan(flavour=b"ftrt", version=(10, 3, 0, 26), record=TENSORRT))
    plan = read_plan(tmp_path / "model.plan")
    (tmp_path / "model.plan.json").write_text(json.dumps(sidecar_json(plan.size, plan.spec, plan.engine, {})))
    with pytest.raises(InputError, match="--batch 9 is more than the plan takes"):
        write_repository(tmp_path / "model.plan", tmp_path / "repository", batch=9)
    assert not (tmp_path / "repository").exists()
    folder = repository(tmp_path / "model.plan")
    found = config(folder / "m_eps")
    assert (found["backend"], found["max_batch_size"], found["default_model_filename"]) == (
        *(["tensorrt"], [8]),
        ["model.plan"],
    )
    assert config(folder / "m")["instance_group"] == [{"count": [1], "kind": ["KIND_GPU"]}]
    assert (folder / "m" / "1" / "model.plan.json").is_file()


@pytest.mark.parametrize("kind", ["classes", "itself"])
def test_the_schema_is_triton_s(repository, tmp_path, kind):
    """The configurations by Triton's own protobuf schema, and this file's reader beside it."""
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="not verified here: Triton's schema")
    from google.protobuf import json_format, text_format

    spec = conditioning.spec_of(kind)
    (tmp_path / "x.onnx").write_bytes(conditioning.onnx(spec, metadata=onnx_file.metadata(spec)))
    for folder in repository(tmp_path / "x.onnx").iterdir():
        text = (folder / "config.pbtxt").read_text()
        found = text_format.Parse(text, schema.ModelConfig())
        assert found.max_batch_size > 0
        assert all(each.dims for each in found.input)
        theirs, mine = json_format.MessageToDict(found, preserving_proto_field_name=True), parse(text)
        assert theirs["name"] == mine["name"][0] == folder.name
        assert [each["name"] for each in theirs["input"]] == [each["name"][0] for each in mine["input"]]
        assert [list(map(int, each["dims"])) for each in theirs["input"]] == [each["dims"] for each in mine["input"]]
        with pytest.raises(text_format.ParseError):  # control
            text_format.Parse(text + "batch: 3\n", schema.ModelConfig())


def test_text_is_quoted():
    assert parse(pbtxt({"name": 'a"b\\c\n'})) == {"name": ['a"b\\c\n']}


def test_what_is_there_stays(tmp_path, gaussian_onnx):
    write_repository(gaussian_onnx, tmp_path / "r", name="one")
    before = {path: path.read_bytes() for path in (tmp_path / "r").rglob("*") if path.is_file()}
    with pytest.raises(OutputError, match=r"one_eps: exists already"):
        write_repository(gaussian_onnx, tmp_path / "r", name="one")
    (tmp_path / "r" / "two").mkdir()
    with pytest.raises(OutputError, match=r"two: exists already"):
        write_repository(gaussian_onnx, tmp_path / "r", name="two")
    assert {path: path.read_bytes() for path in (tmp_path / "r").rglob("*") if path.is_file()} == before
    write_repository(gaussian_onnx, tmp_path / "r", name="three")
    assert {path.name for path in (tmp_path / "r").iterdir()} == {"one", "one_eps", "two", "three", "three_eps"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "a/b"}, "cannot be called 'a/b'"),
        ({"name": ""}, "cannot be called ''"),
        ({"batch": 0}, "batch must be a whole number"),
        ({"instances": 0}, "--instances must be at least 1"),
        ({"provider": "gpu"}, "--provider gpu: ONNX Runtime has no such provider"),
        ({"most_images": 0}, "--most-images must be at least 1"),
    ],
    ids=str,
)
def test_bad_options_are_refused(tmp_path, gaussian_onnx, options, words):
    with pytest.raises(InputError, match=words):
        write_repository(gaussian_onnx, tmp_path / "r", **options)
    assert not (tmp_path / "r").exists()


def test_models_that_triton_cannot_run(tmp_path):
    (tmp_path / "text.onnx").write_text("no")
    with pytest.raises(FileFormatError):
        write_repository(tmp_path / "text.onnx", tmp_path / "r")
    spec = conditioning.spec_of("condition")
    (tmp_path / "cond.onnx").write_bytes(conditioning.onnx(spec, metadata=onnx_file.metadata(spec)))
    with pytest.raises(InputError, match="takes a condition image"):
        write_repository(tmp_path / "cond.onnx", tmp_path / "r")
    (tmp_path / "rtx.plan").write_bytes(make_plan())
    with pytest.raises(InputError, match="a plan of TensorRT-RTX, which Triton does not run"):
        write_repository(tmp_path / "rtx.plan", tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_a_file_without_a_description_takes_one_along(tmp_path, repository):
    spec = conditioning.spec_of("itself")
    (tmp_path / "bare.onnx").write_bytes(conditioning.onnx(spec, metadata={}))
    with pytest.raises(SpecError):
        write_repository(tmp_path / "bare.onnx", tmp_path / "r")
    (tmp_path / "spec.json").write_text('{"shape": [3, 8, 8], "timesteps": 20, "self_condition": true}')
    folder = repository(tmp_path / "bare.onnx", spec=tmp_path / "spec.json")
    with Server(folder / "m") as server:
        assert server(server.request(seed=1, steps=2))[0].shape == (1, 1, 8, 8, 3)
