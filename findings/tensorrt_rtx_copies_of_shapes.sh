#!/bin/sh
# TensorRT-RTX 1.7.1. One would guess that an engine for a range of batch sizes runs more general kernels than one for a single size, and
# no more than that. The program in its plan has other work as well: copies of shapes from the host to the device, "copy_s2d", while an
# engine of the same network for one size has none. Here, with two convolutions and attention between them, the plan for batches of
# 1…64 has 16 of them, and those for 16 and for 1 alone have 0; a second optimization profile for one size adds none. In a stream of short
# kernels that is work between them, and where a run is captured it becomes nodes of the graph.
# No GPU is needed: the engines are built, not run.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tensorrt-rtx-cu13==1.7.1.116 onnx==1.22.0 numpy==2.2.6
cat > "$folder/show.py" <<'PY'
import numpy as np, tensorrt_rtx as trt
from onnx import TensorProto, helper, numpy_helper

C, SIDE = 32, 16
nodes, constants = [], []
rng = np.random.default_rng(0)


def constant(array):
    constants.append(numpy_helper.from_array(np.asarray(array), f"c{len(constants)}"))
    return constants[-1].name


def op(kind, *inputs, **attributes):
    nodes.append(helper.make_node(kind, list(inputs), [f"o{len(nodes)}"], **attributes))
    return nodes[-1].output[0]


def conv(x, size):
    weights = (rng.standard_normal((C, C, size, size)) / 20).astype(np.float16)
    return op("Conv", x, constant(weights), kernel_shape=[size, size], pads=[size // 2] * 4)


x = conv(op("Cast", "x", to=TensorProto.FLOAT16), 3)
q, k, v = (op("Reshape", conv(x, 1), constant(np.array([0, C, SIDE * SIDE]))) for _ in range(3))
weights = op("Softmax", op("MatMul", op("Transpose", q, perm=[0, 2, 1]), k), axis=-1)
y = op("MatMul", v, op("Transpose", weights, perm=[0, 2, 1]))
y = conv(op("Reshape", y, constant(np.array([0, C, SIDE, SIDE]))), 3)
nodes.append(helper.make_node("Cast", [y], ["y"], to=TensorProto.FLOAT))
shape = ["batch", C, SIDE, SIDE]
graph = helper.make_graph(
    nodes,
    "attention",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
    constants,
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9).SerializeToString()

logger = trt.Logger(trt.Logger.ERROR)
for profiles in ([(1, 16, 64)], [(16, 16, 16)], [(1, 1, 1)], [(1, 16, 64), (16, 16, 16)]):
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(model), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    for batches in profiles:
        profile = builder.create_optimization_profile()
        profile.set_shape("x", *((n, C, SIDE, SIDE) for n in batches))
        config.add_optimization_profile(profile)
    plan = bytes(builder.build_serialized_network(network, config))
    print(trt.__version__, *profiles, "copies:", plan.count(b"copy_s2d"))
PY
"$folder/venv/bin/python" "$folder/show.py" | tee "$folder/seen"
grep -q "1.7.1.116 (1, 16, 64) copies: 16$" "$folder/seen"
grep -q "(16, 16, 16) copies: 0$" "$folder/seen"
grep -q "(1, 1, 1) copies: 0$" "$folder/seen"
grep -q "(1, 16, 64) (16, 16, 16) copies: 16$" "$folder/seen"
