"""Writes types.ckpt-12 and types.json with TensorFlow 1.15: every element type, three data files, a variable in parts.

python make_types.py FOLDER
"""

import json
import os
import sys

import numpy as np
import tensorflow.compat.v1 as tf

folder = sys.argv[1]
tf.disable_v2_behavior()
expected = {}


def variable(name, values, dtype):
    """A variable, and its values among the expected ones, as numbers that JSON writes exactly."""
    made = tf.get_variable(name, initializer=tf.cast(tf.constant(values), dtype))
    wide = tf.float64 if made.dtype.base_dtype.is_floating else tf.int64
    expected[name] = (dtype.name, tf.cast(made, wide))
    return made


with tf.Graph().as_default():
    with tf.device("/cpu:0"):
        variable("floats/half", [[0.5, -1.25, 65504.0], [6e-8, 0.1, -0.0]], tf.float16)
        variable("floats/bfloat16", [1.0, -0.1, 3e38, 1e-30], tf.bfloat16)
        variable("floats/double", np.array([np.pi, -1e300, 5e-324]), tf.float64)
        weights = variable("model/conv_in/W", np.arange(36, dtype=np.float32).reshape(3, 3, 1, 4) / 7, tf.float32)
        text = tf.get_variable("text", initializer=tf.constant([b"ab", b""]))
    with tf.device("/cpu:1"):
        for dtype in (tf.int8, tf.int16, tf.int32, tf.int64, tf.uint8, tf.uint16, tf.bool):
            info = (0, 1) if dtype is tf.bool else (dtype.min, dtype.max)
            variable("ints/" + dtype.name, np.array([info[0], 1, info[1]], np.int64), dtype)
        variable("shapes/scalar", 7.5, tf.float32)
        variable("shapes/empty", np.zeros((2, 0, 3), np.float32), tf.float32)
        parts = tf.get_variable(
            "parts", [4, 2], initializer=tf.ones_initializer(), partitioner=tf.fixed_size_partitioner(2)
        )
    step = tf.train.get_or_create_global_step()
    average = tf.train.ExponentialMovingAverage(0.5).apply([weights])
    with tf.control_dependencies([average]):
        train = tf.train.AdamOptimizer(0.1).minimize(tf.reduce_sum(weights**2), step, var_list=[weights])
    with tf.Session(config=tf.ConfigProto(device_count={"CPU": 2})) as session:
        session.run(tf.global_variables_initializer())
        session.run(train)
        for name in ("model/conv_in/W/ExponentialMovingAverage", "model/conv_in/W/Adam", "model/conv_in/W/Adam_1"):
            (found,) = [v for v in tf.global_variables() if v.op.name == name]
            expected[name] = ("float32", tf.cast(found, tf.float64))
        power = tf.get_default_graph().get_tensor_by_name("beta1_power:0")
        expected["beta1_power"] = ("float32", tf.cast(power, tf.float64))
        expected["global_step"] = ("int64", step)
        values = session.run({name: tensor for name, (_, tensor) in expected.items()})
        tf.train.Saver(sharded=True).save(
            session, os.path.join(folder, "types.ckpt"), global_step=12, write_meta_graph=False, write_state=False
        )
described = {
    name: {"dtype": dtype, "shape": list(values[name].shape), "values": values[name].reshape(-1).tolist()}
    for name, (dtype, _) in expected.items()
}
with open(os.path.join(folder, "types.json"), "w") as stream:
    json.dump(described, stream, indent=1, sort_keys=True)
    stream.write("\n")
