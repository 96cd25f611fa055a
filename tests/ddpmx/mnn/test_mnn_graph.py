"""The padding of 1×1 convolutions: the same network, in which neighbours make no difference to MNN."""

from __future__ import annotations

import numpy as np
import pytest

from ddpmx.backends.open import open_model
from ddpmx.errors import BackendError, FileFormatError
from ddpmx.formats.spec import ModelSpec
from ddpmx.mnn import build as mnn_build
from ddpmx.mnn import library
from ddpmx.mnn.graph import keep_images_apart
from ddpmx.models import shipped
from ddpmx.sampling import chain
from oracles import protobuf
from oracles.protobuf import FLOAT, INT32, field, ints, node, tensor

SPEC = ModelSpec((3, 16, 16), timesteps=20)
WIDTH = 512


def network(*attributes: bytes, shape: tuple[int, int] = (1, 1)) -> bytes:
    """Two convolutions, 3 → 512 → 512 → 3 channels by 1×1, the middle one with these attributes. t has no effect."""
    rng = np.random.default_rng(0)
    sizes = [(WIDTH, 3, 1, 1), (WIDTH, WIDTH, *shape), (3, WIDTH, 1, 1)]
    constants = [
        tensor(f"w{i}", FLOAT, dims, (rng.standard_normal(dims) / dims[1] ** 0.5).astype(np.float32).tobytes())
        for i, dims in enumerate(sizes)
    ]
    one = ints("kernel_shape", [1, 1])
    nodes = [
        node("Conv", ["x", "w0"], ["a"], one),
        node("Conv", ["a", "w1"], ["b"], *attributes),
        node("Conv", ["b", "w2"], ["c"], one, ints("pads", [0, 0, 0, 0]), ints("strides", [1, 1])),
        node("Gather", ["zeros", "t"], ["nothing"]),
        node("Add", ["c", "nothing"], ["eps"]),
    ]
    constants.append(tensor("zeros", FLOAT, (20, 1, 1, 1), bytes(80)))
    return protobuf.model(
        {"x": (FLOAT, ("batch", 3, 16, 16)), "t": (INT32, ("batch",))},
        {"eps": (FLOAT, ("batch", 3, 16, 16))},
        metadata={"ddpmx": SPEC.to_text()},
        graph=b"".join(field(1, each) for each in nodes) + b"".join(field(5, each) for each in constants),
    )


def outputs(model: bytes) -> np.ndarray:
    ort = pytest.importorskip("onnxruntime", reason="not verified here: a padded network (no ONNX Runtime)")
    x = np.random.default_rng(1).standard_normal((3, 3, 16, 16)).astype(np.float32)
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x, "t": np.array([0, 3, 19], np.int32)})[0]


def test_the_network_is_the_same():
    model = network(ints("kernel_shape", [1, 1]))
    changed, count = keep_images_apart(model)
    assert count == 3
    np.testing.assert_allclose(outputs(changed), outputs(model), rtol=0, atol=2e-5)


@pytest.mark.torch
def test_the_changed_file_is_valid():
    onnx = pytest.importorskip("onnx", reason="not verified here: that a padded network is valid ONNX (no onnx)")
    changed, count = keep_images_apart(shipped.find("garments").read_bytes())
    model = onnx.load_model_from_string(changed)
    onnx.checker.check_model(model, full_check=True)
    padded = [each for each in model.graph.node if each.op_type == "Slice" and each.name.endswith("/narrow")]
    assert len(padded) == count > 10


@pytest.mark.parametrize(
    "attributes",
    [
        [ints("kernel_shape", [3, 3]), ints("pads", [1, 1, 1, 1])],
        [ints("kernel_shape", [1, 1]), ints("strides", [2, 2])],
        [ints("kernel_shape", [1, 1]), ints("pads", [0, 0, 1, 0])],
        [ints("kernel_shape", [1, 1]), field(1, "group") + field(3, 2)],
        [ints("kernel_shape", [1, 1]), field(1, "auto_pad") + field(4, "SAME_UPPER")],
        [],
    ],
    ids=["3×3", "strides", "padded", "groups", "auto_pad", "no size"],
)
def test_other_convolutions_stay_as_they_are(attributes):
    model = network(*attributes, shape=(3, 3) if not attributes or b"\x03" in attributes[0][:30] else (1, 1))
    changed, count = keep_images_apart(model)
    assert count == 2, "the first and the last"
    middle = field(1, node("Conv", ["a", "w1"], ["b"], *attributes))
    assert middle in changed


def test_a_file_without_them_is_not_changed(gaussian_onnx):
    model = gaussian_onnx.read_bytes()
    assert keep_images_apart(model) == (model, 0)


@pytest.mark.parametrize("data", [b"\x00", b"\x3a\xff", b"\x3a\x03\x0a\x05x"])
def test_what_is_no_onnx_file_is_refused(data):
    with pytest.raises(FileFormatError, match="not a valid ONNX file"):
        keep_images_apart(data)


@pytest.fixture
def model(tmp_path):
    try:
        library.load()
    except BackendError as why:
        pytest.skip(f"not verified here: neighbours in MNN ({why.fact})")
    (tmp_path / "m.onnx").write_bytes(network(ints("kernel_shape", [1, 1])))
    return tmp_path / "m.onnx"


def test_neighbours_make_no_difference_to_mnn(model):
    mnn_build.build(model, part=4)
    spec, backend = open_model(model.with_suffix(".mnn"), threads=2)
    assert chain.fixed_places(backend, spec, 4)
    assert chain.choose_part(backend, spec, 16) == 4
    backend.close()


def test_without_the_change_each_image_runs_alone(model, monkeypatch):  # control
    """Where Strassen's algorithm pays, which depends on the CPU's cache."""
    monkeypatch.setattr(mnn_build, "keep_images_apart", lambda model: (model, 0))
    mnn_build.build(model, part=4)
    spec, backend = open_model(model.with_suffix(".mnn"), threads=2)
    part = chain.choose_part(backend, spec, 16)
    backend.close()
    if part == 4:
        pytest.skip("not verified here: that neighbours are noticed (on this CPU MNN keeps images apart by itself)")
    assert part == 1
