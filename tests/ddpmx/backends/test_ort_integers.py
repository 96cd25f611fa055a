"""8-bit convolutions as products of integers: against the sums written out, which are exact."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

import ddpmx
from ddpmx.backends import ort_common, ort_integers
from ddpmx.backends.ort_integers import as_integers
from ddpmx.errors import FileFormatError, InputError
from ddpmx.formats.spec import ModelSpec
from oracles import protobuf
from oracles.protobuf import FLOAT, FLOAT16, INT32, field, ints, node, tensor

ort = pytest.importorskip("onnxruntime", reason="not verified here: products of integers (no ONNX Runtime)")

INT8 = 3
STEP = 0.03125
"""s_x, a power of two: x / s_x has one rounding, that to whole numbers."""


def text(name: str, value: str) -> bytes:
    return field(1, name) + field(4, value) + field(20, 3)


def number(name: str, value: int) -> bytes:
    return field(1, name) + field(3, value) + field(20, 2)


def numbers(name: str, values: list, dims: tuple[int, ...] = ()) -> bytes:
    return tensor(name, FLOAT, dims, np.array(values, "<f4").tobytes())


AXIS = number("axis", 0)
NEAREST = [
    text("mode", "nearest"),
    text("nearest_mode", "floor"),
    text("coordinate_transformation_mode", "asymmetric"),
]


class Net:
    """x [batch, 3, 7, 6] → one convolution in 8 bits, or what a test makes of it → y.

    Args:
        kernel: height and width.
        attributes: of the convolution.
        enlarged: factors of a nearest-neighbour Resize before it.
        most: the largest weight.
    """

    channels, size = 3, (7, 6)

    def __init__(self, kernel=(3, 3), attributes=(), enlarged=(1, 1), most=63, outputs=5):
        random = np.random.default_rng(0)
        self.weights = random.integers(-most, most + 1, (outputs, self.channels, *kernel)).astype(np.int8)
        self.weights[0] = most
        self.steps = (random.random(outputs) / 100).astype(np.float32)
        self.bias = random.standard_normal(outputs).astype(np.float32)
        self.enlarged = enlarged
        self.convolution = node("Conv", ["x/DQ", "w/DQ", "b"], ["y"], *attributes)
        self.nodes = {
            "Q": node("QuantizeLinear", ["large", "s", "z"], ["x/Q"]),
            "DQ": node("DequantizeLinear", ["x/Q", "s", "z"], ["x/DQ"]),
            "weights": node("DequantizeLinear", ["w", "steps", "zs"], ["w/DQ"], AXIS),
        }
        resize = node("Resize", ["x", "", "factors"], ["large"], *NEAREST)
        self.nodes = {"Resize": resize if enlarged != (1, 1) else node("Identity", ["x"], ["large"])} | self.nodes
        self.constants = {
            "w": tensor("w", INT8, self.weights.shape, self.weights.tobytes()),
            "steps": numbers("steps", self.steps, (outputs,)),
            "zs": tensor("zs", INT8, (outputs,), bytes(outputs)),
            "s": numbers("s", [STEP]),
            "z": tensor("z", INT8, (), bytes(1)),
            "b": numbers("b", self.bias, (outputs,)),
            "factors": numbers("factors", [1, 1, *enlarged], (4,)),
        }

    def model(self, *after: bytes, output: str = "y") -> bytes:
        graph = b"".join(field(1, each) for each in (*self.nodes.values(), self.convolution, *after))
        graph += b"".join(field(5, each) for each in self.constants.values())
        dims = ("batch", self.channels, *self.size)
        return protobuf.model({"x": (FLOAT, dims)}, {output: (FLOAT, ("batch", None, None, None))}, graph=graph)

    def x(self, n=2):
        return np.random.default_rng(1).normal(0, 2, (n, self.channels, *self.size)).astype(np.float32)

    def rewritten(self, model=None):
        return as_integers(ort, model or self.model(), {"x": self.x(1)})

    def sums(self, x, pads, strides=(1, 1), dilations=(1, 1)):
        """Σ q_x q_w, written out, in int64."""
        large = x.repeat(self.enlarged[0], axis=2).repeat(self.enlarged[1], axis=3)
        q = np.clip(np.round(large / np.float32(STEP)), -128, 127).astype(np.int64)
        top, left, bottom, right = pads
        q = np.pad(q, ((0, 0), (0, 0), (top, bottom), (left, right)))
        kernel = self.weights.shape[2:]
        spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
        out = [(q.shape[2 + i] - spans[i]) // strides[i] + 1 for i in (0, 1)]
        total = np.zeros((len(x), len(self.weights), *out), np.int64)
        for i in range(kernel[0]):
            for j in range(kernel[1]):
                first, second = i * dilations[0], j * dilations[1]
                part = q[:, :, first:, second:][:, :, :: strides[0], :: strides[1]][:, :, : out[0], : out[1]]
                total += np.einsum("nchw,oc->nohw", part, self.weights[:, :, i, j].astype(np.int64))
        return total

    def expected(self, sums):
        scales = np.float32(STEP) * self.steps
        return sums.astype(np.float32) * scales[:, None, None] + self.bias[:, None, None]


def run(model: bytes, x: np.ndarray) -> np.ndarray:
    return ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def operators(model: bytes) -> list[str]:
    from ddpmx.formats.onnx_graph import GRAPH_NODE, MODEL_GRAPH, read_node
    from ddpmx.formats.protobuf import fields

    graph = next(value for part, value in fields(memoryview(model)) if part == MODEL_GRAPH)
    return [read_node(value).operator for part, value in fields(graph) if part == GRAPH_NODE]


GEOMETRY = {
    "plain": ((1, 1), (0, 0, 0, 0), (1, 1), (1, 1), (1, 1)),
    "same": ((3, 3), (1, 1, 1, 1), (1, 1), (1, 1), (1, 1)),
    "down": ((3, 3), (0, 0, 1, 1), (2, 2), (1, 1), (1, 1)),
    "strided 1×1": ((1, 1), (0, 0, 0, 0), (2, 2), (1, 1), (1, 1)),
    "enlarged": ((3, 3), (1, 1, 1, 1), (1, 1), (1, 1), (2, 2)),
    "enlarged 1×1": ((1, 1), (0, 0, 0, 0), (1, 1), (1, 1), (2, 3)),
    "uneven": ((2, 3), (1, 2, 0, 3), (2, 1), (2, 1), (1, 1)),
    "padding beyond the kernel": ((3, 3), (3, 3, 3, 3), (1, 1), (1, 1), (1, 1)),
}


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("geometry", GEOMETRY.values(), ids=GEOMETRY)
def test_the_sums_are_exact(monkeypatch, geometry, signed):
    kernel, pads, strides, dilations, enlarged = geometry
    monkeypatch.setattr(ort_integers, "_signed_sums_are_exact", lambda ort: signed)
    attributes = [ints("pads", pads), ints("strides", strides), ints("dilations", dilations)]
    net = Net(kernel, attributes, enlarged)
    model, x = net.rewritten(), net.x()
    expected = net.expected(net.sums(x, pads, strides, dilations))
    # a product, a sum, each rounded, or both at once
    np.testing.assert_allclose(run(model, x), expected, rtol=3e-7, atol=3e-7)
    assert "MatMulIntegerToFloat" in operators(model)
    assert not {"Conv", "DequantizeLinear", "Resize"} & set(operators(model))
    before = run(net.model(), x)
    assert before.shape == expected.shape  # ONNX Runtime, which widens both operands, gives the same but for rounding
    np.testing.assert_allclose(before, expected, rtol=1e-4, atol=1e-4)


def test_the_largest_values_do_not_saturate():
    net = Net(attributes=[ints("pads", (1, 1, 1, 1))], most=127)
    x = np.full((1, net.channels, *net.size), 1e3, np.float32)
    sums = net.sums(x, (1, 1, 1, 1))
    assert sums.max() == 27 * 127 * 127
    np.testing.assert_allclose(run(net.rewritten(), x), net.expected(sums), rtol=3e-7)


def test_what_shows_that_sums_saturate_is_believed(monkeypatch):
    """A processor without VNNI: 16 bits for two products."""

    class Session:
        def __init__(self, sums):
            self.sums = sums

        def run(self, names, inputs):
            return [np.full((16, 32), self.sums, np.float32)]

    class Library:
        SessionOptions = ort.SessionOptions

        def __init__(self, sums):
            self.sums = sums

        def InferenceSession(self, *given, **more):
            if self.sums is None:
                raise RuntimeError("not implemented")
            return Session(self.sums)

    exact = ort_integers._signed_sums_are_exact
    assert exact(Library(64 * 255 * 127)) is True
    assert exact(Library(32 * 32767)) is False
    assert exact(Library(None)) is None
    monkeypatch.setattr(ort_integers, "_signed_sums_are_exact", lambda ort: None)
    assert Net().rewritten() is None  # a build without that product runs the file as it is


def test_readers_of_one_tensor_share_its_rounding():
    net = Net(attributes=[ints("pads", (1, 1, 1, 1))])
    again = node("Conv", ["x/DQ", "w/DQ"], ["other"], ints("pads", (1, 1, 1, 1)))
    model = net.rewritten(net.model(again, node("Add", ["y", "other"], ["sum"]), output="sum"))
    assert operators(model).count("QuantizeLinear") == 1
    assert operators(model).count("MatMulIntegerToFloat") == 2
    x = net.x()
    twice = 2 * net.expected(net.sums(x, (1, 1, 1, 1))) - net.bias[:, None, None]
    np.testing.assert_allclose(run(model, x), twice, rtol=1e-5, atol=1e-5)


def test_a_rounded_value_that_others_read_stays():
    net = Net(attributes=[ints("pads", (1, 1, 1, 1))], outputs=3)
    model = net.rewritten(net.model(node("Add", ["y", "x/DQ"], ["sum"]), output="sum"))
    assert "DequantizeLinear" in operators(model)
    x = net.x()
    rounded = np.clip(np.round(x / np.float32(STEP)), -128, 127) * np.float32(STEP)
    expected = net.expected(net.sums(x, (1, 1, 1, 1))) + rounded
    np.testing.assert_allclose(run(model, x), expected, rtol=1e-5, atol=1e-5)


SCALES = {"by channel": (5, 1, 1), "with a batch": (1, 5, 1, 1)}


@pytest.mark.parametrize("dims", SCALES.values(), ids=SCALES)
def test_a_scale_and_a_shift_by_channel_are_one_pass(dims):
    net, random = Net(attributes=[ints("pads", (1, 1, 1, 1))]), np.random.default_rng(2)
    scale, shift = random.standard_normal((2, *dims)).astype(np.float32)
    net.constants |= {"scale": numbers("scale", scale.ravel(), dims), "shift": numbers("shift", shift.ravel(), dims)}
    model = net.model(node("Mul", ["y", "scale"], ["m"]), node("Add", ["m", "shift"], ["out"]), output="out")
    changed, x = net.rewritten(model), net.x()
    assert "BatchNormalization" in operators(changed)
    assert not {"Mul", "Add"} & set(operators(changed))
    scaled = net.expected(net.sums(x, (1, 1, 1, 1))) * scale + shift
    np.testing.assert_allclose(run(changed, x), scaled, rtol=1e-6, atol=1e-6)


def test_other_products_and_sums_stay():
    net = Net(outputs=7)
    wide, each = np.arange(1, 8, dtype=np.float32), np.arange(7 * 5 * 4, dtype=np.float32)
    net.constants["wide"] = numbers("wide", wide, (7, 1, 1))
    net.constants["each"] = numbers("each", each, (1, 7, 5, 4))
    after = [
        node("Mul", ["y", "wide"], ["m"]),  # read twice
        node("Add", ["m", "wide"], ["a"]),
        node("Mul", ["a", "each"], ["n"]),  # another number for each pixel
        node("Add", ["n", "each"], ["c"]),
        node("Add", ["c", "m"], ["out"]),
    ]
    model, x = net.model(*after, output="out"), net.x()
    changed = net.rewritten(model)
    assert [operators(changed).count(name) for name in ("Mul", "Add")] == [2, 3]
    m = net.expected(net.sums(x, (0, 0, 0, 0))) * wide[:, None, None]
    each = each.reshape(7, 5, 4)
    np.testing.assert_allclose(run(changed, x), (m + wide[:, None, None]) * each + each + m, rtol=1e-5, atol=1e-4)


def test_one_channel_that_is_scaled_to_several_is_no_normalisation():
    net = Net(outputs=1)
    net.constants |= {"scale": numbers("scale", [1, 2, 3], (3, 1, 1)), "shift": numbers("shift", [4, 5, 6], (3, 1, 1))}
    model = net.model(node("Mul", ["y", "scale"], ["m"]), node("Add", ["m", "shift"], ["out"]), output="out")
    changed, x = net.rewritten(model), net.x()
    assert "BatchNormalization" not in operators(changed)
    y = net.expected(net.sums(x, (0, 0, 0, 0)))
    scaled = y * np.array([1, 2, 3]).reshape(3, 1, 1) + np.array([4, 5, 6]).reshape(3, 1, 1)
    np.testing.assert_allclose(run(changed, x), scaled, rtol=1e-5, atol=1e-5)


def other_zero(net):
    net.constants["z"] = tensor("z", INT8, (), b"\x01")


def other_weight_zero(net):
    net.constants["zs"] = tensor("zs", INT8, (5,), b"\0\0\1\0\0")


def two_steps(net):
    net.nodes["DQ"] = node("DequantizeLinear", ["x/Q", "s2", "z"], ["x/DQ"])
    net.constants["s2"] = numbers("s2", [STEP * 2])


def groups(net):
    net.convolution = node("Conv", ["x/DQ", "w/DQ", "b"], ["y"], number("group", 3))
    net.constants["w"] = tensor("w", INT8, (3, 1, 3, 3), bytes(27))
    net.constants["steps"] = numbers("steps", [0.1] * 3, (3,))
    net.constants["zs"] = tensor("zs", INT8, (3,), bytes(3))
    net.constants["b"] = numbers("b", [0] * 3, (3,))


def padding_by_name(net):
    net.convolution = node("Conv", ["x/DQ", "w/DQ", "b"], ["y"], text("auto_pad", "SAME_UPPER"))


def not_rounded(net):
    net.nodes["DQ"] = node("Identity", ["large"], ["x/DQ"])


def one_step_for_inputs(net):
    net.nodes["weights"] = node("DequantizeLinear", ["w", "steps", "zs"], ["w/DQ"], number("axis", 1))
    net.constants["steps"] = numbers("steps", [0.1] * 3, (3,))
    net.constants["zs"] = tensor("zs", INT8, (3,), bytes(3))


@pytest.mark.parametrize(
    "change", [other_zero, other_weight_zero, two_steps, groups, padding_by_name, not_rounded, one_step_for_inputs]
)
def test_other_convolutions_stay_as_they_are(change):
    net = Net()
    change(net)
    run(net.model(), net.x())  # a valid network
    assert net.rewritten() is None


@pytest.mark.parametrize(
    "values", [("strides", (0, 1)), ("strides", (1,)), ("pads", (0, 0, 0, 1 << 40)), ("dilations", (1, 0))]
)
def test_numbers_that_no_convolution_has_are_left_to_onnx_runtime(values):
    assert Net(attributes=[ints(*values)]).rewritten() is None


def test_an_output_in_8_bits_as_well_is_left_to_onnx_runtime():
    net = Net()
    rounds = node("QuantizeLinear", ["y", "s", "z"], ["y/Q"])
    wide = node("DequantizeLinear", ["y/Q", "s", "z"], ["out"])
    assert net.rewritten(net.model(rounds, wide, output="out")) is None


def test_a_model_with_graphs_inside_is_left_alone():
    net = Net()
    assert net.rewritten(net.model(node("If", ["condition"], ["other"]))) is None


def saved(path, rounded="x/DQ"):
    """A file in 8 bits, x [batch, 3, 7, 6] and t → eps; ``rounded`` is the name of what the convolution reads."""
    net = Net(attributes=[ints("pads", (1, 1, 1, 1))], outputs=3)
    net.constants["steps"] = numbers("steps", [1e-3] * 3, (3,))
    net.nodes["DQ"] = node("DequantizeLinear", ["x/Q", "s", "z"], [rounded])
    net.convolution = node("Conv", [rounded, "w/DQ", "b"], ["eps"], ints("pads", (1, 1, 1, 1)))
    spec = ModelSpec((3, 7, 6), timesteps=5, precision="int8")
    # another reader, so that the tensor stays: what it gives is multiplied by 0
    kept = [node("Mul", [rounded, "nothing"], ["zero"]), node("Add", ["eps", "zero"], ["out"])]
    net.constants["nothing"] = numbers("nothing", [0])
    graph = b"".join(field(1, each) for each in (*net.nodes.values(), net.convolution, *kept))
    graph += b"".join(field(5, each) for each in net.constants.values())
    dims = ("batch", 3, 7, 6)
    inputs = {"x": (FLOAT, dims), "t": (INT32, ("batch",))}
    path.write_bytes(protobuf.model(inputs, {"eps": (FLOAT, dims)}, metadata={"ddpmx": spec.to_text()}, graph=graph))
    return path


@pytest.fixture
def file(tmp_path):
    return saved(tmp_path / "model.onnx")


def test_images_are_the_same_for_any_number_of_them_and_of_threads(file, monkeypatch):
    monkeypatch.setattr("ddpmx.backends.ort.PART_PIXELS", 3 * 42)  # parts of three
    with ddpmx.load(file, threads=1) as pipeline:
        assert "in 8-bit integers and float32, 1 thread" in pipeline.backend
        whole = pipeline.generate(9, seed=3)
    assert len({image.tobytes() for image in whole}) == 9
    for n, threads in ((1, 1), (4, 2), (9, 3)):
        with ddpmx.load(file, threads=threads) as pipeline:
            np.testing.assert_array_equal(pipeline.generate(n, seed=3), whole[:n])


@pytest.mark.parametrize("how", [{"providers": ("openvino", "cpu"), "fallback": True}, {"threads": 257}])
def test_other_ways_to_open_it_are_as_ever(file, how):
    """A file that a provider beside the CPU may run is run as it is; wrong numbers are refused."""
    if "threads" in how:
        with pytest.raises(InputError, match="threads must be from 0 to 256"):
            ddpmx.load(file, **how)
        return
    with ddpmx.load(file, **how) as pipeline:
        assert "integers" not in pipeline.backend
        assert np.isfinite(pipeline.generate(1, seed=0)).all()


def test_a_file_whose_names_are_taken_runs_as_it_is(file, tmp_path):
    """By ONNX Runtime alone, within float32's rounding of the same convolution."""
    other = saved(tmp_path / "other.onnx", rounded="eps/product")
    with ddpmx.load(file) as pipeline, ddpmx.load(other) as alone:
        assert "integers" in pipeline.backend
        assert "integers" not in alone.backend
        apart = pipeline.generate(2, seed=1).astype(int) - alone.generate(2, seed=1)
    assert abs(apart).max() <= 1


