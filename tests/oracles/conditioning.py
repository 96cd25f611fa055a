"""Conditioned toy networks: what a class, x̂_0 of the step before and a condition add to their output, a hand-written ONNX
file that does the same, and its chain written out in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ddpmx.diffusion.noise import Purpose, normal
from ddpmx.formats.spec import ModelSpec
from oracles import protobuf
from oracles.protobuf import FLOAT, INT32, INT64

CLASSES, CHANNELS = 5, 2
ALL: dict[str, Any] = {"classes": CLASSES, "self_condition": True, "condition": CHANNELS}
KINDS: dict[str, dict[str, Any]] = {
    "classes": {"classes": CLASSES},
    "itself": {"self_condition": True},
    "condition": {"condition": CHANNELS},
    "all": ALL,
}
BY_CLASS, BY_ITSELF, BY_CONDITION = 0.1, 0.25, -0.2


def spec_of(kind: str, shape: tuple[int, int, int] = (3, 8, 8), **changes: Any) -> ModelSpec:
    return ModelSpec(shape, **{"timesteps": 20, "ddpmx": "0.1.0", **KINDS[kind], **changes})


def conditioning_of(spec: ModelSpec, n: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
    """Labels and conditions of n images, all different, as far as the model takes them."""
    found: dict[str, np.ndarray] = {}
    if spec.classes:
        found["y"] = np.array([(3 * i + 1) % spec.classes for i in range(n)], np.int32)
    if spec.condition:
        rng = np.random.default_rng(seed)
        found["cond"] = rng.uniform(-1, 1, (n, *spec.conditioning_shapes["cond"])).astype(np.float32)
    return found


def as_arguments(conditioning: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same as arguments of Pipeline.generate."""
    return {{"y": "labels"}.get(name, name): array for name, array in conditioning.items()}


def effect(inputs: Mapping[str, np.ndarray | None]) -> Any:
    """What is added to the output: 0.1·(y − 1) + 0.25·x0_prev − 0.2·(the last channel of cond)."""
    y, x0_prev, cond = (inputs.get(name) for name in ("y", "x0_prev", "cond"))
    added: Any = 0.0
    if y is not None:
        added = added + BY_CLASS * (y[:, None, None, None] - 1.0)
    if x0_prev is not None:
        added = added + BY_ITSELF * x0_prev
    if cond is not None:
        added = added + BY_CONDITION * cond[:, -1:]
    return added


def factors(spec: ModelSpec) -> np.ndarray:
    """float32 [T], what the ONNX file multiplies x by."""
    return np.linspace(0.3, 0.9, spec.timesteps).astype(np.float32)


def onnx(spec: ModelSpec, *, metadata: Mapping[str, str], inputs: Mapping[str, Any] | None = None) -> bytes:
    """out = factors[t]·x + effect, and var = x/2 if there is one. ``inputs`` replaces the graph's declared inputs."""
    axis = protobuf.field(1, "axis") + protobuf.field(3, 1) + protobuf.field(20, 2)
    nodes = [protobuf.node("Gather", ["factors", "t"], ["factor"]), protobuf.node("Mul", ["factor", "x"], ["sum0"])]
    constants = [protobuf.tensor("factors", FLOAT, (spec.timesteps, 1, 1, 1), factors(spec).tobytes())]
    terms = {
        "y": [protobuf.node("Gather", ["table", "y"], ["by_y"])],
        "x0_prev": [protobuf.node("Mul", ["x0_prev", "by_itself"], ["by_x0_prev"])],
        "cond": [
            protobuf.node("Gather", ["cond", "last"], ["channel"], axis),
            protobuf.node("Mul", ["channel", "by_condition"], ["by_cond"]),
        ],
    }
    table = (np.float32(BY_CLASS) * (np.arange(spec.label_count) - 1)).astype(np.float32)
    parts = {
        "y": [protobuf.tensor("table", FLOAT, (len(table), 1, 1, 1), table.tobytes())],
        "x0_prev": [protobuf.tensor("by_itself", FLOAT, (), np.float32(BY_ITSELF).tobytes())],
        "cond": [
            protobuf.tensor("last", INT64, (1,), np.int64([(spec.condition or CHANNELS) - 1]).tobytes()),
            protobuf.tensor("by_condition", FLOAT, (), np.float32(BY_CONDITION).tobytes()),
        ],
    }
    result = "sum0"
    for number, name in enumerate(spec.conditioning_shapes, 1):
        nodes += [*terms[name], protobuf.node("Add", [result, f"by_{name}"], [f"sum{number}"])]
        constants += parts[name]
        result = f"sum{number}"
    nodes.append(protobuf.node("Identity", [result], [spec.prediction]))
    if "var" in spec.outputs:
        nodes.append(protobuf.node("Mul", ["x", "half"], ["var"]))
        constants.append(protobuf.tensor("half", FLOAT, (), np.float32(0.5).tobytes()))
    types = {name: INT32 if name in ("t", "y") else FLOAT for name in spec.inputs}
    return protobuf.model(
        {name: (types[name], ("batch", *dims)) for name, dims in spec.inputs.items()} if inputs is None else inputs,
        dict.fromkeys(spec.outputs, (FLOAT, ("batch", *spec.shape))),
        metadata=metadata,
        graph=b"".join(protobuf.field(1, node) for node in nodes) + b"".join(protobuf.field(5, c) for c in constants),
    )


def chain_by_hand(
    spec: ModelSpec,
    conditioning: Mapping[str, np.ndarray],
    *,
    seed: int,
    n: int,
    clip: float = 1.0,
    beta: np.ndarray | None = None,
) -> list[np.ndarray]:
    """x̂_0 of each step of Algorithm 2 with σ² = β, in float64: [n, C, H, W] each."""

    def draw(t: int, purpose: Purpose) -> np.ndarray:
        return normal(seed, range(n), t, purpose, int(np.prod(spec.shape))).reshape(n, *spec.shape).astype(np.float64)

    beta = np.linspace(1e-4, 0.02, spec.timesteps) if beta is None else beta
    kept = np.cumprod(1 - beta)
    x, x0, found = draw(0, Purpose.INITIAL), np.zeros((n, *spec.shape)), []
    for t in reversed(range(spec.timesteps)):
        before = {"x0_prev": x0} if spec.self_condition else {}
        eps = factors(spec)[t].astype(np.float64) * x + effect({**conditioning, **before})
        x0 = ((x - np.sqrt(1 - kept[t]) * eps) / np.sqrt(kept[t])).clip(-clip, clip)
        found.append(x0)
        last = kept[t - 1] if t else 1.0
        x = (np.sqrt(last) * beta[t] * x0 + np.sqrt(1 - beta[t]) * (1 - last) * x) / (1 - kept[t])
        if t:
            x = x + np.sqrt(beta[t]) * draw(t, Purpose.STEP)
    return found
