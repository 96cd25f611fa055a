"""Real builds of networks with conditioning, a learned variance or an array of β."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ddpmx.errors import FileFormatError
from ddpmx.formats import onnx_file, plan_file
from oracles import conditioning, protobuf
from oracles.conditioning import KINDS, spec_of


def file(folder, spec):
    path = folder / "model.onnx"
    path.write_bytes(conditioning.onnx(spec, metadata=onnx_file.metadata(spec)))
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_is_built_and_declares_its_conditioning(folder, build, kind):
    spec = spec_of(kind)
    assert build(file(folder, spec)).info.spec == spec


def test_the_profile_names_every_input(folder, build, library, monkeypatch):
    seen = {}
    real = library.trt.Builder

    class Watched:
        def __init__(self, logger):
            self._inside = real(logger)

        def __getattr__(self, name):
            return getattr(self._inside, name)

        def create_optimization_profile(self):
            profile = self._inside.create_optimization_profile()

            class Recording:
                def set_shape(self, name, *shapes):
                    seen[name] = shapes
                    return profile.set_shape(name, *shapes)

            Recording.inside = profile
            return Recording()

        def build_serialized_network(self, network, config):
            return self._inside.build_serialized_network(network, config)

    monkeypatch.setattr(library.trt, "Builder", Watched)
    config = library.trt.IBuilderConfig.add_optimization_profile
    monkeypatch.setattr(
        library.trt.IBuilderConfig, "add_optimization_profile", lambda self, profile: config(self, profile.inside)
    )
    spec = spec_of("all")
    build(file(folder, spec), batch=(1, 2, 4))
    assert seen == {name: tuple((n, *dims) for n in (1, 2, 4)) for name, dims in spec.inputs.items()}


def test_a_network_that_learns_its_variance_has_two_outputs(folder, build):
    spec = spec_of("classes", variance="learned_range")
    path = folder / "model.onnx"
    nodes = b"".join(
        protobuf.field(1, node)
        for node in (
            protobuf.node("Gather", ["table", "y"], ["by_y"]),
            protobuf.node("Gather", ["factors", "t"], ["factor"]),
            protobuf.node("Mul", ["factor", "x"], ["scaled"]),
            protobuf.node("Add", ["scaled", "by_y"], ["eps"]),
            protobuf.node("Sub", ["scaled", "by_y"], ["var"]),
        )
    )
    constants = b"".join(
        protobuf.field(
            5, protobuf.tensor(name, protobuf.FLOAT, (n, 1, 1, 1), np.linspace(0, 1, n, dtype=np.float32).tobytes())
        )
        for name, n in (("table", spec.classes), ("factors", spec.timesteps))
    )
    path.write_bytes(
        protobuf.model(
            {
                "x": (protobuf.FLOAT, ("batch", *spec.shape)),
                "t": (protobuf.INT32, ("batch",)),
                "y": (protobuf.INT32, ("batch",)),
            },
            dict.fromkeys(spec.outputs, (protobuf.FLOAT, ("batch", *spec.shape))),
            metadata=onnx_file.metadata(spec),
            graph=nodes + constants,
        )
    )
    assert build(path).info.spec == spec


def test_a_plan_with_an_array_of_betas_writes_it_beside(folder, build):
    betas = np.linspace(0.01, 0.3, 20)
    spec = spec_of("itself", schedule="betas", betas=betas)
    path = file(folder, spec)
    np.testing.assert_array_equal(build(path).info.spec.betas, betas)
    assert build(path).reused
    sidecar = plan_file.sidecar_path(folder / "model.plan")
    assert json.loads(sidecar.read_text())["betas"].startswith("betas1 20 ")
    sidecar.unlink()
    again = build(path)  # without it the plan is of no use
    assert not again.reused
    np.testing.assert_array_equal(plan_file.read_plan(folder / "model.plan").spec.betas, betas)


def test_an_int64_label_is_refused_before_it_is_built(folder, build):
    spec = spec_of("classes")
    path = folder / "model.onnx"
    inputs = {
        "x": (protobuf.FLOAT, ("batch", *spec.shape)),
        "t": (protobuf.INT32, ("batch",)),
        "y": (protobuf.INT64, ("batch",)),
    }
    path.write_bytes(conditioning.onnx(spec, metadata=onnx_file.metadata(spec), inputs=inputs))
    with pytest.raises((FileFormatError, onnx_file.SpecError), match="does not match the spec"):
        build(path)
    assert not (folder / "model.plan").exists()