@pytest.fixture
def rounding(tmp_path):
    """eps is x in half precision, rounded to whole numbers: what a Q/DQ graph in half does before a convolution."""
    spec, dims = ModelSpec((1, 2, 4), timesteps=5, precision="int8"), ("batch", 1, 2, 4)
    nodes = [
        node("Cast", ["x"], ["half"], number("to", FLOAT16)),
        node("QuantizeLinear", ["half", "s", "z"], ["q"]),
        node("DequantizeLinear", ["q", "s", "z"], ["dq"]),
        node("Cast", ["dq"], ["eps"], number("to", FLOAT)),
    ]
    constants = [tensor("s", FLOAT16, (), np.float16(1).tobytes()), tensor("z", INT8, (), b"\0")]
    graph = b"".join(field(1, each) for each in nodes) + b"".join(field(5, each) for each in constants)
    inputs = {"x": (FLOAT, dims), "t": (INT32, ("batch",))}
    path = tmp_path / "rounding.onnx"
    path.write_bytes(protobuf.model(inputs, {"eps": (FLOAT, dims)}, metadata={"ddpmx": spec.to_text()}, graph=graph))
    return path


@pytest.mark.parametrize("how", [{}, {"providers": ("openvino", "cpu"), "fallback": True}])
@pytest.mark.parametrize("old", [False, True])
def test_half_precision_is_rounded_by_every_version(rounding, monkeypatch, old, how):
    """ONNX Runtime before 1.30 cuts it off, so that there the file is computed in float32."""
    if old:
        monkeypatch.setattr(ort_common, "rounds_halves", lambda ort: False)
    x = np.array([0.25, 0.75, 1.9, 2.5, -0.75, -1.9, 100.6, -3.5], np.float32).reshape(1, 1, 2, 4)
    with ddpmx.load(rounding, **how) as pipeline:
        if old:
            assert "in float32" in pipeline.backend
        np.testing.assert_array_equal(pipeline.evaluate(x, 0).out, np.rint(x))


@pytest.mark.parametrize(
    ("version", "rounds"),
    [("1.29.0", False), ("1.30.0", True), ("1.4.1", False), ("2.0.0", True), ("1.30.0.dev3+cu130", True), ("?", False)],
)
def test_the_first_version_that_rounds(version, rounds):
    assert ort_common.rounds_halves(SimpleNamespace(__version__=version)) == rounds


def test_widened_it_is_computed_in_float32(file):
    with ddpmx.load(file, widen=True) as pipeline:
        assert "integers" not in pipeline.backend
        assert pipeline.arithmetic == "fp32"


@pytest.mark.parametrize(("dims", "data"), [((1,) * 70, b"\0"), ((0, 1 << 62), b"")], ids=["many", "large"])
def test_a_constant_of_no_shape_is_an_error(dims, data):
    net = Net()
    net.constants["z"] = tensor("z", INT8, dims, data)
    with pytest.raises(FileFormatError, match="not a valid ONNX file"):
        net.rewritten()


def test_what_gathers_too_much_stays_as_it_is(monkeypatch):
    assert Net((65, 1), [ints("pads", (32, 0, 32, 0))]).rewritten() is None
    net = Net(attributes=[ints("pads", (1, 1, 1, 1))])
    monkeypatch.setattr(ort_integers, "_MOST_GATHERED", 9 * 8 * 27 - 1)
    assert net.rewritten() is None
    monkeypatch.setattr(ort_integers, "_MOST_GATHERED", 9 * 8 * 27)
    assert net.rewritten() is not None


@pytest.mark.parametrize("odd", [np.inf, np.nan])
def test_a_scale_that_is_not_finite_stays_a_product(odd):
    net = Net()
    net.constants |= {"scale": numbers("scale", [odd] * 5, (5, 1, 1)), "shift": numbers("shift", [1] * 5, (5, 1, 1))}
    model = net.model(node("Mul", ["y", "scale"], ["m"]), node("Add", ["m", "shift"], ["out"]), output="out")
    assert "BatchNormalization" not in operators(net.rewritten(model))


def test_what_onnx_runtime_refuses_is_not_made_valid():
    net = Net((1, 1), [ints("kernel_shape", (3, 3))])
    with pytest.raises(Exception, match="kernel_shape"):
        run(net.model(), net.x())
    assert net.rewritten() is None


def test_a_damaged_model_is_an_error():
    with pytest.raises(FileFormatError, match="not a valid ONNX file"):
        as_integers(ort, Net().model()[:-3], {})
